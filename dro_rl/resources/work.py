"""What goes through the models: the tokens of a question, found on some of the training questions themselves.

Selections are drawn at random, all of them well-formed: what a policy that knows the format writes before it has
learned anything. One that has sharpened repeats itself, and its questions cost less.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dro_rl.config import DROConfig
from dro_rl.job.quotes import quoted_examples
from dro_rl.likelihood import passes, unshared
from dro_rl.likelihood.packing import Row
from dro_rl.prompts import Prompter
from dro_rl.prompts.rows import answer_row, constraint_of
from dro_rl.recipe import Recipe
from dro_rl.records import Question
from dro_rl.roles import ROLES, Role
from dro_rl.selection import format_selection
from dro_rl.selection.constraint import allowed_for
from dro_rl.selection.windows import Slide

SAMPLED = 48
"""Questions that are looked at, evenly over the training set."""

QUOTED = 8
"""The same, of conversations."""

Rows = Mapping[Role, Sequence[Row]]
"""What both models read of a question in a step: the selector's row of each order of the candidates, and of each window
after the first that a rollout is shown, the generator's of each distinct selection."""


def rows_of(training: DROConfig, questions: Sequence[Question], prompters: Mapping[Role, Prompter]) -> list[Rows]:
    """The rows of some of the questions."""
    count = min(SAMPLED, len(questions))
    return [_rows(training, questions[i * len(questions) // count], prompters) for i in range(count)]


def _rows(training: DROConfig, question: Question, prompters: Mapping[Role, Prompter]) -> Rows:
    spec, draw = training.spec, random.Random(f"{training.seed}/plan/{question.id}")
    prompter = prompters["selector"]
    written: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}  # by the order, and what is shown of it
    lengths = [draw.randint(spec.least, spec.most) for _ in range(training.num_generations)]
    distinct: dict[tuple[int, ...], None] = {}
    for number, length in enumerate(lengths):
        slide, order = Slide.begin(training.windows, len(question.documents)), number % training.candidate_orders
        while True:
            numbers = slide.shown or tuple(range(1, len(question.documents) + 1))
            picked = tuple(draw.sample(numbers, length))
            places = [numbers.index(each) + 1 for each in picked]
            written.setdefault((order, *slide.shown), {})[prompter.completion(format_selection(places))] = None
            if slide.last:
                break
            slide = slide.after(picked)
        distinct[picked] = None
    asked = []
    for shown_as, completions in written.items():
        shown, own = question.shown(shown_as[1:]), list(completions)
        prompt = prompter.selector_prompt(shown, spec.most, spec.least).ids
        asked.append(Row(prompt, own, allowed_for(constraint_of(prompter, shown, spec), own)))
    read = [answer_row(prompters["generator"], question, each, training.answer_aliases) for each in distinct]
    return {"selector": asked, "generator": read}


@dataclass(frozen=True, slots=True)
class Work:
    """The tokens of a question, means over those that were looked at, and of a pass of the M-step.

    Args:
        prompt, selection: of the selector's prompt, and of a selection.
        reading, answer: of a generator's prompt, and of the answer after it.
        distinct: selections of a question that differ.
        longest_prompt, longest_reading, longest_answer: the most that was seen.
        tokens: that go through each role in an M-step, of one question.
        pass_tokens: of each role in the fullest pass.
        passes: of a device in one step.
        predicting: tokens of completions in the fullest pass, of each role.
        windows: that a question's candidates are shown in.
        conversation, longest_conversation: of the quotes of a selector's warm-up, 0 where it imitates selections.
    """

    prompt: float
    selection: float
    reading: float
    answer: float
    distinct: float
    longest_prompt: int
    longest_reading: int
    longest_answer: int
    tokens: Mapping[Role, float]
    pass_tokens: Mapping[Role, int]
    passes: int
    predicting: Mapping[Role, int]
    windows: float = 1.0
    conversation: float = 0.0
    longest_conversation: int = 0


def windows_of(training: DROConfig, questions: Sequence[Question]) -> float:
    """In how many windows a question's candidates are shown, the mean."""
    windows = training.windows
    return 1.0 if windows is None else statistics.fmean(windows.count(len(each.documents)) for each in questions)


def quoted_of(recipe: Recipe, questions: Sequence[Question], prompter: Prompter) -> list[int]:
    """Tokens of some conversations of the selector's warm-up, where it has them."""
    if not recipe.run.of("selector").warms or recipe.run.warmup_selector_order != "quotes":
        return []
    some = questions[:: max(1, len(questions) // QUOTED)][:QUOTED]
    talks = quoted_examples(some, prompter, recipe.training, None)
    return [sum(len(prompt) + len(completion) for prompt, completion in turns) for turns in talks]


def work_of(
    training: DROConfig,
    questions: Sequence[Rows],
    packed: Mapping[Role, bool],
    windows: float = 1.0,
    quoted: Sequence[int] = (),
) -> Work:
    """What a step comes to.

    Args:
        questions: their rows.
        packed: whether a role takes each prompt once for all its completions.
        windows: that a question's candidates are shown in.
        quoted: tokens of conversations of the selector's warm-up.
    """
    moves = [role for role in training.roles if training.role_learning_rate(role) > 0]
    taken = [
        {role: sum(len(row) if packed.get(role, True) else unshared(row) for row in rows[role]) for role in ROLES}
        for rows in questions
    ]
    sizes = [sum(each[role] for role in moves) for each in taken]
    together = max(1, round(training.questions_per_batch))
    batch = [i % len(sizes) for i in range(together)]
    runs = [[batch[i] for i in run] for run in passes([sizes[i] for i in batch], training.scoring.tokens)]
    fullest = max([*runs, [sizes.index(max(sizes))]], key=lambda run: sum(sizes[i] for i in run))
    scale = 1.0
    if len(runs) > 1:  # among the passes of a whole set some are all but full
        scale = max(1.0, (training.scoring.tokens - statistics.fmean(sizes) / 2) / sum(sizes[i] for i in fullest))
    asked = [row for rows in questions for row in rows["selector"]]
    read = [row for rows in questions for row in rows["generator"]]
    written = {"selector": asked, "generator": read}
    ends = {
        role: sum(len(c) for row in rows for c in row.completions) / len(questions) for role, rows in written.items()
    }
    return Work(
        prompt=statistics.fmean(len(row.prompt) for row in asked),
        selection=statistics.fmean(len(completion) for row in asked for completion in row.completions),
        reading=statistics.fmean(len(row.prompt) for row in read),
        answer=statistics.fmean(len(completion) for row in read for completion in row.completions),
        distinct=len(read) / len(questions),
        longest_prompt=max(len(row.prompt) for row in asked),
        longest_reading=max(len(row.prompt) for row in read),
        longest_answer=max(len(completion) for row in read for completion in row.completions),
        tokens={role: statistics.fmean(each[role] for each in taken) for role in ROLES},
        pass_tokens={role: int(scale * sum(taken[i][role] for i in fullest)) for role in ROLES},
        passes=len(runs) * training.gradient_accumulation_steps,
        predicting={role: int(scale * len(fullest) * ends[role]) for role in ROLES},
        windows=windows,
        conversation=statistics.fmean(quoted) if quoted else 0.0,
        longest_conversation=max(quoted, default=0),
    )
