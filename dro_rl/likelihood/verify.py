"""Shared prefixes against the plain path, on a few of the run's own rows: values and gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dro_rl.errors import InputError, Phrase
from dro_rl.likelihood import Model, Scoring, row_logps, without_adapters
from dro_rl.likelihood.attention import takes_packed_rows
from dro_rl.likelihood.packing import Row

TOLERANCES = {torch.float32: (1e-3, 1e-2), torch.bfloat16: (0.25, 0.25), torch.float16: (0.1, 0.1)}
"""Nats of a token's log-probability, and the share of the gradient's norm, that rounding may account for.

A log-probability is the difference of numbers that grow with it, and so does its rounding: the nats are those of a
token that is certain, and as much again for each ten that one lies below zero. A pre-trained model asked for an answer
that it would never give is at -20 a token.
"""


@dataclass(frozen=True, slots=True)
class Difference:
    """Between the two paths: the largest of a token's log-probability, as nats of a certain one; of the gradient, over
    its norm."""

    logps: float
    gradients: float | None


def difference(model: Any, rows: Sequence[Row], scoring: Scoring, *, gradients: bool) -> Difference | None:
    """Score a few rows on both paths; None where there is only the plain one.

    Args:
        model: a causal LM, or what stands for one.
        rows: two of them are used, and two completions of each, so that the plain path has room.
        scoring: whether to share prefixes, and as a tree.
        gradients: compare gradients too: those of the first decoder layer, which errors in any later layer reach. They
            need the whole parameters here.
    """
    rows = [Row(row.prompt, row.completions[:2], row.allowed and row.allowed[:2]) for row in rows[:2]]
    longest = max(len(row.prompt) + len(completion) for row in rows for completion in row.completions)
    if not scoring.shared_prefix or not takes_packed_rows(model, longest):
        return None
    if not gradients:
        return Difference(_values(model, rows, scoring), None)
    layer = [
        parameter
        for parameter in without_adapters(model).get_decoder().layers[0].parameters()
        if parameter.requires_grad
    ]
    with _without_dropout(model):
        found = _values(model, rows, scoring)
        fast, plain = (
            torch.cat([g.flatten().float() for g in torch.autograd.grad(_weighed(model, rows, scoring, shared), layer)])
            for shared in (True, False)
        )
    return Difference(found, ((fast - plain).norm() / plain.norm().clamp(min=1e-12)).item())


def check(role: str, found: Difference, dtype: torch.dtype) -> None:
    """Raise `InputError` with the numbers when they are more than rounding in `dtype`."""
    nats, share = TOLERANCES[dtype]
    if found.logps <= nats and (found.gradients or 0.0) <= share:
        return
    gradients = "" if found.gradients is None else f", gradients by {found.gradients:.3g} of their norm"
    raise InputError(
        "verify_fast_path",
        Phrase(f"the {role}'s log-probabilities differ by {found.logps:.3g} nats{gradients}"),
        f"the shared-prefix path equals the plain one up to rounding ({nats:g} nats, {share:g})",
        "Set shared_prefix: off for this model, and report it.",
    )


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout) and module.training]
    for dropout in dropouts:
        dropout.eval()
    try:
        yield
    finally:
        for dropout in dropouts:
            dropout.train()


@torch.no_grad()
def _values(model: Model, rows: Sequence[Row], scoring: Scoring) -> float:
    shared, plain = (_logps(model, rows, scoring, shared) for shared in (True, False))
    return ((shared - plain).abs() / (1 + plain.abs() / 10)).max().item()


def _logps(model: Model, rows: Sequence[Row], scoring: Scoring, shared: bool) -> Tensor:
    scored = row_logps(model, rows, shared_prefix=shared, prefix_tree=scoring.prefix_tree)
    return torch.cat([logps for row in scored for logps in row])


def _weighed(model: Model, rows: Sequence[Row], scoring: Scoring, shared: bool) -> Tensor:
    """A sum with a different weight for each token, so that no two errors cancel."""
    logps = _logps(model, rows, scoring, shared)
    return (logps * torch.linspace(-1, 2, len(logps), device=logps.device)).sum()
