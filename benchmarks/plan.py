"""What `dro-rl plan --calibrate` says of a run, against the run: peak memory and time of recipes that a CPU can train.

Time is the processor's, which other jobs on the machine disturb less; both sides are of one thread.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import child, harness
from dro_rl.recipe import load_recipe, parse_command_line
from dro_rl.resources.machine import machine
from dro_rl.resources.plan import make_plan

CLOSE = 0.25
"""How far a plan may be from the run, of the run."""


def main(
    context: typer.Context,
    recipe: Annotated[list[str], typer.Option(help="A recipe with --key value over it, in quotes; several times.")] = [  # noqa: B006
        "quickstart"
    ],
    output: harness.OutputOption = harness.OUTPUT,
    device: harness.DeviceOption = "cpu",
) -> None:
    """Plan each recipe, train it, and compare."""
    rows = [_row(arguments) for arguments in recipe]
    harness.report(
        "plan",
        context,
        "The plan against the run",
        ("recipe", "planned MiB", "peak MiB", "ratio", "planned s", "took s", "ratio", f"within {CLOSE:.0%}"),
        [_line(row) for row in rows],
        rows,
        notes=["Planned over measured; seconds of the processor; memory is the resident set's peak."],
    )


def _row(arguments: str) -> dict[str, Any]:
    words = arguments.split()
    with tempfile.TemporaryDirectory() as folder:
        words += ["--output_dir", str(Path(folder) / "run"), "--warmup_cache_dir", str(Path(folder) / "warmup")]
        plan = harness.apart(planned, words=words)
        took = harness.apart(trained, words=words)
    return {"recipe": arguments, **plan, **took}


def planned(words: list[str]) -> dict[str, Any]:
    """Bytes and seconds that a plan says, in a process that has done nothing else."""
    found = make_plan(load_recipe(*parse_command_line(words)), machine(on_cpu=True), calibrated=True, clock="processor")
    parts = {each.phase: each.seconds for each in found.done}
    return {
        "planned_bytes": found.peak.total,
        "phase": found.peak.name,
        "planned_seconds": found.seconds,
        "parts": parts,
    }


def trained(words: list[str]) -> dict[str, Any]:
    """Bytes and seconds that the job took, in a process of its own."""
    taken = child.measure([sys.executable, "-m", "dro_rl.train", *words])
    return {"bytes": taken.peak_mib * 2**20, "seconds": taken.cpu_seconds}


def _line(row: dict[str, Any]) -> list[str]:
    memory, seconds = row["planned_bytes"] / row["bytes"], row["planned_seconds"] / row["seconds"]
    close = all(abs(ratio - 1) <= CLOSE for ratio in (memory, seconds))
    return [
        row["recipe"],
        harness.cell(row["planned_bytes"] / harness.MIB, 0),
        harness.cell(row["bytes"] / harness.MIB, 0),
        harness.cell(memory),
        harness.cell(row["planned_seconds"], 0),
        harness.cell(row["seconds"], 0),
        harness.cell(seconds),
        "yes" if close else "no",
    ]


if __name__ == "__main__":
    typer.run(main)
