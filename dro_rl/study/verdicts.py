"""What values over seeds say: means, contrasts, and whether a claim holds. Numbers in, numbers out; tests by scipy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dro_rl.evaluation.statistics import CONFIDENCE

POWER = 0.8
"""Chance that so many seeds as are asked for would decide, if the difference is what it looks like."""
MOST_SEEDS = 1000

Verdict = Literal["supported", "refuted", "undecided"]


@dataclass(frozen=True, slots=True)
class OverSeeds:
    """A mean over seeds with Student's interval at `CONFIDENCE`.

    Args:
        mean: None without a seed.
        low, high: None with fewer than two.
        seeds: how many.
    """

    mean: float | None
    low: float | None
    high: float | None
    seeds: int


@dataclass(frozen=True, slots=True)
class Contrast:
    """How far a value lies on the claimed side, over seeds.

    Args:
        estimate: positive where the claim would hold: a difference less the margin, or the logarithm of a ratio.
        difference: what is shown: the difference itself, or the ratio.
        low, high: its interval at `CONFIDENCE`; None with fewer than two seeds.
        p_value: two-sided, that `estimate` is zero; None with fewer than two seeds.
        seeds: how many there are of both.
        a_seed: variance that one seed brings; more seeds lessen it.
        the_rest: variance of the mean that more seeds do not lessen: of the questions, which all seeds share.
        of_variances: it compares variances.
    """

    estimate: float
    difference: float
    low: float | None
    high: float | None
    p_value: float | None
    seeds: int
    a_seed: float = math.nan
    the_rest: float = 0.0
    of_variances: bool = False


def over_seeds(values: Sequence[float]) -> OverSeeds:
    """The mean of one value a seed."""
    n = len(values)
    if n == 0:
        return OverSeeds(None, None, None, 0)
    mean = math.fsum(values) / n
    if n == 1:
        return OverSeeds(mean, None, None, 1)
    half = _quantile(n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return OverSeeds(mean, mean - half, mean + half, n)


def paired(differences: np.ndarray, margin: float = 0.0, sign: int = 1) -> Contrast:
    """The mean of paired differences with seeds, and questions, as clusters.

    Every seed answers the same questions, so a difference has a part of its seed's, one of its question's, and one of
    its own. The variance of the grand mean is that of two crossed random effects: of the means of seeds, plus of the
    means of questions, less what both count, and never less than either. t has one degree of freedom less than there
    are seeds, whatever the number of questions: no number of questions stands for another training.

    Args:
        differences: (seeds, questions); one column for a value that is of no question.
        margin: what is claimed is that the mean is above it.
        sign: −1 where it is claimed to be below −margin.
    """
    seeds, questions = differences.shape
    mean = float(differences.mean())
    estimate = sign * mean - margin
    if seeds < 2:
        return Contrast(estimate, mean, None, None, None, seeds)
    of_seeds, of_questions = differences.mean(axis=1), differences.mean(axis=0)
    by_seed = float(of_seeds.var(ddof=1)) / seeds
    variance = by_seed
    if questions > 1:
        by_question = float(of_questions.var(ddof=1)) / questions
        own = differences - of_seeds[:, None] - of_questions[None, :] + mean
        both = float((own**2).sum()) / ((seeds - 1) * (questions - 1)) / (seeds * questions)
        variance = max(by_seed, by_question, by_seed + by_question - both)
    error = math.sqrt(variance)
    half = _quantile(seeds - 1) * error
    return Contrast(
        estimate,
        mean,
        mean - half,
        mean + half,
        _two_sided(estimate, error, seeds - 1),
        seeds,
        a_seed=by_seed * seeds,
        the_rest=variance - by_seed,
    )


def ratio_of_variances(a: Sequence[float], b: Sequence[float]) -> Contrast:
    """Whether A varies less over seeds than B: the F test of two variances of normal values."""
    from scipy.stats import f

    seeds = min(len(a), len(b))
    if seeds < 2:
        return Contrast(math.nan, math.nan, None, None, None, seeds, of_variances=True)
    first, second = float(np.var(a, ddof=1)), float(np.var(b, ddof=1))
    if first == 0 or second == 0:
        ratio = 1.0 if first == second else 0.0 if first == 0 else math.inf
        return Contrast(0.0, ratio, None, None, 1.0, seeds, of_variances=True)
    ratio, law = first / second, f(len(a) - 1, len(b) - 1)
    tail = (1 - CONFIDENCE) / 2
    p_value = min(1.0, 2 * min(float(law.cdf(ratio)), float(law.sf(ratio))))
    low, high = ratio / float(law.ppf(1 - tail)), ratio / float(law.ppf(tail))
    return Contrast(-math.log(ratio), ratio, low, high, p_value, seeds, of_variances=True)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values adjusted by Holm's step-down method; None stays, and counts as a test that was made.

    The chance that any true hypothesis among them is rejected is then at most the level (Holm, 1979).
    """
    order = sorted((i for i, p in enumerate(p_values) if p is not None), key=lambda i: p_values[i] or 0.0)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * (p_values[i] or 0.0)))
        adjusted[i] = highest
    return adjusted


def verdict(contrast: Contrast, adjusted: float | None, level: float) -> Verdict:
    """What a contrast says of its claim. One seed says nothing."""
    if contrast.seeds < 2 or adjusted is None or adjusted > level:
        return "undecided"
    return "supported" if contrast.estimate > 0 else "refuted"


def seeds_needed(contrast: Contrast, level: float) -> int | None:
    """About how many seeds more would decide, with a chance of `POWER`, if all is as it looks.

    Args:
        level: of the one test: the claim's, over what Holm's method multiplies its p-value by.

    Returns:
        At least one; None where no number of seeds below `MOST_SEEDS` would.

    Raises:
        ValueError: there are fewer than two seeds, which show no variance.
    """
    if contrast.seeds < 2:
        raise ValueError("the variance over seeds needs two of them")
    for seeds in range(contrast.seeds + 1, MOST_SEEDS):
        if _power(contrast, seeds, level) >= POWER:
            return seeds - contrast.seeds
    return None


def _power(contrast: Contrast, seeds: int, level: float) -> float:
    from scipy.stats import f, nct, t

    if contrast.of_variances:
        law, ratio = f(seeds - 1, seeds - 1), math.exp(-abs(contrast.estimate))
        return float(law.cdf(law.ppf(level / 2) / ratio))
    error = math.sqrt(contrast.a_seed / seeds + contrast.the_rest)
    if error == 0:
        return float(contrast.estimate != 0)
    far = abs(contrast.estimate) / error
    return float(nct.sf(t.ppf(1 - level / 2, seeds - 1), seeds - 1, far))


def _two_sided(estimate: float, error: float, freedom: int) -> float:
    from scipy.stats import t

    if error == 0:
        return 0.0 if estimate else 1.0
    return float(2 * t.sf(abs(estimate) / error, freedom))


def _quantile(freedom: int) -> float:
    from scipy.stats import t

    return float(t.ppf(1 - (1 - CONFIDENCE) / 2, freedom))
