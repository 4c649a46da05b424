"""The objective as pure functions of tensors: weights, diagnostics, losses. Imports torch and nothing else.

Shapes: the last dimension is the group, the m rollouts of one question; leading dimensions are questions. Everything is
in nats and in log space, float32 or wider. `mask` is True for rollouts that count (those that name a document).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


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

    The tempering of sequential Monte Carlo, per question, by search in log T. Where no temperature reaches the
    target (the proposal ratios alone are too uneven), `max_temperature`. (..., m) -> (...).
    """
    logps = _wide(answer_logps)
    count = torch.full_like(logps[..., 0], logps.shape[-1]) if mask is None else mask.sum(dim=-1).to(logps)

    def reached(log_temperature: Tensor) -> Tensor:
        weights = importance_weights(
            logps,
            proposal_log_ratio=proposal_log_ratio,
            mask=mask,
            temperature=log_temperature.exp(),
            max_log_ratio=max_log_ratio,
        )
        return effective_sample_size(weights) >= target * count * (1 - 1e-6)

    # With proposal ratios the effective sample size need not grow with T: look for the first step of a fine grid that
    # reaches the target, then bisect within it.
    grid = torch.linspace(0.0, math.log(max_temperature), 257, dtype=logps.dtype, device=logps.device)
    reaches = torch.stack([reached(step.expand_as(count)) for step in grid], dim=-1)
    first = torch.where(reaches.any(dim=-1), reaches.int().argmax(dim=-1), len(grid) - 1)
    low, high = grid[(first - 1).clamp(min=0)], grid[first]
    for _ in range(40):
        middle = (low + high) / 2
        enough = reached(middle)
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return high.exp()


def selector_coefficients(
    weights: Tensor,
    *,
    baseline: str = "none",
    proposal_weights: Tensor | None = None,
    selection_logps: Tensor | None = None,
    reference_logps: Tensor | None = None,
    beta: float = 0.0,
    entropy_coef: float = 0.0,
) -> Tensor:
    """What multiplies ∇ log p(z_i|x) when the selector moves: weight, control variate and regularisers in one number.

    The ascent direction Σ c_i ∇ log p(z_i|x) estimates the gradient of
    log p(y|x) − beta · KL(p ‖ reference) + entropy_coef · H(p), with KL and entropy by the score function, each against
    the mean of the other rollouts (leave-one-out, unbiased on-policy).

    All m rollouts take part, those of weight 0 too: the control variate has expectation zero over what was sampled, and
    leaving the invalid out would bias it, and take away what pushes the selector from them.

    Args:
        weights: (..., m) importance weights.
        baseline: `none`, the paper's form (Eq. 12), or `mean`, which subtracts the proposal's own weight (1/m
            on-policy). Its expectation on-policy is zero, and a group that ties gives no gradient.
        proposal_weights: (..., m) p/q of the rollouts, normalised over the group; 1/m when None (on-policy).
        selection_logps: (..., m) log p(z_i|x), needed for `beta` or `entropy_coef`.
        reference_logps: (..., m) the same under the initial selector, needed for `beta`.
        beta: weight of the KL divergence to the reference.
        entropy_coef: weight of the entropy bonus.
    """
    if proposal_weights is None:
        proposal_weights = torch.full_like(weights, 1 / weights.shape[-1])
    if baseline == "none":
        coefficients = weights
    elif baseline == "mean":
        coefficients = weights - proposal_weights
    else:
        raise ValueError(f"baseline is 'none' or 'mean', not {baseline!r}")
    for factor, cost in (
        (beta, None if reference_logps is None or selection_logps is None else selection_logps - reference_logps),
        (entropy_coef, selection_logps),
    ):
        if factor:
            if cost is None:
                raise ValueError("beta needs selection_logps and reference_logps, entropy_coef needs selection_logps")
            coefficients = coefficients - factor * proposal_weights * _minus_others(cost)
    return coefficients


def selector_loss(selection_logps: Tensor, weights: Tensor, *, baseline: str = "none") -> Tensor:
    """−Σ_i w_i log p(z_i|x), mean over questions (paper, Eq. 10); with `baseline="mean"`, w_i − 1/m in place of w_i.

    Args:
        selection_logps: (..., m) log p(z_i|x), with gradient.
        weights: (..., m), treated as constants; or the output of `selector_coefficients`, with `baseline="none"`.

    Returns:
        A scalar.
    """
    return _weighted_nll(selection_logps, selector_coefficients(weights, baseline=baseline))


def generator_loss(answer_logps: Tensor, weights: Tensor) -> Tensor:
    """−Σ_i w_i log p(y|x,d_{z_i}), mean over questions (paper, Eq. 11). Shapes as in `selector_loss`; returns a scalar.

    With the weights of the same `answer_logps` its gradient is exactly that of −evidence_bound.
    """
    return _weighted_nll(answer_logps, weights)


def _weighted_nll(logps: Tensor, coefficients: Tensor) -> Tensor:
    logps, coefficients = _wide(logps), _wide(coefficients).detach()
    # An invalid selection leads to no answer: its log-probability may be NaN, and 0 · NaN is NaN.
    terms = torch.where(coefficients == 0, torch.zeros_like(logps), coefficients * logps)
    return -terms.sum(dim=-1).mean()


def _minus_others(values: Tensor) -> Tensor:
    """Each value less the mean of the others in its group; 0 where it is alone."""
    values = _wide(values)
    m = values.shape[-1]
    if m == 1:
        return torch.zeros_like(values)
    return (values - values.mean(dim=-1, keepdim=True)) * (m / (m - 1))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
