"""How far the engine's log-probabilities are from the trainer's: reported at every step, said once where it is far."""

from __future__ import annotations

import logging

from torch import Tensor

logger = logging.getLogger(__name__)

MAX_DIFFERENCE = 0.1
"""Nats a token, on average: two implementations of a model in bfloat16 stay below it."""


class EngineMismatch:
    """Compares log p with log q of the same selections by the same weights: what separates them is the engine."""

    def __init__(self) -> None:
        self._warned = False

    def measure(self, difference: Tensor, tokens: int, *, stale: bool) -> dict[str, float]:
        """The step's metrics of log p less log q, in nats a selection, and a warning where they are far apart.

        Args:
            difference: of each selection.
            tokens: of all of them together.
            stale: older weights sampled, so that a difference is no wonder.
        """
        a_token = difference.abs().sum().item() / tokens
        if a_token > MAX_DIFFERENCE and not stale and not self._warned:
            self._warned = True
            logger.warning(
                f"the engine's log-probabilities differ from the trainer's by {a_token:.2g} nats a token on average; "
                f"by rounding it would be less than {MAX_DIFFERENCE}: does it hold the weights that it was sent? "
                "Rollouts are corrected by p/q; sampling/logp_difference_mean and sampling/log_ratio_max say how far."
            )
        return {
            "sampling/logp_difference_mean": difference.abs().mean().item(),
            "sampling/logp_difference_max": difference.abs().max().item(),
        }
