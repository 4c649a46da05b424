"""Prompts with their completions, as the models score them."""

from __future__ import annotations

from collections.abc import Sequence

from dro_rl.likelihood.packing import Row
from dro_rl.prompts import Prompter
from dro_rl.records import Question
from dro_rl.selection import SelectionSpec
from dro_rl.selection.constraint import SelectionConstraint, allowed_for


def constraint_of(prompter: Prompter, question: Question, spec: SelectionSpec) -> SelectionConstraint | None:
    """What a question's selections are held to; None where they are free."""
    return prompter.constraint(len(question.documents), spec.most, spec.least) if spec.constrained else None


def selector_row(
    prompter: Prompter, question: Question, samples: Sequence[tuple[int, ...]], spec: SelectionSpec
) -> Row:
    """The selector's prompt with samples as its completions, under the constraint where there is one."""
    allowed = allowed_for(constraint_of(prompter, question, spec), samples)
    return Row(prompter.selector_prompt(question, spec.most, spec.least).ids, samples, allowed)


def answer_row(prompter: Prompter, question: Question, numbers: Sequence[int], aliases: str) -> Row:
    """The generator's prompt over the selected documents, with the accepted answers that count as its completions.

    Answers that become the same tokens are one: each is a way to be right, and is counted once.
    """
    answers = question.answers[:1] if aliases == "first" else question.answers
    completions = dict.fromkeys(prompter.completion(answer) for answer in answers)
    return Row(prompter.generator_prompt(question, numbers).ids, list(completions))
