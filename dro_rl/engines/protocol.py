"""What every rollout engine is given and gives back. An engine turns prompts into sampled completions with log q."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from dro_rl.proposal import Completion, SamplingParams
from dro_rl.selection.constraint import SelectionConstraint


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
