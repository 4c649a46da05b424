"""Values that nobody should write into a recipe, for every key: refused in a line that names the key, or trained with.

    python -m benchmarks.hostile_settings                       every value: read as a recipe, then run as a tiny job
    python -m benchmarks.hostile_settings --key seed --key optim

A job has a deadline and a limit of memory: one that still trains at its deadline is as good as one that is done. What
counts is a traceback, a refusal that does not name the key, or a process that is no more.
"""

from __future__ import annotations

import datetime
import io
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from dro_rl.errors import InputError, first_line
from dro_rl.keys.reference import KEYS
from dro_rl.recipe import load_recipe

MEMORY = 6 * 2**30
"""Bytes of data that a job may have."""

LEAST: dict[str, Any] = {
    "dataset_name": "toy",
    "selector_model_name_or_path": "toy",
    "generator_model_name_or_path": "toy",
    "output_dir": "run",
}
TINY: dict[str, Any] = {
    **LEAST,
    "selector_prompt_template": "toy_selector",
    "generator_prompt_template": "toy_generator",
    "max_train_samples": 8,
    "max_eval_samples": 2,
    "num_iterations": 2,
    "questions_per_iteration": 4,
    "num_generations": 2,
    "num_selected": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_prompt_length": 200,
    "max_completion_length": 8,
    "max_answer_length": 4,
    "report_to": "none",
    "warmup_cache_dir": "cache",
    "warmup_selector_steps": 1,
    "warmup_generator_steps": 1,
}
"""A job of two iterations, two steps, in a second or two."""


def _nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def _bomb() -> list[Any]:
    value: list[Any] = ["x"] * 10
    for _ in range(8):
        value = [value] * 10
    return value


NUMBERS = [
    0, 1, -1, 2, 7, 0.5, -0.5, 1.5, 1e308, -1e308, 1e-320, float("inf"), float("-inf"), float("nan"), 2**31 - 1, 2**31,
    2**32 - 1, 2**32, 2**53, 2**63, 10**30, -(10**30), 10**5000, 3 + 4j,
]  # fmt: skip
TEXTS = [
    "", " ", "x", "0", "1e-5", "1e999", "inf", "nan", "none", "auto", "true", "steps", "no", "epoch", "verbose",
    "foo.json", "no/such/path", "/", ".", "~", "/etc/passwd", "a" * 300, "a" * 100_000, "a/" * 2000, "\0", "a\nb",
    "\x1b[31m", "[red]", "\ud800", "日本", "{}", "{", '{"a": 1}', "{{ 7 * 7 }}", "http://127.0.0.1:99999",
    "adamw_8bit", "galore_adamw", "cosine_with_min_lr", "reduce_lr_on_plateau", "gloo", "nccl", "a=1", "betas=0.9",
    "momentum=0.9",
]  # fmt: skip
OTHERS = [
    None, True, False, [], [1], ["x"], ["x", "y"], [None], [[]], {}, {"a": 1}, {"a": float("inf")}, {"a": None}, {1: 2},
    {"a": {"b": datetime.date(2020, 1, 1)}}, {"use_reentrant": True}, {"min_lr_rate": 0.1}, {"min_lr": 1e-6},
    {"num_cycles": 1e9}, {"num_cycles": "x"}, {"num_decay_steps": -3}, datetime.date(2020, 1, 1), b"x", {1, 2}, (1, 2),
    object(), _nested(500), _bomb(),
]  # fmt: skip


def hostile_values() -> list[Any]:
    """Numbers, texts and other things that no key, or few, mean to be given."""
    return [*NUMBERS, *TEXTS, *OTHERS]


def as_recipe(key: str, value: Any) -> tuple[str, str]:
    """What reading this value comes to: `accepted`, `refused`, `unnamed` or `traceback`, and its words."""
    try:
        load_recipe(None, {**LEAST, key: value})
    except InputError as error:
        return "refused" if key in str(error) else "unnamed", str(error)
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {first_line(error)}"
    return "accepted", ""


def as_job(key: str, value: Any, folder: Path, seconds: int) -> tuple[str, str]:
    """What a tiny job with this value comes to: `trained`, `refused` or `traceback`, and its words."""
    from dro_rl import train

    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**TINY, key: value}), encoding="utf-8")
    os.chdir(folder)
    said = io.StringIO()
    signal.signal(signal.SIGALRM, _enough)
    signal.alarm(seconds)
    began = time.monotonic()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            status = train.run_job(["recipe.yaml"])
    except BaseException as error:
        if time.monotonic() - began >= seconds:  # libraries turn what the alarm raises into errors of their own
            return "trained", f"for {seconds} s"
        return "traceback", f"{type(error).__name__}: {first_line(error)}"
    finally:
        signal.alarm(0)
        os.chdir("/")
        shutil.rmtree(folder, ignore_errors=True)
    if status == 0:
        return "trained", ""
    line = next((line for line in said.getvalue().splitlines() if line.startswith("error: ")), "no error line")
    return "refused" if line.startswith("error: ") else "traceback", line


def _enough(*_: object) -> None:
    raise TimeoutError


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))


class Jobs:
    """Tiny jobs, one after another in a process of their own, which another follows when one is no more."""

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds
        self.folder = Path(tempfile.mkdtemp())
        self.pool: ProcessPoolExecutor | None = None

    def run(self, key: str, value: Any, number: int) -> tuple[str, str]:
        """Run one."""
        self.pool = self.pool or ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_limit_memory)
        try:
            job = self.pool.submit(as_job, key, value, self.folder / str(number), self.seconds)
            return job.result(timeout=10 * self.seconds)
        except (BrokenProcessPool, TimeoutError) as error:
            for process in self.pool._processes.values():
                process.kill()
            self.pool = None
            return "traceback", f"the process is no more ({type(error).__name__})"

    def close(self) -> None:
        """End the process and remove what jobs left."""
        if self.pool is not None:
            self.pool.shutdown()
        shutil.rmtree(self.folder, ignore_errors=True)


def _verdicts(judge: Callable[[str, Any], tuple[str, str]], cases: Iterator[tuple[str, Any]] | list[tuple[str, Any]]
) -> tuple[Counter[str], list[tuple[str, Any]]]:  # fmt: skip
    """Counts by verdict, and the cases that were accepted. Prints those that a user should not see."""
    counts: Counter[str] = Counter()
    accepted = []
    for key, value in cases:
        verdict, words = judge(key, value)
        counts[verdict] += 1
        if verdict == "accepted":
            accepted.append((key, value))
        if verdict in ("unnamed", "traceback"):
            print(f"{verdict}: {key}: {str(value)[:60]!r}: {words[:200]}", flush=True)
    return counts, accepted


def main(
    key: Annotated[list[str] | None, typer.Option(help="Only this key; may be repeated.")] = None,
    seconds: Annotated[int, typer.Option(help="A job's deadline.")] = 20,
    jobs: Annotated[bool, typer.Option(help="Run accepted values as jobs.")] = True,
) -> None:
    """Read every value as a recipe, run the accepted ones as jobs, and count."""
    cases = ((name, value) for name in key or KEYS for value in hostile_values())
    counts, accepted = _verdicts(as_recipe, cases)
    print(f"{counts.total()} recipe values: {dict(counts)}")
    if jobs:
        runner = Jobs(seconds)
        numbers = iter(range(len(accepted)))
        counts, _ = _verdicts(lambda name, value: runner.run(name, value, next(numbers)), accepted)
        runner.close()
        print(f"{counts.total()} jobs: {dict(counts)}")
    sys.exit(1 if counts["traceback"] or counts["unnamed"] else 0)


if __name__ == "__main__":
    typer.run(main)
