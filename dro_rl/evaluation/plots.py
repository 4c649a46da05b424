"""A run as curves: `evaluation/curves.png`, drawn from `trainer_state.json` and `summary.json` alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dro_rl.evaluation.stages import recalls
from dro_rl.files import written_whole
from dro_rl.shown import chart


def plot_curves(output_dir: str | Path, most: int) -> Path:
    """Draw a run's curves and return where they are.

    Four panels over optimizer steps: the dev split; the evidence bound; the effective sample size and the selector's
    entropy; recall and validity of the rollouts. Thin lines are steps, thick ones their running mean.

    Args:
        output_dir: the run's.
        most: the documents that its selector names at most, at which recall is drawn.
    """
    history = json.loads((Path(output_dir) / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    dev = [entry for entry in history if "eval_em" in entry]
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    figure.suptitle(chart(output_dir))
    recall = recalls(most)[-1]
    _dev(axes[0][0], dev, recall)
    _steps(axes[0][1], steps, {"evidence_bound": "evidence bound", "answer_logp": "mean log p(answer)"}, "nats")
    _steps(axes[1][0], steps, {"ess": "effective sample size", "selector_entropy": "selector entropy (nats)"}, "")
    _steps(
        axes[1][1],
        steps,
        {recall: recall, "rollouts/valid": "valid", "rollouts/duplicate": "duplicate"},
        "share",
    )
    path = Path(output_dir) / "evaluation" / "curves.png"
    with written_whole(path) as beside:
        figure.savefig(beside, format="png", dpi=120)
    return path


def _dev(axes: Axes, entries: Sequence[Mapping[str, Any]], recall: str) -> None:
    labels = {"em": "exact match", "f1": "F1", recall: recall, "valid": "valid"}
    for name, label in ((f"eval_{name}", label) for name, label in labels.items()):
        points = [(entry["step"], entry[name]) for entry in entries if name in entry]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    _finish(axes, "dev split", "percent")
    axes.set_ylim(-3, 103)


def _steps(axes: Axes, entries: Sequence[Mapping[str, Any]], names: Mapping[str, str], unit: str) -> None:
    for name, label in names.items():
        points = [(entry["step"], entry[name]) for entry in entries if name in entry]
        if not points:
            continue
        x, y = zip(*points, strict=True)
        window = max(1, len(y) // 20)
        smooth = [sum(y[max(0, i - window) : i + 1]) / len(y[max(0, i - window) : i + 1]) for i in range(len(y))]
        (line,) = axes.plot(x, smooth, label=label)
        axes.plot(x, y, alpha=0.25, linewidth=0.7, color=line.get_color())
    _finish(axes, "rollouts", unit)


def _finish(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(unit)
    axes.grid(alpha=0.3)
    if axes.get_lines():
        axes.legend(fontsize=8)
