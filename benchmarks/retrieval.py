"""Retrievers by speed and memory: passages and questions a second, CPU seconds, peak memory, size of the index.

    python -m benchmarks.retrieval                       # all cases, a table and JSON
    python -m benchmarks.retrieval --case bm25-million   # one of them
    python -m benchmarks.retrieval --passages 100000     # a smaller generated corpus

Cases: BM25 on HotpotQA's passages (`corpus/hotpotqa.jsonl.gz` under DRO_RL_DATA or ../shared/data) and on a generated
corpus of a million; ColBERT on the first passages of HotpotQA, with an encoder that is untrained as ColBERT
(`untrained_colbert.py`); dense on the first passages of HotpotQA, with all-MiniLM-L6-v2. Building and searching have a
process of their own each. Peak memory is the largest sum over a process and its children, sampled every tenth of a
second; pages of the memory-mapped index that it touched are counted, though the system takes them back when it needs
room. CPU seconds are of the process and its children: they say what the wall clock would on a machine that does nothing
else.
"""

from __future__ import annotations

import gzip
import json
import os
import platform
import resource
import shutil
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from benchmarks import generated_corpus, untrained_colbert

DATA = Path(os.environ.get("DRO_RL_DATA") or Path(__file__).parents[2] / "shared" / "data")
CASES = ("bm25-hotpotqa", "bm25-million", "colbert-hotpotqa", "dense-hotpotqa")
FEW = 100
"""Questions of the cases with an encoder; else 2,000."""
K = 20
WIKIPEDIA = 21_015_324
"""Passages of DPR's Wikipedia, psgs_w100.tsv."""


def build(retriever: str, corpus: Path, folder: Path, processes: int, checkpoint: str) -> dict[str, Any]:
    """Seconds to index, in this process and its children."""
    from dro_rl.retrieval.bm25 import BM25
    from dro_rl.retrieval.colbert import ColBERT
    from dro_rl.retrieval.dense import Dense
    from dro_rl.retrieval.index import build_index

    started = time.perf_counter()
    made = {"bm25": BM25, "colbert": lambda: ColBERT(checkpoint), "dense": lambda: Dense(checkpoint)}[retriever]()
    manifest = build_index(made, str(corpus), folder, processes=processes)
    return {"seconds": time.perf_counter() - started, "cpu": _cpu_seconds(), "passages": manifest.passages}


def search(folder: Path, questions: Path) -> dict[str, Any]:
    """Seconds to open and to search, texts looked up, one process."""
    from dro_rl.retrieval.index import Index

    started = time.perf_counter()
    index = Index(folder)
    index.search(["warm up"], K)
    opened = time.perf_counter()
    asked, before = json.loads(questions.read_text()), _cpu_seconds()
    found = index.search(asked, K)
    return {
        "open": opened - started,
        "seconds": time.perf_counter() - opened,
        "cpu": _cpu_seconds() - before,
        "questions": len(asked),
        "found": sum(map(len, found)) / len(found),
    }


def _cpu_seconds() -> float:
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in spent)


def measured(*arguments: str) -> dict[str, Any]:
    """One of the two in a process of its own, with the peak memory of it and its children in GiB."""
    command = [sys.executable, "-m", "benchmarks.retrieval", *arguments]
    with tempfile.TemporaryFile("w+") as out:
        process = psutil.Popen(command, stdout=out)
        peak = 0
        while process.poll() is None:
            peak = max(peak, _memory(process))
            time.sleep(0.1)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
        out.seek(0)
        return {**json.loads(out.read().splitlines()[-1]), "gib": peak / 2**30}


def _memory(process: psutil.Process) -> int:
    total = 0
    try:
        for each in (process, *process.children(recursive=True)):
            total += each.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total


def prepare(case: str, folder: Path, passages: int, count: int) -> tuple[Path, Path]:
    """A corpus and questions about it, as files."""
    corpus, questions = folder / f"{case}.jsonl", folder / f"{case}.questions.json"
    if case == "bm25-million":
        generated_corpus.write(corpus, passages)
        asked = generated_corpus.questions(count, passages)
    else:
        with gzip.open(DATA / "corpus" / "hotpotqa.jsonl.gz", "rt", encoding="utf-8") as lines:
            corpus.write_text("".join(islice(lines, None if case == "bm25-hotpotqa" else passages)))
        with gzip.open(DATA / "dev" / "hotpotqa.jsonl.gz", "rt", encoding="utf-8") as lines:
            asked = [json.loads(line)["question"] for line in lines][:count]
    questions.write_text(json.dumps(asked))
    return corpus, questions


def run_case(case: str, folder: Path, passages: int, processes: int, checkpoint: str) -> dict[str, Any]:
    """Both measurements of one case."""
    corpus, questions = prepare(case, folder, passages, 2000 if case.startswith("bm25") else FEW)
    index = folder / case
    retriever = case.partition("-")[0]
    built = measured("--build", retriever, str(corpus), str(index), "--processes", str(processes),
                     "--checkpoint", checkpoint)  # fmt: skip
    searched = measured("--search", str(index), str(questions))
    size = sum(path.stat().st_size for path in index.rglob("*") if path.is_file())
    row = {
        "case": case,
        "passages": built["passages"],
        "build_seconds": built["seconds"],
        "build_cpu_seconds": built["cpu"],
        "passages_per_second": built["passages"] / built["seconds"],
        "build_gib": built["gib"],
        "index_gib": size / 2**30,
        "corpus_gib": corpus.stat().st_size / 2**30,
        "open_seconds": searched["open"],
        "questions_per_second": searched["questions"] / searched["seconds"],
        "questions_per_cpu_second": searched["questions"] / searched["cpu"],
        "search_gib": searched["gib"],
    }
    shutil.rmtree(index)
    corpus.unlink()
    return row


def wikipedia(row: dict[str, Any]) -> dict[str, float]:
    """What DPR's Wikipedia would take by the measured row: everything here grows with the number of passages."""
    times = WIKIPEDIA / row["passages"]
    return {
        "build_hours": row["build_seconds"] * times / 3600,
        "build_gib": row["build_gib"] * times,
        "index_gib": row["index_gib"] * times,
        "questions_per_second": row["questions_per_second"] / times,
    }


def main(
    arguments: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    case: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(CASES)}.")] = None,
    passages: Annotated[int, typer.Option(help="Passages of the generated corpus.")] = 1_000_000,
    colbert_passages: Annotated[int, typer.Option(help="Passages for ColBERT.")] = 1_000,
    dense_passages: Annotated[int, typer.Option(help="Passages for the dense retriever.")] = 1_000,
    processes: Annotated[int, typer.Option(help="Processes that index.")] = 2,
    checkpoint: Annotated[
        str, typer.Option(help="A ColBERT checkpoint; without one, an untrained encoder of that form.")
    ] = "",
    folder: Annotated[Path | None, typer.Option(help="Where corpora and indexes go meanwhile.")] = None,
    output: Annotated[Path | None, typer.Option(help="Also write the JSON here.")] = None,
    build_one: Annotated[bool, typer.Option("--build", hidden=True)] = False,
    search_one: Annotated[bool, typer.Option("--search", hidden=True)] = False,
) -> None:
    """Measure retrievers."""
    if build_one and arguments:
        print(json.dumps(build(arguments[0], Path(arguments[1]), Path(arguments[2]), processes, checkpoint)))
        return
    if search_one and arguments:
        print(json.dumps(search(Path(arguments[0]), Path(arguments[1]))))
        return
    rows = []
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for name in case or CASES:
            encoder, size, workers = checkpoint, passages, processes
            if name == "colbert-hotpotqa":
                encoder = checkpoint or str(untrained_colbert.write_checkpoint(Path(scratch) / "checkpoint"))
                size, workers = colbert_passages, 1
            elif name == "dense-hotpotqa":
                encoder, size, workers = str(untrained_colbert.encoder_folder()), dense_passages, 1
            rows.append(run_case(name, Path(scratch), size, workers, encoder))
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB"
    print(f"{machine}; k={K}; building on {processes} processes, searching on one\n")
    print("| case | passages | built in | CPU | passages/s | peak | index | questions/s | by CPU | peak |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        print(
            f"| {row['case']} | {row['passages']:,} | {row['build_seconds']:.0f} s "
            f"| {row['build_cpu_seconds']:.0f} s | {row['passages_per_second']:,.0f} "
            f"| {row['build_gib']:.2f} GiB | {row['index_gib']:.2f} GiB | {row['questions_per_second']:,.0f} "
            f"| {row['questions_per_cpu_second']:,.0f} | {row['search_gib']:.2f} GiB |"
        )
        row["wikipedia"] = wikipedia(row)
    for row in rows:
        if row["case"] == "bm25-million":
            far = row["wikipedia"]
            print(
                f"\n{WIKIPEDIA:,} passages by the same rates: {far['build_hours']:.1f} h to build, "
                f"{far['build_gib']:.0f} GiB of memory, {far['index_gib']:.0f} GiB on disk, "
                f"{far['questions_per_second']:.0f} questions/s and process."
            )
    if output is not None:
        output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
