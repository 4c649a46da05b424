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


def guarded_temperature(config: DROConfig, iteration: int, before: Sequence[Sample]) -> float:
    """The temperature of an iteration, given the rollouts of the one before (none for the first)."""
    scheduled = scheduled_temperature(config, iteration)
    if config.duplicate_threshold is None or not before:
        return scheduled
    factor = before[0].temperature / scheduled_temperature(config, iteration - 1)
    repeated = repeated_share(before, config.num_generations)
    if repeated > config.duplicate_threshold:
        factor *= STEP
    elif repeated <= config.duplicate_threshold:  # not so where no rollout could repeat another (NaN)
        factor = max(factor / STEP, 1.0)
    return min(scheduled * factor, max(scheduled, config.temperature_max))


def repeated_share(rollouts: Sequence[Sample], m: int) -> float:
    """`duplicate_share` of rollouts in order, m of each question."""
    return duplicate_share([[r.selection for r in rollouts[i : i + m]] for i in range(0, len(rollouts), m)])
