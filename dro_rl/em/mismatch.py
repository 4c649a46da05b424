"""How far the engine's log-probabilities are from the trainer's. Where they are far, a signal says so."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from dro_rl.em.m_step import MicroBatch
from dro_rl.proposal import SamplingParams
from dro_rl.records import Rollout


class EngineMismatch:
    """Compares log p with log q of the same selections by the same weights: what separates them is the engine.

    Args:
        sampling: the proposal; where it is p itself, log q is meant to be log p.
    """

    def __init__(self, sampling: SamplingParams) -> None:
        self.sampling = sampling
        self.a_token = math.nan
        """Mean |log p − log q| at the last comparison, nats a token; NaN before the first."""

    def of_pass(self, micro_batch: MicroBatch, logps: Tensor | None) -> dict[str, float]:
        """The metrics of a training pass over what the trainer's own weights drew; none of any other.

        Args:
            logps: log p of the selector's completions in this pass, in row order, nats.
        """
        if logps is None or not micro_batch.drawn_here:
            return {}
        difference = logps.double().cpu() - micro_batch.proposal_logps()
        return self._measure(difference, micro_batch.completion_tokens, stale=False)

    def of_rollouts(self, rollouts: Iterable[Rollout], *, stale: bool) -> dict[str, float]:
        """The metrics of rollouts that the E-step scored, by the weights that the engine was sent.

        Args:
            stale: older weights sampled, so that a difference is no wonder, and says nothing of the engine.
        """
        plain = [each for each in rollouts if replace(self.sampling, temperature=each.temperature).on_policy]
        if not plain:
            return {}
        difference = torch.tensor([rollout.selection_logp - rollout.proposal_logp for rollout in plain])
        return self._measure(difference, sum(rollout.tokens_written for rollout in plain), stale=stale)

    def _measure(self, difference: Tensor, tokens: int, *, stale: bool) -> dict[str, float]:
        if not stale:
            self.a_token = difference.abs().sum().item() / tokens
        return {
            "sampling/logp_difference_mean": difference.abs().mean().item(),
            "sampling/logp_difference_max": difference.abs().max().item(),
        }
