"""What happens between steps and between iterations: weights are looked at, dev is evaluated, checkpoints are due."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dro_rl.em.schedule import Schedule
from dro_rl.em.timing import PhaseClock
from dro_rl.records import Question


class Loop(Protocol):
    """What of the trainer is asked here."""

    schedule: Schedule
    clock: PhaseClock
    eval_questions: Sequence[Question] | None

    def check_weights(self, *, moved: bool = False) -> None: ...

    def evaluate_initially(self) -> None: ...

    def stalled(self) -> bool: ...


class Boundaries(TrainerCallback):
    """Evaluates before the first iteration and after each, saves, and stops when dev no longer improves.

    Times the optimizer too: only callbacks stand on both sides of it.

    Args:
        loop: the trainer.
        eval_iterations: iterations between two evaluations, each with a checkpoint.
    """

    def __init__(self, loop: Loop, eval_iterations: int) -> None:
        self.loop, self.eval_iterations = loop, eval_iterations

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.loop.check_weights()
        if self.loop.eval_questions is not None and not state.log_history:
            self.loop.evaluate_initially()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.loop.clock.switch("optimizer")

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.loop.check_weights(moved=True)
        self.loop.clock.switch("other")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        done, within = divmod(state.global_step, self.loop.schedule.steps_per_iteration)
        last = state.global_step == state.max_steps
        if last or (within == 0 and done % self.eval_iterations == 0):
            control.should_evaluate = self.loop.eval_questions is not None
            control.should_save = True
        return control

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if state.global_step and self.loop.stalled():
            control.should_training_stop = True
        return control
