"""The names of what claims are about: of a dev split, of a step log, of a measurement of gradients."""

from __future__ import annotations

from dataclasses import fields

from dro_rl.evaluation.results import METRICS
from dro_rl.rollouts.diagnostics import RECALL_AT, Summary

TRAIN = "train/"
"""Before a name that the dev split has too, for what the rollouts of the training say."""


def _logged() -> tuple[str, ...]:
    names = []
    for item in fields(Summary):
        if name := item.metadata.get("log"):
            names += [f"{name}@{k}" for k in RECALL_AT] if str(item.type).startswith("dict") else [name]
    return tuple(TRAIN + name if name in METRICS else name for name in names)


LOGGED = _logged()
"""Figures of an iteration's rollouts, by the names of the step log: shares 0..1, nats."""
GRADIENTS = (
    "gradient_variance", "gradient_variance_within", "gradient_norm", "gradient_variance@rollouts",
    "gradient_variance@tokens", "gradient_noise@rollouts", "gradient_noise@tokens", "tokens",
)  # fmt: skip
"""What `dro-rl study gradients` measures: see `dro_rl.study.gradients.Moments`."""
RESULT = "gradients.json"
"""In the folder of such a measurement."""

__all__ = ["GRADIENTS", "LOGGED", "METRICS", "RESULT", "TRAIN"]
