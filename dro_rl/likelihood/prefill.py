"""Prompts that go through a policy once for sampling and training: the pass that sampling begins with keeps its graph.

A `Prefill` is a prompt's keys and values in each layer and the last of its outputs. Sampling goes on from them without
gradient; training then reads the completions alone, which attend to them, and one backward pass goes through both.
Every prompt is a pass of its own, so that one whose completions teach nothing costs no backward pass. `Prefills` says
when they are worth their memory.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dro_rl.likelihood import hidden_states, without_adapters
from dro_rl.likelihood.packing import Row, lay_out
from dro_rl.likelihood.room import Room, free

logger = logging.getLogger(__name__)

WORTH_KEEPING = 512
"""Tokens of a prompt, on average. Shorter ones are packed for sampling and read again: a pass for each costs more than
it saves (of 200 tokens, a step of the selector took 6 % longer)."""


@dataclass(frozen=True, slots=True)
class Prefill:
    """A prompt as a decoder has read it, with the graph of that pass.

    Args:
        states: by layer the keys and values that its attention saw, (1, heads, tokens, size) each.
        last: (1, width), what the last token comes to before the head.
    """

    states: Mapping[int, tuple[Tensor, Tensor]]
    last: Tensor


class Prefills:
    """What was read for sampling and is still to be trained on.

    Args:
        room: for how many tokens a pass has room. More prompts than that are read without a graph.
        wanted: whether the weights that sample are those that train, in one pass.
    """

    def __init__(self, room: Room, wanted: bool) -> None:
        self.room, self.wanted = room, wanted
        self.used = 0
        """Tokens of prompts that the last pass did not read again."""
        self._kept: dict[tuple[int, ...], Prefill] = {}
        self._said = False

    def begin(self, prompts: Sequence[Sequence[int]]) -> bool:
        """Whether to keep what these prompts come to; what was kept before is let go."""
        self.drop()
        tokens = sum(map(len, prompts))
        worth = WORTH_KEEPING * len(prompts) <= tokens <= self.room.tokens
        return self.wanted and self.room.found and worth

    def read(self, model: Any, prompt: Sequence[int]) -> Prefill:
        """Take a prompt through a model that takes packed rows, as a training pass would, and keep what it comes to."""
        keep: dict[int, tuple[Tensor, Tensor]] = {}
        training = model.training
        model.train()  # layers are recomputed in the backward pass where training recomputes them
        if not self._kept:
            torch.clear_autocast_cache()  # weights cast without gradient would have none
        with torch.enable_grad():
            last = hidden_states(without_adapters(model), lay_out([Row(prompt, ())]), keep=keep)[-1:]
        model.train(training)
        self._kept[tuple(prompt)] = found = Prefill(keep, last)
        return found

    def take(self, rows: Sequence[Row]) -> list[Prefill]:
        """What each row's prompt came to, or nothing where one was not kept. Nothing is kept from here on."""
        kept, self._kept = self._kept, {}
        found = [kept[tuple(row.prompt)] for row in rows if tuple(row.prompt) in kept]
        if len(found) < len(rows):
            found = []
        self.used = sum(len(row.prompt) for row in rows) if found else 0
        if found and not self._said:
            self._said = True
            logger.info("prompts go through the selector once for sampling and training (reuse_sampling_pass)")
        return found

    def drop(self) -> None:
        """Let go of what is kept: it is read again."""
        self._kept, self.used = {}, 0

    @property
    def holds(self) -> bool:
        """Whether something is kept, or was taken by the last pass."""
        return bool(self._kept or self.used)

    def give_up(self) -> bool:
        """Keep nothing from here on, where that may be why memory ran out. Returns whether it may."""
        held = self.holds
        if held:
            self.drop()
            self.wanted = False
            free()
            logger.warning("out of memory: prompts are read again to train from here on (reuse_sampling_pass)")
        return held
