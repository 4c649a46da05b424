"""The quick start over several seeds: `python -m benchmarks.quickstart_seeds RUN RUN RUN`, a table of before and after.

Each RUN is the output folder of `recipes/quickstart.yaml` with a seed of its own. The interval is Student's t over
seeds, 95 %.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated, Any

import typer

from dro_rl.evaluation.evaluator import read_stages

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Two-sided 95 % points of Student's t for so many seeds."""


def main(runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs, two to five.")]) -> None:
    """Print each seed's dev split before and after joint training, and the mean gain with its interval."""
    stages = [{stage["stage"]: stage for stage in read_stages(run)} for run in runs]
    columns: list[tuple[str, str | None, str]] = [("EM", None, "em"), ("recall@3", None, "recall@3")]
    for kind in sorted(stages[0]["final"]["by_type"]):
        columns += [(f"EM, {kind}", kind, "em"), (f"recall@3, {kind}", kind, "recall@3")]
    print("| | " + " | ".join(f"{title}: before → after" for title, _, _ in columns) + " |")
    print("|---|" + "---|" * len(columns))
    for run, known in zip(runs, stages, strict=True):
        cells = [
            f"{value(known['warmup'], kind, name):.1f} → {value(known['final'], kind, name):.1f}"
            for _, kind, name in columns
        ]
        print(f"| {run.name} | " + " | ".join(cells) + " |")
    cells = []
    for _, kind, name in columns:
        gains = [value(known["final"], kind, name) - value(known["warmup"], kind, name) for known in stages]
        half = T_95[len(gains)] * statistics.stdev(gains) / len(gains) ** 0.5
        cells.append(f"{statistics.mean(gains):+.1f} ± {half:.1f}")
    print("| mean gain | " + " | ".join(cells) + " |")


def value(stage: dict[str, Any], kind: str | None, name: str) -> float:
    """A metric of a stage, of all questions or of one type."""
    return float((stage if kind is None else stage["by_type"][kind])[name])


if __name__ == "__main__":
    typer.run(main)
