"""The devices that a run is planned for: this machine's, or those that a user names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import psutil
import torch

from dro_rl.em.timing import PEAK_FLOPS, known_card
from dro_rl.errors import InputError

Sharding = Literal["none", "ddp", "zero2", "zero3", "fsdp2"]
"""How processes share the models, as the files of recipes/accelerate/ are called."""

BANDWIDTH = {
    "A100": 2.0e12, "A10": 0.6e12, "A30": 0.93e12, "B200": 8.0e12, "GH200": 4.0e12, "H100": 3.35e12, "H200": 4.8e12,
    "H20": 4.0e12, "L4": 0.3e12, "L40S": 0.86e12, "V100": 0.9e12,
}  # fmt: skip
"""Bytes a second from a card's memory, as the makers state them: what decoding waits for."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Devices of one kind.

    Args:
        kind: `cpu` or `cuda`.
        devices: how many, a process each.
        memory: bytes of one device; on a CPU those of the machine, which its processes share.
        card: the entry of `PEAK_FLOPS`; None where it is not known.
        here: whether it is this machine, where time can be measured.
    """

    kind: Literal["cpu", "cuda"]
    devices: int
    memory: int
    card: str | None
    here: bool

    @property
    def memory_of_a_process(self) -> int:
        """What one process may take."""
        return self.memory // self.devices if self.kind == "cpu" else self.memory


def machine(
    gpus: int | None = None,
    memory: str | None = None,
    card: str | None = None,
    *,
    on_cpu: bool = False,
    processes: int | None = None,
) -> Machine:
    """The devices that are named, else those of this machine.

    Args:
        gpus: their number; None: this machine's.
        memory: of one, as `80GB`.
        card: a name such as `H100`.
        on_cpu: whether the run keeps to the CPU whatever there is.
        processes: of a run on this machine; None: one a GPU, or one.

    Raises:
        InputError: a size or a card that means nothing, or GPUs without a size.
    """
    named = None if card is None else known_card(card)
    if card is not None and named is None:
        raise InputError("--card", card, f"this is one of {', '.join(PEAK_FLOPS)}", "Use the nearest.")
    size = None if memory is None else parse_size(memory)
    if gpus is None and card is None and (on_cpu or not torch.cuda.is_available()):
        return Machine("cpu", processes or 1, size or psutil.virtual_memory().total, None, here=True)
    if torch.cuda.is_available():
        there = torch.cuda.get_device_properties(0)
        own, size = known_card(there.name), size or there.total_memory
        known = named or own
        return Machine("cuda", gpus or processes or torch.cuda.device_count(), size, known, here=known == own)
    if size is None:
        raise InputError("--memory", None, "there is no GPU here to ask", "Say what one has: --memory 80GB.")
    return Machine("cuda", gpus or 1, size, named, here=False)


def parse_size(text: str) -> int:
    """Bytes of `80GB`, `80GiB`, `24g` or `512MB`: powers of 1,024, as the sizes of cards are meant."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([MGT])i?B?\s*", text, re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise InputError("--memory", text, "this is a size such as 80GB or 512MB", "Correct it.")
    return int(float(found[1]) * 1024 ** ("MGT".index(found[2].upper()) + 2))
