"""Activations in the CPU's memory between forward and backward, by TRL's own manager."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from trl.models import get_act_offloading_ctx_manager

from dro_rl.models.module import SelectorGenerator


def offloading(model: SelectorGenerator) -> AbstractContextManager[Any]:
    """Within it, what a backward pass needs of a forward pass leaves the accelerator and comes back for it.

    Weights stay, and so does what a head is given: its backward pass comes at once. Enter it anew for each pass,
    forward and backward together.
    """
    managers = [get_act_offloading_ctx_manager(getattr(model, role)) for role in model.roles]
    managers[0].update_model_params(model)  # one keeps the activations of both; the others have marked their heads
    found: AbstractContextManager[Any] = managers[0]
    return found
