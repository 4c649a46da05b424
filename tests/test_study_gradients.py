"""Moments of the selector's gradient: against plain sums, and the gradients against a plain loop of autograd."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_world import world

from dro_rl.em.e_step import EStep
from dro_rl.em.method import Method
from dro_rl.engines.decoding import Decoder
from dro_rl.job.assembly import load_models
from dro_rl.job.preflight import prepare
from dro_rl.likelihood import completion_logps
from dro_rl.recipe import load_recipe
from dro_rl.roles import ROLES
from dro_rl.study.gradients import described, measure, moments, selector_gradients


class Sampler:
    """The trainer's own decoding, without a trainer."""

    def __init__(self, model: Any, prompter: Any) -> None:
        self.decoder = Decoder(model, prompter.ends.stops)

    @contextmanager
    def at(self, step: int) -> Any:
        yield self

    def generate(self, request: Any) -> Any:
        return self.decoder.generate(request)

    def samples_policy(self, sampling: Any) -> bool:
        return sampling.on_policy


@pytest.fixture
def parts(tmp_path: Path) -> Any:
    """`parts(**keys)`: the little world's job, its models, and an E-step over them."""

    def make(**keys: Any) -> tuple[Any, Any, EStep]:
        recipe = load_recipe(world(tmp_path / "world", use_cpu=True, **keys))
        job = prepare(recipe, 1)
        model = load_models(recipe, {role: recipe.run.of(role).model for role in ROLES}).eval()

        @contextmanager
        def opened(role: str) -> Any:
            with torch.no_grad():
                yield getattr(model, role)

        engine: Any = Sampler(model.selector, job.prompters["selector"])
        return job, model, EStep(engine, opened, None, job.prompters, Method.of(recipe.training))

    return make


def test_moments_are_those_of_plain_sums() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(5, 3, 7)) + rng.normal(size=(5, 1, 7))
    found = moments([torch.tensor(estimates) for estimates in question] for question in values)
    means = values.mean(axis=1)
    within = values.var(axis=1, ddof=1).sum(axis=-1).mean()
    assert (found.questions, found.repeats) == (5, 3)
    assert found.within == pytest.approx(within)
    assert found.between == pytest.approx(means.var(axis=0, ddof=1).sum() - within / 3)
    pairs = [means[i] @ means[j] for i in range(5) for j in range(5) if i != j]
    assert found.squared_norm == pytest.approx(np.mean(pairs))


def test_moments_are_without_bias() -> None:
    """Over many measurements of known laws: variance 7 within, 7·4 between, a mean of length 3."""
    rng, centre = np.random.default_rng(1), np.array([3.0, 0, 0, 0, 0, 0, 0])
    found = [
        moments(torch.tensor(centre + rng.normal(0, 2, 7) + rng.normal(size=(2, 7))) for _ in range(6))
        for _ in range(2000)
    ]
    assert np.mean([each.within for each in found]) == pytest.approx(7, rel=0.03)
    assert np.mean([each.between for each in found]) == pytest.approx(28, rel=0.03)
    assert np.mean([each.squared_norm for each in found]) == pytest.approx(9, rel=0.05)


def test_the_price_of_an_average_is_in_rollouts_or_in_tokens() -> None:
    found = described(moments(torch.tensor(rows) for rows in ([[1.0], [3.0]], [[2.0], [6.0]])), 8, 500.0)
    variance = found["gradient_variance"]
    assert found["gradient_variance@rollouts"] == pytest.approx(variance * 8 / 1000)
    assert found["gradient_variance@tokens"] == pytest.approx(variance * 500 / 1e6)
    signal = found["gradient_norm"] ** 2
    assert found["gradient_noise@rollouts"] == pytest.approx(variance * 8 / 1000 / signal)


def test_a_signal_that_noise_hides_is_nothing_and_not_a_root_of_less_than_nothing() -> None:
    found = described(moments(torch.tensor(rows) for rows in ([[1.0], [1.2]], [[-1.0], [-1.2]])), 2, 10.0)
    assert found["gradient_norm"] is None
    assert found["gradient_noise@tokens"] is None


@pytest.mark.parametrize("baseline", ["none", "mean"])
@pytest.mark.parametrize("keys", [{}, {"constrain_selection": True, "max_completion_length": 8}], ids=["free", "held"])
def test_a_gradient_is_that_of_a_plain_loop(parts: Any, baseline: str, keys: dict[str, Any]) -> None:
    """Σ (w_i − 1/m) ∇ log p(z_i|x), or without the 1/m, rollout by rollout through the plain path."""
    job, model, e_step = parts(selector_baseline=baseline, **keys)
    question = job.train[0]
    kept: list[Any] = []
    weigh = e_step.weigh
    e_step.weigh = lambda *arguments: kept.append(weigh(*arguments)) or kept[-1]  # type: ignore[method-assign]
    ((first, second),) = selector_gradients(model, e_step, [question], seed=5, repeats=2)
    assert not torch.equal(first, second)
    prompt = job.prompters["selector"].selector_prompt(question, 2).ids
    constraint = job.prompters["selector"].constraint(len(question.documents), 2)
    for found, rollouts in zip((first, second), kept, strict=True):
        total = torch.zeros(())
        for rollout in rollouts:
            if keys:
                total = total + _coefficient(rollout, baseline) * _held(model.selector, prompt, rollout, constraint)
            else:
                (logp,) = completion_logps(model.selector, prompt, [rollout.token_ids], shared_prefix=False)
                total = total + _coefficient(rollout, baseline) * logp.sum()
        plain = torch.autograd.grad(total, list(model.selector.parameters()), allow_unused=True)
        flat = torch.cat(
            [
                (torch.zeros_like(p) if g is None else g).flatten()
                for p, g in zip(model.selector.parameters(), plain, strict=True)
            ]
        )
        assert (found - flat).norm() < 1e-4 * max(1.0, float(flat.norm()))
        assert flat.norm() > 0


def _coefficient(rollout: Any, baseline: str) -> float:
    return rollout.weight - (0.25 if baseline == "mean" else 0.0)


def _held(model: Any, prompt: Any, rollout: Any, constraint: Any) -> torch.Tensor:
    """log p of a completion among what the constraint admits, token by token."""
    ids = torch.tensor([[*prompt, *rollout.token_ids]])
    logits, total = model(input_ids=ids).logits[0], torch.zeros(())
    for place, token in enumerate(rollout.token_ids):
        allowed = list(constraint.allowed(rollout.token_ids[:place]))
        total = total + logits[len(prompt) + place - 1, allowed].log_softmax(-1)[allowed.index(token)]
    return total


def test_a_measurement_is_written_and_is_the_same_twice(tmp_path: Path) -> None:
    path = world(tmp_path / "world", use_cpu=True)
    found = [
        measure(load_recipe(path, {"output_dir": str(tmp_path / name), "questions_per_iteration": 4}), 2)
        for name in ("one", "two")
    ]
    assert found[0] == found[1]
    assert json.loads((tmp_path / "one" / "gradients.json").read_text()) == found[0]
    assert (found[0]["questions"], found[0]["repeats"], found[0]["num_generations"]) == (4, 2, 4)
    assert found[0]["tokens"] > 0
    assert found[0]["gradient_variance"] > found[0]["gradient_variance_within"] / 2 > 0


def test_with_one_rollout_there_is_no_signal_and_a_baseline_leaves_nothing(tmp_path: Path) -> None:
    path = world(tmp_path / "world", use_cpu=True)
    keys = {
        "num_generations": 1,
        "allow_single_generation": True,
        "constrain_selection": True,
        "max_completion_length": 8,
        "gradient_accumulation_steps": 1,
        "questions_per_iteration": 4,
    }
    found = {
        baseline: measure(
            load_recipe(path, {**keys, "selector_baseline": baseline, "output_dir": str(tmp_path / baseline)}), 2
        )
        for baseline in ("none", "mean")
    }
    assert found["none"]["gradient_variance"] > 0
    assert found["mean"]["gradient_variance"] < 1e-6 * found["none"]["gradient_variance"]
    assert not math.isnan(found["none"]["gradient_variance@tokens"])
