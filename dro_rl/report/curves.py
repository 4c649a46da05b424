"""Curves of several runs as SVG: one picture a figure, a colour a run, intervals as bands. Values in, text out."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dro_rl.report.gather import Point
from dro_rl.shown import chart

COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2", "#65a30d", "#64748b")
"""Of runs, in their order; after the last the first comes again, with another dash."""
DASHES = ("-", "--", ":", "-.")
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: small, and searched with the page
    "svg.hashsalt": "dro_rl",  # equal runs, equal bytes
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#94a3b8",
    "axes.labelcolor": "#475569",
    "xtick.color": "#475569",
    "ytick.color": "#475569",
    "grid.color": "#e2e8f0",
}


@dataclass(frozen=True, slots=True)
class Panel:
    """A picture.

    Args:
        title: over it.
        unit: of its values.
        curves: names of `Told.curves`, with what each is called; several are told apart by their dashes.
        about: what it shows and how to read it, in a sentence.
    """

    title: str
    unit: str
    curves: Mapping[str, str]
    about: str


PANELS = (
    Panel("Exact match on dev", "percent", {"dev em": "EM"}, "Answers written greedily, of the dev split."),
    Panel("F1 on dev", "percent", {"dev f1": "F1"}, "Answers written greedily, of the dev split."),
    Panel(
        "Recall on dev",
        "percent",
        {"dev recall@1": "@1", "dev recall@3": "@3", "dev recall@5": "@5"},
        "Supporting documents among the first selected; only where the split has labels.",
    ),
    Panel(
        "Evidence", "nats", {"evidence_bound": "bound"}, "log((1/m) Σ p/q p(answer)) of the training questions sampled."
    ),
    Panel(
        "Reward",
        "nats, or the reward's own unit",
        {"reward": "reward"},
        "What the objective weighs, of the training questions sampled, under the selector.",
    ),
    Panel(
        "Recall of rollouts",
        "share",
        {"recall@1": "@1", "recall@3": "@3", "recall@5": "@5"},
        "Supporting documents among the first selected, under the selector.",
    ),
    Panel("Effective sample size", "share of m", {"ess_share": "ESS/m"}, "How many rollouts the weights amount to."),
    Panel(
        "Selector entropy",
        "nats",
        {"selector_entropy": "entropy"},
        "How undecided the policy is. Near 0 it has collapsed.",
    ),
    Panel(
        "Well-formed and valid",
        "share of rollouts",
        {"clean": "as asked", "valid": "names a document"},
        "Selections exactly as asked, and those that name a document at all.",
    ),
    Panel(
        "Duplicates",
        "share of rollouts",
        {"duplicate": "duplicate"},
        "Rollouts that repeat a selection of their question.",
    ),
    Panel(
        "Engine mismatch",
        "nats",
        {"sampling/logp_difference_mean": "mean |Δ log p|"},
        "Between what sampled and what trains, where both said the log-probability of the same tokens.",
    ),
    Panel("Losses", "", {"selector/loss": "selector", "generator/loss": "generator"}, "As the steps had them."),
)


def draw(panel: Panel, runs: Sequence[Mapping[str, Sequence[Point]]]) -> str | None:
    """A panel as SVG; None where no run has any of its curves."""
    if not any(curves.get(name) for curves in runs for name in panel.curves):
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(4.8, 2.7), layout="constrained")
        axes = figure.subplots()
        for number, curves in enumerate(runs):
            for place, (name, label) in enumerate(panel.curves.items()):
                shown = label if number == 0 and len(panel.curves) > 1 else None
                _draw_curve(axes, curves.get(name, ()), number, place, len(runs), shown)
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel(chart(panel.unit))
        axes.grid(True)
        if len(panel.curves) > 1:
            axes.legend(fontsize=8, frameon=False)
        return _svg(figure)


def draw_phases(names: Sequence[str], phases: Sequence[Mapping[str, float]]) -> str | None:
    """Where the time went, a bar a run: shares of its seconds by phase."""
    order = list(dict.fromkeys(phase for each in phases for phase in each))
    if not order:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(9.6, 0.9 + 0.45 * len(phases)), layout="constrained")
        axes = figure.subplots()
        for place, phase in enumerate(order):
            seconds = [each.get(phase, 0.0) for each in phases]
            left = [sum(each.get(name, 0.0) for name in order[:place]) for each in phases]
            colour = COLOURS[place % len(COLOURS)]
            hatch = None if place < len(COLOURS) else "///"
            axes.barh(range(len(phases)), seconds, left=left, color=colour, hatch=hatch, label=chart(phase), alpha=0.85)
        axes.set_yticks(range(len(phases)), [chart(_cut(name)) for name in names])
        axes.invert_yaxis()
        axes.set_xlabel("seconds of the main process")
        axes.legend(ncols=6, fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        return _svg(figure)


def _draw_curve(axes: Axes, points: Sequence[Point], run: int, place: int, runs: int, label: str | None) -> None:
    if not points:
        return
    colour = COLOURS[run % len(COLOURS)] if runs > 1 else COLOURS[place % len(COLOURS)]
    dash = DASHES[(place + run // len(COLOURS)) % len(DASHES)] if runs > 1 else "-"
    x = [point.x for point in points]
    marker: Any = "o" if len(points) < 20 else None
    axes.plot(x, [point.value for point in points], dash, color=colour, marker=marker, markersize=3, label=label)
    bands = [point for point in points if point.low is not None and point.high is not None]
    if bands:
        low, high = (
            [math.nan if v is None else v for v in side] for side in zip(*((p.low, p.high) for p in bands), strict=True)
        )
        axes.fill_between([point.x for point in bands], low, high, color=colour, alpha=0.15, linewidth=0)


def _svg(figure: Figure) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def _cut(name: str) -> str:
    return name if len(name) <= 24 else f"…{name[-23:]}"
