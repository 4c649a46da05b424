"""The objective as pure functions of tensors: weights, diagnostics, losses. Imports torch and nothing else.

Shapes: the last dimension is the group, the m rollouts of one question; leading dimensions are questions. Everything is
in nats and in log space, float32 or wider. `mask` is True for rollouts that count (those that name a document).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

MAX_MOVE = 30.0
"""Nats. log p_θ(z|x) − log p_t(z|x) is cut here, so that the ratio of a policy that has moved is a finite number."""


@dataclass(frozen=True, slots=True)
class Weighting:
    """How the E-step weighs rollouts, and what the M-step makes of the weights.

    Args:
        by: `likelihood`, or `uniform`, which looks at no answer (a control).
        temperature: T ≥ 1 softens the weights.
        target_ess: picks T for each question instead: see `temperature_for_ess`.
        max_log_ratio: truncates log p/q from above, nats.
        baseline, beta, entropy_coef: as in `selector_coefficients`.
        min_weight: the generator skips rollouts of less weight.
    """

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


def selector_coefficients(
    weights: Tensor,
    *,
    baseline: str = "none",
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
    if selection_logps is not None and sampled_logps is not None:
        moved = (_wide(selection_logps) - _wide(sampled_logps)).clamp(max=MAX_MOVE)
        counts = counts * moved.exp()
    coefficients = weights - counts if baseline == "mean" else weights
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
