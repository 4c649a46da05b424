"""From log-probabilities to weights: the part of the E-step that needs no model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from dro_rl.errors import InputError
from dro_rl.objective import (
    ADVANTAGES,
    Weighting,
    best_of_m_weights,
    effective_sample_size,
    group_advantages,
    importance_weights,
    leave_one_out_advantages,
    maxrl_weights,
    temperature_for_ess,
)
from dro_rl.records import Rollout, Sample
from dro_rl.rewards import Reward

SAMPLED = tuple(field.name for field in fields(Sample))


def weigh(
    samples: Sequence[Sample],
    policy: Tensor,
    weighting: Weighting,
    reward: Reward,
    *,
    likelihood: str,
    on_policy: bool,
) -> list[Rollout]:
    """Whole groups of samples with their log-probabilities and weights.

    Args:
        samples: m of each question, in order, with what the generator said of the answers.
        policy: (questions, m) log p(z|x), nats.
        weighting: how.
        reward: of what; the samples carry its parts.
        likelihood: `sum` or `mean` of an answer's tokens.
        on_policy: the proposal is the policy, and the ratio one by definition.
    """
    mask = torch.tensor([sample.selection.valid for sample in samples], dtype=torch.bool).reshape(policy.shape)
    answers = torch.tensor([sample.answer_logp_as(likelihood) for sample in samples], dtype=torch.float64)
    answers = answers.reshape(policy.shape)
    proposal = torch.tensor([sample.proposal_logp for sample in samples], dtype=torch.float64).reshape(policy.shape)
    log_ratio = None if on_policy else policy - proposal
    options: dict[str, Any] = {"proposal_log_ratio": log_ratio, "mask": mask, "max_log_ratio": weighting.max_log_ratio}
    rewards = torch.tensor(
        [
            reward.total(answer, dict(sample.rewards), len(sample.selection.numbers))
            for answer, sample in zip(answers.flatten(), samples, strict=True)
        ],
        dtype=torch.float64,
    ).reshape(policy.shape)
    alike, temperature = torch.zeros_like(answers), torch.full(policy.shape[:1], weighting.temperature).double()
    advantages = torch.full_like(answers, math.nan)
    if weighting.objective == "maxrl":
        weights = maxrl_weights(rewards if weighting.log_reward else _log(rewards, samples, mask), **options)
    elif weighting.objective == "best_of_m":
        weights = best_of_m_weights(rewards, mask=mask)
    else:
        weighed = rewards
        if weighting.objective in ADVANTAGES:
            weighed = answers if weighting.generator_weights == "posterior" else alike
            kind = group_advantages if weighting.objective == "grpo" else leave_one_out_advantages
            advantages = kind(rewards, mask=mask)
        if weighting.by == "uniform":
            weighed = alike
        if weighting.target_ess is not None:
            temperature = temperature_for_ess(weighed, weighting.target_ess, **options)
        weights = importance_weights(weighed, temperature=temperature, **options)
    proposal_weights = importance_weights(alike, **{**options, "mask": None})
    ess = effective_sample_size(weights)
    m = policy.shape[-1]
    return [
        Rollout(
            **{name: getattr(sample, name) for name in SAMPLED},
            selection_logp=policy[i // m, i % m].item(),
            answer_logp=answers[i // m, i % m].item(),
            reward=rewards[i // m, i % m].item(),
            weight=weights[i // m, i % m].item(),
            advantage=advantages[i // m, i % m].item(),
            proposal_weight=proposal_weights[i // m, i % m].item(),
            ess=ess[i // m].item(),
            weight_temperature=temperature[i // m].item(),
        )
        for i, sample in enumerate(samples)
    ]


def _log(rewards: Tensor, samples: Sequence[Sample], mask: Tensor) -> Tensor:
    """log R. Raises `InputError` for a reward below 0, which is no likelihood."""
    below = (rewards < 0) & mask
    if below.any():
        place = int(below.flatten().int().argmax())
        raise InputError(
            "reward",
            rewards.flatten()[place].item(),
            f"objective: maxrl weighs by rewards of at least 0 (training question {samples[place].question})",
            "Use another objective, or a reward that is not negative.",
        )
    return rewards.log()
