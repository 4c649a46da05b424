"""Checkpoints: whole or absent, and enough to go on bit for bit.

A run's folder is its state: the newest whole `checkpoint-N`, and the logs of what led there. Knows files and steps;
what a model or an optimizer is, the trainer knows.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from accelerate import PartialState
from transformers import TrainerControl, TrainerState
from transformers.trainer_utils import rotate_checkpoints

from dro_rl.em.schedule import Schedule
from dro_rl.errors import InputError, Phrase
from dro_rl.evaluation.stages import read_stages, write_stages
from dro_rl.files import beside_of, damage, folder_written_whole
from dro_rl.rollouts import log as rollout_log
from dro_rl.rows.small import read_object
from dro_rl.runs import checkpoints_of, step_of

logger = logging.getLogger(__name__)

SCHEDULE = "schedule.json"
"""In a checkpoint: what its steps hold."""


def find_checkpoint(run: Path, wanted: str) -> Path | None:
    """The checkpoint to go on from: `wanted`, or with `auto` the last that is whole.

    Returns:
        None where there is none yet: the run begins.

    Raises:
        InputError: `wanted` is not whole, or is not a checkpoint, or there are some and none is whole.
    """
    if wanted != "auto":
        return _named(run, Path(wanted))
    damaged: list[str] = []
    for place in reversed(checkpoints_of(run)):
        if (what := damage(place)) is None:
            if damaged:
                logger.warning(f"{'; '.join(damaged)}: going on from {place.name}")
            return place
        damaged.append(f"{place.name} is damaged ({what})")
    if damaged:
        raise InputError(
            "resume_from_checkpoint",
            Phrase("; ".join(damaged)),
            "a run goes on from a whole checkpoint, and there is none",
            f"Put one back, or delete them all to begin again in {run}.",
        )
    return None


def _named(run: Path, place: Path) -> Path:
    what = damage(place) if (place / "trainer_state.json").is_file() else "no checkpoint"
    if what is None:
        return place
    if (place / "recipe.yaml").is_file():
        what = "a run"
    raise InputError(
        "resume_from_checkpoint",
        Phrase(f"{place}: {what}"),
        "this is auto, or the path of a whole checkpoint",
        "Use auto, which takes the last whole one." if checkpoints_of(run) else "Leave it out, to begin.",
    )


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run.

    Args:
        run: its folder.
        schedule: which question is used at which step.
        keep: how many stay, the best one apart; None: all.
        keep_last_iteration: the rollouts of the iteration that is done are needed to go on.
        sample_again: an iteration that is begun again does not take its rollouts from the log, where they are weighed:
            weighing is part of its first step, and would differ by rounding.
    """

    run: Path
    schedule: Schedule
    keep: int | None = None
    keep_last_iteration: bool = False
    sample_again: bool = False

    def restore_logs(self, checkpoint: Path | None) -> list[dict[str, Any]]:
        """Put the rollout log and the evaluations back to where the checkpoint was: what came after happens again.

        Rollouts of the iteration that the checkpoint stands in stay: they come from the same weights.

        Returns:
            The stages evaluated by then.
        """
        step = 0
        for leftover in self.run.glob(".*.tmp"):  # what a kill, or a full disk, left half-written
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        if checkpoint is None:
            stages = [stage for stage in read_stages(self.run) if stage["stage"] in ("base", "warmup")]
        else:
            self._check_schedule(checkpoint)
            stages = read_stages(checkpoint)
            step = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).global_step
            if step > self.schedule.total_steps:
                raise InputError(
                    "num_iterations",
                    self.schedule.num_iterations,
                    f"{checkpoint} comes after step {step} of {self.schedule.total_steps}",
                    "Use more, or resume from an earlier checkpoint.",
                )
            for place in checkpoints_of(self.run):
                if step_of(place) > step:
                    shutil.rmtree(place)
            _copy_parts((checkpoint / "rollouts").glob("*.parquet"), self.run)
        write_stages(self.run, stages)
        iteration, within = divmod(step, self.schedule.steps_per_iteration)
        kept = [] if self.sample_again and not within else rollout_log.part_paths(self.run, iteration + 1)
        for path in rollout_log.part_paths(self.run):
            if path not in kept and path >= rollout_log.part_path(self.run, iteration + 1, 0):
                path.unlink()
        return stages

    def best_whole(self, steps: Iterable[int]) -> Path | None:
        """The first of the steps' checkpoints that is whole; says which are not. None where none is."""
        for step in steps:
            place = self.run / f"checkpoint-{step}"
            what = damage(place)
            if what is None:
                return place
            if place.is_dir():
                logger.warning(f"{place.name} is damaged ({what}): the next best is kept")
        return None

    @contextmanager
    def written(self, state: TrainerState, control: TrainerControl, stages: Sequence[dict[str, Any]]) -> Iterator[Path]:
        """A folder to write to, which becomes `checkpoint-N` when the block ends: a kill leaves whole ones only.

        Every process enters. The block writes what the trainer knows; the logs and the state, with the best checkpoint
        so far, are added here.
        """
        process = PartialState()
        place = self.run / f"checkpoint-{state.global_step}"
        with folder_written_whole(place, sealed=True) if process.is_main_process else nullcontext():
            process.wait_for_everyone()
            beside = beside_of(place)
            yield beside
            best = self.run / f"checkpoint-{state.best_global_step}"
            if state.best_global_step is not None and (best.is_dir() or best == place):
                state.best_model_checkpoint = str(best)
            cast(dict[str, Any], state.stateful_callbacks)["TrainerControl"] = control.state()
            if process.is_main_process:
                write_stages(beside, stages)
                (beside / SCHEDULE).write_text(json.dumps(self._steps_hold()))
                for iteration in self._needed(state.global_step):
                    _copy_parts(rollout_log.part_paths(self.run, iteration), beside)
                state.save_to_json(str(beside / "trainer_state.json"))
            process.wait_for_everyone()
        if process.is_main_process:
            rotate_checkpoints(
                output_dir=str(self.run),
                save_total_limit=self.keep,
                best_model_checkpoint=state.best_model_checkpoint,
                use_mtime=False,
            )
        process.wait_for_everyone()

    def _needed(self, step: int) -> list[int]:
        """The iterations whose rollouts are needed to go on: the one the step is in, and what the guard remembers."""
        current, within = divmod(step, self.schedule.steps_per_iteration)
        return [*([current + 1] if within else []), *([current] if self.keep_last_iteration else [])]

    def _steps_hold(self) -> dict[str, int]:
        return {name: getattr(self.schedule, name) for name in ("questions_per_step", "num_questions")}

    def _check_schedule(self, checkpoint: Path) -> None:
        """Steps count questions: with another number of processes a step would mean another place in the run."""
        saved, own = read_object(checkpoint / SCHEDULE, "what steps hold", "Use auto."), self._steps_hold()
        if saved != own:
            raise InputError(
                "resume_from_checkpoint",
                str(checkpoint),
                "a run goes on as it began: it had {questions_per_step} of {num_questions} questions a step".format(
                    **saved
                )
                + ", and has {questions_per_step} of {num_questions} now".format(**own),
                "Resume with as many processes, and on the same questions.",
            )


def _copy_parts(parts: Iterable[Path], folder: Path) -> None:
    for part in parts:
        (folder / "rollouts").mkdir(exist_ok=True)
        shutil.copy2(part, folder / "rollouts" / part.name)
