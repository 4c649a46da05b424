"""What every step reports about its rollouts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from dro_rl.config import DROConfig
from dro_rl.em.temperature import duplicate_share
from dro_rl.metrics import recall_at_k
from dro_rl.objective import evidence_bound, weight_entropy
from dro_rl.records import Question, Rollout


def rollout_metrics(
    groups: Sequence[Sequence[Rollout]], questions: Sequence[Question], config: DROConfig
) -> dict[str, float]:
    """Means over a step's questions: nats for log-probabilities and entropies, shares in 0..1; NaN where undefined.

    Args:
        groups: the m rollouts of each question.
        questions: the training set, indexed by `Rollout.question`.
    """
    everything = [rollout for group in groups for rollout in group]

    def column(name: str) -> torch.Tensor:
        return torch.tensor([[getattr(rollout, name) for rollout in group] for group in groups], dtype=torch.float64)

    valid = torch.tensor([[rollout.selection.valid for rollout in group] for group in groups])
    weights, answers, policy = column("weight"), column("answer_logp"), column("selection_logp")
    log_ratio = policy - column("proposal_logp")
    bound = evidence_bound(answers, mask=valid)
    tie = (answers.masked_fill(~valid, -math.inf).amax(-1) - answers.masked_fill(~valid, math.inf).amin(-1)) < 1e-6
    metrics = {
        "evidence_bound": _mean(bound[bound.isfinite()]),
        "answer_logp": _mean(answers[valid]),
        "ess": _mean(column("ess")[:, 0]),
        "ess_share": _mean(column("ess")[:, 0]) / config.num_generations,
        "weight_entropy": _mean(weight_entropy(weights)),
        "weight_temperature": _mean(column("weight_temperature")[:, 0]),
        "selector_entropy": -_mean(policy),
        "rollouts/valid": _mean(valid.double()),
        "rollouts/clean": _mean(torch.tensor([not r.selection.problems for r in everything], dtype=torch.float64)),
        "rollouts/duplicate": duplicate_share(groups),
        "rollouts/prompt_cut": _mean(torch.tensor([group[0].prompt_cut for group in groups], dtype=torch.float64)),
        "rollouts/all_tie": _mean((valid.any(-1) & tie).double()),
        "rollouts/all_invalid": _mean((~valid.any(-1)).double()),
        "sampling/temperature": _mean(column("temperature")),
        "sampling/log_ratio_mean": _mean(log_ratio),
        "sampling/log_ratio_max": log_ratio.max().item(),
        "sampling/ratio_mean": _mean(log_ratio.exp()),
        "sampling/truncated": _mean((log_ratio > config.max_log_ratio).double()),
    }
    if config.beta:
        metrics["kl"] = _mean(policy - column("reference_logp"))
    if config.min_weight:
        metrics["dropped_mass"] = _mean((weights * (weights < config.min_weight)).sum(-1))
    for k in (1, 3, 5):
        recalls = [
            recall_at_k(rollout.selection.numbers, questions[rollout.question].supporting_numbers, k)
            for rollout in everything
        ]
        metrics[f"recall@{k}"] = _mean(torch.tensor(recalls, dtype=torch.float64))
    return metrics


def _mean(values: torch.Tensor) -> float:
    values = values[~values.isnan()].double()
    return values.mean().item() if values.numel() else float("nan")
