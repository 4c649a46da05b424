"""The sampling temperature of an iteration: a schedule, and a guard that raises it when selections repeat.

Pure functions of the settings and of what the rollout log keeps, so that a resumed run needs no memory of its own. The
weights are corrected for whatever temperature was used: log q is stored at it.
"""

from __future__ import annotations

from collections.abc import Sequence

from dro_rl.config import DROConfig
from dro_rl.records import Sample
from dro_rl.rollouts.diagnostics import duplicate_share

STEP = 1.25
"""The guard multiplies the scheduled temperature by this once more after each iteration that repeats itself too often,
and once less after each that does not."""


def scheduled_temperature(config: DROConfig, iteration: int) -> float:
    """`temperature`, or the point of the straight line from it to `temperature_end` at a 0-based iteration."""
    if config.temperature_end is None or config.num_iterations == 1:
        return config.temperature
    share = min(iteration / (config.num_iterations - 1), 1.0)
    return (1 - share) * config.temperature + share * config.temperature_end


def guarded_temperature(config: DROConfig, iteration: int, before: Sequence[Sequence[Sample]]) -> float:
    """The temperature of an iteration, given the groups of the one before (none for the first)."""
    scheduled = scheduled_temperature(config, iteration)
    if config.duplicate_threshold is None or not before:
        return scheduled
    factor = before[0][0].temperature / scheduled_temperature(config, iteration - 1)
    repeated = repeated_share(before)
    if repeated > config.duplicate_threshold:
        factor *= STEP
    elif repeated <= config.duplicate_threshold:  # not so where no rollout could repeat another (NaN)
        factor = max(factor / STEP, 1.0)
    return min(scheduled * factor, max(scheduled, config.temperature_max))


def repeated_share(groups: Sequence[Sequence[Sample]]) -> float:
    """`duplicate_share` of the rollouts of some questions."""
    return duplicate_share([[rollout.selection for rollout in group] for group in groups])
