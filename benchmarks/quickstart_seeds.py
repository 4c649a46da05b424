"""The quick start over seeds, beside its controls: `python -m benchmarks.quickstart_seeds`, a table with intervals.

Each seed is trained as the recipe says, with the selector frozen, and with uniform weights; a run that is there already
is not trained again. All answer the test split, which no run sees; so does the untrained base, and so do the trained
generators with the retriever's order and with chance in place of the selector. Gains are paired, question by question
within a seed. The interval is Student's t over seeds, 95 %.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from scipy.stats import ttest_1samp

from dro_rl.evaluation.controls import Control
from dro_rl.evaluation.job import EvaluationJob, run_evaluation
from dro_rl.evaluation.results import QuestionResult, metric_values, read_results
from dro_rl.evaluation.stages import read_stages
from dro_rl.toy.world import TOY_BASE

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "quickstart.yaml"
TRAINED: dict[str, list[str]] = {
    "joint training": [],
    "selector frozen": ["--selector_learning_rate", "0"],
    "uniform weights": ["--weighting", "uniform"],
}
REPLACED: dict[str, Control] = {"retriever's order": "retriever-order", "random documents": "random"}
COLUMNS = [("EM", "em", None), ("recall@3", "recall@3", None), ("EM, 1-hop", "em", "1-hop"),
           ("EM, 2-hop", "em", "2-hop"), ("recall@3, 2-hop", "recall@3", "2-hop")]  # fmt: skip
Rows = dict[str, QuestionResult]


def main(
    seeds: Annotated[int, typer.Option(min=2, help="How many seeds, from 0.")] = 3,
    output: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/quickstart-seeds"),
) -> None:
    """Train what is missing, evaluate, and print the table in Markdown and what the last iterations were like."""
    arms: dict[str, list[Rows]] = {}
    for seed in range(seeds):
        for name, rows in one_seed(seed, output).items():
            arms.setdefault(name, []).append(rows)
    runs = [run_folder(output, seed, "joint training") for seed in range(seeds)]
    table = table_of(arms)
    print("\n" + "\n".join([*table, "", *map(end_of, runs)]))
    (output / "table.md").write_text("\n".join(table) + "\n", encoding="utf-8")


def run_folder(output: Path, seed: int, name: str) -> Path:
    return output / f"seed-{seed}" / name.replace(" ", "-")


def one_seed(seed: int, output: Path) -> dict[str, Rows]:
    """What became of each test question under every arm of a seed."""
    base = output / "base"
    for role in ("selector", "generator"):
        shutil.copytree(TOY_BASE, base / role, dirs_exist_ok=True)
    found = {"base, untrained": answers(EvaluationJob(base, "toy", "test", recipe=RECIPE))}
    joint = run_folder(output, seed, "joint training")
    for name, keys in TRAINED.items():
        folder = run_folder(output, seed, name)
        if not any(stage["stage"] == "final" for stage in read_stages(folder)):
            job = [sys.executable, str(ROOT / "dro_rl" / "train.py"), str(RECIPE), "--seed", str(seed), *keys]
            subprocess.run([*job, "--output_dir", str(folder), "--resume_from_checkpoint", "auto"], check=True)
        found[name] = answers(EvaluationJob(folder, "toy", "test"))
    for name, control in REPLACED.items():
        found[name] = answers(EvaluationJob(joint, "toy", "test", control=control, seed=seed))
    return found


def answers(job: EvaluationJob) -> Rows:
    """The rows of an evaluation by question, computed unless they are there."""
    _, folder = run_evaluation(job)
    return {row.id: row for row in read_results(folder / "questions.parquet")[0]}


def table_of(arms: dict[str, list[Rows]]) -> list[str]:
    """A row an arm: its mean over seeds, and in brackets by how much joint training is above it."""
    lines = ["| | " + " | ".join(title for title, *_ in COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
    joint = arms["joint training"]
    for name in sorted(arms, key=lambda name: name == "joint training"):
        cells = []
        for _, metric, kind in COLUMNS:
            mean = statistics.fmean(statistics.fmean(values(rows, metric, kind)) for rows in arms[name])
            gains = [gain(a, b, metric, kind) for a, b in zip(arms[name], joint, strict=True)]
            above = "" if name == "joint training" else f" ({interval(gains)})"
            cells.append(f"{mean:.1f}{above}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def values(rows: Rows, metric: str, kind: str | None) -> list[float]:
    return metric_values([row for row in rows.values() if kind in (None, row.type)], metric)


def gain(a: Rows, b: Rows, metric: str, kind: str | None) -> float:
    """Mean over questions of b less a, in percent."""
    asked = [key for key, row in a.items() if kind in (None, row.type)]
    return 100 * statistics.fmean(b[key].scores[metric] - a[key].scores[metric] for key in asked)


def interval(gains: Sequence[float]) -> str:
    low, high = ttest_1samp(gains, 0.0).confidence_interval(0.95)
    return f"{statistics.fmean(gains):+.1f} ± {(high - low) / 2:.1f}"


def end_of(run: Path, last: int = 20) -> str:
    """Means over the run's last iterations, and its seconds."""
    history: list[dict[str, Any]] = json.loads((run / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    names = {"well-formed": "rollouts/clean", "recall@3": "recall@3", "ESS": "ess", "duplicates": "rollouts/duplicate"}
    shown = ", ".join(
        f"{title} {statistics.fmean(step[name] for step in steps[-last:]):.3f}" for title, name in names.items()
    )
    seconds = next((entry["train_runtime"] for entry in history if "train_runtime" in entry), float("nan"))
    return f"{run.parent.name}, last {last} iterations: {shown}; {seconds:.0f} s"


if __name__ == "__main__":
    typer.run(main)
