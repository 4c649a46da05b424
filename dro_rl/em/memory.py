"""Memory: who holds what, what is still to come, and what a run ends with where it runs out."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dro_rl.errors import LackError, Phrase, as_size, first_line

TOKENS = "tokens_per_microbatch"
EVALUATION = "per_device_eval_batch_size"
KEYS = {"rollout": EVALUATION, "answers": EVALUATION, "evaluation": EVALUATION, "optimizer": "optim"}
"""Which key bounds what a phase takes; of all others it is `tokens_per_microbatch`."""
LESS = "Less is held with gradient_checkpointing, activation_offloading, adapters, share_base or quantization."
ALONE = f"Lower max_prompt_length or num_generations. {LESS}"
FIXES = {
    TOKENS: f"Lower it, or use auto in one process. {LESS}",
    EVALUATION: "Lower it: that many sequences are written at a time.",
    "optim": "Use adamw_8bit or paged_adamw_8bit, or adapters, which have little state.",
}
STATE_BYTES = {
    "adafactor": 0, "sgd": 0, "adagrad": 4, "rmsprop": 4, "adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_32bit": 0,
    "paged_adamw_8bit": 0,
}  # fmt: skip
"""Of each weight that trains, by optimizer; others have two numbers of four bytes. Paged ones can leave the device."""


def held(parts: Mapping[str, nn.Module | None], optimizer: torch.optim.Optimizer | None) -> dict[str, int]:
    """Bytes by who holds them; weights that several have in common count for the first."""
    seen: set[int] = set()

    def fresh(tensors: Iterable[Any]) -> int:
        count = 0
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                count += tensor.numel() * tensor.element_size()
        return count

    found = {name: fresh(part.parameters()) for name, part in parts.items() if part is not None}
    found["gradients"] = fresh(p.grad for part in parts.values() if part is not None for p in part.parameters())
    states = optimizer.state.values() if optimizer is not None else ()
    found["optimizer state"] = fresh(tensor for state in states for tensor in state.values())
    if torch.cuda.is_available():
        found["activations and the rest"] = max(0, torch.cuda.max_memory_allocated() - sum(found.values()))
    return found


def to_come(optimizer: torch.optim.Optimizer | None, name: str) -> int:
    """Bytes that an optimizer is going to hold from its first step on."""
    if optimizer is None or optimizer.state:
        return 0
    weights = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    return weights * state_bytes(name)


def state_bytes(optim: str) -> int:
    """Bytes that an optimizer keeps of each weight that it trains."""
    return STATE_BYTES.get(optim, 8)


class GiveBack(TrainerCallback):
    """After each step on a CPU, gives the system what the step has freed.

    glibc keeps it, in holes between what is held that the next step's tensors, of other lengths, do not fit: a process
    grows from step to step by what nobody uses.
    """

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.device.type == "cpu":
            give_back()


def give_back() -> None:
    """Give the system what has been freed, where the C library keeps it and can be asked."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def out_of_memory(
    error: BaseException, phase: str, value: Any, holders: Mapping[str, int], alone: Phrase | None = None
) -> LackError:
    """What a run ends with.

    Args:
        error: the library's.
        phase: what was being done.
        value: of the key that bounds it, by `KEYS`.
        holders: who held what.
        alone: what is not taken in parts, and how much it takes, where that is why.
    """
    key = KEYS.get(phase, TOKENS)
    said = ", ".join(f"{name} {as_size(size)}" for name, size in holders.items() if size)
    alone = alone if key == TOKENS else None
    return LackError(
        key,
        alone or getattr(value, "value", value),
        f"this has room in memory, in phase {phase}, beside {said} ({first_line(error)})",
        ALONE if alone else FIXES[key],
    )
