"""From log-probabilities to weights: the part of the E-step that needs no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dro_rl.config import DROConfig
from dro_rl.objective import effective_sample_size, importance_weights, selector_coefficients, temperature_for_ess
from dro_rl.records import Rollout


def weigh(
    rollouts: Sequence[Rollout],
    policy: Tensor,
    answers: Tensor,
    config: DROConfig,
    *,
    on_policy: bool,
) -> list[Rollout]:
    """Whole groups of rollouts with their log-probabilities, weights and coefficients filled in.

    Args:
        rollouts: m of each question, in order; with `beta`, with their log-probabilities under the initial selector.
        policy: (questions, m) log p(z|x), nats.
        answers: (questions, m) log p(y|x, d_z), nats; NaN for the invalid.
        config: the weighting.
        on_policy: the proposal is the policy, and the ratio one by definition.
    """
    mask = torch.tensor([rollout.selection.valid for rollout in rollouts], dtype=torch.bool).reshape(policy.shape)
    proposal, reference = (
        torch.tensor(column, dtype=torch.float64).reshape(policy.shape)
        for column in ([r.proposal_logp for r in rollouts], [r.reference_logp for r in rollouts])
    )
    log_ratio = None if on_policy else policy - proposal
    options: dict[str, Any] = {"proposal_log_ratio": log_ratio, "mask": mask, "max_log_ratio": config.max_log_ratio}
    if config.target_ess is None:
        temperature = torch.full(policy.shape[:1], config.weight_temperature, dtype=torch.float64)
    else:
        temperature = temperature_for_ess(answers, config.target_ess, **options)
    weighed = torch.zeros_like(answers) if config.weighting == "uniform" else answers
    weights = importance_weights(weighed, temperature=temperature, **options)
    coefficients = selector_coefficients(
        weights,
        baseline=config.selector_baseline,
        proposal_weights=importance_weights(
            torch.zeros_like(answers), proposal_log_ratio=log_ratio, max_log_ratio=config.max_log_ratio
        ),
        selection_logps=policy,
        reference_logps=reference if config.beta else None,
        beta=config.beta,
        entropy_coef=config.entropy_coef,
    )
    ess = effective_sample_size(weights)
    m = config.num_generations
    return [
        replace(
            rollout,
            selection_logp=policy[i // m, i % m].item(),
            answer_logp=answers[i // m, i % m].item(),
            weight=weights[i // m, i % m].item(),
            selector_coefficient=coefficients[i // m, i % m].item(),
            ess=ess[i // m].item(),
            weight_temperature=temperature[i // m].item(),
        )
        for i, rollout in enumerate(rollouts)
    ]
