"""Prompts with their completions, as the models score them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dro_rl.likelihood.packing import Row
from dro_rl.prompts import Prompter
from dro_rl.records import Question, Sample, Written
from dro_rl.selection import SelectionSpec
from dro_rl.selection.constraint import SelectionConstraint, allowed_for


def constraint_of(prompter: Prompter, question: Question, spec: SelectionSpec) -> SelectionConstraint | None:
    """What a question's selections are held to; None where they are free."""
    return prompter.constraint(len(question.documents), spec.most, spec.least) if spec.constrained else None


def selector_rows(
    prompter: Prompter, question: Question, samples: Iterable[Sample], spec: SelectionSpec
) -> tuple[list[Row], list[Written]]:
    """The selector's prompts with distinct samples as their completions, under the constraint where there is one.

    A sample that was drawn window by window has a completion in a row for each of them.

    Returns:
        A row for each list that the samples' selector was shown, and what its completions are, row after row.
    """
    by_order: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
    for sample in samples:
        for window in sample.all_windows:
            by_order.setdefault(window.order, {})[window.token_ids] = None
    rows = []
    for order, completions in by_order.items():
        shown, written = question.shown(order), list(completions)
        prompt = prompter.selector_prompt(shown, spec.most, spec.least).ids
        rows.append(Row(prompt, written, allowed_for(constraint_of(prompter, shown, spec), written)))
    return rows, [(order, ids) for order, completions in by_order.items() for ids in completions]


def answer_row(prompter: Prompter, question: Question, numbers: Sequence[int], aliases: str) -> Row:
    """The generator's prompt over the selected documents, with the accepted answers that count as its completions.

    Answers that become the same tokens are one: each is a way to be right, and is counted once.
    """
    answers = question.answers[:1] if aliases == "first" else question.answers
    completions = dict.fromkeys(prompter.completion(answer) for answer in answers)
    return Row(prompter.generator_prompt(question, numbers).ids, list(completions))
