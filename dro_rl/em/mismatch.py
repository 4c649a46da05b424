"""How far the engine's log-probabilities are from the trainer's. Where they are far, a signal says so."""

from __future__ import annotations

import math

from torch import Tensor


class EngineMismatch:
    """Compares log p with log q of the same selections by the same weights: what separates them is the engine."""

    def __init__(self) -> None:
        self.a_token = math.nan
        """Mean |log p − log q| at the last comparison, nats a token; NaN before the first."""

    def measure(self, difference: Tensor, tokens: int, *, stale: bool) -> dict[str, float]:
        """The step's metrics of log p less log q, in nats a selection.

        Args:
            difference: of each selection.
            tokens: of all of them together.
            stale: older weights sampled, so that a difference is no wonder, and says nothing of the engine.
        """
        if not stale:
            self.a_token = difference.abs().sum().item() / tokens
        return {
            "sampling/logp_difference_mean": difference.abs().mean().item(),
            "sampling/logp_difference_max": difference.abs().max().item(),
        }
