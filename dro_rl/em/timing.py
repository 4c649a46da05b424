"""Where the time of a run goes: seconds, tokens and operations of each phase."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from dro_rl.likelihood import without_adapters

PEAK_FLOPS = {
    "A100": 312e12, "A10": 125e12, "A30": 165e12, "B200": 2250e12, "GH200": 989e12, "H100": 989e12, "H200": 989e12,
    "H20": 148e12, "L4": 121e12, "L40S": 362e12, "V100": 125e12,
}  # fmt: skip
"""Dense 16-bit operations a second, as the makers of the cards state them (SXM variants where there are several)."""


now = time.perf_counter
"""Seconds, from some beginning: what phases are timed by."""


@dataclass
class Phase:
    """What one phase took: seconds, tokens that went through its model, floating-point operations of its weights."""

    seconds: float = 0.0
    tokens: int = 0
    flops: float = 0.0

    def __iadd__(self, other: Phase) -> Phase:
        self.seconds += other.seconds
        self.tokens += other.tokens
        self.flops += other.flops
        return self


@dataclass
class PhaseClock:
    """Gives every second to exactly one phase: the innermost one that is open, or `other`.

    Args:
        device: waited for at each change of phase, so that what it computes counts where it was asked for.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    now: str = "other"
    since: float = field(default_factory=lambda: now())
    recent: dict[str, Phase] = field(default_factory=lambda: defaultdict(Phase))
    """Since the last log."""
    total: dict[str, Phase] = field(default_factory=lambda: defaultdict(Phase))
    """Of all logs before."""
    failed: str | None = None
    """In which phase the error arose that is on its way up."""

    def switch(self, name: str) -> str:
        """Give the seconds since the last change to the phase that was open; return its name and open another."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        before, moment = self.now, now()
        self.recent[before].seconds += moment - self.since
        self.now, self.since = name, moment
        return before

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The block is of this phase, but for phases opened within."""
        before = self.switch(name)
        try:
            yield
        except BaseException:
            self.failed = self.failed or self.now
            raise
        finally:
            self.switch(before)

    def count(self, name: str, tokens: int, flops: float) -> None:
        """Add work done in a phase."""
        self.recent[name].tokens += tokens
        self.recent[name].flops += flops

    def flush(self) -> dict[str, Phase]:
        """What each phase took since the last flush."""
        self.switch(self.now)
        recent, self.recent = dict(self.recent), defaultdict(Phase)
        for name, phase in recent.items():
            self.total[name] += phase
        return recent


class Flops(NamedTuple):
    """Operations a token, of the weights: in a forward pass, and in a training step of forward and backward."""

    forward: float
    step: float


def flops_per_token(model: Any) -> Flops:
    """Two a weight in a forward pass, as many for the gradient of what comes in, and of the weight where it trains.

    Embeddings look up and the head sees completions alone, so neither counts; attention and recomputation do not
    either.
    """
    plain = without_adapters(model)
    embeddings = {id(parameter) for parameter in plain.get_input_embeddings().parameters()}
    weights = [parameter for parameter in plain.base_model.parameters() if id(parameter) not in embeddings]
    forward = 2.0 * sum(weight.numel() for weight in weights)
    return Flops(forward, 2 * forward + 2.0 * sum(weight.numel() for weight in weights if weight.requires_grad))


def peak_flops(device: torch.device) -> float | None:
    """16-bit operations a second that the card can do; None where that is not known."""
    card = known_card(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if card is None else PEAK_FLOPS[card]


def known_card(name: str) -> str | None:
    """The entry of `PEAK_FLOPS` that a card's name, as its driver or a user writes it, belongs to."""
    words = name.upper().replace("-", " ").split()
    return next((card for card in PEAK_FLOPS if card in words), None)


def rates(phases: dict[str, Phase], peak: float | None) -> dict[str, float]:
    """The log's numbers: `time/<phase>` in seconds, `tokens_per_second/<phase>`, `mfu/<phase>` (0..1).

    Model FLOPs utilisation is of `flops_per_token`, over the peak of the device.
    """
    numbers: dict[str, float] = {}
    for name, phase in phases.items():
        numbers[f"time/{name}"] = round(phase.seconds, 4)
        if phase.tokens and phase.seconds:
            numbers[f"tokens_per_second/{name}"] = round(phase.tokens / phase.seconds, 1)
            if peak and phase.flops:
                numbers[f"mfu/{name}"] = round(phase.flops / phase.seconds / peak, 4)
    return numbers
