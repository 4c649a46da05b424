"""What the arms of a study have left, as values: of each seed one, and of each of its questions where there are any."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dro_rl.errors import InputError
from dro_rl.evaluation.results import metric_values, read_results
from dro_rl.evaluation.stages import FINAL, iteration_of, read_stages
from dro_rl.rollouts.diagnostics import Summary, logged, pooled
from dro_rl.rollouts.read import history, ranges
from dro_rl.rows.small import read_object
from dro_rl.runs import recipe_of
from dro_rl.study.arms import Arm, arm_folder, arms_of, check_unchanged
from dro_rl.study.metrics import GRADIENTS, METRICS, RESULT, TRAIN
from dro_rl.study.plan import Study

LAST = 0.1
"""The share of a run's iterations that its end is: of figures of rollouts, which one iteration has few of."""


@dataclass(frozen=True, slots=True)
class Value:
    """A metric of one arm.

    Args:
        value: percent, nats, or the metric's own unit.
        questions: the same of each question, by id; empty for what is of no question.
    """

    value: float
    questions: Mapping[str, float] = field(default_factory=dict)


class Results:
    """Reads the arms of a study that are done.

    Raises:
        InputError: an arm is there that was trained with other keys than the study asks for.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self.arms: Sequence[Arm] = arms_of(study)
        check_unchanged(study, self.arms)
        self._done = {arm.folder for arm in self.arms if arm.done}
        self._rollouts: dict[Path, list[Summary]] = {}
        self.ended_before: dict[str, set[str]] = {}
        """Stages asked for that an arm ended before, as early stopping ends one, by arm."""

    @property
    def missing(self) -> list[Arm]:
        """Arms that have not been run to their end."""
        return [arm for arm in self.arms if arm.folder not in self._done]

    def values(
        self, variant: str, metric: str, *, stage: str | None = None, type: str | None = None
    ) -> dict[int, Value]:
        """A metric of a variant, by seed. Left out are seeds that have not run, in which it is undefined, or whose
        training ended before the stage.

        Args:
            variant: its name.
            metric: one of its metrics.
            stage: the evaluation on the way, or the iteration; the end unless told.
            type: only questions of this type.

        Raises:
            InputError: no such stage, iteration or type.
        """
        found: dict[int, Value] = {}
        for seed in self.study.seeds:
            folder = arm_folder(self.study, variant, seed)
            if folder in self._done:
                value = self._value(folder, variant, metric, stage, type)
                if not math.isnan(value.value):
                    found[seed] = value
        return found

    def series(self, variant: str, metric: str) -> dict[int, list[float]]:
        """A metric of a training from one iteration, or evaluation, to the next, by seed."""
        found: dict[int, list[float]] = {}
        for seed in self.study.seeds:
            folder = arm_folder(self.study, variant, seed)
            if folder not in self._done:
                continue
            if metric in METRICS:
                stages = {stage["stage"]: stage[metric] for stage in read_stages(folder)}
                before = "base" if "warmup" in stages else None  # training begins with what is warmed up
                values = [value for stage, value in stages.items() if stage not in (FINAL, before)]
            else:
                values = [_figure(summary, metric) for summary in self._history(folder)]
            known = [value for value in values if value is not None and not math.isnan(value)]
            if len(known) > 1:
                found[seed] = known
        return found

    def _value(self, folder: Path, variant: str, metric: str, stage: str | None, type: str | None) -> Value:
        named = self.study.variants[variant]
        if metric in GRADIENTS:
            measured = read_object(folder / RESULT, "a measurement of gradients", "Delete it, and run the study again.")
            found = measured.get(metric)
            return Value(math.nan if found is None else float(found))
        stage = stage or named.stage or FINAL
        if self._ended_before(folder, stage):
            self.ended_before.setdefault(f"{variant}/{folder.name}", set()).add(stage)
            return Value(math.nan)
        if metric not in METRICS:
            return Value(self._logged(folder, metric, stage))
        path = folder / "questions.parquet" if named.control else folder / "evaluation" / f"{stage}.parquet"
        if not path.is_file():
            there = sorted(file.stem for file in (folder / "evaluation").glob("*.parquet"))
            raise InputError(
                str(folder),
                stage,
                f"this is an evaluation of the run, which has {', '.join(there)}",
                "Name one of them.",
            )
        rows, _ = read_results(path)
        chosen = [row for row in rows if type is None or row.type == type]
        if not chosen:
            types = sorted({row.type for row in rows if row.type})
            raise InputError(
                str(path), str(type), f"the types of its questions are {', '.join(types) or 'unknown'}", "Name one."
            )
        pairs = zip(chosen, metric_values(chosen, metric), strict=True)
        known = {row.id: value for row, value in pairs if not math.isnan(value)}
        return Value(math.fsum(known.values()) / len(known) if known else math.nan, known)

    def _ended_before(self, folder: Path, stage: str) -> bool:
        """Whether a training ended, as it may, before an iteration that it was to have."""
        asked = iteration_of(stage)
        if not asked:
            return False
        known = [number for each in read_stages(folder) if (number := iteration_of(each["stage"]))]
        return bool(known) and max(known) < asked <= recipe_of(folder)["num_iterations"]

    def ran(self, variant: str) -> bool:
        """Whether any seed of a variant has run to its end."""
        return any(arm_folder(self.study, variant, seed) in self._done for seed in self.study.seeds)

    def _logged(self, folder: Path, metric: str, stage: str) -> float:
        summaries = self._history(folder)
        if stage == FINAL:
            return _figure(pooled(summaries[-max(1, round(LAST * len(summaries))) :]), metric)
        number = iteration_of(stage)
        if not 1 <= number <= len(summaries):
            logged_ones = ranges(range(1, len(summaries) + 1))
            raise InputError(
                str(folder), stage, f"rollouts are of iterations, and this run has {logged_ones}", "Use iteration-<t>."
            )
        return _figure(summaries[number - 1], metric)

    def _history(self, folder: Path) -> list[Summary]:
        if folder not in self._rollouts:
            self._rollouts[folder] = [iteration.rollouts for iteration in history(folder)]
        return self._rollouts[folder]


def deepest_change(series: Sequence[float]) -> float:
    """The smallest step from one value to the next: negative where it ever falls."""
    return min(after - before for before, after in itertools.pairwise(series))


def _figure(summary: Summary, metric: str) -> float:
    return logged(summary).get(metric.removeprefix(TRAIN), math.nan)
