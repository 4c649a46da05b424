"""Looking into a log of a million rollouts: seconds, processor time and peak memory of each command.

    python -m benchmarks.rollout_log                      # ten iterations of 100,000 rollouts
    python -m benchmarks.rollout_log --iterations 1       # all in one, as the paper's Algorithm 1 has them
    python -m benchmarks.rollout_log --iterations 1000    # online: many small files

The log is made here, with the columns that a training writes. Each command is a process of its own, and its
time includes the interpreter's start. This process holds little: a child's peak begins at what its parent holds.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks import child

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

M, N, K = 8, 20, 5
ROWS_A_PART = 20_000
"""Rollouts that a training writes into one file, at most."""

TARGETS: dict[str, tuple[list[str], float]] = {
    "show, one question": (["rollouts", "show", "RUN", "q77"], 1),
    "show, the hardest": (["rollouts", "show", "RUN", "--sort", "evidence"], 1),
    "stats": (["rollouts", "stats", "RUN"], 5),
    "ls": (["rollouts", "ls", "RUN"], 5),
    "top": (["rollouts", "top", "RUN"], 5),
    "top, a filter": (["rollouts", "top", "RUN", "--only", "unselected"], 5),
    "diff": (["rollouts", "diff", "RUN", "--sort", "worse"], 5),
}
"""By name: a command, and the seconds that it may take. Memory is to stay below `MIB`."""
MIB = 1024


def generate(run: Path, rollouts: int, iterations: int, seed: int = 0) -> None:
    """A log in which every question has M rollouts of K among N documents; questions come again in later iterations."""
    import numpy as np

    from dro_rl.rollouts import log

    draw = np.random.default_rng(seed)
    questions = rollouts // M // iterations
    for iteration in range(1, iterations + 1):
        for part, first in enumerate(range(0, questions, ROWS_A_PART // M)):
            count = min(ROWS_A_PART // M, questions - first)
            log.write(_table(draw, iteration, first, count), log.part_path(run, iteration, part))


def _table(draw: np.random.Generator, iteration: int, first: int, questions: int) -> pa.Table:
    import numpy as np
    import pyarrow as pa

    from dro_rl.rollouts import log

    rows = questions * M
    selections = np.argsort(draw.random((rows, N)), axis=1)[:, :K] + 1
    number = np.repeat(np.arange(first, first + questions), M)
    answer = draw.normal(-4 + iteration / 10, 2, rows)
    weight = np.exp(answer - answer.reshape(-1, M).max(1).repeat(M))
    weight /= weight.reshape(-1, M).sum(1).repeat(M)
    ess = np.repeat(1 / (weight.reshape(-1, M) ** 2).sum(1), M)
    clean = draw.random(rows) > 0.02
    logps, nan = draw.normal(-1, 0.3, (rows, 3 * K)), np.full(rows, np.nan)
    selection_logp = logps.sum(1)

    def lists(values: np.ndarray, kind: pa.DataType) -> pa.Array:
        return pa.ListArray.from_arrays(np.arange(0, values.size + 1, values.shape[1], dtype=np.int32),
                                        pa.array(values.ravel()).cast(kind))  # fmt: skip

    def texts(form: str, values: Any) -> pa.Array:
        return pa.array([form.format(value) for value in values])

    names = pa.array([f"d{n}" for n in range(N)]).take(pa.array(selections.ravel() - 1))
    titles = pa.array([f"A title of document {n}" for n in range(N)]).take(pa.array(selections.ravel() - 1))
    offsets = pa.array(np.arange(0, rows * K + 1, K, dtype=np.int32))
    problems = pa.ListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(~clean)]).astype(np.int32)),
                                        pa.array(["too_many"] * int((~clean).sum()), pa.string()))  # fmt: skip
    columns: dict[str, Any] = {
        "iteration": np.full(rows, iteration),
        "step": np.full(rows, iteration - 1),
        "position": number,
        "question_index": number,
        "question_id": texts("q{}", number),
        "question": texts("Who was it that did number {} of all these things, and when?", number),
        "answers": pa.ListArray.from_arrays(pa.array(np.arange(rows + 1, dtype=np.int32)), texts("answer {}", number)),
        "sample": np.tile(np.arange(M), questions),
        "text": pa.array([" > ".join(f"[{n}]" for n in row) for row in selections.tolist()]),
        "token_ids": lists(draw.integers(0, 32_000, (rows, 3 * K)), pa.int32()),
        "selection": lists(selections, pa.int32()),
        "valid": np.ones(rows, dtype=bool),
        "problems": problems,
        "document_ids": pa.ListArray.from_arrays(offsets, names),
        "document_titles": pa.ListArray.from_arrays(offsets, titles),
        "supporting": lists(selections <= 2, pa.bool_()),
        "num_documents": np.full(rows, N),
        "num_supporting": np.full(rows, 2),
        "proposal_logps": lists(logps, pa.float64()),
        "proposal_logp": selection_logp,
        "selection_logp": selection_logp,
        "answer_logp": answer,
        "answer_logp_sum": answer,
        "answer_logp_mean": answer / 4,
        "reward": answer,
        "weight": weight,
        "proposal_weight": np.full(rows, 1 / M),
        "ess": ess,
        "weight_temperature": np.ones(rows),
        "prompt_cut": np.zeros(rows, dtype=bool),
        "temperature": np.ones(rows),
        "draw": np.ones(rows),
    }
    empty = {"rewards": [[]] * rows, "answer": [None] * rows, "order": [[]] * rows, "windows": [[]] * rows}
    values = [
        pa.array(columns.get(field.name, empty.get(field.name, nan)), field.type)
        if not isinstance(columns.get(field.name), pa.Array)
        else columns[field.name].cast(field.type)
        for field in log.SCHEMA
    ]
    return pa.Table.from_arrays(values, schema=log.SCHEMA)


def main(
    rollouts: Annotated[int, typer.Option(min=M, help="Rollouts in the log.")] = 1_000_000,
    iterations: Annotated[int, typer.Option(min=1, help="Iterations that they are of.")] = 10,
    only: Annotated[str, typer.Option(help="Commands whose name has this.")] = "",
    keep: Annotated[Path | None, typer.Option(help="Make the log here, or take the one that is here.")] = None,
) -> None:
    """Measure, and say whether the targets are met."""
    with tempfile.TemporaryDirectory() as folder:
        run = keep or Path(folder)
        if not (run / "rollouts").is_dir():
            call = f"generate(Path({str(run)!r}), {rollouts}, {iterations})"
            subprocess.run([sys.executable, "-c", f"from benchmarks.rollout_log import *; {call}"], check=True)
        paths = sorted((run / "rollouts").iterdir())
        size = sum(path.stat().st_size for path in paths) / 2**20
        print(f"{rollouts:,} rollouts, {iterations} iterations, {len(paths)} files, {size:,.0f} MiB")
        found = {}
        for name, (command, target) in TARGETS.items():
            if only in name:
                words = [str(run) if word == "RUN" else word for word in command]
                each = child.measure([*child.DRO_RL, *words])
                found[name] = dataclasses.asdict(each)
                met = each.seconds < target and each.peak_mib < MIB
                took = f"{each.seconds:6.2f} s ({each.cpu_seconds:.2f} s of processor)"
                told = f"target {target:g} s, {MIB:,} MiB: {'met' if met else 'MISSED'}"
                print(f"{name:20} {took} {each.peak_mib:6,.0f} MiB peak; {told}", flush=True)
    print(json.dumps({"machine": f"{platform.machine()}, {os.cpu_count()} cores", "cases": found}))


if __name__ == "__main__":
    typer.run(main)
