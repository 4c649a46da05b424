"""What every rollout engine is given and gives back. An engine turns prompts into sampled completions with log q."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from dro_rl.constraint import SelectionConstraint


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


class RolloutEngine(Protocol):
    """Samples completions. `generate` may be called with any number of prompts; it batches as it sees fit."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_generations: int,
        sampling: SamplingParams,
        seeds: Sequence[int],
        constraints: Sequence[SelectionConstraint] | None = None,
    ) -> list[list[Completion]]:
        """`num_generations` completions for each prompt.

        Args:
            prompts: token ids.
            num_generations: m.
            sampling: the proposal.
            seeds: one a prompt. The same prompt, seed and weights give the same completions, whatever else is in the
                batch: runs resume exactly, and do not depend on the number of processes. An engine that cannot
                promise that says so in its docstring.
            constraints: one a prompt. Tokens are drawn from the softmax over those that it allows, then tempered and
                truncated, and log q is that distribution's: p, to which the trainer compares it, is constrained too.
        """
        ...

    def samples_policy(self, sampling: SamplingParams) -> bool:
        """Whether its log q is the trainer's own log p, so that the importance ratio is one by definition."""
        ...


def rollout_seed(*parts: int | str) -> int:
    """A seed made of its parts alone (run seed, iteration, position), so that no generator state need be kept."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def uniforms(seed: int, num_generations: int, length: int) -> torch.Tensor:
    """(num_generations, length) float64 uniform numbers on [0, 1): the randomness of one prompt's rollouts."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_generations, length, generator=generator, dtype=torch.float64)
