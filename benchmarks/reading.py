"""Reading 100,000 questions of 10 to 20 passages, and a corpus of 300,000: seconds and peak memory.

    python -m benchmarks.reading                    # every case, a table and JSON
    python -m benchmarks.reading --case stream      # one measurement, as JSON, in this process

The file is generated: passages of 100 words, as in DPR's Wikipedia, each of which stands with about fifteen questions.
Each case has a process of its own, so that its peak memory is its own; seconds of processor are given beside seconds of
the clock, which a busy machine stretches. `json` only decodes the lines: what is above it is the price of the checks.
Targets of the stream: 20 seconds and 1 GiB.
"""

from __future__ import annotations

import itertools
import json
import os
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

from dro_rl.data.corpus import CorpusHash, read_corpus
from dro_rl.records import Document, Question, iter_questions, read_questions, write_questions

CASES = ("json", "stream", "stream-gz", "list", "corpus")
FILES = {"stream-gz": "questions.jsonl.gz", "corpus": "corpus.tsv"}
"""What a case reads, where it is not `questions.jsonl`."""

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


def generate_files(folder: Path, questions: int) -> None:
    """The question file, plain and packed, and a corpus of three times as many passages, as DPR's file has them."""
    path = folder / "questions.jsonl"
    write_questions(path, generate(questions))
    write_questions(folder / FILES["stream-gz"], iter_questions(path))
    with (folder / FILES["corpus"]).open("w", encoding="utf-8") as file:
        file.write("id\ttext\ttitle\n")
        passages = (document for question in iter_questions(path) for document in question.documents)
        for number, passage in enumerate(itertools.islice(passages, 3 * questions), start=1):
            file.write(f'{number}\t"{passage.text}"\t{passage.title}\n')


def measure(case: str, path: Path) -> dict[str, float]:
    """Seconds of one reading, and the process's peak memory in MiB, the interpreter and its imports included."""
    started, busy = time.perf_counter(), time.process_time()
    if case == "json":
        with path.open("rb") as lines:
            count = sum(len(json.loads(line)) > 0 for line in lines)
    elif case.startswith("stream"):
        count = sum(1 for _ in iter_questions(path))
    elif case == "corpus":
        digest = CorpusHash()
        for document in read_corpus(path):
            digest.add(document)
        count = digest.count
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
    file: Annotated[Path | None, typer.Option(help="The file to read, or with --case generate the folder.")] = None,
    questions: Annotated[int, typer.Option(min=20, help="Questions in the generated file.")] = 100_000,
) -> None:
    """Measure, and say whether the stream meets its targets."""
    if case is not None and file is not None:
        if case == "generate":
            generate_files(file, questions)
        else:
            print(json.dumps(measure(case, file)))
        return
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own too: a child's peak begins at what its parent holds.
        run("generate", Path(folder), questions)
        found = {}
        for each in CASES:
            path = Path(folder) / FILES.get(each, "questions.jsonl")
            found[each] = json.loads(run(each, path, questions))
            read, seconds, cpu, peak = (found[each][name] for name in ("read", "seconds", "cpu_seconds", "peak_mib"))
            size = path.stat().st_size / 2**20
            print(
                f"{each:10} {read:8,} of {size:6,.0f} MiB {seconds:7.1f} s ({cpu:.1f} s of processor) "
                f"{peak:6,.0f} MiB peak",
                flush=True,
            )
    met = found["stream"]["seconds"] < TARGET_SECONDS and found["stream"]["peak_mib"] < TARGET_MIB
    print(f"target {TARGET_SECONDS} s and {TARGET_MIB:,} MiB for the stream: {'met' if met else 'MISSED'}")
    print(json.dumps({"machine": f"{platform.machine()}, {os.cpu_count()} cores", "cases": found}))


def run(case: str, file: Path, questions: int) -> str:
    """What a case prints, in a process of its own."""
    arguments = [sys.executable, "-m", "benchmarks.reading", "--case", case, "--file", str(file)]
    arguments += ["--questions", str(questions)]
    return subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    typer.run(main)
