"""The rollouts that a report shows: whole questions, some of each of some iterations, with their documents' texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from dro_rl.errors import InputError
from dro_rl.report.gather import Told
from dro_rl.rollouts.explain import Group
from dro_rl.rollouts.find import find, find_groups
from dro_rl.runs import Run, questions_of
from dro_rl.shown import plain, visible

QUESTIONS = 1200
"""That a report shows, of all runs together, unless told."""
ITERATIONS = 12
"""Of a run that are shown, at most."""
T = TypeVar("T")
TEXT = 600
"""Characters of a document that are shown."""

RULE = (
    "Of each run at most {iterations} iterations, the first and the last among them and the others at equal distances; "
    "of each of these a quarter of the questions are those with the least evidence, a quarter those with the most, and "
    "the rest are at equal distances between."
)


@dataclass(frozen=True)
class Shown:
    """Questions of all runs.

    Args:
        groups: each with its run's number and its documents.
        total: questions that were logged.
        rule: how they were chosen; empty where all are shown.
        without_texts: by run, why documents have no texts.
    """

    groups: Sequence[Mapping[str, Any]]
    total: int
    rule: str
    without_texts: Mapping[str, str]


def some_of(told: Sequence[Told], limit: int) -> Shown:
    """Choose questions of the runs by `RULE`, and read them with all their rollouts.

    Args:
        told: the runs.
        limit: questions of all runs together, at most.
    """
    groups: list[dict[str, Any]] = []
    without: dict[str, str] = {}
    for number, each in enumerate(told):
        chosen = _spread(each.iterations, ITERATIONS)
        found: list[Group] = []
        for iteration in chosen:
            there = find(each.run.path, iteration=iteration, sort="evidence")
            places = _pick(there.places, max(1, limit // len(told) // len(chosen)))
            found += find_groups(replace(there, places=places))
        texts, why = _texts(each.run, {group.question_id for group in found})
        if why:
            without[each.name] = why
        groups += [_document(group, number, texts) for group in found]
    total = sum(each.questions for each in told)
    return Shown(groups, total, "" if len(groups) == total else RULE.format(iterations=ITERATIONS), without)


def _spread(values: Sequence[T], count: int) -> list[T]:
    """So many values at equal distances, the first and the last among them."""
    if len(values) <= count:
        return list(values)
    return [values[i] for i in np.unique(np.linspace(0, len(values) - 1, count).round().astype(int))]


def _pick(places: Sequence[T], count: int) -> list[T]:
    """Of places in order of evidence a quarter from each end, and the rest at equal distances between."""
    if len(places) <= count:
        return list(places)
    ends = count // 4
    middle = places[ends : len(places) - ends]
    return [*places[:ends], *_spread(middle, count - 2 * ends), *places[len(places) - ends :]]


def _texts(run: Run, wanted: set[str]) -> tuple[dict[str, dict[str, str]], str]:
    """By question and document id the texts of the candidates, of the file that the run names; or why not."""
    if not wanted:
        return {}, ""
    try:
        questions = questions_of(run)
    except InputError as error:
        return {}, str(error)
    known = {
        question.id: {document.id: document.text for document in question.documents}
        for question in questions
        if question.id in wanted
    }
    return known, "" if known else "the file has none of these questions"


def _document(group: Group, run: int, texts: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """A question as the page has it: short names, every text through the one door, documents once."""
    known = texts.get(group.question_id, {})
    documents: dict[int, dict[str, Any]] = {}
    for rollout in group.rollouts:
        for document in rollout.documents:
            if document.number not in documents:
                text = plain(known.get(document.id, "")[: 4 * TEXT])
                documents[document.number] = {
                    "title": visible(document.title),
                    "text": text if len(text) <= TEXT else text[:TEXT] + "…",
                    "gold": document.supporting,
                }
    return {
        "run": run,
        "iteration": group.iteration,
        "id": visible(group.question_id),
        "question": plain(group.question),
        "answers": [plain(answer) for answer in group.answers[:8]],
        "bound": _short(group.evidence_bound),
        "ess": _short(group.ess),
        "kinds": group.kinds,
        "why": plain(group.why),
        "documents": documents,
        "rollouts": [
            {
                "w": _short(rollout.weight),
                "l": _short(rollout.answer_logp),
                "p": _short(rollout.selection_logp),
                "z": [document.number for document in rollout.documents],
                "x": list(rollout.problems),
                "t": plain(rollout.text[:400]) if rollout.problems else "",
                **({"a": plain(rollout.answer[:400])} if rollout.answer is not None else {}),
            }
            for rollout in group.rollouts
        ],
    }


def _short(value: float) -> float | None:
    return round(float(value), 4) if np.isfinite(value) else None
