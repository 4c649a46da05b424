"""The objective as pure functions of tensors: weights, diagnostics, losses. Imports torch and nothing else.

Shapes: the last dimension is the group, the m rollouts of one question; leading dimensions are questions. Everything is
in nats and in log space, float32 or wider. `mask` is True for rollouts that count (those that name a document).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

MAX_MOVE = 30.0
"""Nats. log p_θ(z|x) − log p_t(z|x) is cut here, so that the ratio of a policy that has moved is a finite number."""


Objective = Literal["dro", "grpo", "rloo", "maxrl", "best_of_m"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
ADVANTAGES: frozenset[Objective] = frozenset({"grpo", "rloo"})
"""Objectives that move the selector by advantages, which are signed; the others do it by weights, which sum to one."""


@dataclass(frozen=True, slots=True)
class Weighting:
    """How the E-step weighs rollouts, and what the M-step makes of the weights.

    Args:
        objective: what moves the selector: importance weights (`dro`), advantages (`grpo`, `rloo`), weights by reward
            (`maxrl`) or the best rollout (`best_of_m`).
        generator_weights: what the generator learns from under an objective of advantages: the answers' `posterior`, or
            all valid rollouts alike (`uniform`). Under the others it learns from the weights that move the selector.
        epsilon: how far `grpo` follows a rollout: p_θ/p_t from 1 − epsilon to 1 + epsilon.
        log_reward: the reward is a log-likelihood, so that under `maxrl` it is exponentiated.
        by: `likelihood`, or `uniform`, which looks at no answer (a control).
        temperature: T ≥ 1 softens the weights.
        target_ess: picks T for each question instead: see `temperature_for_ess`.
        max_log_ratio: truncates log p/q from above, nats.
        baseline, beta, entropy_coef: as in `selector_coefficients`.
        min_weight: the generator skips rollouts of less weight.
    """

    objective: Objective = "dro"
    generator_weights: Literal["posterior", "uniform"] = "posterior"
    epsilon: float = 0.2
    log_reward: bool = True
    by: Literal["likelihood", "uniform"] = "likelihood"
    temperature: float = 1.0
    target_ess: float | None = None
    max_log_ratio: float = math.inf
    baseline: Literal["none", "mean"] = "none"
    beta: float = 0.0
    entropy_coef: float = 0.0
    min_weight: float = 0.0


def importance_weights(
    answer_logps: Tensor,
    *,
    proposal_log_ratio: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    max_log_ratio: float | None = None,
) -> Tensor:
    """Self-normalised importance weights, w_i ∝ p(y|x,d_{z_i})^(1/T) · p(z_i|x)/q(z_i|x) (paper, Eq. 7 and 19).

    Consistent as m grows, not unbiased for finite m.

    Args:
        answer_logps: (..., m) log p(y|x,d_{z_i}), summed over the answer's tokens. Values under the mask may be NaN.
        proposal_log_ratio: (..., m) log p(z_i|x) − log q(z_i|x); None when the rollouts come from p itself.
        mask: (..., m) bool.
        temperature: T ≥ 1 softens the weights; a tensor of shape (...) gives one per question.
        max_log_ratio: truncates the ratio from above, in nats.

    Returns:
        (..., m), summing to 1 where any rollout is unmasked, else all 0.
    """
    logits = _wide(answer_logps)
    if isinstance(temperature, Tensor):
        logits = logits / temperature.to(logits).unsqueeze(-1)
    else:
        logits = logits / temperature
    if proposal_log_ratio is not None:
        ratio = _wide(proposal_log_ratio)
        logits = logits + (ratio if max_log_ratio is None else ratio.clamp(max=max_log_ratio))
    if mask is None:
        mask = torch.ones_like(logits, dtype=torch.bool)
    logits = logits.masked_fill(~mask, -math.inf)
    # A group of impossible answers (all −inf) is a tie, not a NaN.
    impossible = (logits == -math.inf).all(dim=-1, keepdim=True)
    logits = torch.where(impossible & mask, torch.zeros_like(logits), logits)
    empty = ~mask.any(dim=-1, keepdim=True)
    return torch.softmax(logits.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)


def effective_sample_size(weights: Tensor) -> Tensor:
    """(Σw)² / Σw²: 1 when one rollout holds all weight, m when all tie, 0 when all are masked. (..., m) -> (...)."""
    weights = _wide(weights)
    squares = weights.square().sum(dim=-1)
    return torch.where(squares > 0, weights.sum(dim=-1).square() / squares.clamp(min=1e-38), torch.zeros_like(squares))


def weight_entropy(weights: Tensor) -> Tensor:
    """−Σ w log w, nats: 0 when one rollout holds all weight, log m when they tie. (..., m) -> (...)."""
    return torch.special.entr(_wide(weights)).sum(dim=-1)


def evidence_bound(answer_logps: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """log((1/m) Σ p(y|x,d_{z_i})): a lower bound of log p(y|x) in expectation, tight as m grows. (..., m) -> (...).

    A masked rollout reads nothing and so explains nothing: it adds 0 to the sum and still counts in m. Otherwise
    writing garbage on hard questions would raise the bound. An all-masked group gives −inf.
    """
    logps = _wide(answer_logps)
    if mask is not None:
        logps = logps.masked_fill(~mask, -math.inf)
    return torch.logsumexp(logps, dim=-1) - math.log(logps.shape[-1])


def temperature_for_ess(
    answer_logps: Tensor,
    target: float,
    *,
    proposal_log_ratio: Tensor | None = None,
    mask: Tensor | None = None,
    max_log_ratio: float | None = None,
    max_temperature: float = 1e6,
) -> Tensor:
    """The smallest weight temperature ≥ 1 at which the effective sample size reaches `target` of the unmasked rollouts.

    The tempering of sequential Monte Carlo, per question, by search in log T. Where the proposal ratios alone are so
    uneven that no temperature reaches the target, it is the same share of the most that one reaches: the answers
    count in every case. (..., m) -> (...).
    """
    logps = _wide(answer_logps)
    count = torch.full_like(logps[..., 0], logps.shape[-1]) if mask is None else mask.sum(dim=-1).to(logps)

    def sizes(log_temperature: Tensor) -> Tensor:
        weights = importance_weights(
            logps,
            proposal_log_ratio=proposal_log_ratio,
            mask=mask,
            temperature=log_temperature.exp(),
            max_log_ratio=max_log_ratio,
        )
        return effective_sample_size(weights)

    # With proposal ratios the effective sample size need not grow with T: look for the first step of a fine grid that
    # reaches the target, then bisect within it.
    grid = torch.linspace(0.0, math.log(max_temperature), 257, dtype=logps.dtype, device=logps.device)
    found = torch.stack([sizes(step.expand_as(count)) for step in grid], dim=-1)
    most = found.amax(dim=-1)
    wanted = target * torch.where(most < target * count * (1 - 1e-6), most, count) * (1 - 1e-6)
    first = (found >= wanted.unsqueeze(-1)).int().argmax(dim=-1)
    low, high = grid[(first - 1).clamp(min=0)], grid[first]
    for _ in range(40):
        middle = (low + high) / 2
        enough = sizes(middle) >= wanted
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return high.exp()


# Rivals: what else may come of the rewards of a group


def group_advantages(rewards: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """(R_i − mean R) / (std R + 1e-4), the advantages of GRPO (arXiv 2402.03300, section 4.1; std over m − 1).

    Args:
        rewards: (..., m). Values under the mask may be NaN.
        mask: (..., m) bool. A rollout that names no document is as bad as the worst that does: it says nothing better.

    Returns:
        (..., m); 0 throughout where all tie, or none is valid.
    """
    rewards = _filled(rewards, mask)
    spread = rewards.std(dim=-1, keepdim=True) if rewards.shape[-1] > 1 else torch.zeros_like(rewards)
    return (rewards - rewards.mean(dim=-1, keepdim=True)) / (spread + 1e-4)


def leave_one_out_advantages(rewards: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """R_i − mean of the others' R, the advantages of RLOO (arXiv 2402.14740). As in `group_advantages`."""
    rewards = _filled(rewards, mask)
    return rewards - _mean_of_others(rewards) if rewards.shape[-1] > 1 else torch.zeros_like(rewards)


def maxrl_weights(
    log_rewards: Tensor,
    *,
    proposal_log_ratio: Tensor | None = None,
    mask: Tensor | None = None,
    max_log_ratio: float | None = None,
) -> Tensor:
    """R_i / Σ R: maximum-likelihood RL (arXiv 2602.02710); with R = p(y|x,d_z) the method's own weights.

    Args:
        log_rewards: (..., m) log R_i; −inf for a failure.
        proposal_log_ratio, mask, max_log_ratio: as in `importance_weights`.

    Returns:
        (..., m), summing to 1 where any rollout succeeds, else all 0: a group of failures moves nothing. With rewards
        of 0 and 1 the expected gradient is that of log p(success), expanded in powers of p(failure), to order m; with a
        variate in the groups that succeed, to order m − 1.
    """
    succeeds = log_rewards > -math.inf
    return importance_weights(
        log_rewards,
        proposal_log_ratio=proposal_log_ratio,
        mask=succeeds if mask is None else succeeds & mask,
        max_log_ratio=max_log_ratio,
    )


def best_of_m_weights(rewards: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """1 for the rollout of the highest reward, shared by those that tie for it; 0 throughout where none is valid.

    Imitation of the best of m (rejection sampling; RAFT, arXiv 2304.06767). Arguments as in `group_advantages`.
    """
    rewards = _wide(rewards)
    if mask is not None:
        rewards = rewards.masked_fill(~mask, -math.inf)
    best = rewards == rewards.amax(dim=-1, keepdim=True)
    best = best & (rewards > -math.inf) if mask is None else best & mask
    return best / best.sum(dim=-1, keepdim=True).clamp(min=1).to(rewards)


def _filled(rewards: Tensor, mask: Tensor | None) -> Tensor:
    """Rewards with the lowest of the group in place of what is masked; 0 where all of it is."""
    rewards = _wide(rewards)
    if mask is None:
        return rewards
    lowest = rewards.masked_fill(~mask, math.inf).amin(dim=-1, keepdim=True)
    lowest = torch.where(mask.any(dim=-1, keepdim=True), lowest, torch.zeros_like(lowest))
    return torch.where(mask, rewards, lowest)


# What the weights become


def selector_coefficients(
    weights: Tensor,
    *,
    baseline: str = "none",
    advantages: Tensor | None = None,
    epsilon: float | None = None,
    follows_failures: bool = True,
    proposal_weights: Tensor | None = None,
    selection_logps: Tensor | None = None,
    sampled_logps: Tensor | None = None,
    reference_logps: Tensor | None = None,
    beta: float = 0.0,
    entropy_coef: float = 0.0,
) -> Tensor:
    """What multiplies ∇ log p_θ(z_i|x) when the selector moves: weight, control variate and regularisers in one number.

    The ascent direction Σ c_i ∇ log p_θ(z_i|x) estimates the gradient of
    Σ_z w(z) log p_θ(z|x) − beta · KL(p_θ ‖ reference) + entropy_coef · H(p_θ).

    The weights hold for a whole iteration: with them fixed, the first term is a weighted likelihood. Whatever is an
    expectation under the policy of the moment is not: samples of p_t, the policy that the E-step weighed with, count
    p_θ/p_t each. That is the control variate, whose expectation E_{p_t}[p_θ/p_t ∇ log p_θ] is zero at every θ, and
    KL and entropy by the score function, each against the mean of the other rollouts as the E-step saw them
    (leave-one-out: unbiased at every θ where p_t sampled).

    All m rollouts take part, those of weight 0 too: the control variate has expectation zero over what was sampled, and
    leaving the invalid out would bias it, and take away what pushes the selector from them.

    Args:
        weights: (..., m) importance weights.
        baseline: `none`, the paper's form (Eq. 12), or `mean`, which subtracts the proposal's own weight (1/m
            on-policy), times p_θ/p_t. At p_t a group that ties then gives no gradient.
        advantages: (..., m) in place of the weights: A_i p_θ/p_t, each counted by its proposal weight, whose
            expectation at every θ is the gradient of E_{p_θ}[A].
        epsilon: leave out a rollout that p_θ/p_t has carried beyond 1 ± epsilon in its advantage's direction (the
            clipped surrogate of PPO, arXiv 1707.06347, Eq. 7); None follows it however far.
        follows_failures: whether a group without any weight still has its variate, which pushes from what it wrote.
        proposal_weights: (..., m) p_t/q of the rollouts, normalised over the group; 1/m when None (on-policy).
        selection_logps: (..., m) log p_θ(z_i|x), detached: needed where θ has moved, for `beta` and `entropy_coef`.
        sampled_logps: (..., m) log p_t(z_i|x); None where θ is still what the E-step weighed with.
        reference_logps: (..., m) the same under the initial selector, needed for `beta`.
        beta: weight of the KL divergence to the reference.
        entropy_coef: weight of the entropy bonus.
    """
    if baseline not in ("none", "mean"):
        raise ValueError(f"baseline is 'none' or 'mean', not {baseline!r}")
    if (beta and reference_logps is None) or ((beta or entropy_coef) and selection_logps is None):
        raise ValueError("beta needs selection_logps and reference_logps, entropy_coef needs selection_logps")
    counts = torch.full_like(weights, 1 / weights.shape[-1]) if proposal_weights is None else proposal_weights
    ratio = torch.ones_like(counts)
    if selection_logps is not None and sampled_logps is not None:
        ratio = (_wide(selection_logps) - _wide(sampled_logps)).clamp(max=MAX_MOVE).exp()
    counts = counts * ratio
    if advantages is not None:
        coefficients = counts * advantages
        if epsilon is not None:
            beyond = torch.where(advantages > 0, ratio > 1 + epsilon, ratio < 1 - epsilon)
            coefficients = coefficients.masked_fill(beyond, 0.0)
    elif baseline == "mean":
        coefficients = weights - (counts if follows_failures else counts * weights.sum(dim=-1, keepdim=True))
    else:
        coefficients = weights
    if selection_logps is not None and (beta or entropy_coef):
        before = selection_logps if sampled_logps is None else sampled_logps
        now, then = (_cost(logps, reference_logps, beta, entropy_coef) for logps in (selection_logps, before))
        coefficients = coefficients - counts * (now - _mean_of_others(then))
    return coefficients


def _cost(logps: Tensor, reference_logps: Tensor | None, beta: float, entropy_coef: float) -> Tensor:
    """What has the expectation beta · KL − entropy_coef · H under the policy of `logps`."""
    cost = entropy_coef * _wide(logps)
    return cost if reference_logps is None else cost + beta * (_wide(logps) - _wide(reference_logps))


def selector_loss(
    selection_logps: Tensor, weights: Tensor, *, baseline: str = "none", sampled_logps: Tensor | None = None
) -> Tensor:
    """−Σ_i w_i log p(z_i|x), mean over questions (paper, Eq. 10); with `baseline="mean"` less the control variate.

    Args:
        selection_logps: (..., m) log p(z_i|x), with gradient.
        weights: (..., m), treated as constants; or the output of `selector_coefficients`, with `baseline="none"`.
        sampled_logps: (..., m) log p(z_i|x) at the weights that the E-step used, where these have moved since.

    Returns:
        A scalar.
    """
    coefficients = selector_coefficients(
        weights, baseline=baseline, selection_logps=selection_logps.detach(), sampled_logps=sampled_logps
    )
    return weighted_nll(selection_logps, coefficients)


def generator_loss(answer_logps: Tensor, weights: Tensor) -> Tensor:
    """−Σ_i w_i log p(y|x,d_{z_i}), mean over questions (paper, Eq. 11). Shapes as in `selector_loss`; returns a scalar.

    With the weights of the same `answer_logps` its gradient is exactly that of −evidence_bound.
    """
    return weighted_nll(answer_logps, weights)


def weighted_nll(logps: Tensor, coefficients: Tensor) -> Tensor:
    """−Σ c_i log p_i, mean over groups: what both losses are. `coefficients` are constants. (..., m) -> a scalar."""
    logps, coefficients = _wide(logps), _wide(coefficients).detach()
    # An invalid selection leads to no answer: its log-probability may be NaN, and 0 · NaN is NaN.
    terms = torch.where(coefficients == 0, torch.zeros_like(logps), coefficients * logps)
    return -terms.sum(dim=-1).mean()


def _mean_of_others(values: Tensor) -> Tensor:
    """The mean of the others in each value's group; 0 where it is alone."""
    m = values.shape[-1]
    return (values.sum(dim=-1, keepdim=True) - values) / (m - 1) if m > 1 else torch.zeros_like(values)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
