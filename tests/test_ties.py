"""Claims about places that tie: drawn again or given to another question, with what that does to the gradient, by
enumeration; counted, bounded, and gone on with bit for bit."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_world import largest_difference, launch, questions, weights, world

from dro_rl import engines
from dro_rl.config import DROConfig
from dro_rl.em import iteration as iteration_of_em
from dro_rl.em.schedule import Schedule
from dro_rl.em.ties import tied
from dro_rl.em.weighing import weigh
from dro_rl.errors import InputError
from dro_rl.objective import Weighting, selector_coefficients
from dro_rl.recipe import load_recipe
from dro_rl.records import Rollout, Sample, Selection
from dro_rl.rewards import Reward
from dro_rl.rollouts.read import read_iteration, summarize_iteration

TYING: dict[str, Any] = {
    "num_generations": 2, "num_selected": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
    "questions_per_iteration": 4, "num_iterations": 3,
}  # fmt: skip
"""Two rollouts of one document each: many questions tie."""


# Which places tie ---------------------------------------------------------------------------------------------


def rollouts(rewards: Sequence[float]) -> list[Rollout]:
    """A group of distinct selections with these log-likelihoods; NaN for one that names nothing."""
    samples = [
        Sample(0, i, (i,), (0.0,), "", Selection(() if math.isnan(reward) else (i + 1,), not math.isnan(reward)),
               answer_logp_sum=reward)
        for i, reward in enumerate(rewards)
    ]  # fmt: skip
    policy = torch.zeros(1, len(rewards), dtype=torch.float64)
    return weigh(samples, policy, Weighting(), Reward(), likelihood="sum", on_policy=True)


@pytest.mark.parametrize(
    ("rewards", "ties"),
    [
        ([-1.0, -1.0, -1.0], True),
        ([-1.0, -1.04, -1.0], True),
        ([-1.0, -1.2, -1.0], False),
        ([-math.inf, -math.inf, -math.inf], True),
        ([-1.0, -math.inf, -1.0], False),
        ([-1.0, math.nan, -1.0], True),
        ([math.nan, math.nan, math.nan], False),
    ],
)
def test_a_place_ties_where_all_that_is_valid_is_worth_the_same(rewards: list[float], ties: bool) -> None:
    """As the log counts them; where nothing is valid there is validity to learn."""
    assert tied([rollouts([-3.0, -1.0, -2.0]), rollouts(rewards)], questions(1)) == ([1] if ties else [])


def test_of_no_places_none_ties() -> None:
    assert tied([], questions(1)) == []


# What it does to the gradient, by enumeration -------------------------------------------------------------------

LOGITS = torch.tensor([[0.3, 0.8, -1.1], [1.5, 0.2, -1.0]], dtype=torch.float64)
"""The selector's scores of three documents, for each of two questions, which are drawn as often."""
LIKELIHOODS = ([0.0, 0.0, -2.0], [-0.5, -1.5, -2.5])
"""Of the answer after each document. The first question ties much more often than the second."""
ROUNDS = 3


def ties(question: int, z: Sequence[int]) -> bool:
    group = [replace(each, sample=i) for i, each in enumerate(rollouts([LIKELIHOODS[question][d] for d in z]))]
    return bool(tied([group], questions(1)))


def step(question: int, z: Sequence[int], baseline: str) -> Tensor:
    """What one group adds to the gradient by its question's logits."""
    logits = LOGITS[question].clone().requires_grad_()
    likelihoods = torch.tensor(LIKELIHOODS[question], dtype=torch.float64)[list(z)]
    coefficients = selector_coefficients(likelihoods.softmax(0), baseline=baseline)
    return torch.autograd.grad((coefficients * logits.log_softmax(0)[list(z)]).sum(), logits)[0]


def groups(m: int = 2) -> list[tuple[int, ...]]:
    return list(itertools.product(range(3), repeat=m))


def probability(question: int, z: Sequence[int]) -> float:
    return float(LOGITS[question].log_softmax(0)[list(z)].sum().exp())


def tie_chance(question: int) -> float:
    return sum(probability(question, z) for z in groups() if ties(question, z))


def expected(
    first: Sequence[float], baseline: str, then: Callable[[int], Sequence[float]] | None, rounds: int
) -> Tensor:
    """(2, 3) E of the kept draw's gradient, by following every draw: a place has a question with a chance, its group
    ties or not, and where it does there is another draw, while there are rounds, of a question that `then` gives
    chances."""
    total = torch.zeros(2, 3, dtype=torch.float64)
    for question, chance in enumerate(first):
        for z in groups():
            reached = chance * probability(question, z)
            if reached and then is not None and rounds and ties(question, z):
                total += reached * expected(then(question), baseline, then, rounds - 1)
            elif reached:
                total[question] += reached * step(question, z, baseline)
    return total


def same(question: int) -> list[float]:
    return [float(question == 0), float(question == 1)]


def any_of_all(question: int) -> list[float]:
    return [0.5, 0.5]


def scale(chance: float, rounds: int = ROUNDS) -> float:
    """1 + p + p² + …: how many draws a place takes, in expectation."""
    return (1 - chance ** (rounds + 1)) / (1 - chance)


def test_drawing_again_weighs_questions_by_how_often_they_tie() -> None:
    """Under the variate a tie gives nothing: a question's gradient keeps its direction and grows by its own factor."""
    plain = expected([0.5, 0.5], "mean", None, 0)
    again = expected([0.5, 0.5], "mean", same, ROUNDS)
    chances = [tie_chance(question) for question in (0, 1)]
    assert chances[0] > chances[1] + 0.1
    for question, chance in enumerate(chances):
        torch.testing.assert_close(again[question], scale(chance) * plain[question], atol=1e-12, rtol=0)
    cosine = torch.cosine_similarity(again.flatten(), plain.flatten(), dim=0)
    assert cosine < 0.999, "the mean over questions has another direction"


def test_taking_other_questions_keeps_the_direction_and_lengthens_the_step() -> None:
    """Under the variate, others drawn like the first: what DAPO's dynamic sampling does."""
    plain = expected([0.5, 0.5], "mean", None, 0)
    replaced = expected([0.5, 0.5], "mean", any_of_all, ROUNDS)
    chance = (tie_chance(0) + tie_chance(1)) / 2
    torch.testing.assert_close(replaced, scale(chance) * plain, atol=1e-12, rtol=0)


def test_without_the_variate_a_tie_moves_the_selector_and_is_missed() -> None:
    """So much that what is left may point the other way."""
    plain = expected([0.0, 1.0], "none", None, 0)
    again = expected([0.0, 1.0], "none", same, ROUNDS)
    assert torch.cosine_similarity(again[1], plain[1], dim=0) < 0.5


# The schedule ---------------------------------------------------------------------------------------------------


def test_who_may_take_a_place_is_a_function_of_seed_and_iteration() -> None:
    schedule = Schedule(10, 4, 2, 1, 3, 2, seed=7)
    for iteration in range(3):
        others = schedule.others(iteration)
        assert sorted([*others, *schedule.questions(iteration)]) == list(range(10))
        assert others == Schedule(10, 4, 2, 1, 9, 8, seed=7).others(iteration)
    assert Schedule(10, 4, 2, 1, 3, 2, seed=8).others(0) != schedule.others(0)


# The job --------------------------------------------------------------------------------------------------------


def figures(run: Path, iteration: int = 1) -> Any:
    return summarize_iteration(read_iteration(run, iteration)).rollouts


def steps(run: Path) -> list[dict[str, float]]:
    return [e for e in json.loads((run / "trainer_state.json").read_text())["log_history"] if "loss" in e]


def places(run: Path, iteration: int = 1) -> list[dict[str, Any]]:
    """The first row of each place."""
    return [row for row in read_iteration(run, iteration).to_pylist() if row["sample"] == 0]


PARTS = pytest.mark.parametrize(("how", "part"), [("redraw", 128), ("replace", 128), ("replace", 2)])
"""In one part, or in parts of two questions, each of which begins where the one before left off."""


@PARTS
def test_fewer_places_tie_and_the_log_counts_what_was_drawn_again(
    job, monkeypatch: pytest.MonkeyPatch, how: str, part: int
) -> None:
    monkeypatch.setattr(iteration_of_em, "QUESTIONS_PER_PART", part)
    plain, other = job("plain", **TYING), job("other", **TYING, resample_ties=how, resample_rounds=2)
    before, after = figures(plain), figures(other)
    assert before.all_tie > 0
    assert after.all_tie < before.all_tie
    assert after.resampled == before.all_tie, "of the first draws, which are the same"
    assert {before.resampled, *(step["rollouts/resampled"] for step in steps(plain))} == {0}
    for one, two in zip(places(plain), places(other), strict=True):
        assert (one["text"] == two["text"]) or two["draw"] > 1
        assert (one["question_index"] == two["question_index"]) == (how == "redraw" or two["draw"] == 1)
    assert {row["draw"] for row in places(other)} <= {1, 2, 3}
    asked = [row["question_index"] for row in places(other)]
    assert len(set(asked)) == len(asked)


def test_rounds_bound_the_draws_and_the_last_is_kept(job) -> None:
    """No answer here is ever right, so that every place ties for good."""
    run = job(**{**TYING, "num_iterations": 1}, reward="em", constrain_selection=True, resample_ties="redraw",
              resample_rounds=2)  # fmt: skip
    assert [row["draw"] for row in places(run)] == [3] * 4
    assert (figures(run).all_tie, figures(run).resampled) == (1, 1)


@PARTS
def test_a_run_that_stopped_goes_on_bit_for_bit(job, monkeypatch: pytest.MonkeyPatch, how: str, part: int) -> None:
    monkeypatch.setattr(iteration_of_em, "QUESTIONS_PER_PART", part)
    settings: dict[str, Any] = {
        **TYING, "questions_per_iteration": 8, "num_iterations": 2, "resample_ties": how, "save_steps": 1,
        "load_best_model_at_end": False,
    }  # fmt: skip
    whole = job("whole", **settings)
    job("half", **settings, max_steps=3)
    half = job("half", **settings, resume_from_checkpoint="auto")
    assert largest_difference(weights(whole), weights(half)) == 0
    for iteration in (1, 2):
        assert str(read_iteration(whole, iteration).to_pylist()) == str(read_iteration(half, iteration).to_pylist())


@pytest.mark.slow
def test_two_processes_draw_again_as_one_does(tmp_path: Path) -> None:
    recipe = world(tmp_path / "world", **{**TYING, "resample_ties": "replace"})
    one = launch(recipe, tmp_path / "one")
    assert one.returncode == 0, one.stderr[-3000:]
    two = launch(recipe, tmp_path / "two", "--gradient_accumulation_steps", "1", processes=2)
    assert two.returncode == 0, two.stderr[-3000:]
    assert max(row["draw"] for row in places(tmp_path / "one")) > 1
    kept = ["question_index", "text", "draw"]
    for iteration in (1, 2, 3):
        tables = [read_iteration(tmp_path / name, iteration).select(kept) for name in ("one", "two")]
        assert tables[0].equals(tables[1])
    assert largest_difference(weights(tmp_path / "one"), weights(tmp_path / "two")) < 2e-6


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"resample_ties": "again"}, "resample_ties: 'again': this is one of none, redraw, replace"),
        ({"resample_ties": "redraw", "resample_rounds": 0}, "resample_rounds: 0: this is at least 1"),
        ({"resample_ties": "redraw", "weighting": "uniform"}, "resample_ties: 'redraw': one rollout ties"),
        (
            {"resample_ties": "replace", "num_generations": 1, "allow_single_generation": True},
            "resample_ties: 'replace': one rollout ties",
        ),
        (
            {"resample_ties": "redraw", "overlap_rollouts": True, "rollout_engine": "vllm", "vllm_mode": "server"},
            "resample_ties: 'redraw': rollouts sampled ahead",
        ),
    ],
)
def test_what_means_nothing_together_is_refused(tmp_path: Path, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        load_recipe(world(tmp_path), keys)


def test_others_are_needed_to_take_a_place() -> None:
    def config(**keys: Any) -> DROConfig:
        return DROConfig(output_dir="unused", report_to="none", num_generations=8, resample_ties="replace", **keys)

    with pytest.raises(InputError, match=r"resample_ties: 'replace': others take the places .* all 12 training"):
        config().check_batch(1, 12)
    config(questions_per_iteration=4).check_batch(1, 12)


def test_what_lists_every_selection_is_not_drawn_again() -> None:
    config = DROConfig(
        output_dir="unused", report_to="none", rollout_engine="enumeration", constrain_selection=True,
        max_log_ratio=100.0, temperature=1000.0, resample_ties="redraw",
    )  # fmt: skip
    with pytest.raises(InputError, match="resample_ties: 'redraw': what lists every selection"):
        engines.check(config)
