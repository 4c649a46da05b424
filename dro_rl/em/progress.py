"""What a training says while it runs: a readable line a log, and its signals when they appear and are over."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from dro_rl.config import DROConfig
from dro_rl.em.schedule import Schedule
from dro_rl.evaluation.stages import read_stages, recalls
from dro_rl.progress import Progress, how_far, on_terminal
from dro_rl.records import Question
from dro_rl.rollouts import read, signals
from dro_rl.rollouts.diagnostics import Summary
from dro_rl.rollouts.signals import Estimate, Iteration, Signal

logger = logging.getLogger(__name__)


def _columns(recall: str) -> tuple[tuple[str, str, str], ...]:
    """What a line says: a metric, its label, its form."""
    return (
        ("evidence_bound", "bound", ".2f"),
        ("ess", "ess", ".1f"),
        ("answer_logp", "answer", ".2f"),
        (recall, recall, ".2f"),
        ("rollouts/valid", "valid", ".2f"),
        ("rollouts/clean", "clean", ".2f"),
    )


PATIENCE = 3
"""Iterations that a signal is quiet for before it is over."""


class SignalWatch(TrainerCallback):
    """Follows a run's signals from iteration to iteration: says each once when it appears and once when it is over.

    A signal is over when it has been quiet for as many iterations as its window holds, and for `PATIENCE` of them, so
    that a value about its limit does not come and go.

    Args:
        schedule: what the run holds.
        run_dir: where its log is, for a run that goes on.
        metric: the dev metric that chooses the best iteration, in percent; None where none does, or its unit is nats.
        speaks: this process says what is found.
    """

    def __init__(self, schedule: Schedule, run_dir: Path, metric: str | None = None, *, speaks: bool = True) -> None:
        self.schedule, self.run_dir, self.metric, self.speaks = schedule, run_dir, metric, speaks
        self.history: list[Iteration] = []
        self.found: list[Signal] = []
        """Every signal after the last iteration, fired or not."""
        self.spans: dict[str, list[tuple[int, int | None]]] = {}
        """By name, the iterations in which a signal appeared and was over; None for one that stands."""
        self._fired: dict[str, int] = {}  # the last iteration in which each that stands did

    @property
    def standing(self) -> list[Signal]:
        """The signals that have appeared and are not over."""
        return [signal for signal in self.found if signal.rule.name in self._fired]

    def end_iteration(self, number: int, rollouts: Summary, engine_difference: float = math.nan) -> dict[str, float]:
        """Judge the run after one more iteration.

        Args:
            number: 1-based.
            rollouts: the figures of all its rollouts.
            engine_difference: mean |log p − log q| of what was sampled plainly, nats a token; NaN where not compared.

        Returns:
            For the step log: `signals/<name>`, 1 for those that stand and 0 for the others.

        Raises:
            InputError: no rollout of a whole window names a document, so there is nothing to go on for.
        """
        step = self.schedule.steps_per_iteration * (number - 1)
        self._take(Iteration(number, step, step, rollouts, engine_difference))
        signals.refuse_hopeless(self.history)
        return {f"signals/{signal.rule.name}": float(signal.rule.name in self._fired) for signal in self.found}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take note of the iterations before, of a run that goes on. Nothing is said of them again."""
        done = self.schedule.iteration(state.global_step)
        if self.history or not done:
            return
        stages = {stage["stage"]: stage for stage in read_stages(self.run_dir)}
        speaks, self.speaks = self.speaks, False
        for iteration in read.history(self.run_dir):
            if iteration.number <= done:
                self._take(iteration)
                self._evaluated(stages.get(f"iteration-{iteration.number}", {}))
        self.speaks = speaks

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Dev has been evaluated, after the last iteration unless it had been before."""
        self._evaluated({name.removeprefix("eval_"): value for name, value in (metrics or {}).items()})

    def _evaluated(self, means: Mapping[str, Any]) -> None:
        value, count = means.get(self.metric or ""), means.get("n")
        if value is not None and count and self.history and self.history[-1].dev is None:
            share = min(max(value / 100, 0.0), 1.0)
            error = 100 * (share * (1 - share) / count) ** 0.5  # no share of this mean varies more
            self.history[-1] = replace(self.history[-1], dev=Estimate(value, error))
            self._judge()

    def _take(self, iteration: Iteration) -> None:
        self.history.append(iteration)
        self._judge()

    def _judge(self) -> None:
        self.found, number = signals.of_iteration(self.history), self.history[-1].number
        for signal in self.found:
            name, standing = signal.rule.name, signal.rule.name in self._fired
            if signal.fired:
                self._fired[name] = number
                if not standing:
                    self.spans.setdefault(name, []).append((number, None))
                    self._say(f"{signals.reading(signal)}. {signal.rule.meaning} {signal.rule.advice}")
            elif standing and number - self._fired[name] >= max(1 + number - signal.first_iteration, PATIENCE):
                del self._fired[name]
                self.spans[name][-1] = (self.spans[name][-1][0], number)
                self._say(f"{signals.reading(signal)} is over.")

    def _say(self, what: str) -> None:
        if self.speaks:
            logger.warning(f"iteration {self.history[-1].number}: signal: {what}")


class SupervisedProgress(TrainerCallback):
    """How far a supervised warm-up is, and its loss at each log.

    Args:
        what: as a line begins: `warm-up of the selector`.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._progress: Progress | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._progress = Progress(
            state.max_steps,
            self._what,
            "steps",
            bars=not args.disable_tqdm,
            quiet=not state.is_world_process_zero,
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self._progress is not None
        self._progress.update(1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._progress is not None and logs and "loss" in logs:
            self._progress.note(f"loss {float(logs['loss']):.3f}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self._progress is not None
        self._progress.close()


class LineProgress(ProgressCallback):
    """One readable line a log in place of a dictionary of every metric, below the stock bar where there is a terminal.

    Elsewhere, and under `disable_tqdm`, the lines say how far the run is, and so does the end of each iteration of
    several steps.

    Args:
        schedule: what the run holds.
        watch: the signals that stand are named in each line.
    """

    def __init__(self, schedule: Schedule, watch: SignalWatch) -> None:
        super().__init__()
        self.schedule, self.watch = schedule, watch
        self._began, self._first = 0.0, 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began, self._first = time.monotonic(), state.global_step
        if self._draws(args):
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._draws(args):
            super().on_step_end(args, state, control, **kwargs)
        elif state.is_world_process_zero and self._ends_long_iteration(state):
            self._write(f"{self._where(state)}  {self._how_far(state)}{self._named()}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._draws(args):
            super().on_train_end(args, state, control, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        recall = recalls(cast(DROConfig, args).spec.most)[-1]
        if "loss" in logs:
            took = {name: value for name, value in logs.items() if name.startswith("time/")}
            seconds = sum(took.values()) - took.get("time/evaluation", 0.0)
            parts = [f"loss {logs['loss']:.3f}"]
            parts += [f"{label} {logs[name]:{form}}" for name, label, form in _columns(recall) if name in logs]
            far = [] if self._draws(args) else [self._how_far(state)]
            self._write(f"{self._where(state)}  {'  '.join([*parts, f'{seconds:.1f} s', *far])}{self._named()}")
        elif "eval_em" in logs:
            known = [name for name in (f"eval_{recall}", "eval_valid") if logs.get(name) is not None]
            parts = [f"{name.removeprefix('eval_')} {logs[name]:.1f}" for name in ("eval_em", "eval_f1", *known)]
            self._write(f"{self._where(state)}  dev: {'  '.join(parts)}")

    def _draws(self, args: TrainingArguments) -> bool:
        return not args.disable_tqdm and on_terminal()

    def _ends_long_iteration(self, state: TrainerState) -> bool:
        """Whether an iteration has ended; not where each log does."""
        steps = self.schedule.steps_per_iteration
        return steps > 1 and state.global_step % steps == 0

    def _write(self, line: str) -> None:
        if self.training_bar is None:
            print(line, flush=True)
        else:
            self.training_bar.write(line)

    def _where(self, state: TrainerState) -> str:
        iteration = -(-state.global_step // self.schedule.steps_per_iteration)
        return f"iteration {iteration}/{self.schedule.num_iterations}  step {state.global_step}/{state.max_steps}"

    def _how_far(self, state: TrainerState) -> str:
        """Questions, each as often as it is trained on."""
        a_step = self.schedule.questions_per_step
        seconds, here = time.monotonic() - self._began, state.global_step - self._first
        return how_far(state.global_step * a_step, state.max_steps * a_step, "questions", seconds, here * a_step)

    def _named(self) -> str:
        return "".join(f"  !{signal.rule.name}" for signal in self.watch.standing)


def say_at_the_start(args: DROConfig, questions: Sequence[Question]) -> None:
    """What of the settings is easily overlooked."""
    several = sum(len(question.answers) > 1 for question in questions)
    if several:
        logger.info(
            f"{several} of {len(questions)} questions have several accepted answers; "
            f"the likelihood takes answer_aliases: {args.answer_aliases}"
        )
    if args.sampling.truncates:
        logger.warning(
            "top_p, top_k and min_p leave out selections that p could write. The weights are right among those "
            "that can be drawn; how much of p these have is logged as sampling/ratio_mean"
        )
