"""Which questions each iteration and each step sees: a pure function of the seed, so that resuming needs no memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset, Sampler

from dro_rl.config import DROConfig


@dataclass(frozen=True)
class Schedule:
    """The order of a run.

    Iterations take `questions_per_iteration` questions each from an endless stream of shuffled passes over the training
    set, so every question is used equally often. Within an iteration each M-step epoch has an order of its own.

    Args:
        num_questions: size of the training set.
        questions_per_iteration, questions_per_step: the first is a multiple of the second.
        m_step_epochs, num_iterations, num_generations, seed: as in the recipe.
    """

    num_questions: int
    questions_per_iteration: int
    questions_per_step: int
    m_step_epochs: int
    num_iterations: int
    num_generations: int
    seed: int

    @classmethod
    def of(cls, args: DROConfig, processes: int, num_questions: int) -> Schedule:
        """The schedule that a run's settings mean for so many questions."""
        rollouts = args.per_device_train_batch_size * processes * args.gradient_accumulation_steps
        per_step = rollouts // args.num_generations
        return cls(
            num_questions=num_questions,
            questions_per_iteration=args.questions_per_iteration or num_questions // per_step * per_step,
            questions_per_step=per_step,
            m_step_epochs=args.m_step_epochs,
            num_iterations=args.num_iterations,
            num_generations=args.num_generations,
            seed=args.seed,
        )

    @property
    def steps_per_iteration(self) -> int:
        return self.m_step_epochs * self.questions_per_iteration // self.questions_per_step

    @property
    def total_steps(self) -> int:
        return self.num_iterations * self.steps_per_iteration

    def steps(self, max_steps: int) -> int:
        """Optimizer steps of a run that stops after so many, or does not (-1)."""
        return self.total_steps if max_steps < 0 else max_steps

    def iterations(self, steps: int) -> int:
        """E-steps that so many optimizer steps take."""
        return -(-steps // self.steps_per_iteration)

    def iteration(self, step: int) -> int:
        """0-based iteration of an optimizer step."""
        return step // self.steps_per_iteration

    def questions(self, iteration: int) -> list[int]:
        """Indices into the training set of an iteration's questions, by position."""
        first = iteration * self.questions_per_iteration
        wanted = range(first, first + self.questions_per_iteration)
        passes = {n: self._shuffled(self.num_questions, 0, n) for n in {i // self.num_questions for i in wanted}}
        return [int(passes[i // self.num_questions][i % self.num_questions]) for i in wanted]

    def others(self, iteration: int) -> list[int]:
        """The questions that an iteration does not have, in an order of their own: they may take places in it."""
        taken = set(self.questions(iteration))
        return [int(index) for index in self._shuffled(self.num_questions, 2, iteration) if int(index) not in taken]

    def positions(self, step: int) -> list[int]:
        """Positions in the iteration of the questions of a step."""
        iteration, within = divmod(step, self.steps_per_iteration)
        epoch, within = divmod(within, self.steps_per_iteration // self.m_step_epochs)
        order = self._shuffled(self.questions_per_iteration, 1, iteration, epoch)
        return order[within * self.questions_per_step :][: self.questions_per_step].tolist()

    def places(self, slots: Sequence[int]) -> dict[int, list[int]]:
        """Slots as the rollouts that they are: by the question's position in the iteration, places in its group."""
        found: dict[int, list[int]] = {}
        for slot in slots:
            found.setdefault(slot // self.num_generations, []).append(slot % self.num_generations)
        return found

    def ends_iteration(self, step: int) -> bool:
        """Whether a step is its iteration's last."""
        return (step + 1) % self.steps_per_iteration == 0

    def begins_iteration(self, step: int) -> bool:
        """Whether a step is its iteration's first: the weights are still those of the E-step."""
        return step % self.steps_per_iteration == 0

    def _shuffled(self, count: int, *key: int) -> np.ndarray:
        return np.random.default_rng([self.seed, *key]).permutation(count)


def fuses(args: DROConfig, schedule: Schedule, *, drops_out: bool) -> bool:
    """Whether one forward pass gives likelihoods, weights and losses.

    It does where that is what scoring first would give: when an iteration is a single step of both models (or several
    passes over one step's questions, of which the first is fresh), each question is whole on a process, no rollout is
    to be left out of the backward pass or drawn again, the reward is the likelihood, and no dropout disturbs the pass
    that weighs.
    """
    one_step = schedule.questions_per_iteration == schedule.questions_per_step
    return args.weighs_in_training and one_step and not drops_out


class Slots(Dataset[int]):
    """What the data loader carries: numbers. Slot `position * m + sample` is a rollout of the current iteration."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def __len__(self) -> int:
        return self.schedule.total_steps * self.schedule.questions_per_step * self.schedule.num_generations

    def __getitem__(self, slot: int) -> int:
        return slot


class SlotSampler(Sampler[int]):
    """Slots of a run in order, step by step; a group's rollouts stand together.

    Args:
        schedule: the order.
        steps: how many are drawn: a run that has stopped early, or had its `max_steps`, and is resumed draws no more.
    """

    def __init__(self, schedule: Schedule, steps: int | None = None) -> None:
        self.schedule = schedule
        self.steps = schedule.total_steps if steps is None else min(steps, schedule.total_steps)

    def __len__(self) -> int:
        return len(Slots(self.schedule))

    def __iter__(self) -> Iterator[int]:
        m = self.schedule.num_generations
        for step in range(self.steps):
            for position in self.schedule.positions(step):
                yield from range(position * m, (position + 1) * m)
