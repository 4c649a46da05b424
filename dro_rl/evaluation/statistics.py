"""How sure a mean is, and whether two runs differ: bootstrap and paired tests by scipy. Numbers in, numbers out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 10_000
CELLS = 4_000_000
"""Numbers held at once while resampling: 32 MB."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over questions with its bootstrap interval.

    Args:
        mean: None where no question defines the metric.
        low, high: bounds of the interval; None for fewer than two questions, or an infinite one.
        n: questions that define the metric.
    """

    mean: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True, slots=True)
class Difference:
    """B against A on the same questions.

    Args:
        a, b, difference: means, and b − a.
        low, high: bootstrap interval of the difference; None for fewer than two questions.
        p_value: two-sided, that the two are alike.
        test: the test that gave it.
        wins, losses, ties: questions on which B is higher, lower, equal.
        n: questions that define the metric in both.
    """

    a: float
    b: float
    difference: float
    low: float | None
    high: float | None
    p_value: float
    test: str
    wins: int
    losses: int
    ties: int
    n: int


def estimate(values: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """The mean of a metric over questions, with the percentile bootstrap interval at `CONFIDENCE`.

    Questions are what is drawn, with replacement. NaN marks a question that does not define the metric: it is left out.
    A mean that is infinite has no interval.
    """
    known = _known(values)
    if not len(known):
        return Estimate(None, None, None, 0)
    low, high = _interval(known, seed, resamples)
    return Estimate(math.fsum(known) / len(known), low, high, len(known))


def compare(a: Sequence[float], b: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES) -> Difference | None:
    """Compare a metric of the same questions under A and B, pair by pair.

    A metric with two values is tested by McNemar's exact test (a binomial test of the questions on which the two
    differ), any other by a permutation test that exchanges A and B within questions: all exchanges where there are at
    most `resamples` of them, else that many drawn ones.

    Returns:
        None where no question defines the metric in both: an infinity does not, since two have no difference.
    """
    pairs = np.array([(x, y) for x, y in zip(a, b, strict=True) if math.isfinite(x) and math.isfinite(y)], dtype=float)
    if not len(pairs):
        return None
    first, second = pairs.T
    differences = second - first
    wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
    low, high = _interval(differences, seed, resamples)
    binary = len(np.unique(pairs)) <= 2
    return Difference(
        a=math.fsum(first) / len(pairs),
        b=math.fsum(second) / len(pairs),
        difference=math.fsum(differences) / len(pairs),
        low=low,
        high=high,
        p_value=_mcnemar(wins, losses) if binary else _permutation(differences, seed, resamples),
        test="McNemar, exact" if binary else "permutation, paired",
        wins=wins,
        losses=losses,
        ties=len(pairs) - wins - losses,
        n=len(pairs),
    )


def _known(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    return array[~np.isnan(array)]


def _interval(values: np.ndarray, seed: int, resamples: int) -> tuple[float | None, float | None]:
    from scipy.stats import bootstrap

    if len(values) < 2 or not np.isfinite(values).all():
        return None, None
    interval = bootstrap(
        (values,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, CELLS // len(values)),
        vectorized=True,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def _mcnemar(wins: int, losses: int) -> float:
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def _permutation(differences: np.ndarray, seed: int, resamples: int) -> float:
    from scipy.stats import permutation_test

    moved = differences[differences != 0]  # exchanging equal values changes nothing
    if len(moved) < 2:
        return 1.0  # and both exchanges of a single one are as far apart
    result = permutation_test(
        (moved,),
        np.sum,
        permutation_type="samples",
        n_resamples=resamples,
        batch=max(1, CELLS // len(moved)),
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)
