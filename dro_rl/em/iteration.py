"""An iteration's E-step on all processes: in parts, each shared, and kept where a killed run finds it again."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object

from dro_rl.config import DROConfig
from dro_rl.em.ahead import Ahead
from dro_rl.em.e_step import Asked, EStep
from dro_rl.em.schedule import Schedule
from dro_rl.em.temperature import guarded_temperature, repeated_share
from dro_rl.em.ties import asked_again, tied
from dro_rl.progress import Progress
from dro_rl.proposal import rollout_seed
from dro_rl.records import Question, Rollout, Sample
from dro_rl.rollouts import log as rollout_log

logger = logging.getLogger(__name__)

QUESTIONS_PER_PART = 128
"""Questions a process whose rollouts are computed and written together: what a kill in an E-step can cost."""


@dataclass(frozen=True, slots=True)
class Rollouts:
    """What an E-step gives, equal on every process.

    Args:
        iteration: 0-based.
        groups: the m samples of each of the iteration's questions, by position. Weighed (`Rollout`) or, where the first
            pass of the M-step weighs them, not yet.
        on_policy: whether they were drawn from the policy that weighs them.
        staleness: updates between the weights that sampled and those that train on them first.
    """

    iteration: int
    groups: Sequence[Sequence[Sample]]
    on_policy: bool
    staleness: int = 0

    @property
    def weighed(self) -> bool:
        """Whether weights are known."""
        return all(isinstance(sample, Rollout) for group in self.groups for sample in group)

    def at(self, positions: Sequence[int]) -> list[list[Rollout]]:
        """The weighed groups of some questions."""
        return [[sample for sample in self.groups[place] if isinstance(sample, Rollout)] for place in positions]


class Iterations:
    """Runs the E-step of one iteration after another.

    Args:
        schedule: which questions an iteration has.
        questions: the training set.
        e_step: makes rollouts of questions.
        run_dir: where the log is.
        config: seed, temperatures, processes.
        fused: the M-step's forward passes weigh the rollouts, so they come as they were sampled.
    """

    def __init__(
        self,
        schedule: Schedule,
        questions: Sequence[Question],
        e_step: EStep,
        run_dir: Path,
        config: DROConfig,
        *,
        fused: bool,
    ) -> None:
        self.schedule, self.questions, self.run_dir, self.config = schedule, questions, run_dir, config
        self.e_step, self.fused = e_step, fused
        self._main = config.process_index == 0
        self._ahead: Ahead | None = None

    def begin(self, iteration: int, step: int, before: Rollouts | None) -> Rollouts:
        """The E-step of an iteration, after `step` updates: parts that are in the log are read, others are made.

        Args:
            before: the rollouts of the iteration before, where they are at hand.
        """
        ahead = self._ahead if self._ahead is not None and self._ahead.iteration == iteration else None
        temperature = self._temperature(iteration, before) if ahead is None else ahead.temperature
        parts = self._parts(iteration, temperature)
        count = sum(len(part.indices) for part in parts)
        bars, quiet = not self.config.disable_tqdm, len(parts) == 1 or not self._main
        samples: list[Any] = []
        on_policy = self.e_step.engine.samples_policy(replace(self.e_step.method.sampling, temperature=temperature))
        with Progress(count, f"iteration {iteration + 1}, rollouts", bars=bars, quiet=quiet) as progress:
            for number, part in enumerate(parts):
                again = sum(sample.draw - 1 for sample in samples[:: self.config.num_generations])
                known = self._logged(iteration, number, part)
                samples += known or self._part(iteration, number, part, step, ahead, again)
                progress.update(len(part.indices))
        if self._main:  # cut otherwise, by a run with another number of processes
            for leftover in rollout_log.part_paths(self.run_dir, iteration + 1)[len(parts) :]:
                leftover.unlink()
        rollouts = Rollouts(iteration, self._grouped(samples), on_policy)
        self._say_what_tied(rollouts)
        if ahead is not None:
            rollouts = replace(rollouts, on_policy=False, staleness=step - ahead.step)
        if self.config.overlap_rollouts and iteration + 1 < self.config.num_iterations:
            following = self._parts(iteration + 1, self._temperature(iteration + 1, rollouts))
            self._ahead = Ahead.start(self.e_step, iteration + 1, step, [self._mine(part) for part in following])
        return rollouts

    def weighed(self, rollouts: Rollouts, done: Mapping[int, Rollout]) -> Rollouts:
        """Fresh rollouts as the step's forward passes weighed them: shared, and written.

        Args:
            done: by slot, the step's rollouts that went through this process.
        """
        everything = {slot: rollout for part in gather_object([dict(done)]) for slot, rollout in part.items()}
        found = [everything[slot] for slot in range(len(everything))]
        self._write(rollouts.iteration, 0, self._parts(rollouts.iteration, 0.0)[0], found)
        return replace(rollouts, groups=self._grouped(found))

    def close(self) -> None:
        """Wait for rollouts in flight, which early stopping leaves, and end the engines' part in the run."""
        if self._ahead is not None:
            self._ahead.wait()
            self._ahead = None
        self.e_step.engine.close()
        self.e_step.answerer.close()

    def _parts(self, iteration: int, temperature: float) -> list[Asked]:
        """An iteration in parts that are shared and written together: one, where the step's passes weigh them."""
        indices, seed = self.schedule.questions(iteration), self.config.seed
        size = len(indices) if self.fused else QUESTIONS_PER_PART * self.config.world_size
        return [
            Asked(
                indices[first : first + size],
                [self.questions[index] for index in indices[first : first + size]],
                [rollout_seed(seed, iteration, i) for i in range(first, min(first + size, len(indices)))],
                temperature,
            )
            for first in range(0, len(indices), size)
        ]

    def _grouped(self, samples: Sequence[Sample]) -> list[Sequence[Sample]]:
        m = self.config.num_generations
        return [samples[first : first + m] for first in range(0, len(samples), m)]

    def _mine(self, part: Asked) -> Asked:
        """What falls to this process: one question in `world_size`."""
        own = slice(self.config.process_index, None, self.config.world_size)
        return replace(part, indices=part.indices[own], questions=part.questions[own], seeds=part.seeds[own])

    def _logged(self, iteration: int, number: int, part: Asked) -> list[Rollout] | None:
        """A part that a killed run left whole."""
        kept: list[Any] = [None]
        path = rollout_log.part_path(self.run_dir, iteration + 1, number)
        if self._main and path.is_file():
            found = rollout_log.to_rollouts(rollout_log.read([path]))
            first = found[:: self.config.num_generations]
            others = set(self.schedule.others(iteration)) if self.config.resample_ties == "replace" else set()
            if len(first) == len(part.indices) and all(
                rollout.question in (others if rollout.draw > 1 and others else {index})
                for rollout, index in zip(first, part.indices, strict=True)
            ):
                kept[0] = found
        return broadcast_object_list(kept)[0]

    def _part(self, iteration: int, number: int, part: Asked, step: int, ahead: Ahead | None, again: int) -> list[Any]:
        """One part of an E-step: sampled, weighed unless the M-step's passes do, shared and written.

        Args:
            again: draws beyond the first that the parts before took.
        """
        groups = self._drawn(part, step, number, ahead)
        if self.config.resample_ties != "none":
            self._resample(iteration, part, groups, step, again)
        everything = [sample for group in groups for sample in group]
        if not self.fused:
            self._write(iteration, number, part, everything)
        return everything

    def _resample(self, iteration: int, part: Asked, groups: list[Any], step: int, again: int) -> None:
        """Draw once more for the places that tie, until none does or the rounds are over."""
        replaces = self.config.resample_ties == "replace"
        others = self.schedule.others(iteration)[again:] if replaces else []
        for draw in range(2, self.config.resample_rounds + 2):
            places = tied(groups, self.questions)
            if replaces:
                places = places[: len(others)]
                indices, others = others[: len(places)], others[len(places) :]
            else:
                indices = [part.indices[place] for place in places]
            if not places:
                return
            drawn = self._drawn(asked_again(part, places, indices, self.questions, draw), step)
            for place, group in zip(places, drawn, strict=True):
                groups[place] = [replace(rollout, draw=draw) for rollout in group]

    def _say_what_tied(self, rollouts: Rollouts) -> None:
        if self._main and self.config.resample_ties != "none":
            again = sum(group[0].draw > 1 for group in rollouts.groups)
            still = len(tied(rollouts.at(range(len(rollouts.groups))), self.questions))
            logger.info(
                f"iteration {rollouts.iteration + 1}: {again} of {len(rollouts.groups)} places tied and were drawn "
                f"again (resample_ties: {self.config.resample_ties}); {still} still tie"
            )

    def _drawn(self, asked: Asked, step: int, number: int = 0, ahead: Ahead | None = None) -> list[Any]:
        """The groups of some questions, in order, on every process: each samples and weighs its share."""
        mine, m, clock = self._mine(asked), self.config.num_generations, self.e_step.clock
        if ahead is None:
            sampled = self.e_step.sample(mine, step)
        else:
            with clock.phase("rollout"):
                sampled = ahead.samples(self.e_step, number, mine)
        own = sampled.samples if self.fused else self.e_step.weigh(mine, sampled)
        with clock.phase("rollout"):  # until the slowest process is there
            world, rank = self.config.world_size, self.config.process_index
            groups = gather_object([(n * world + rank, own[n * m : (n + 1) * m]) for n in range(len(mine.indices))])
        return [group for _, group in sorted(groups, key=lambda item: item[0])]

    def _write(self, iteration: int, number: int, part: Asked, rollouts: Sequence[Rollout]) -> None:
        if self._main:
            step, m = self.schedule.steps_per_iteration * iteration, self.config.num_generations
            first = number * QUESTIONS_PER_PART * self.config.world_size
            rollout_log.write(
                rollout_log.to_table(rollouts, self.questions, iteration + 1, step, first, m),
                rollout_log.part_path(self.run_dir, iteration + 1, number),
            )

    def _temperature(self, iteration: int, before: Rollouts | None) -> float:
        """What an iteration is sampled at. The guard goes by the iteration before: from memory, or from the log."""
        found = [0.0]
        if self._main:
            known: Sequence[Sequence[Sample]] = ()
            if self.config.duplicate_threshold is not None:
                if before is not None and before.iteration == iteration - 1:
                    known = before.groups
                else:
                    logged = rollout_log.read(rollout_log.part_paths(self.run_dir, iteration))
                    known = self._grouped(rollout_log.to_rollouts(logged))
            found[0] = guarded_temperature(self.config, iteration, known)
            if known and found[0] != known[0][0].temperature:
                repeated = repeated_share(known)
                logger.info(
                    f"iteration {iteration + 1}: temperature {known[0][0].temperature:.3g} -> {found[0]:.3g}, after "
                    f"{repeated:.0%} of the rollouts repeated another "
                    f"(duplicate_threshold: {self.config.duplicate_threshold})"
                )
        return broadcast_object_list(found)[0]
