"""The rollouts of an iteration: sampled, shared by all processes, and kept where a killed run finds them again."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from dro_rl.config import DROConfig
from dro_rl.em.e_step import EStep
from dro_rl.em.schedule import Schedule
from dro_rl.em.temperature import guarded_temperature, repeated_share
from dro_rl.em.timing import PhaseClock
from dro_rl.engines.protocol import RolloutEngine
from dro_rl.proposal import Completion, rollout_seed
from dro_rl.records import Question, Rollout
from dro_rl.rollouts import log as rollout_log

logger = logging.getLogger(__name__)

QUESTIONS_PER_PART = 128
"""Questions a process whose rollouts are computed and written together: what a kill in an E-step can cost."""


@dataclass(frozen=True, slots=True)
class _Ahead:
    """An iteration that is being sampled while the one before it trains: by weights of `step` updates, in parts."""

    iteration: int
    step: int
    temperature: float
    parts: Sequence[Future[list[list[Completion]]]]


class IterationRollouts:
    """One iteration's rollouts at a time, equal on every process.

    Args:
        schedule: which questions an iteration has.
        questions: the training set.
        e_step: makes rollouts of questions.
        open_engine: opens the rollout engine.
        run_dir: where the log is.
        args: the settings.
        clock: told what takes time.
        fused: the step's forward passes weigh the rollouts, so they come as they were sampled.
    """

    def __init__(
        self,
        schedule: Schedule,
        questions: Sequence[Question],
        e_step: EStep,
        open_engine: Callable[[], AbstractContextManager[RolloutEngine]],
        run_dir: Path,
        args: DROConfig,
        clock: PhaseClock,
        *,
        fused: bool,
    ) -> None:
        self.schedule, self.questions, self.run_dir, self.args = schedule, questions, run_dir, args
        self.clock, self.fused, self._e_step, self._open_engine = clock, fused, e_step, open_engine
        self.on_policy = True
        """Whether rollouts that are not weighed yet were drawn from the policy."""
        self.staleness = 0
        """Updates between the weights that sampled the rollouts in use and those that they train first."""
        self._main = args.process_index == 0
        self._iteration: int | None = None
        self._rollouts: list[Rollout] = []
        self._ahead: _Ahead | None = None

    def of(self, iteration: int, step: int) -> list[Rollout]:
        """An iteration's rollouts, by slot: from memory, from the log, or sampled now, after `step` updates."""
        if self._iteration != iteration:
            indices = self.schedule.questions(iteration)
            ahead = self._ahead if self._ahead is not None and self._ahead.iteration == iteration else None
            temperature = self._temperature(iteration) if ahead is None else ahead.temperature
            self.staleness = 0 if ahead is None else step - ahead.step
            size = self._part_size(len(indices))
            quiet = self.args.disable_tqdm or len(indices) <= size or not self._main
            self._rollouts = []
            with tqdm(total=len(indices), desc=f"iteration {iteration + 1}: rollouts", unit="q", disable=quiet) as bar:
                for part, first in enumerate(range(0, len(indices), size)):
                    sampled = None if ahead is None else ahead.parts[part].result
                    some = indices[first : first + size]
                    self._rollouts += self._part(iteration, part, first, some, temperature, sampled)
                    bar.update(min(size, len(indices) - first))
            if self._main:  # cut otherwise, by a run with another number of processes
                count = -(-len(indices) // size)
                for leftover in rollout_log.part_paths(self.run_dir, iteration + 1)[count:]:
                    leftover.unlink()
            self._iteration = iteration
            if self.args.overlap_rollouts and iteration + 1 < self.args.num_iterations:
                self._ahead = self._sample_ahead(iteration + 1, step)
        return self._rollouts

    def _part_size(self, questions: int) -> int:
        """Questions whose rollouts are shared and written together: all, where the step's passes weigh them."""
        return questions if self.fused else QUESTIONS_PER_PART * self.args.world_size

    def _sample_ahead(self, iteration: int, step: int) -> _Ahead:
        """Ask the servers for an iteration's rollouts with the weights of now, while the one before it trains."""
        indices, temperature = self.schedule.questions(iteration), self._temperature(iteration)
        size = self._part_size(len(indices))
        parts, pool = [], ThreadPoolExecutor(1, "rollouts")
        with self._open_engine() as engine:
            for first in range(0, len(indices), size):
                mine = range(self.args.process_index, min(size, len(indices) - first), self.args.world_size)
                request, _ = self._e_step.request(
                    [self.questions[indices[first + i]] for i in mine],
                    [rollout_seed(self.args.seed, iteration, first + i) for i in mine],
                    temperature,
                )
                parts.append(pool.submit(engine.generate, *request))
        pool.shutdown(wait=False)  # it ends with its last part
        return _Ahead(iteration, step, temperature, parts)

    def _temperature(self, iteration: int) -> float:
        """What an iteration is sampled at. The guard goes by the iteration before: from memory, or from the log."""
        found = [0.0]
        if self._main:
            before: Sequence[Rollout] = ()
            if self.args.duplicate_threshold is not None:
                known = self._iteration == iteration - 1
                logged = rollout_log.part_paths(self.run_dir, iteration)  # 1-based there
                before = self._rollouts if known else rollout_log.to_rollouts(rollout_log.read(logged))
            found[0] = guarded_temperature(self.args, iteration, before)
            if before and found[0] != before[0].temperature:
                repeated = repeated_share(before, self.args.num_generations)
                logger.info(
                    f"iteration {iteration + 1}: temperature {before[0].temperature:.3g} -> {found[0]:.3g}, after "
                    f"{repeated:.0%} of the rollouts repeated another "
                    f"(duplicate_threshold: {self.args.duplicate_threshold})"
                )
        return broadcast_object_list(found)[0]

    def _part(
        self,
        iteration: int,
        part: int,
        first: int,
        indices: list[int],
        temperature: float,
        sampled: Callable[[], list[list[Completion]]] | None,
    ) -> list[Rollout]:
        """One part of an E-step: read where a killed run left it whole, else sampled, shared and written.

        Where the E-step is fused with the M-step, rollouts are shared as they were sampled, and written when the
        step's forward passes have weighed them.
        """
        kept: list[Any] = [None]
        path = rollout_log.part_path(self.run_dir, iteration + 1, part)
        if self._main and path.is_file():
            found = rollout_log.to_rollouts(rollout_log.read([path]))
            if [rollout.question for rollout in found[:: self.args.num_generations]] == indices:
                kept[0] = found
        if broadcast_object_list(kept)[0] is not None:
            return kept[0]
        rank, world = self.args.process_index, self.args.world_size
        mine = range(rank, len(indices), world)
        numbers, m = [indices[i] for i in mine], self.args.num_generations
        questions = [self.questions[number] for number in numbers]
        seeds = [rollout_seed(self.args.seed, iteration, first + i) for i in mine]
        with self.clock.phase("rollout"):
            given = None if sampled is None else sampled()
        if self.fused:
            rollouts, self.on_policy = self._e_step.sample(numbers, questions, seeds, temperature, given)
        else:
            rollouts = self._e_step(numbers, questions, seeds, temperature, given)
        with self.clock.phase("rollout"):  # until the slowest process is there
            groups = gather_object([(i, rollouts[n * m : (n + 1) * m]) for n, i in enumerate(mine)])
        everything = [rollout for _, group in sorted(groups, key=lambda item: item[0]) for rollout in group]
        if not self.fused:
            self._write_part(iteration, part, first, everything)
        return everything

    def weighed(self, iteration: int, step: int, done: Mapping[int, Rollout]) -> list[Rollout]:
        """The iteration's rollouts after a step, by slot; fresh ones as the forward passes weighed them.

        Args:
            iteration, step: as in `of`.
            done: by slot, the step's rollouts that went through this process. Those of all are shared and written.
        """
        rollouts = self.of(iteration, step)
        if any(math.isnan(rollout.weight) for rollout in rollouts):
            everything = {slot: rollout for part in gather_object([dict(done)]) for slot, rollout in part.items()}
            self._rollouts = rollouts = [everything[slot] for slot in range(len(rollouts))]
            self._write_part(iteration, 0, 0, rollouts)
        return rollouts

    def close(self) -> None:
        """Wait for rollouts in flight, which early stopping leaves: they read the weights' folder."""
        if self._ahead is not None:
            wait(self._ahead.parts)
            self._ahead = None

    def _write_part(self, iteration: int, part: int, first: int, rollouts: Sequence[Rollout]) -> None:
        if self._main:
            step, m = self.schedule.steps_per_iteration * iteration, self.args.num_generations
            rollout_log.write(
                rollout_log.to_table(rollouts, self.questions, iteration + 1, step, first, m),
                rollout_log.part_path(self.run_dir, iteration + 1, part),
            )
