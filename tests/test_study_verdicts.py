"""What is made of values over seeds: intervals against scipy and simulation, Holm by hand, verdicts, seeds needed."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from dro_rl.study.verdicts import (
    Contrast,
    holm,
    over_seeds,
    paired,
    ratio_of_variances,
    seeds_needed,
    verdict,
)

A, B = [51.0, 55.5, 60.0, 54.0], [48.0, 50.0, 57.0, 53.5]


def column(*values: float) -> np.ndarray:
    return np.array(values).reshape(-1, 1)


def crossed(rng: np.random.Generator, seeds: int, questions: int, effect: float) -> np.ndarray:
    """Differences with a part of the seed's, of the question's, and of their own."""
    return (
        effect
        + rng.normal(0, 2, (seeds, 1))
        + rng.normal(0, 20, (1, questions))
        + rng.normal(0, 30, (seeds, questions))
    )


def test_a_mean_over_seeds_has_students_interval() -> None:
    found = over_seeds(A)
    low, high = stats.t.interval(0.95, 3, np.mean(A), stats.sem(A))
    assert (found.mean, found.low, found.high, found.seeds) == (pytest.approx(np.mean(A)), *map(pytest.approx, (low, high)), 4)  # fmt: skip # noqa: E501
    assert over_seeds([3.0]).low is None
    assert over_seeds([]).mean is None


def test_values_that_are_of_no_question_are_compared_by_the_paired_t_test() -> None:
    found = paired(column(*(a - b for a, b in zip(A, B, strict=True))))
    expected = stats.ttest_rel(A, B)
    interval = expected.confidence_interval()
    assert found.p_value == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))


def test_questions_that_are_all_alike_add_nothing_to_what_seeds_say() -> None:
    of_seeds = column(3.0, 1.0, 4.0)
    assert paired(np.repeat(of_seeds, 50, axis=1)).p_value == pytest.approx(paired(of_seeds).p_value)


def test_seeds_that_agree_do_not_hide_that_questions_differ() -> None:
    """Equal trainings on 20 questions are no more sure of the next questions than one training is."""
    questions = np.random.default_rng(0).normal(5, 40, 20)
    found = paired(np.tile(questions, (3, 1)))
    assert found.high is not None
    half = stats.t.ppf(0.975, 2) * questions.std(ddof=1) / np.sqrt(20)
    assert found.high - found.difference == pytest.approx(half)
    assert found.the_rest > 0


@pytest.mark.parametrize("seeds", [2, 3, 6])
def test_the_interval_holds_the_truth_as_often_as_it_says(seeds: int) -> None:
    """Seeds and questions both drawn anew: at least 95 in 100, less what 400 draws may miss."""
    rng, held = np.random.default_rng(seeds), 0
    for _ in range(400):
        found = paired(crossed(rng, seeds, 40, effect=4.0))
        held += found.low <= 4.0 <= found.high
    assert held / 400 > 0.92


def test_a_margin_moves_what_is_tested_and_below_turns_it_round() -> None:
    differences = column(10.0, 11.0, 12.0)
    assert verdict(paired(differences, 5.0), 0.01, 0.05) == "supported"
    assert paired(differences, 11.0).p_value == pytest.approx(1.0)
    assert paired(differences, 20.0).estimate < 0
    below = paired(-differences, 5.0, sign=-1)
    assert below.estimate == pytest.approx(6.0)
    assert below.difference == pytest.approx(-11.0)


@pytest.mark.parametrize(
    ("p_values", "adjusted"),
    [
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
        ([0.2], [0.2]),
        ([0.5, 0.9], [1.0, 1.0]),
        ([0.01, None, 0.04], [0.03, None, 0.08]),
        ([], []),
    ],
)
def test_holms_correction(p_values: list[float | None], adjusted: list[float | None]) -> None:
    assert holm(p_values) == [None if p is None else pytest.approx(p) for p in adjusted]


@pytest.mark.parametrize(
    ("estimate", "seeds", "adjusted", "found"),
    [
        (3.0, 3, 0.01, "supported"),
        (-3.0, 3, 0.01, "refuted"),
        (3.0, 3, 0.2, "undecided"),
        (3.0, 1, None, "undecided"),
        (3.0, 0, None, "undecided"),
    ],
)
def test_verdicts(estimate: float, seeds: int, adjusted: float | None, found: str) -> None:
    assert verdict(Contrast(estimate, estimate, None, None, adjusted, seeds), adjusted, 0.05) == found


def test_one_run_decides_nothing_whatever_it_says() -> None:
    found = paired(np.full((1, 500), 90.0))
    assert found.p_value is None
    assert verdict(found, None, 0.5) == "undecided"
    with pytest.raises(ValueError, match="two"):
        seeds_needed(found, 0.05)


@pytest.mark.parametrize("effect", [1.0, 2.5])
def test_so_many_seeds_decide_four_times_in_five(effect: float) -> None:
    """By simulation: with the seeds asked for the t test finds the effect with a power of about 80 %."""
    found = Contrast(effect, effect, None, None, 0.3, 3, a_seed=4.0)
    more = seeds_needed(found, 0.05)
    assert more is not None
    draws = np.random.default_rng(1).normal(effect, 2.0, (4000, 3 + more))
    power = (stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05).mean()
    assert 0.78 < power < 0.92


def test_a_stricter_level_needs_more_seeds_and_questions_may_be_what_is_missing() -> None:
    found = Contrast(2.0, 2.0, None, None, 0.3, 3, a_seed=4.0)
    assert seeds_needed(found, 0.005) > seeds_needed(found, 0.05)
    assert seeds_needed(Contrast(2.0, 2.0, None, None, 0.3, 3, a_seed=4.0, the_rest=3.0), 0.05) is None
    assert seeds_needed(Contrast(0.0, 0.0, None, None, 1.0, 3, a_seed=4.0), 0.05) is None


def test_variances_are_compared_by_the_f_test() -> None:
    a, b = [50.0, 50.4, 49.8, 50.1, 50.2], [40.0, 60.0, 52.0, 47.0, 55.0]
    found = ratio_of_variances(a, b)
    ratio = np.var(a, ddof=1) / np.var(b, ddof=1)
    assert found.difference == pytest.approx(ratio)
    assert found.p_value == pytest.approx(2 * stats.f(4, 4).cdf(ratio))
    assert found.estimate > 0
    assert ratio_of_variances(b, a).estimate < 0
    assert ratio_of_variances(a, a).p_value == pytest.approx(1.0)
    assert ratio_of_variances([1.0], b).p_value is None
    assert ratio_of_variances([5.0, 5.0], [5.0, 5.0]).p_value == 1.0


def test_more_seeds_tell_two_variances_apart() -> None:
    ratio = 0.5
    found = Contrast(-np.log(ratio), ratio, None, None, 0.4, 3, of_variances=True)
    more = seeds_needed(found, 0.05)
    assert more is not None
    n, rng = 3 + more, np.random.default_rng(0)
    a, b = rng.normal(0, ratio**0.5, (3000, n)), rng.normal(0, 1, (3000, n))
    power = (a.var(axis=1, ddof=1) / b.var(axis=1, ddof=1) < stats.f(n - 1, n - 1).ppf(0.025)).mean()
    assert 0.76 < power < 0.85
