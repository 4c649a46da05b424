"""A question's rollouts over several orders of its candidates: a place in the list earns nothing, and all else stays.

Where a preference for a place is all that a policy has, everything is enumerated.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_training import trainer_of
from training_world import largest_difference, questions, weights, world
from transformers import AutoModelForCausalLM

from dro_rl.errors import InputError
from dro_rl.job.assembly import build_prompters
from dro_rl.likelihood import completion_logps
from dro_rl.objective import importance_weights
from dro_rl.proposal import candidate_orders
from dro_rl.recipe import load_recipe
from dro_rl.records import Rollout, Selection
from dro_rl.rollouts import log as rollout_log
from dro_rl.rollouts.diagnostics import columns, summarize
from dro_rl.rollouts.read import columns_of
from dro_rl.rollouts.signals import Iteration, of_iteration
from dro_rl.selection import parse_selection

Job = Callable[..., Path]

N = 3
ANSWERS = torch.tensor([0.0, -2.0, -5.0], dtype=torch.float64)
"""What each of the N documents is worth, nats."""
PREFERENCE = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
"""A policy that names places, whatever stands there."""


# The draw ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("documents", "count"), [(4, 2), (20, 4), (2, 4), (1, 2)])
def test_orders_are_permutations(documents: int, count: int) -> None:
    orders = candidate_orders(3, documents, count)
    assert len(orders) == count
    assert all(sorted(order) == list(range(1, documents + 1)) for order in orders)


def test_orders_are_drawn_alike_and_apart() -> None:
    """Every pair of permutations is as frequent as any other."""
    counts = Counter(tuple(candidate_orders(seed, 3, 2)) for seed in range(36 * 300))
    assert len(counts) == 36
    assert max(counts.values()) < 1.3 * 300
    assert min(counts.values()) > 0.7 * 300


def test_one_order_is_the_questions_own_and_a_seed_decides_the_others() -> None:
    assert candidate_orders(7, 5, 1) == [()]
    assert candidate_orders(7, 5, 2) == candidate_orders(7, 5, 2)
    assert candidate_orders(7, 5, 2) != candidate_orders(8, 5, 2)
    question = questions(1)[0]
    assert question.shown(()) is question
    assert [d.id for d in question.shown((3, 1, 2, 5, 4)).documents] == ["d2", "d0", "d1", "d4", "d3"]


# What a place earns -----------------------------------------------------------------------------------------


def earned(orders: int) -> torch.Tensor:
    """(N,) the expected pull on the score of each place, of three rollouts in one order or three, over all draws."""
    permutations = torch.tensor(list(itertools.permutations(range(N))))
    drawn = torch.cartesian_prod(*[torch.arange(len(permutations))] * orders).view(-1, orders).expand(-1, 3)
    places = torch.cartesian_prod(*[torch.arange(N)] * 3)
    shown = permutations[drawn][:, None].expand(-1, len(places), 3, N)
    named = shown.gather(3, places[None, ..., None].expand(len(drawn), -1, 3, 1))
    coefficients = importance_weights(ANSWERS[named[..., 0]]) - 1 / 3
    pulls = (coefficients * PREFERENCE[places].prod(-1, keepdim=True)).mean(0)
    return torch.zeros(N, dtype=torch.float64).index_add(0, places.flatten(), pulls.flatten())


def test_of_rollouts_in_orders_of_their_own_a_place_earns_nothing() -> None:
    """Whatever the documents are worth and the policy prefers. In one order, who agrees with others shares."""
    assert earned(3).abs().max() < 1e-12
    assert earned(1)[0] < -0.005
    assert earned(1)[-1] > 0.005


# Training ---------------------------------------------------------------------------------------------------


ORDERS = {"candidate_orders": 2}


def drawn(run: Path) -> list[Rollout]:
    return rollout_log.to_rollouts(rollout_log.read(rollout_log.part_paths(run)))


def test_rollouts_are_read_and_scored_under_their_own_order(job: Job) -> None:
    """log p of each is that of its own prompt, and what it says is in the question's own numbers."""
    run = job(**ORDERS, questions_per_iteration=4, num_iterations=1)
    rollouts, made = drawn(run), questions(12)
    selector = AutoModelForCausalLM.from_pretrained(run.parent / "world" / "base-selector")
    prompter = build_prompters(load_recipe(run.parent / "run.yaml"))["selector"]
    assert {rollout.order for rollout in rollouts[:2]} != {rollout.order for rollout in rollouts[2:4]}
    for i, rollout in enumerate(rollouts):
        assert rollout.order == rollouts[i // 2 * 2].order, "two rollouts of each order"
        shown = made[rollout.question].shown(rollout.order)
        prompt = prompter.selector_prompt(shown, 2).ids
        logp = completion_logps(selector, prompt, [rollout.token_ids], shared_prefix=False)[0].sum().item()
        assert rollout.selection_logp == pytest.approx(logp, abs=1e-4)
        read = parse_selection(rollout.text, 5, 2)
        named = [made[rollout.question].documents[number - 1].id for number in rollout.selection.numbers]
        assert named == [shown.documents[place - 1].id for place in read.numbers]
        assert rollout.selection.problems == read.problems


def test_weights_over_all_selections_of_all_orders_are_the_posterior(job: Job) -> None:
    """p(order, z | x, y) where orders are drawn alike: the orders' own probability cancels."""
    run = job(
        **ORDERS, rollout_engine="enumeration", constrain_selection=True, temperature=1000.0, max_log_ratio=100.0,
        num_selected=1, num_generations=10, per_device_train_batch_size=10, num_iterations=1,
    )  # fmt: skip
    rollouts = drawn(run)
    for first in range(0, len(rollouts), 10):
        group = rollouts[first : first + 10]
        assert Counter(rollout.selection.numbers for rollout in group) == {(n,): 2 for n in range(1, 6)}
        joint = np.exp([rollout.selection_logp + rollout.answer_logp for rollout in group])
        np.testing.assert_allclose([rollout.weight for rollout in group], joint / joint.sum(), rtol=1e-4)
        for half in (group[:5], group[5:]):
            assert sum(np.exp(rollout.selection_logp) for rollout in half) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    "arrangement",
    [
        {"shared_prefix": "off"},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16},
        {"tokens_per_microbatch": 1},
        {"per_device_eval_batch_size": 1},
    ],
    ids=["plain", "groups split over micro-batches", "each question alone", "small inference batches"],
)
def test_the_arrangement_of_the_work_does_not_change_the_weights(job: Job, arrangement: dict[str, Any]) -> None:
    assert largest_difference(weights(job("one", **ORDERS)), weights(job("other", **ORDERS, **arrangement))) < 2e-6


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.3, "beta": 0.1}], ids=["p", "another proposal"])
def test_fusing_the_e_step_with_the_m_step_changes_nothing(job: Job, settings: dict[str, Any]) -> None:
    online = {**ORDERS, "questions_per_iteration": 4, "num_iterations": 3, **settings}
    fused, apart = job("fused", **online), job("apart", **online, fused_e_step="off")
    assert largest_difference(weights(fused), weights(apart)) < 2e-6
    for one, other in zip(drawn(fused), drawn(apart), strict=True):
        assert (one.order, one.token_ids, one.selection) == (other.order, other.token_ids, other.selection)
        assert one.weight == pytest.approx(other.weight, abs=1e-4)


def test_a_run_resumes_bit_for_bit_and_each_iteration_has_other_orders(job: Job) -> None:
    keys = {**ORDERS, "optim": "adamw_torch", "num_iterations": 3, "questions_per_iteration": 4}
    whole = job("whole", **keys)
    job("half", **keys, max_steps=1)
    half = job("half", **keys, resume_from_checkpoint="auto")
    assert largest_difference(weights(whole), weights(half)) == 0
    assert repr(drawn(whole)) == repr(drawn(half))
    by_question: dict[int, set[tuple[int, ...]]] = {}
    for rollout in drawn(job("twice", **{**keys, "num_iterations": 6})):
        by_question.setdefault(rollout.question, set()).add(rollout.order)
    assert len(by_question) == 12
    assert all(len(orders) > 2 for orders in by_question.values()), "each seen twice, in two orders, which may recur"


def test_the_gradient_of_a_step_is_the_plain_formula(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, **ORDERS, per_device_train_batch_size=16, gradient_accumulation_steps=1)
    slots = [p * 4 + j for p in trainer.schedule.positions(0) for j in range(4)]
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer()
    trainer.training_step(trainer.model, slots)
    rollouts = [trainer.e_step(0).groups[slot // 4][slot % 4] for slot in slots]
    reference = trainer_of(tmp_path / "again").model.selector
    for rollout in rollouts:
        shown = trainer.train_questions[rollout.question].shown(rollout.order)
        prompt = trainer.prompters["selector"].selector_prompt(shown, 2).ids
        logp = completion_logps(reference, prompt, [rollout.token_ids], shared_prefix=False)[0].sum()
        (-(rollout.weight - 1 / 4) * logp / 4).backward()
    for (name, mine), plain in zip(trainer.model.selector.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, plain.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_both_models_learn(job: Job) -> None:
    run = job(**ORDERS, load_best_model_at_end=False)
    for role in ("selector", "generator"):
        base = load_file(run.parent / "world" / f"base-{role}" / "model.safetensors")
        trained = load_file(run / role / "model.safetensors")
        assert not any(torch.equal(tensor, trained[name]) for name, tensor in base.items())


@pytest.mark.parametrize("orders", [3, 8])
def test_each_order_has_as_many_rollouts(tmp_path: Path, orders: int) -> None:
    with pytest.raises(InputError, match="candidate_orders"):
        load_recipe(world(tmp_path), {"candidate_orders": orders})


# What is said of it -----------------------------------------------------------------------------------------


def named(place: int, orders: Sequence[tuple[int, ...]], question: int) -> list[Rollout]:
    """Two rollouts of each order, all of the same place."""
    return [
        Rollout(
            question=question, sample=i, token_ids=(place,), proposal_logps=(-0.01,), text=f"[{place}]",
            selection=Selection((order[place - 1],) if order else (place,), True), order=order, selection_logp=-0.01,
            answer_logp=-1.0 - i, reward=-1.0 - i, weight=0.25, proposal_weight=0.25, ess=4.0, weight_temperature=1.0,
        )
        for i, order in enumerate(order for order in orders for _ in range(4 // len(orders)))
    ]  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_policy_that_names_one_place_is_named_in_any_number_of_orders(count: int) -> None:
    """Though the documents that it names are others in each."""
    made = questions(120)
    groups = [named(2, candidate_orders(i, 5, count), i) for i in range(120)]
    found = summarize(columns(groups, made))
    assert found.first == pytest.approx((0, 1, 0, 0, 0))
    fired = {signal.rule.name for signal in of_iteration([Iteration(1, 0, 0, found)]) if signal.fired}
    assert "position" in fired


def test_a_policy_that_reads_names_no_place() -> None:
    made = questions(120)
    groups = []
    for i in range(120):
        group = named(1, candidate_orders(i, 5, 2), i)
        groups.append([replace(rollout, selection=Selection((3,), True)) for rollout in group])
    found = summarize(columns(groups, made))
    assert max(found.first) < 0.35
    assert found.duplicate == 1.0, "the same document, in whatever order it was shown"


def test_places_are_those_that_the_policy_names_whatever_was_drawn() -> None:
    """Listed alike, or drawn hot, selections would hide a policy that names one place."""
    made = questions(120)
    groups = []
    for i in range(120):
        listed = [named(place, [()], i)[0] for place in range(1, 6)]
        policy = np.log([0.04, 0.8, 0.08, 0.04, 0.04])
        groups.append(
            [
                replace(rollout, proposal_logps=(np.log(0.2),), selection_logp=logp)
                for rollout, logp in zip(listed, policy, strict=True)
            ]
        )
    found = summarize(columns(groups, made))
    assert found.first == pytest.approx((0.04, 0.8, 0.08, 0.04, 0.04))
    assert "position" in {signal.rule.name for signal in of_iteration([Iteration(1, 0, 0, found)]) if signal.fired}


def test_the_log_knows_the_places_that_the_records_know() -> None:
    made = questions(6)
    groups = [named(1 + i % 5, candidate_orders(i, 5, (1, 2, 4)[i % 3]), i) for i in range(6)]
    table = rollout_log.to_table([rollout for group in groups for rollout in group], made, 1, 0, 0, 4)
    assert repr(rollout_log.to_rollouts(table)) == repr([rollout for group in groups for rollout in group])
    np.testing.assert_array_equal(columns_of(table).shown, columns(groups, made).shown)
    assert columns_of(table).shown.tolist() == [1 + i % 5 for i in range(6) for _ in range(4)]
