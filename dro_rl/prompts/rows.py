"""Prompts with their completions, as the models score them."""

from __future__ import annotations

from collections.abc import Sequence

from dro_rl.config import DROConfig
from dro_rl.likelihood.packing import Row
from dro_rl.prompts import Prompter
from dro_rl.records import Question
from dro_rl.selection.constraint import allowed_for


def selector_row(prompter: Prompter, question: Question, samples: Sequence[tuple[int, ...]], config: DROConfig) -> Row:
    """The selector's prompt with samples as its completions, under the constraint where there is one."""
    k = config.num_selected
    constraint = prompter.constraint(len(question.documents), k) if config.constrain_selection else None
    return Row(prompter.selector_prompt(question, k).ids, samples, allowed_for(constraint, samples))


def answer_row(prompter: Prompter, question: Question, numbers: Sequence[int], aliases: str) -> Row:
    """The generator's prompt over the selected documents, with the accepted answers that count as its completions."""
    answers = question.answers[:1] if aliases == "first" else dict.fromkeys(question.answers)
    return Row(prompter.generator_prompt(question, numbers).ids, [prompter.completion(answer) for answer in answers])
