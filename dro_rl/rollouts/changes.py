"""Questions that were sampled twice: how much better, or worse, their answers are explained than they were."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dro_rl.errors import InputError, Phrase
from dro_rl.rollouts import log
from dro_rl.rollouts.diagnostics import GroupFigures
from dro_rl.rollouts.places import Brief, Place, briefs_at
from dro_rl.rollouts.read import as_arrow, chosen_parts, column, columns_of, in_order, parts_of, ranges

BOUND = ("position", "sample", "valid", "answer_logp", "selection_logp", "proposal_logp")
"""What the evidence bound is made of."""


class Time(NamedTuple):
    """A time that a question was sampled: the iteration, the evidence bound in nats, and where it stands."""

    iteration: int
    bound: float
    place: Place


class Pair(NamedTuple):
    """Two times of a question."""

    before: Time
    after: Time

    @property
    def change(self) -> float:
        """How much better the answer is explained, nats; 0 where neither time anything was valid."""
        change = self.after.bound - self.before.bound
        return 0.0 if math.isnan(change) else change


@dataclass(frozen=True, slots=True)
class Change:
    """A question that was sampled twice, in two lines."""

    before: Brief
    after: Brief
    evidence: float


@dataclass(frozen=True, slots=True)
class MeanChange:
    """The evidence bound over questions, in nats: those of which something was valid at both times.

    Args:
        before, after, change: means, and after − before.
        low, high: 95 % interval of the change, Student's t over questions; None for fewer than two of them.
        p_value: two-sided, that nothing changes; None as well.
        questions: how many.
    """

    before: float
    after: float
    change: float
    low: float | None
    high: float | None
    p_value: float | None
    questions: int


@dataclass(frozen=True, slots=True)
class Changes:
    """What became of the questions that were sampled twice.

    Args:
        compared, improved, worse: how many there are, and for how many the evidence bound rose, and fell.
        mean: over all of them; None where nothing was valid twice.
        shown: those that were asked for.
    """

    compared: int
    improved: int
    worse: int
    mean: MeanChange | None
    shown: Sequence[Change]


def compare(
    run: str | Path,
    other: str | Path | None = None,
    *,
    first: Sequence[int] | None = None,
    last: Sequence[int] | None = None,
    improved_first: bool = False,
    limit: int | None = None,
) -> Changes:
    """Compare two times of each question.

    Args:
        run: the run.
        other: another one, whose last times are compared with the last times of `run`; None compares within `run`.
        first, last: the iterations to compare; None takes the first and the last time of each question.
        improved_first: show what improved most; else what became worst.
        limit: so many are shown, at most.
    """
    if other is not None:
        pairs = _pairs(_last_times(run, first), _last_times(other, last))
    else:
        pairs = _within(run, first, last)
    ordered = sorted(pairs.values(), key=lambda pair: -pair.change if improved_first else pair.change)[:limit]
    before, after = (briefs_at([pair[i].place for pair in ordered]) for i in (0, 1))
    return Changes(
        compared=len(pairs),
        improved=sum(pair.change > 0 for pair in pairs.values()),
        worse=sum(pair.change < 0 for pair in pairs.values()),
        mean=_mean_change(list(pairs.values())),
        shown=[Change(b, a, pair.change) for b, a, pair in zip(before, after, ordered, strict=True)],
    )


def _mean_change(pairs: Sequence[Pair]) -> MeanChange | None:
    bounds = np.array([(pair.before.bound, pair.after.bound) for pair in pairs]).reshape(-1, 2)
    known = bounds[np.isfinite(bounds).all(axis=1)]
    if not len(known):
        return None
    (before, after), changes = known.mean(axis=0).tolist(), known[:, 1] - known[:, 0]
    low = high = p_value = None
    if len(changes) > 1 and changes.std() > 0:
        from scipy.stats import ttest_1samp

        test = ttest_1samp(changes, 0.0)
        interval = test.confidence_interval(0.95)
        low, high, p_value = float(interval.low), float(interval.high), float(test.pvalue)
    return MeanChange(before, after, float(changes.mean()), low, high, p_value, len(known))


def since(run: str | Path, iteration: int | None) -> dict[str, Pair]:
    """The last time of each question against its last one up to an iteration, which it came after; by id.

    Args:
        iteration: None compares with the first time.

    Raises:
        InputError: nothing was sampled by then.
    """
    if iteration is None:
        return _within(run, None, None)
    logged = parts_of(run)
    early = [number for number in logged if number <= iteration]
    if not early:
        raise InputError(
            f"{run}: --since", iteration, f"this run has logged {ranges(list(logged))}", "Choose one of them."
        )
    late = [number for number in logged if number > iteration]
    if not late:
        raise InputError(
            f"{run}: --since", iteration, Phrase("something was sampled after it"), f"Use less than {max(logged)}."
        )
    return _pairs(_last_times(run, early), _last_times(run, late))


def _pairs(before: Mapping[str, Time], after: Mapping[str, Time]) -> dict[str, Pair]:
    return {name: Pair(before[name], after[name]) for name in before if name in after}


def _within(run: str | Path, first: Sequence[int] | None, last: Sequence[int] | None) -> dict[str, Pair]:
    """Two times of each question, the second later: in the iterations named, else its first and its last one."""
    named = sorted({*(first or ()), *(last or ())})
    chosen_parts(run, named)  # refuses one that was not logged
    before: dict[str, Time] = {}
    after: dict[str, Time] = {}
    for name, time in _times(run, named if first and last else None):
        if first is None or time.iteration in first:
            before.setdefault(name, time)
        if last is None or time.iteration in last:
            after[name] = time
    pairs = _pairs(before, after)
    return {name: pair for name, pair in pairs.items() if pair.before.iteration < pair.after.iteration}


def _last_times(run: str | Path, iterations: Sequence[int] | None) -> dict[str, Time]:
    return dict(_times(run, iterations))


def _times(run: str | Path, iterations: Sequence[int] | None) -> Iterator[tuple[str, Time]]:
    """Every question as it was sampled in some iterations, or in all, in the order of time."""
    chosen = parts_of(run) if iterations is None else chosen_parts(run, iterations)
    for number, paths in chosen.items():
        for path in paths:
            table = in_order(log.read([path], [*BOUND, "question_id"]))
            if not table.num_rows:
                continue
            rollouts = columns_of(table)
            names = table["question_id"].take(as_arrow(rollouts.start)).to_pylist()
            positions = column(table, "position")[rollouts.start].tolist()
            for name, position, bound in zip(
                names, positions, GroupFigures(rollouts).evidence_bound.tolist(), strict=True
            ):
                yield name, Time(number, bound, Place(path, position))
