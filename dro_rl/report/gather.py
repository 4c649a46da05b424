"""What a report tells of a run, read from its folder: figures of iterations, evaluations, the log, what stood out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dro_rl.errors import InputError
from dro_rl.evaluation.results import METRICS, metric_values, read_results
from dro_rl.evaluation.stages import SHOWN, STARTS, start_of, summary_path
from dro_rl.evaluation.statistics import Estimate, estimate
from dro_rl.recipe.difference import differences
from dro_rl.rollouts.diagnostics import Summary, pooled
from dro_rl.rollouts.read import history
from dro_rl.rollouts.signals import of_iteration, reading
from dro_rl.runs import Run, logs_of, read_run, record_of
from dro_rl.selection import SelectionSpec

POINTS = 120
"""Of a curve at most: consecutive iterations are pooled into one."""
RESAMPLES = 2_000
"""Of an interval. A report has hundreds."""
SHARES = ("valid", "clean", "duplicate")
NORMAL = 1.96


@dataclass(frozen=True, slots=True)
class Point:
    """A value of a curve.

    Args:
        x: optimizer steps taken.
        low, high: the interval at 95 %; None where there is none.
    """

    x: float
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Told:
    """A run as the report tells it.

    Args:
        name: what the report calls it.
        run: its folder.
        versions: what computed it; empty where the run does not say.
        stages: of each evaluated stage the metrics that a report shows.
        curves: by figure, over optimizer steps.
        phases: seconds of each phase, the longest first.
        warnings: what stands, in words, with the keys to turn.
        questions, rollouts: how many it has logged.
        iterations: those that it has logged.
    """

    name: str
    run: Run
    versions: Mapping[str, str]
    stages: Mapping[str, Mapping[str, Estimate]]
    curves: Mapping[str, Sequence[Point]]
    phases: Mapping[str, float]
    warnings: Sequence[tuple[str, str]]
    questions: int
    rollouts: int
    iterations: Sequence[int]


def tell(folders: Sequence[Path]) -> list[Told]:
    """Read the runs. Raises `InputError` for a folder that is none, or one that is damaged."""
    runs = [read_run(folder) for folder in folders]
    return [_tell(run, name) for run, name in zip(runs, names_of(folders), strict=True)]


def names_of(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(each[-1:])} ({number})" for number, each in enumerate(parts, start=1)]


def what_differs(told: Sequence[Told]) -> list[tuple[str, list[Any]]]:
    """The keys, and the versions, that are not the same in all runs, with each run's value."""
    first, *others = (each.run.recipe for each in told)
    keys = dict.fromkeys(found.key.name for other in others for found in differences(first, other))
    rows = [(key, [each.run.recipe[key] for each in told]) for key in keys if key != "output_dir"]
    packages = dict.fromkeys(name for each in told for name in each.versions)
    for name in packages:
        values = [each.versions.get(name) for each in told]
        if len(set(values)) > 1:
            rows.append((f"version of {name}", values))
    return rows


def _tell(run: Run, name: str) -> Told:
    logged = next(logs_of(run.path, run.state == "finished"), [])
    iterations = history(run.path) if run.iteration else []
    try:
        versions: Mapping[str, str] = record_of(run.path)[1]
    except InputError:
        versions = {}
    curves = _dev_curves(run, stages := dict(_stages(run)), logged)
    curves |= _step_curves(logged)
    if iterations:
        size = math.ceil(len(iterations) / POINTS)
        windows = [iterations[first : first + size] for first in range(0, len(iterations), size)]
        points = [(window[-1].last_step, pooled([each.rollouts for each in window])) for window in windows]
        curves |= _rollout_curves(points, SelectionSpec.of(run.recipe["num_selected"]).most)
    return Told(
        name=name,
        run=run,
        versions=versions,
        stages=stages,
        curves=curves,
        phases=_phases(run, logged),
        warnings=[(reading(found), ", ".join(found.rule.keys)) for found in of_iteration(iterations) if found.fired],
        questions=sum(each.rollouts.questions for each in iterations),
        rollouts=sum(each.rollouts.rollouts for each in iterations),
        iterations=[each.number for each in iterations],
    )


def _stages(run: Run) -> Iterator[tuple[str, dict[str, Estimate]]]:
    """Every stage's metrics, with intervals where its questions are there."""
    asked = dict.fromkeys((*SHOWN, run.recipe["metric_for_best_model"]))
    metrics = [name for name in asked if name in METRICS]
    for stage in run.stages:
        path = summary_path(run.path).with_name(f"{stage['stage']}.parquet")
        try:
            results, _ = read_results(path)
        except InputError:  # the means are in the summary
            known = {name: stage[name] for name in metrics if isinstance(stage.get(name), int | float)}
            yield stage["stage"], {name: Estimate(value, None, None, stage["n"]) for name, value in known.items()}
            continue
        found = {name: estimate(metric_values(results, name), resamples=RESAMPLES) for name in metrics}
        yield stage["stage"], {name: value for name, value in found.items() if value.mean is not None}


def _dev_curves(
    run: Run, stages: Mapping[str, Mapping[str, Estimate]], logged: Sequence[Mapping[str, Any]]
) -> dict[str, list[Point]]:
    """Metrics of the dev split over steps: evaluations are logged from the start on, in the order of the stages."""
    steps = [entry["step"] for entry in logged if "eval_n" in entry]
    start = start_of(run.stages) if run.stages else None
    names = [stage["stage"] for stage in run.stages if stage is start or stage["stage"] not in STARTS]
    curves: dict[str, list[Point]] = {}
    for step, stage in zip(steps, names, strict=False):
        for metric, found in stages[stage].items():
            k = metric.partition("@")[2]
            if k and int(k) > SelectionSpec.of(run.recipe["num_selected"]).most:
                continue
            if found.mean is not None and math.isfinite(found.mean):
                curves.setdefault(f"dev {metric}", []).append(Point(step, found.mean, found.low, found.high))
    return curves


def _step_curves(logged: Sequence[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """What only the step log says."""
    curves = {}
    for name in ("sampling/logp_difference_mean", "selector/loss", "generator/loss"):
        points = [
            Point(entry["step"], entry[name]) for entry in logged if "step" in entry and _is_number(entry.get(name))
        ]
        if points:
            size = math.ceil(len(points) / POINTS)
            curves[name] = [_mean_point(points[first : first + size]) for first in range(0, len(points), size)]
    return curves


def _mean_point(points: Sequence[Point]) -> Point:
    return Point(points[-1].x, math.fsum(point.value for point in points) / len(points))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _rollout_curves(points: Sequence[tuple[int, Summary]], most: int) -> dict[str, list[Point]]:
    """Figures of rollouts. Intervals over questions are normal: of means by deviations, of shares by the binomial.

    Args:
        most: documents that a selection has at most; recall at more says nothing more.
    """
    curves: dict[str, list[Point]] = {}

    def add(
        name: str, x: int, value: float, half: float = math.nan, least: float = -math.inf, highest: float = math.inf
    ) -> None:
        if math.isfinite(value):
            known = math.isfinite(half)
            low, high = (max(least, value - half), min(highest, value + half)) if known else (None, None)
            curves.setdefault(name, []).append(Point(x, value, low, high))

    for x, summary in points:
        questions = max(1, summary.valid_questions)
        add("evidence_bound", x, summary.evidence_bound, NORMAL * summary.evidence_bound_sd / math.sqrt(questions))
        add("reward", x, summary.reward, NORMAL * summary.reward_sd / math.sqrt(questions))
        add("ess_share", x, summary.ess_share)
        add("selector_entropy", x, summary.selector_entropy)
        for k, recall in summary.recall.items():
            if k <= most:
                half = NORMAL * summary.recall_sd[k] / math.sqrt(max(1, summary.labelled))
                add(f"recall@{k}", x, recall, half, 0.0, 1.0)
        for name in SHARES:
            share, count = getattr(summary, name), max(1, summary.questions)
            add(name, x, share, NORMAL * math.sqrt(max(0.0, share * (1 - share)) / count), 0.0, 1.0)
    return curves


def _phases(run: Run, logged: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of each phase: what the run said at its end, else what it logged."""
    taken: dict[str, float] = {}
    for entry in [run.ending.rates] if run.ending else logged:
        for name, value in entry.items():
            if name.startswith("time/") and _is_number(value):
                taken[name[5:]] = taken.get(name[5:], 0.0) + float(value)
    return dict(sorted(taken.items(), key=lambda item: -item[1]))
