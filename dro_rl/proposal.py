"""The proposal q: how selections are drawn, what a draw is, and the seeds that draws depend on. Values alone."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """The proposal q: how tokens are drawn from the selector's logits, or from those that a constraint allows.

    Args:
        max_completion_length: tokens at most, end-of-sequence included.
        temperature: 1 samples from p itself; 0 is greedy.
        top_p, top_k, min_p: truncations of the distribution; 1, 0 and 0 are off.
    """

    max_completion_length: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    @property
    def on_policy(self) -> bool:
        """Whether q is p, so that the importance ratio is one by definition."""
        return self.temperature == 1.0 and not self.truncates

    @property
    def truncates(self) -> bool:
        """Whether there are completions that p could write and q cannot."""
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0


@dataclass(frozen=True, slots=True)
class Completion:
    """Sampled token ids, end-of-sequence included when reached, and log q of each, in nats."""

    ids: tuple[int, ...]
    logps: tuple[float, ...]


def rollout_seed(*parts: int | str) -> int:
    """A seed made of its parts alone (run seed, iteration, position), so that no generator state need be kept."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def candidate_orders(seed: int, num_documents: int, count: int) -> list[tuple[int, ...]]:
    """Orders in which a selector is shown a question's candidates, each the numbers of the documents, drawn alike.

    They are independent: what one place holds in an order says nothing of what any place holds in another.

    Args:
        seed: of the question in the iteration.
        num_documents: N.
        count: how many; for one, the question's own order, which is written as an empty one.
    """
    if count == 1:
        return [()]
    draw = random.Random(rollout_seed(seed, "orders"))
    return [tuple(draw.sample(range(1, num_documents + 1), num_documents)) for _ in range(count)]


def uniforms(seed: int, count: int, length: int) -> torch.Tensor:
    """(count, length) float64 uniform numbers on [0, 1): the randomness of one prompt's rollouts."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, length, generator=generator, dtype=torch.float64)
