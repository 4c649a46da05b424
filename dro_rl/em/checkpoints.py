"""Checkpoints: whole or absent, and enough to go on bit for bit.

A run's folder is its state: the newest whole `checkpoint-N`, and the logs of what led there. Knows files and steps;
what a model or an optimizer is, the trainer knows.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerState
from transformers.trainer_utils import rotate_checkpoints

from dro_rl.em.schedule import Schedule
from dro_rl.errors import InputError
from dro_rl.evaluation.evaluator import read_stages, write_stages
from dro_rl.rollouts import log as rollout_log

SCHEDULE = "schedule.json"
"""In a checkpoint: what its steps hold."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run.

    Args:
        run: its folder.
        schedule: which question is used at which step.
        keep: how many stay, the best one apart; None: all.
        keep_last_iteration: the rollouts of the iteration that is done are needed to go on.
    """

    run: Path
    schedule: Schedule
    keep: int | None = None
    keep_last_iteration: bool = False

    def restore_logs(self, checkpoint: Path | None) -> None:
        """Put the rollout log and the evaluations back to where the checkpoint was: what came after happens again.

        Rollouts of the iteration that the checkpoint stands in stay: they come from the same weights.
        """
        current = 1
        for leftover in self.run.glob(".*.tmp"):  # what a kill, or a full disk, left half-written
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        if checkpoint is not None:
            self._check_schedule(checkpoint)
            state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            current = self.schedule.iteration(state.global_step) + 1
            _copy_parts((checkpoint / "rollouts").glob("*.parquet"), self.run)
            write_stages(self.run, read_stages(checkpoint))
        else:
            write_stages(self.run, [stage for stage in read_stages(self.run) if stage["stage"] in ("base", "warmup")])
        kept = rollout_log.part_paths(self.run, current)
        for path in rollout_log.part_paths(self.run):
            if path not in kept and path > rollout_log.part_path(self.run, current, 0):
                path.unlink()

    @contextmanager
    def written(self, state: TrainerState, stages: Sequence[dict[str, Any]]) -> Iterator[Path]:
        """A folder to write to, which becomes `checkpoint-N` when the block ends: a kill leaves whole ones only.

        Every process enters. The block writes what the trainer knows; the logs and the state, with the best checkpoint
        so far, are added here.
        """
        process = PartialState()
        place = self.run / f"checkpoint-{state.global_step}"
        beside = self.run / f".{place.name}.tmp"
        if process.is_main_process:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
        process.wait_for_everyone()
        yield beside
        best = self.run / f"checkpoint-{state.best_global_step}"
        if state.best_global_step and (best.is_dir() or best == place):
            state.best_model_checkpoint = str(best)
        if process.is_main_process:
            write_stages(beside, stages)
            (beside / SCHEDULE).write_text(json.dumps(self._steps_hold()))
            for iteration in self._needed(state.global_step):
                _copy_parts(rollout_log.part_paths(self.run, iteration), beside)
            state.save_to_json(str(beside / "trainer_state.json"))
        process.wait_for_everyone()
        if process.is_main_process:
            shutil.rmtree(place, ignore_errors=True)
            beside.rename(place)
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
        saved, own = json.loads((checkpoint / SCHEDULE).read_text()), self._steps_hold()
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
