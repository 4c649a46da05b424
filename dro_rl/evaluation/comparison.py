"""`dro-rl compare`: two evaluations of the same questions, pair by pair."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dro_rl.errors import InputError, Phrase
from dro_rl.evaluation.results import METRICS, Conditions, QuestionResult, metric_values, read_results
from dro_rl.evaluation.statistics import CONFIDENCE, RESAMPLES, Difference, compare
from dro_rl.files import written_whole

DIFFERENT = {
    "candidates_hash": "the candidates differ: retrieval is part of the difference",
    "num_selected": "K differs",
    "window_size": "windows differ",
    "control": "what selects differs",
}
"""Conditions that two evaluations may differ in, and what that means."""


@dataclass(frozen=True)
class Side:
    """One of the two evaluations: where its rows are, and under which conditions they came about."""

    path: str
    conditions: Conditions


@dataclass(frozen=True)
class Change:
    """A question whose F1 changed."""

    id: str
    question: str
    answers: Sequence[str]
    prediction_a: str
    prediction_b: str
    f1_a: float
    f1_b: float
    selection_a: Sequence[int]
    selection_b: Sequence[int]


@dataclass(frozen=True)
class Comparison:
    """B against A.

    Args:
        a, b: the evaluations.
        n: questions that both have.
        notes: what else differs between the two.
        metrics: for each metric that some question defines in both.
        won, lost: the questions on which B's F1 rose and fell most, most first.
    """

    a: Side
    b: Side
    n: int
    notes: Sequence[str]
    metrics: Mapping[str, Difference]
    won: Sequence[Change]
    lost: Sequence[Change]
    confidence: float = field(default=CONFIDENCE, init=False)
    resamples: int = field(default=RESAMPLES, init=False)


def compare_runs(a: Path, b: Path, *, name: str | None = None, limit: int = 5) -> Comparison:
    """Compare two evaluations.

    Args:
        a, b: an evaluation's folder, a `.parquet` of a training stage, or a run's folder.
        name: which evaluation of a run's folder, where it has several.
        limit: questions in `won` and `lost` at most.

    Raises:
        InputError: the two are not of the same questions, or are not there.
    """
    paths = [find_results(path, name) for path in (a, b)]
    (rows_a, conditions_a), (rows_b, conditions_b) = map(read_results, paths)
    sides = [Side(str(path), conditions) for path, conditions in zip(paths, (conditions_a, conditions_b), strict=True)]
    _check_same_questions(*sides)
    by_id = {row.id: row for row in rows_b}
    pairs = [(row, by_id[row.id]) for row in rows_a if row.id in by_id]
    if not pairs:
        raise InputError(
            str(b), Phrase("no question in common"), "two evaluations share questions", "Evaluate both on the same."
        )
    first, second = [row for row, _ in pairs], [row for _, row in pairs]
    notes = [text for key, text in DIFFERENT.items() if getattr(conditions_a, key) != getattr(conditions_b, key)]
    if len(pairs) < max(len(rows_a), len(rows_b)):
        notes.append(f"{len(pairs)} questions are in both, of {len(rows_a)} and {len(rows_b)}")
    wanted = list(METRICS)
    if _likelihood(conditions_a) != _likelihood(conditions_b):
        wanted.remove("answer_logp")
        notes.append("answer_logp is left out: the likelihood is defined differently")
    found = {metric: compare(metric_values(first, metric), metric_values(second, metric)) for metric in wanted}
    return Comparison(
        a=sides[0],
        b=sides[1],
        n=len(pairs),
        notes=notes,
        metrics={metric: difference for metric, difference in found.items() if difference is not None},
        won=_changes(pairs, 1, limit),
        lost=_changes(pairs, -1, limit),
    )


def find_results(path: Path, name: str | None = None) -> Path:
    """The per-question file that a path means: itself, an evaluation's, or that of a run's only evaluation."""
    if path.is_file():
        return path
    if (path / "questions.parquet").is_file():
        return path / "questions.parquet"
    folder = path / "evaluation"
    finished = {found.parent.name: found for found in sorted(folder.glob("*/questions.parquet"))}
    if name is not None and name in finished:
        return finished[name]
    if name is None and len(finished) == 1:
        return next(iter(finished.values()))
    if not finished:
        raise InputError(
            str(path),
            Phrase("no finished evaluation"),
            "this is a run that was evaluated, an evaluation's folder, or a .parquet of a training stage",
            "Run dro-rl evaluate first.",
        )
    raise InputError(
        str(path),
        name if name is not None else Phrase(f"{len(finished)} evaluations"),
        f"one of its evaluations is named: {', '.join(finished)}",
        "Use --name, or give the evaluation's folder itself.",
    )


def _check_same_questions(a: Side, b: Side) -> None:
    if a.conditions.questions_hash == b.conditions.questions_hash:
        return
    one, other = (
        f"{side.conditions.split}, {side.conditions.num_questions} questions, {side.conditions.questions_hash[:12]}"
        for side in (a, b)
    )
    raise InputError(
        b.path,
        Phrase(f"questions hash of {other}"),
        f"both evaluations are of the same questions, and {a.path} is of {one}",
        "Evaluate both runs on one file.",
    )


def _likelihood(conditions: Conditions) -> tuple[str, str]:
    return conditions.answer_likelihood, conditions.answer_aliases


def _changes(pairs: Sequence[tuple[QuestionResult, QuestionResult]], sign: int, limit: int) -> list[Change]:
    def gain(pair: tuple[QuestionResult, QuestionResult]) -> tuple[float, float]:
        a, b = pair[0].scores, pair[1].scores
        return sign * (b["f1"] - a["f1"]), sign * (b["answer_logp"] - a["answer_logp"])

    moved = sorted((pair for pair in pairs if gain(pair)[0] > 0), key=gain, reverse=True)
    return [
        Change(
            id=a.id,
            question=a.question,
            answers=a.answers,
            prediction_a=a.prediction,
            prediction_b=b.prediction,
            f1_a=100 * a.scores["f1"],
            f1_b=100 * b.scores["f1"],
            selection_a=a.selection,
            selection_b=b.selection,
        )
        for a, b in moved[:limit]
    ]


def write_comparison(path: Path, comparison: Comparison) -> None:
    """Write a comparison as JSON, whole."""
    with written_whole(path) as beside:
        beside.write_text(json.dumps(asdict(comparison), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
