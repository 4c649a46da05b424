"""Claims about the objectives beside the method's own: values by hand, gradients against enumeration, before and after
the policy has moved."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dro_rl.objective import (
    best_of_m_weights,
    group_advantages,
    importance_weights,
    leave_one_out_advantages,
    maxrl_weights,
    selector_coefficients,
)

SAMPLED = torch.tensor([0.3, -0.8, 1.1], dtype=torch.float64)
MOVED = torch.tensor([-0.4, 0.9, 0.3], dtype=torch.float64)
REWARDS = torch.tensor([0.2, 1.0, 0.5], dtype=torch.float64)
SUCCESS = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)


def expected_gradient(m: int, coefficients: Callable[[Tensor, Tensor], Tensor], policy: Tensor) -> Tensor:
    """E[Σ c_i ∇ log p_θ(z_i)] over all m-tuples of the policy that sampled, exact. `coefficients(z, log p_θ(z))`."""
    logits = policy.clone().requires_grad_()
    logp, sampled = logits.log_softmax(0), SAMPLED.log_softmax(0)
    total = torch.zeros((), dtype=torch.float64)
    for members in itertools.product(range(3), repeat=m):
        z = torch.tensor(members)
        c = coefficients(z, logp[z].detach()).detach()
        total = total + sampled[z].sum().exp() * (c * logp[z]).sum()
    return torch.autograd.grad(total, logits)[0]


def gradient_of(objective: Callable[[Tensor], Tensor], policy: Tensor) -> Tensor:
    logits = policy.clone().requires_grad_()
    return torch.autograd.grad(objective(logits.log_softmax(0)), logits)[0]


def moved(z: Tensor, logp: Tensor) -> dict[str, Tensor]:
    return {"selection_logps": logp, "sampled_logps": SAMPLED.log_softmax(0)[z]}


# Values -----------------------------------------------------------------------------------------------------


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([[1.0, 2.0, 6.0]], dtype=torch.float64)
    spread = math.sqrt(((1 - 3) ** 2 + (2 - 3) ** 2 + (6 - 3) ** 2) / 2) + 1e-4
    torch.testing.assert_close(group_advantages(rewards), torch.tensor([[-2.0, -1.0, 3.0]]).double() / spread)
    torch.testing.assert_close(leave_one_out_advantages(rewards), torch.tensor([[-3.0, -1.5, 4.5]]).double())


def test_a_rollout_that_names_nothing_is_as_bad_as_the_worst_that_does() -> None:
    rewards = torch.tensor([[math.nan, 2.0, 6.0]], dtype=torch.float64)
    mask = torch.tensor([[False, True, True]])
    filled = torch.tensor([[2.0, 2.0, 6.0]], dtype=torch.float64)
    for kind in (group_advantages, leave_one_out_advantages):
        torch.testing.assert_close(kind(rewards, mask=mask), kind(filled))
        assert not kind(rewards, mask=torch.zeros_like(mask)).any()


@pytest.mark.parametrize("kind", [group_advantages, leave_one_out_advantages])
def test_a_group_that_ties_has_no_advantage(kind: Callable[..., Tensor]) -> None:
    assert not kind(torch.full((2, 4), -7.25)).any()
    assert not kind(torch.tensor([[3.0]])).any()


def test_weights_by_reward_are_shares_of_what_succeeds() -> None:
    found = maxrl_weights(torch.tensor([[0.0, 1.0, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0]]).log())
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.5, 0.25, 0.25], [0.0, 0.0, 0.0, 0.0]]))


def test_weights_by_the_likelihood_as_reward_are_the_methods_own() -> None:
    answers, ratio = torch.tensor([[-3.0, -1.0, -2.5]]), torch.tensor([[0.4, -0.3, 0.0]])
    own = importance_weights(answers, proposal_log_ratio=ratio, max_log_ratio=2.0)
    torch.testing.assert_close(maxrl_weights(answers, proposal_log_ratio=ratio, max_log_ratio=2.0), own)


def test_the_best_share_the_weight_and_the_invalid_have_none() -> None:
    rewards = torch.tensor([[1.0, 3.0, 3.0, 9.0], [math.nan, math.nan, math.nan, math.nan]])
    mask = torch.tensor([[True, True, True, False], [False, False, False, False]])
    assert best_of_m_weights(rewards, mask=mask).tolist() == [[0.0, 0.5, 0.5, 0.0], [0.0] * 4]


# Gradients, by enumeration ----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [SAMPLED, MOVED], ids=["where it was sampled", "moved since"])
@pytest.mark.parametrize("m", [2, 3, 4])
def test_rloo_has_the_gradient_of_the_expected_reward(m: int, policy: Tensor) -> None:
    """Unbiased for every m, wherever the policy has moved."""

    def coefficients(z: Tensor, logp: Tensor) -> Tensor:
        advantages = leave_one_out_advantages(REWARDS[z])
        return selector_coefficients(torch.zeros(m).double(), advantages=advantages, **moved(z, logp))

    exact = gradient_of(lambda logp: (logp.exp() * REWARDS).sum(), policy)
    torch.testing.assert_close(expected_gradient(m, coefficients, policy), exact, atol=1e-12, rtol=0)


@pytest.mark.parametrize("epsilon", [0.2, 0.7, None])
@pytest.mark.parametrize("policy", [SAMPLED, MOVED], ids=["where it was sampled", "moved since"])
def test_grpo_has_the_gradient_of_its_clipped_surrogate(policy: Tensor, epsilon: float | None) -> None:
    m = 3

    def surrogate(logp: Tensor) -> Tensor:
        sampled, total = SAMPLED.log_softmax(0), torch.zeros((), dtype=torch.float64)
        for members in itertools.product(range(3), repeat=m):
            z = torch.tensor(members)
            ratio, advantages = (logp[z] - sampled[z]).exp(), group_advantages(REWARDS[z])
            terms = ratio * advantages
            if epsilon is not None:
                terms = torch.minimum(terms, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)
            total = total + sampled[z].sum().exp() * terms.mean()
        return total

    def coefficients(z: Tensor, logp: Tensor) -> Tensor:
        advantages = group_advantages(REWARDS[z])
        zero = torch.zeros(m).double()
        return selector_coefficients(zero, advantages=advantages, epsilon=epsilon, **moved(z, logp))

    exact = gradient_of(surrogate, policy)
    assert exact.norm() > 1e-3
    torch.testing.assert_close(expected_gradient(m, coefficients, policy), exact, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("baseline", "terms"), [("none", 0), ("mean", -1)])
@pytest.mark.parametrize("m", [1, 2, 4])
def test_maxrl_has_the_gradient_of_the_likelihood_of_success_to_an_order(m: int, baseline: str, terms: int) -> None:
    """log p(success) = −Σ_k (1 − p)^k / k. Groups of m give the first m terms; a variate that is there only where a
    group succeeds gives the first m − 1."""

    def coefficients(z: Tensor, logp: Tensor) -> Tensor:
        weights = maxrl_weights(SUCCESS[z].log())
        return selector_coefficients(weights, baseline=baseline, follows_failures=False, **moved(z, logp))

    def truncated(logp: Tensor) -> Tensor:
        failure = 1 - (logp.exp() * SUCCESS).sum()
        return -sum((failure**k / k for k in range(1, m + terms + 1)), start=0 * failure)

    found, exact = expected_gradient(m, coefficients, SAMPLED), gradient_of(truncated, SAMPLED)
    torch.testing.assert_close(found, exact, atol=1e-12, rtol=0)


def test_maxrl_leaves_a_group_of_failures_alone() -> None:
    weights = maxrl_weights(torch.zeros(1, 4).log())
    assert not selector_coefficients(weights, baseline="mean", follows_failures=False).any()
    assert selector_coefficients(weights, baseline="mean").tolist() == [[-0.25] * 4]


# Questions that teach nothing -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [
        {"selector_baseline": "mean", "questions_per_iteration": 4},
        {"selector_baseline": "mean", "questions_per_iteration": 4, "fused_e_step": "off"},
        {"objective": "grpo", "selector_baseline": "none", "reward": "em"},
        {"objective": "rloo", "selector_baseline": "none", "reward": "contains"},
    ],
    ids=["fused", "scored first", "grpo", "rloo"],
)
def test_leaving_out_what_teaches_nothing_changes_no_weight(job, monkeypatch: pytest.MonkeyPatch, keys: dict) -> None:
    """With two rollouts of one document each, many questions tie."""
    from training_world import largest_difference, weights

    from dro_rl.em import m_step

    skipped: list[int] = []
    plain = m_step.MicroBatch.tokens_skipped.fget
    monkeypatch.setattr(
        m_step.MicroBatch, "tokens_skipped", property(lambda self: (skipped.append(plain(self)), plain(self))[1])
    )
    settings = {**keys, "num_generations": 2, "gradient_accumulation_steps": 2, "num_selected": 1}
    lean = job("lean", **settings)
    assert sum(skipped) > 0
    monkeypatch.setattr(m_step, "NOTHING", 0.0)
    skipped.clear()
    whole = job("whole", **settings)
    assert sum(skipped) == 0
    assert largest_difference(weights(lean), weights(whole)) < 1e-6
