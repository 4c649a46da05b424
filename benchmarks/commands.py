"""Commands that one gives all day, and the report of a large run: seconds, processor time and peak memory.

    python -m benchmarks.commands                      # a small run of 640 rollouts, and one of 100,000
    python -m benchmarks.commands --rollouts 1000000

Both runs are made here: the log of `benchmarks.rollout_log`, evaluations of as many questions as MuSiQue's dev split
has, what was logged at each step, and the questions' file with passages of about 100 words, which a report shows. Each
command is a process of its own, and its time includes the interpreter's start; the best of several counts, since a busy
machine only ever adds. This process holds little: a child's peak begins at what its parent holds.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import child
from benchmarks.rollout_log import M, N, generate

SMALL = 640
DEV = 2417
"""Questions of MuSiQue's dev split."""


@dataclass(frozen=True)
class Case:
    """A command, the run that it is about, and what it may take.

    Args:
        words: RUN stands for the run, PAGE for the file that it writes.
        run: `small` or `large`.
        cpu_seconds: of the processor.
        page_mb: of the file, 10^6 bytes; None where it writes none.
    """

    name: str
    words: tuple[str, ...]
    run: str
    cpu_seconds: float
    page_mb: float | None = None


CASES = (
    Case("--help", ("--help",), "small", 0.2),
    Case("rollouts ls, small", ("rollouts", "ls", "RUN"), "small", 0.5),
    Case("runs show, small", ("runs", "show", "RUN"), "small", 0.5),
    Case("report, small", ("report", "RUN", "-o", "PAGE"), "small", 30, 20),
    Case("report, large", ("report", "RUN", "-o", "PAGE"), "large", 30, 20),
)


def make_run(folder: Path, rollouts: int, iterations: int, dev: int = DEV) -> None:
    """A run that has ended, with its questions beside it."""
    generate(folder, rollouts, iterations)
    _write_questions(folder / "questions.jsonl", rollouts // M // iterations)
    recipe = {
        "selector_model_name_or_path": "selector",
        "generator_model_name_or_path": "generator",
        "dataset_name": str(folder / "questions.jsonl"),
        "output_dir": str(folder),
        "num_generations": M,
        "num_iterations": iterations,
        "max_log_ratio": 5.0,
    }
    (folder / "recipe.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in recipe.items()))
    _write_evaluations(folder, iterations, dev)


def _write_questions(path: Path, count: int) -> None:
    from dro_rl.records import Document, Question, write_questions

    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(20_000)]
    texts = ((" ".join(draw.choices(words, k=2)), " ".join(draw.choices(words, k=100))) for _ in itertools.count())
    write_questions(
        path,
        (
            Question(
                f"q{number}",
                f"Who was it that did number {number} of all these things, and when?",
                (f"answer {number}",),
                tuple(
                    Document(f"d{place}", title, text) for place, (title, text) in enumerate(itertools.islice(texts, N))
                ),
                ("d0", "d1"),
                "2hop",
            )
            for number in range(count)
        ),
    )


def _write_evaluations(folder: Path, iterations: int, dev: int) -> None:
    """Every stage with its questions, and the log of steps."""
    import numpy as np

    from dro_rl.evaluation.results import METRICS, Conditions, QuestionResult, write_results
    from dro_rl.evaluation.stages import summary_path, write_stages

    draw, stages, logged = np.random.default_rng(0), [], []
    names = ["base", *(f"iteration-{number}" for number in range(1, iterations + 1)), "final"]
    for step, name in enumerate(names):
        scores = (draw.random((dev, len(METRICS))) < 0.3 + 0.02 * step).astype(float).tolist()
        results = [
            QuestionResult(
                f"dev{n}",
                "2hop",
                f"Question {n}?",
                ["a"],
                "a",
                -1.0,
                [1, 2, 3, 4, 5],
                dict(zip(METRICS, row, strict=True)),
            )
            for n, row in enumerate(scores)
        ]
        conditions = Conditions(name, "dev", dev, "0", "0", N, 5)
        write_results(summary_path(folder).with_name(f"{name}.parquet"), results, conditions)
        means = {metric: 100 * sum(row[place] for row in scores) / dev for place, metric in enumerate(METRICS)}
        stages.append({"stage": name, "split": "dev", "n": dev, **means})
        logged.append({"step": 100 * step, "eval_n": dev} | {f"eval_{metric}": mean for metric, mean in means.items()})
    for step in range(100 * iterations):
        phases = {f"time/{phase}": 1.0 for phase in ("rollout", "scoring", "selector", "generator", "optimizer")}
        losses = {f"{role}/loss": 1 / (step + 1) for role in ("selector", "generator")}
        logged.append({"step": step + 1, "sampling/logp_difference_mean": 1e-6, **phases, **losses})
    write_stages(folder, stages)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": logged}))


def main(
    rollouts: Annotated[int, typer.Option(min=10 * M, help="Rollouts of the large run, in ten iterations.")] = 100_000,
    dev: Annotated[int, typer.Option(min=2, help="Questions of each evaluation.")] = DEV,
    repeats: Annotated[int, typer.Option(min=1, help="Times that each command is given; the best counts.")] = 3,
    only: Annotated[str, typer.Option(help="Commands whose name has this.")] = "",
) -> None:
    """Measure, and say whether the targets are met."""
    rows: list[dict[str, Any]] = []
    print("| command | processor s | s | peak MiB | page MB | target | |")
    print("|---|---:|---:|---:|---:|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"small": SMALL, "large": rollouts}
        for name in {case.run: None for case in CASES if only in case.name}:
            call = f"make_run(Path({str(Path(folder) / name)!r}), {sizes[name]}, 10, {dev})"
            subprocess.run([sys.executable, "-c", f"from benchmarks.commands import *; {call}"], check=True)
        for case in CASES:
            if only in case.name:
                rows.append(row := _measured(case, Path(folder), repeats))
                print(f"| {' | '.join(_cells(row))} |", flush=True)
    print(
        json.dumps({"machine": f"{platform.machine()}, {os.cpu_count()} cores", "load": os.getloadavg(), "cases": rows})
    )


def _measured(case: Case, folder: Path, repeats: int) -> dict[str, Any]:
    places = {"RUN": str(folder / case.run), "PAGE": str(folder / "page.html")}
    command = [*child.DRO_RL, *(places.get(word, word) for word in case.words)]
    best = min((child.measure(command) for _ in range(repeats)), key=lambda taken: taken.cpu_seconds)
    page = None if case.page_mb is None else Path(places["PAGE"]).stat().st_size / 1e6
    met = best.cpu_seconds < case.cpu_seconds and (page is None or case.page_mb is None or page < case.page_mb)
    return {"name": case.name, **asdict(best), "page_mb": page, "met": met, "target": asdict(case)}


def _cells(row: dict[str, Any]) -> list[str]:
    target = f"{row['target']['cpu_seconds']:g} s" + (f", {row['target']['page_mb']:g} MB" if row["page_mb"] else "")
    return [
        row["name"],
        f"{row['cpu_seconds']:.2f}",
        f"{row['seconds']:.2f}",
        f"{row['peak_mib']:.0f}",
        "" if row["page_mb"] is None else f"{row['page_mb']:.1f}",
        target,
        "met" if row["met"] else "MISSED",
    ]


if __name__ == "__main__":
    typer.run(main)
