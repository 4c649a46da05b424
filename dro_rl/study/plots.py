"""A study as a picture, `report.png`: every metric by variant, seed by seed, and what is claimed never to fall."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dro_rl.files import written_whole
from dro_rl.study.plan import Study
from dro_rl.study.results import Results
from dro_rl.study.verdicts import over_seeds

COLUMNS = 3


def plot_study(study: Study, results: Results) -> Path | None:
    """Draw a study, and return where the picture is; None where it shows no metric."""
    series = [claim for claim in study.claims.values() if claim.test == "never_falls"]
    panels = len(study.metrics) + len(series)
    if not panels:
        return None
    rows = -(-panels // COLUMNS)
    figure = Figure(figsize=(4.2 * min(panels, COLUMNS), 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, min(panels, COLUMNS), squeeze=False).flatten()
    figure.suptitle(study.name)
    for place, metric in zip(axes, study.metrics, strict=False):
        _by_variant(place, study, results, metric)
    for place, claim in zip(axes[len(study.metrics) :], series, strict=False):
        for seed, values in results.series(claim.variant, claim.metric).items():
            place.plot(values, marker="o", markersize=2, label=f"seed {seed}")
        place.set_title(f"{claim.variant}: {claim.metric}", fontsize=9)
        place.set_xlabel("iteration")
        place.grid(alpha=0.3)
    for place in axes[panels:]:
        place.set_axis_off()
    path = study.output_dir / "report.png"
    with written_whole(path) as beside:
        figure.savefig(beside, format="png", dpi=120)
    return path


def _by_variant(axes: Axes, study: Study, results: Results, metric: str) -> None:
    names = [name for name, variant in study.variants.items() if metric in variant.metrics]
    for place, name in enumerate(names):
        values = [value.value for value in results.values(name, metric).values()]
        axes.plot([place] * len(values), values, "o", alpha=0.4, markersize=4, color="tab:blue")
        found = over_seeds(values)
        if found.mean is not None:
            axes.plot([place - 0.2, place + 0.2], [found.mean] * 2, color="black")
        if found.low is not None and found.high is not None:
            axes.vlines(place, found.low, found.high, color="black", linewidth=1)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=7)
    axes.set_title(metric, fontsize=9)
    axes.grid(alpha=0.3, axis="y")
