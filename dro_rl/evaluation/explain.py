"""Why a pair answers as it does: the answer's likelihood under the documents selected, and under others in their place.

Each selected document is left out, moved, read alone, and exchanged for a supporting one that was not selected. All is
scored together, by the code that scores rollouts. Differences within `TIE` are none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from dro_rl.likelihood import answer_logp
from dro_rl.pipeline import RAGPipeline, read
from dro_rl.prompts.rows import answer_row
from dro_rl.records import Question, Selection
from dro_rl.rollouts.diagnostics import TIE
from dro_rl.selection import format_selection

Kind = Literal["as selected", "without", "moved", "alone", "exchanged", "no document"]


@dataclass(frozen=True, slots=True)
class Trial:
    """A list of documents that the generator is given.

    Args:
        kind: how it comes from the selection.
        number: the document that it is about, 1-based; None for the selection itself, and for no document.
        numbers: what is read, in order.
        sum, mean: log p(answer) over its tokens, nats.
        change: of the likelihood that is weighed, sum or mean, against the selection's, nats.
        tie: whether the change is none.
    """

    kind: Kind
    number: int | None
    numbers: tuple[int, ...]
    sum: float
    mean: float
    change: float
    tie: bool


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why the answer is as likely as it is.

    Args:
        question_id, question: what was asked.
        answers: whose likelihood it is.
        selected: whether the selector named a document; else the generator reads the first ones.
        likelihood: which of sum and mean is weighed.
        titles: of the documents that any trial reads, by number, and whether each is supporting.
        trials: the selection first.
        why: in words, which document moved the answer.
    """

    question_id: str
    question: str
    answers: tuple[str, ...]
    selected: bool
    likelihood: str
    titles: dict[int, tuple[str, bool]]
    trials: tuple[Trial, ...]
    why: str


def explain(
    pipeline: RAGPipeline,
    question: Question,
    selection: Selection | None = None,
    *,
    likelihood: str = "sum",
    aliases: str = "first",
) -> Explanation:
    """Try other documents in the place of those selected.

    Args:
        pipeline: the pair.
        question: with its candidates, and the answers whose likelihood is looked at.
        selection: what is explained; the selector's own unless given.
        likelihood, aliases: as `answer_likelihood` and `answer_aliases` in training.
    """
    selection = selection or pipeline.select_all([question])[0]
    numbers = read(selection, question, pipeline.settings.spec.most)
    named = list(_trials(numbers, question.supporting_numbers))
    lists = list(dict.fromkeys(each for _, _, each in named))  # [1] alone may be what is left without [2]
    rows = [answer_row(pipeline.prompters["generator"], question, each, aliases) for each in lists]
    scored = dict(zip(lists, pipeline.answerer.score(rows), strict=True))
    figures = {
        each: tuple(answer_logp(logps, how, aliases).item() for how in ("sum", "mean"))
        for each, logps in scored.items()
    }
    weighed = 0 if likelihood == "sum" else 1
    start = figures[numbers][weighed]
    trials = []
    for kind, number, each in named:
        total, mean = figures[each]
        change = figures[each][weighed] - start
        trials.append(Trial(kind, number, each, total, mean, change, abs(change) <= TIE))
    shown = sorted({number for each in lists for number in each})
    return Explanation(
        question_id=question.id,
        question=question.question,
        answers=question.answers[:1] if aliases == "first" else question.answers,
        selected=selection.valid,
        likelihood=likelihood,
        titles={n: (_title(question, n), n in question.supporting_numbers) for n in shown},
        trials=tuple(trials),
        why=_in_words(trials, question),
    )


def _trials(numbers: tuple[int, ...], gold: Sequence[int]) -> Iterator[tuple[Kind, int | None, tuple[int, ...]]]:
    yield "as selected", None, numbers
    for number in numbers:
        rest = tuple(n for n in numbers if n != number)
        if rest:
            yield "without", number, rest
            yield "moved", number, (*rest, number) if number == numbers[0] else (number, *rest)
            yield "alone", number, (number,)
        if number not in gold:
            for other in (n for n in gold if n not in numbers):
                yield "exchanged", number, tuple(other if n == number else n for n in numbers)
    yield "no document", None, ()


def _in_words(trials: Sequence[Trial], question: Question) -> str:
    """Which document, left out, moves the answer most; or that several tie, or none does."""
    whole = trials[0]
    if len(whole.numbers) == 1:
        change = -next(trial.change for trial in trials if trial.kind == "no document")
        said = f"[{whole.numbers[0]}] {_moves(change)} against no document."
    else:
        left_out = sorted((trial for trial in trials if trial.kind == "without"), key=lambda trial: -abs(trial.change))
        first = left_out[0]
        alike = [t for t in left_out if abs(abs(t.change) - abs(first.change)) <= TIE and t.change * first.change > 0]
        if first.tie:
            said = "A tie: no document, left out, moves the answer."
        elif len(alike) > 1:
            named = ", ".join(f"[{trial.number}]" for trial in alike)
            said = f"A tie of {named}: each {_moves(-first.change)}, within {TIE:g}, as the others stay."
        else:
            said = f"[{first.number}] {_title(question, first.number or 0)} {_moves(-first.change)} as the others stay."
    exchanged = sorted((trial for trial in trials if trial.kind == "exchanged"), key=lambda trial: -trial.change)
    if exchanged:
        best = exchanged[0]
        became = f"{_moves(best.change)}" if not best.tie else "is a tie"
        said += f" The best exchange for a supporting document, {format_selection(best.numbers)}, {became}."
    return said


def _moves(change: float) -> str:
    if abs(change) <= TIE:
        return "moves the answer by no more than a tie"
    return f"makes the answer {'more' if change > 0 else 'less'} likely by {abs(change):.2f} nats"


def _title(question: Question, number: int) -> str:
    document = question.documents[number - 1]
    return document.title or document.text[:60]
