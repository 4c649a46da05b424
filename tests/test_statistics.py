"""Intervals and tests against plain twins: a loop of our own, exhaustive exchange, binomial sums by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from dro_rl.evaluation.statistics import compare, estimate

VALUES = [0.0, 10.0, 100.0, 35.0, 50.0, 0.0, 80.0]


def test_the_interval_is_that_of_a_plain_bootstrap_loop() -> None:
    rng = np.random.default_rng(5)
    means = [np.mean([VALUES[i] for i in rng.integers(0, len(VALUES), len(VALUES))]) for _ in range(4000)]
    low, high = np.percentile(means, [2.5, 97.5])
    found = estimate(VALUES, seed=5, resamples=4000)
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.mean == pytest.approx(np.mean(VALUES))


def test_the_interval_of_a_large_sample_is_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(30, 10, 4000)
    found = estimate(values)
    assert found.low is not None
    assert found.high is not None
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert found.mean - found.low == pytest.approx(half, rel=0.05)
    assert found.high - found.mean == pytest.approx(half, rel=0.05)


def test_nineteen_intervals_in_twenty_hold_the_truth() -> None:
    """Coverage of the 95 % interval: 200 samples of 60 coins with p = 0.3."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        found = estimate(100.0 * (rng.random(60) < 0.3), resamples=1000)
        held += found.low <= 30 <= found.high
    assert 180 <= held <= 198


def test_questions_that_do_not_define_a_metric_are_left_out() -> None:
    assert estimate([math.nan, *VALUES, math.nan]) == estimate(VALUES)
    assert estimate(VALUES).n == 7
    assert estimate([math.nan]).mean is None
    assert estimate([]).n == 0
    one = estimate([4.0, math.nan])
    assert (one.mean, one.low, one.high, one.n) == (4.0, None, None, 1)


def test_an_interval_is_the_same_twice_and_of_no_width_where_nothing_varies() -> None:
    assert estimate(VALUES, seed=3) == estimate(VALUES, seed=3)
    assert (estimate([50.0] * 9).low, estimate([50.0] * 9).high) == (50.0, 50.0)


def test_the_permutation_test_is_the_count_over_all_exchanges() -> None:
    a, b = [10.0, 0.0, 33.0, 80.0, 5.0, 60.0], [40.0, 20.0, 30.0, 99.0, 5.0, 70.0]
    moved = [y - x for x, y in zip(a, b, strict=True)]
    observed = abs(sum(moved))
    sums = [sum(s * d for s, d in zip(signs, moved, strict=True)) for signs in itertools.product((1, -1), repeat=6)]
    found = compare(a, b)
    assert found is not None
    assert found.test == "permutation, paired"
    assert found.p_value == pytest.approx(sum(abs(s) >= observed - 1e-9 for s in sums) / len(sums))
    assert (found.wins, found.losses, found.ties, found.n) == (4, 1, 1, 6)
    assert found.difference == pytest.approx(sum(moved) / 6)


@pytest.mark.parametrize(
    ("a", "b", "p_value"),
    [
        ([0.0, 0.5, 1.0], [0.0, 0.5, 0.8], 1.0),
        ([20.0, 40.0, 60.0, 80.0], [25.0, 40.0, 60.0, 80.0], 1.0),
        ([-3.5], [-1.25], 1.0),
        ([0.0, 0.5, 1.0], [0.3, 0.5, 1.3], 0.5),
    ],
)
def test_a_question_or_two_that_moved_are_no_evidence(a: list[float], b: list[float], p_value: float) -> None:
    """Defect: with exactly one that moved, a traceback of scipy, which wants two."""
    found = compare(a, b)
    assert found is not None
    assert found.p_value == pytest.approx(p_value)
    assert found.wins + found.losses == sum(x != y for x, y in zip(a, b, strict=True))


def test_two_valued_metrics_are_tested_by_exact_mcnemar() -> None:
    """8 won, 1 lost: twice the tail of a fair coin, 2 · (9 + 1) / 2⁹, whatever the ties."""
    a, b = [0.0] * 8 + [100.0] + [0.0] * 4 + [100.0] * 3, [100.0] * 8 + [0.0] + [0.0] * 4 + [100.0] * 3
    found = compare(a, b)
    assert found is not None
    assert found.test == "McNemar, exact"
    assert found.p_value == pytest.approx(2 * (9 + 1) / 2**9)
    assert (found.wins, found.losses, found.ties) == (8, 1, 7)


def test_the_interval_of_a_difference_is_that_of_the_paired_differences() -> None:
    rng = np.random.default_rng(2)
    a = rng.normal(50, 30, 40)
    b = a + rng.normal(3, 1, 40)  # questions vary much, pairs little
    found, paired = compare(a, b), estimate(b - a)
    assert found is not None
    assert (found.low, found.high) == (paired.low, paired.high)
    assert found.p_value < 0.001


def test_equal_runs_do_not_differ() -> None:
    for values in (VALUES, [0.0, 100.0, 100.0]):
        found = compare(values, values)
        assert found is not None
        assert (found.difference, found.low, found.high, found.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_exchanging_the_sides_exchanges_the_signs() -> None:
    other = [5.0, 10.0, 90.0, 45.0, 70.0, 0.0, 81.0]
    there, back = compare(VALUES, other), compare(other, VALUES)
    assert there is not None
    assert back is not None
    assert there.difference == pytest.approx(-back.difference)
    assert there.p_value == pytest.approx(back.p_value)
    assert (there.wins, there.losses) == (back.losses, back.wins)


def test_pairs_are_made_where_both_sides_are_defined() -> None:
    found = compare([math.nan, 1.0, 2.0], [1.0, math.nan, 5.0])
    assert found is not None
    assert (found.n, found.difference, found.low) == (1, 3.0, None)
    assert compare([math.nan], [1.0]) is None


def test_an_infinity_is_a_mean_without_an_interval_and_no_difference() -> None:
    """A log-probability of zero, in half precision."""
    found = estimate([-math.inf, -1.0])
    assert (found.mean, found.low, found.high, found.n) == (-math.inf, None, None, 2)
    paired = compare([-math.inf, -3.0, -2.0], [-1.0, -1.0, -math.inf])
    assert paired is not None
    assert (paired.n, paired.difference) == (1, 2.0)
    assert compare([-math.inf], [-math.inf]) is None
