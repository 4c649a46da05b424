"""All that only a GPU can say, in one command that fits a lent card's minutes.

    python -m benchmarks.gpu --minutes 12
    python -m benchmarks.gpu --device cpu --minutes 5     the same code at tiny sizes, so that nothing fails there first

Parts run in order of worth, each in a process of its own with a time limit of its own; one that fails or runs out of
time is said, and the next goes on. `<output>/gpu.json` is written as parts end; a short table comes last. Each part is
a benchmark that can be run alone: the JSON has its line.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import harness
from benchmarks.harness import DeviceOption
from dro_rl.files import written_whole

SECONDS_TO_SAY_SO = 10
"""Left of the minutes for the table."""


@dataclass(frozen=True)
class Part:
    """One benchmark.

    Args:
        name: in the table and in the JSON.
        arguments: of `python -m`.
        seconds: at most.
        needs: a module without which it is left out.
        reads: folders without which it is left out.
    """

    name: str
    arguments: tuple[str, ...]
    seconds: float
    needs: str | None = None
    reads: tuple[str, ...] = ()


CPU = (
    ("exact", 120, "exactness --model 64x1 --prompt 40 --completion 4 --m 3 --matrix 64"),
    ("selector", 120, "selector_update --model 64x1 --prompt 60 --completion 4 --m 2 --plain-m 2 --repeats 1"),
    ("sampling", 120, "sampling_pass --model 64x1 --prompt 60 --completion 4 --m 2 --repeats 1"),
    (
        "generator",
        180,
        "generator_update --model 64x1 --m 4 --distinct 2 --documents 4 --k 2 --tokens 8 --repeats 1",
    ),
    ("attention", 90, "attention --model 64x1 --m 2 --prompt 60 --completion 4 --repeats 1"),
    ("step", 240, "trl_step --model 64x1 --documents 8 --m 4 --k 3 --tokens 8 --steps 1"),
)
CUDA = (
    ("exact", 90, "exactness --model llama-1b --prompt 3000 --matrix 8192"),
    ("selector-1b", 120, "selector_update --dtype bfloat16 --model llama-1b --m 1 --m 8 --m 16 --plain-m 8"),
    ("sampling-1b", 120, "sampling_pass --dtype bfloat16 --model llama-1b --m 8"),
    ("generator-1b", 120, "generator_update --dtype bfloat16 --model llama-1b"),
    ("attention", 120, "attention --dtype bfloat16 --model llama-1b --m 8"),
    ("selector-8b", 120, "selector_update --dtype bfloat16 --model llama-8b --m 8 --plain-m 8 --repeats 3"),
    ("generator-8b", 120, "generator_update --dtype bfloat16 --model llama-8b --repeats 3"),
    ("step-1b", 180, "trl_step --dtype bfloat16 --model llama-1b --questions 2 --checkpointing --steps 3"),
)
"""Name, seconds, benchmark: the most worth first."""


REAL = "dro_rl train nq_smollm2 --dataset_name data"
"""A real model on real questions, at the recipe's whole size."""
TINY = "dro_rl train quickstart --num_iterations 2 --eval_iterations 2 --max_eval_samples 16"
"""What stands for it on a CPU: the same command, a model that is shipped."""


def parts(device: str, output: Path) -> list[Part]:
    """What is run on a device, each with a folder of its own."""
    listed = [
        Part(name, (*f"benchmarks.{line} --device {device} --output".split(), str(output / name)), seconds)
        for name, seconds, line in (CUDA if device == "cuda" else CPU)
    ]
    own = ("--output_dir", str(output / "real"), "--warmup_cache_dir", str(output / "warmup"))
    if device == "cpu":
        return [*listed, Part("real", (*TINY.split(), *own), 240)]
    real = Part("real", (*REAL.split(), *own), 300, reads=("data", "models/smollm2-135m"))
    line = "benchmarks.rollouts --width 2048 --layers 16 --m 8 --output"
    return [*listed, real, Part("vllm", (*line.split(), str(output / "rollouts.json")), 240, needs="vllm")]


def run(part: Part, seconds: float) -> dict[str, Any]:
    """Run a part, and end it with all that it started when its time is out."""
    command = [sys.executable, "-m", *part.arguments]
    record: dict[str, Any] = {"part": part.name, "command": " ".join(["python", "-m", *part.arguments])}
    if part.needs is not None and importlib.util.find_spec(part.needs) is None:
        return {**record, "state": f"left out: {part.needs} is not installed"}
    if absent := [name for name in part.reads if not Path(name).exists()]:
        return {**record, "state": f"left out: there is no {absent[0]}"}
    if seconds <= 0:
        return {**record, "state": "left out: no time"}
    print(f"{part.name}: {seconds:.0f} s at most", file=sys.stderr, flush=True)
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, error = process.communicate(timeout=seconds)
        state = "done" if process.returncode == 0 else f"failed: {(error.strip().splitlines() or ['?'])[-1][:200]}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, error = process.communicate()
        state = "out of time"
    except BaseException:  # this process is to end, and leaves none of its own behind
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return {**record, "state": state, "seconds": round(time.perf_counter() - started, 1), "output": out[-8000:]}


def main(
    minutes: Annotated[float, typer.Option(help="All parts together; those that do not fit are left out.")] = 12.0,
    device: DeviceOption = "cuda",
    output: Annotated[Path, typer.Option(help="Folder of the JSON and of each part's tables.")] = Path("runs/gpu"),
) -> None:
    """Run the list, in order of worth, within the minutes."""
    harness.check("64x1", device)
    deadline = time.monotonic() + 60 * minutes - SECONDS_TO_SAY_SO
    whole: dict[str, Any] = {"machine": harness.machine(device), "minutes": minutes, "parts": []}
    for part in parts(device, output):
        whole["parts"].append(run(part, min(part.seconds, deadline - time.monotonic())))
        with written_whole(output / "gpu.json") as beside:
            beside.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    card = torch.cuda.get_device_name() if device == "cuda" else whole["machine"]["machine"]
    print(f"\n{card}, torch {torch.__version__}; every figure in {output}\n\n| part | state | s |\n|---|---|---:|")
    for record in whole["parts"]:
        print(f"| {record['part']} | {record['state']} | {record.get('seconds', '')} |")
    for record in whole["parts"]:
        if record["state"] == "done":
            print(f"\n{record['output'].strip()}")
    if not any(record["state"] == "done" for record in whole["parts"]):
        raise typer.Exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    typer.run(main)
