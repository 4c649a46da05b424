"""Stops a run at the first number that is not finite: nothing good follows, and nothing of it is exported."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from torch import nn

from dro_rl.errors import InputError, Phrase
from dro_rl.records import Rollout
from dro_rl.roles import Role
from dro_rl.runs import checkpoints_of


def refuse_nonfinite(value: float, what: str, role: Role, step: int, run: Path) -> None:
    """Raise `InputError` unless `value` is a number to go on from.

    Args:
        value: a loss, a norm or a log-probability.
        what: what errors call it.
        role: whose it is.
        step: optimizer steps that were taken before.
        run: the run's folder, whose last checkpoint is named.
    """
    if math.isfinite(value):
        return
    last = next((f"{place} is the last good checkpoint" for place in reversed(checkpoints_of(run))), None)
    raise InputError(
        f"step {step + 1}",
        Phrase(f"{what} of the {role} is {value}"),
        f"training goes on from finite numbers; {last or 'there is no checkpoint yet'}",
        f"Begin again in another output_dir with a lower {role}_learning_rate or learning_rate, or a lower "
        "max_grad_norm.",
    )


def largest(parameters: Iterable[nn.Parameter]) -> float:
    """The largest absolute value in this process's part of some parameters; NaN where there is one."""
    parts = [p.to_local() if hasattr(p, "to_local") else p for p in parameters]
    with torch.no_grad():
        return nn.utils.get_total_norm(
            [part for part in parts if part.numel() and part.is_floating_point()], norm_type=math.inf
        ).item()


def refuse_nonfinite_rollouts(rollouts: Iterable[Rollout], roles: Collection[Role], step: int, run: Path) -> None:
    """`refuse_nonfinite` for what the models that are here think of the rollouts that name a document."""
    for rollout in rollouts:
        if rollout.selection.valid:
            if "generator" in roles:
                refuse_nonfinite(rollout.answer_logp, "the answer's log-probability", "generator", step, run)
            refuse_nonfinite(rollout.selection_logp, "a selection's log-probability", "selector", step, run)
