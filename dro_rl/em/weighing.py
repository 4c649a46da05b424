"""From log-probabilities to weights: the part of the E-step that needs no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from dro_rl.objective import Weighting, effective_sample_size, importance_weights, temperature_for_ess
from dro_rl.records import Rollout, Sample

SAMPLED = tuple(field.name for field in fields(Sample))


def weigh(
    samples: Sequence[Sample], policy: Tensor, answers: Tensor, weighting: Weighting, *, on_policy: bool
) -> list[Rollout]:
    """Whole groups of samples with their log-probabilities and weights.

    Args:
        samples: m of each question, in order.
        policy: (questions, m) log p(z|x), nats.
        answers: (questions, m) log p(y|x, d_z), nats; NaN for the invalid.
        weighting: how.
        on_policy: the proposal is the policy, and the ratio one by definition.
    """
    mask = torch.tensor([sample.selection.valid for sample in samples], dtype=torch.bool).reshape(policy.shape)
    proposal = torch.tensor([sample.proposal_logp for sample in samples], dtype=torch.float64).reshape(policy.shape)
    log_ratio = None if on_policy else policy - proposal
    options: dict[str, Any] = {"proposal_log_ratio": log_ratio, "mask": mask, "max_log_ratio": weighting.max_log_ratio}
    if weighting.target_ess is None:
        temperature = torch.full(policy.shape[:1], weighting.temperature, dtype=torch.float64)
    else:
        temperature = temperature_for_ess(answers, weighting.target_ess, **options)
    alike = torch.zeros_like(answers)
    weights = importance_weights(alike if weighting.by == "uniform" else answers, temperature=temperature, **options)
    proposal_weights = importance_weights(alike, **{**options, "mask": None})
    ess = effective_sample_size(weights)
    m = policy.shape[-1]
    return [
        Rollout(
            **{name: getattr(sample, name) for name in SAMPLED},
            selection_logp=policy[i // m, i % m].item(),
            answer_logp=answers[i // m, i % m].item(),
            weight=weights[i // m, i % m].item(),
            proposal_weight=proposal_weights[i // m, i % m].item(),
            ess=ess[i // m].item(),
            weight_temperature=temperature[i // m].item(),
        )
        for i, sample in enumerate(samples)
    ]
