"""The page: what was gathered and drawn, in one file. Texts are escaped where they enter: by the template, and in the
script by never being anything but text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from dro_rl import __version__
from dro_rl.errors import InputError, Phrase
from dro_rl.evaluation.stages import SHOWN, start_of
from dro_rl.evaluation.statistics import Estimate
from dro_rl.files import written_whole
from dro_rl.report.curves import COLOURS, PANELS, draw, draw_phases
from dro_rl.report.gather import Told, tell, what_differs
from dro_rl.report.rollouts import QUESTIONS, some_of
from dro_rl.shown import visible
from dro_rl.study.plan import read_study
from dro_rl.study.report import CLAIM_HEAD, NOTE, claim_rows, make_report, mean_rows
from dro_rl.study.results import Results

KIND_WORDS = {
    "missed": "gold never selected",
    "unselected": "gold not in the heaviest",
    "tie": "all tie",
    "collapsed": "all the same",
    "invalid": "one names no document",
}
"""What the page calls `dro_rl.rollouts.diagnostics.KINDS`."""
MOST_STAGES = 24
"""Rows of a run in it; of more, the first, the last and the kept one are among those that are shown."""


def write_report(
    folders: Sequence[Path], output: Path, *, studies: Sequence[str] = (), questions: int = QUESTIONS
) -> int:
    """Write a report about runs and studies.

    Args:
        folders: the runs.
        output: the file.
        studies: names or files of studies, whose verdicts stand in it.
        questions: that are shown with their rollouts, of all runs together, at most.

    Returns:
        its bytes.

    Raises:
        InputError: a folder is no run, or is damaged; a study is wrong; there is nothing to tell.
    """
    if not folders and not studies:
        raise InputError("RUN", Phrase("none"), "a report is about a run or a study", "Name one.")
    doubled = next((folder for i, folder in enumerate(folders) if folder.resolve() in _resolved(folders[:i])), None)
    if doubled is not None:
        raise InputError("RUN", str(doubled), "a run stands in a report once", "Name it once.")
    told = tell(folders)
    shown = some_of(told, questions)
    curves = [each.curves for each in told]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"visible": visible, "figure": _figure}
    source = files("dro_rl.report")
    page = environment.from_string(source.joinpath("page.html.jinja").read_text(encoding="utf-8")).render(
        version=__version__,
        at=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        style=source.joinpath("page.css").read_text(encoding="utf-8"),
        script=source.joinpath("page.js").read_text(encoding="utf-8"),
        runs=[_run(each, number) for number, each in enumerate(told)],
        differences=what_differs(told) if len(told) > 1 else [],
        panels=[(panel, svg) for panel in PANELS if (svg := draw(panel, curves))],
        phases=draw_phases([visible(each.name) for each in told], [each.phases for each in told]),
        metrics=SHOWN,
        kinds=KIND_WORDS,
        studies=[_study(name) for name in studies],
        shown=shown,
        data={"runs": [visible(each.name) for each in told], "colours": COLOURS, "groups": shown.groups},
    )
    with written_whole(output) as beside:
        beside.write_text(page, encoding="utf-8")
    return output.stat().st_size


def _resolved(folders: Sequence[Path]) -> set[Path]:
    return {folder.resolve() for folder in folders}


def _run(told: Told, number: int) -> dict[str, Any]:
    run = told.run
    stages = [stage["stage"] for stage in run.stages]
    metric = str(run.recipe["metric_for_best_model"])
    if len(stages) > MOST_STAGES:
        step = len(stages) / MOST_STAGES
        kept = {stages[int(i * step)] for i in range(MOST_STAGES)} | {stages[0], stages[-1], run.kept}
        stages = [name for name in stages if name in kept]
    start = start_of(run.stages)["stage"] if run.stages else None
    return {
        "name": told.name,
        "path": str(run.path),
        "colour": COLOURS[number % len(COLOURS)],
        "state": run.state,
        "iteration": run.iteration,
        "iterations": run.iterations,
        "rollouts": told.rollouts,
        "kept": run.kept,
        "start": start,
        "metric": metric,
        "before": told.stages[start].get(metric) if start else None,
        "after": told.stages.get(run.kept or "", {}).get(metric),
        "split": run.stages[0]["split"] if run.stages else "",
        "questions": run.stages[0]["n"] if run.stages else 0,
        "stages": [(name, told.stages[name]) for name in stages],
        "left_out": len(run.stages) - len(stages),
        "warnings": told.warnings,
        "recipe": {key: value for key, value in run.recipe.items() if value is not None},
        "versions": told.versions,
        "seconds": sum(told.phases.values()),
    }


def _study(name: str) -> Mapping[str, Any]:
    study = read_study(name)
    report = make_report(study, Results(study))
    head, rows = mean_rows(report)
    return {
        "name": report.study,
        "about": report.about,
        "head": CLAIM_HEAD,
        "claims": claim_rows(report),
        "mean_head": head,
        "means": rows,
        "missing": report.missing,
        "note": NOTE,
    }


def _figure(found: Estimate | None) -> str:
    """A mean with its interval, as a table has it."""
    if found is None or found.mean is None or not math.isfinite(found.mean):
        return "–"
    if found.low is None or found.high is None:
        return f"{found.mean:.2f}"
    return f"{found.mean:.2f} [{found.low:.1f}, {found.high:.1f}]"
