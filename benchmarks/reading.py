"""Reading 100,000 questions of 10 to 20 passages: seconds and peak memory, as a stream and as a list.

    python -m benchmarks.reading                    # every case, a table and JSON
    python -m benchmarks.reading --case stream      # one measurement, as JSON, in this process

The file is generated: passages of 100 words, as in DPR's Wikipedia, each of which stands with about fifteen questions.
Each case has a process of its own, so that its peak memory is its own; seconds of processor are given beside seconds of
the clock, which a busy machine stretches. `json` only decodes the lines: what is above it is the price of the checks.
Targets of the stream: 20 seconds and 1 GiB.
"""

from __future__ import annotations

import json
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from dro_rl.data.manifest import questions_hash
from dro_rl.records import Document, Question, iter_questions, read_questions, write_questions

CASES = ("json", "stream", "stream-gz", "hash", "list")
TARGET_SECONDS, TARGET_MIB = 20, 1024


def generate(questions: int, words: int = 100) -> Iterator[Question]:
    """Questions with 10 to 20 candidates out of as many passages as there are questions."""
    draw = random.Random(0)
    vocabulary = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyzé", k=draw.randint(2, 9))) for _ in range(20_000)]
    passages = [
        Document(str(n), " ".join(draw.choices(vocabulary, k=2)), " ".join(draw.choices(vocabulary, k=words)))
        for n in range(questions)
    ]
    for n in range(questions):
        candidates = tuple(passages[place] for place in draw.sample(range(questions), draw.randint(10, 20)))
        supporting = (candidates[draw.randrange(len(candidates))].id,)
        yield Question(f"q{n}", " ".join(draw.choices(vocabulary, k=9)), ("x", "y"), candidates, supporting, "made")


def measure(case: str, path: Path) -> dict[str, float]:
    """Seconds of one reading, and the process's peak memory in MiB, the interpreter and its imports included."""
    started, busy = time.perf_counter(), time.process_time()
    if case == "json":
        with path.open("rb") as lines:
            count = sum(len(json.loads(line)) > 0 for line in lines)
    elif case.startswith("stream"):
        count = sum(1 for _ in iter_questions(path))
    elif case == "hash":
        count = len(questions_hash(iter_questions(path)))
    else:
        count = len(read_questions(path))
    seconds, usage = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    return {
        "read": count,
        "seconds": seconds,
        "cpu_seconds": time.process_time() - busy,
        "peak_mib": usage.ru_maxrss / 1024,
    }


def main(
    case: Annotated[str | None, typer.Option(help=f"One of {', '.join(CASES)}: measure in this process.")] = None,
    file: Annotated[Path | None, typer.Option(help="The file to read, with --case.")] = None,
    questions: Annotated[int, typer.Option(min=20, help="Questions in the generated file.")] = 100_000,
) -> None:
    """Measure, and say whether the stream meets its targets."""
    if case is not None and file is not None:
        print(json.dumps(measure(case, file)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path, packed = Path(folder) / "questions.jsonl", Path(folder) / "questions.jsonl.gz"
        write_questions(path, generate(questions))
        write_questions(packed, iter_questions(path))
        size = path.stat().st_size / 2**20
        print(f"{questions:,} questions, {size:,.0f} MiB, {packed.stat().st_size / 2**20:,.0f} MiB packed")
        found = {}
        for each in CASES:
            source = packed if each.endswith("gz") else path
            arguments = [sys.executable, "-m", "benchmarks.reading", "--case", each, "--file", str(source)]
            found[each] = json.loads(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)
            seconds, cpu, peak = (found[each][name] for name in ("seconds", "cpu_seconds", "peak_mib"))
            print(f"{each:10} {seconds:7.1f} s ({cpu:.1f} s of processor) {peak:8,.0f} MiB peak", flush=True)
    met = found["stream"]["seconds"] < TARGET_SECONDS and found["stream"]["peak_mib"] < TARGET_MIB
    print(f"target {TARGET_SECONDS} s and {TARGET_MIB:,} MiB for the stream: {'met' if met else 'MISSED'}")
    print(json.dumps({"questions": questions, "mib": size, "cases": found, "machine": platform.processor()}))
    raise typer.Exit(not met)


if __name__ == "__main__":
    typer.run(main)
