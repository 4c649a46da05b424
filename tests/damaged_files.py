"""Data files with something wrong in them, drawn by a seed: question files, corpora, indexes, manifests.

    python -m tests.damaged_files 2000 [KIND …]     in forked processes, under limits of time and memory

Each is read by the commands that read such files. What must not happen: a traceback, an exit status other than 0 and 2,
an error that does not say which file. `test_damaged_files.py` runs the first few of each kind.
"""

from __future__ import annotations

import copy
import gzip
import io
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from typer.testing import CliRunner

from dro_rl.cli import app
from dro_rl.data import load_questions
from dro_rl.data.manifest import Manifest, file_sha256, questions_hash, write_manifest
from dro_rl.errors import InputError
from dro_rl.records import read_questions
from dro_rl.retrieval.bm25 import BM25
from dro_rl.retrieval.index import build_index

QUESTIONS: list[dict[str, Any]] = [
    {
        "id": f"q{n}",
        "dataset": "birds",
        "question": f"Which bird has {n} red lamps?",
        "answers": ["heron", "the grey heron"],
        "documents": [{"id": f"p{d}", "title": f"T{d}", "text": f"Bird {d} has a red lamp."} for d in range(4)],
        "supporting": ["p1"],
        "type": "1-hop",
    }
    for n in range(5)
]
PASSAGES: list[dict[str, Any]] = [
    {"id": f"p{n}", "title": f"T{n}", "text": f"Bird {n} has a red lamp."} for n in range(9)
]
ODD: list[Any] = [
    None, True, False, 0, -1, 7, 1.5, float("nan"), float("inf"), 10**30, 10**400, "", " ", "\0", "x" * 5000, "a\nb",
    "a\tb", '"', "'", "[]", '["a"]', "{}", "\ud800", "\x1b[2J", "…", [], {}, [[]], [None], [1], [""], ["p1", "p1"],
    {"a": 1}, {"id": 1}, [{}], [{"id": "p1"}], [{"id": None, "text": None}],
]  # fmt: skip
COLUMNS: list[Callable[[int], pa.Array]] = [
    lambda n: pa.nulls(n),
    lambda n: pa.array(range(n)),
    lambda n: pa.array([float("nan")] * n),
    lambda n: pa.array([True] * n),
    lambda n: pa.array([b"\xff\xfe"] * n),
    lambda n: pa.array([Decimal("7.5")] * n),
    lambda n: pa.array([datetime(2020, 1, 1)] * n),
    lambda n: pa.array([400_000_000_000] * n, pa.int64()).cast(pa.timestamp("s")),
    lambda n: pa.array([timedelta(days=1)] * n),
    lambda n: pa.array(["p1"] * n).dictionary_encode(),
    lambda n: pa.array([["p1"]] * n, pa.list_(pa.string())),
    lambda n: pa.array([[1]] * n),
    lambda n: pa.array([{"a": 1}] * n),
    lambda n: pa.array([[{"id": 1}]] * n),
    lambda n: pa.array([[("k", "v")]] * n, pa.map_(pa.string(), pa.string())),
]


@dataclass(frozen=True)
class Damaged:
    """A case.

    Args:
        kind: `questions`, `corpus`, `manifest` or `index`.
        path: the damaged file.
        told: the words of which an error has one: the file, or what it belongs to.
        commands: what reads it, each as arguments of `dro-rl`; `train` stands for reading as training does.
    """

    kind: str
    path: Path
    told: tuple[str, ...]
    commands: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class World:
    """Whole files, to be damaged: questions with their manifest, a corpus with its index."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> World:
        """Write them."""
        (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
        (folder / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PASSAGES))
        asked = [{key: row[key] for key in ("id", "question", "answers")} for row in QUESTIONS]
        (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
        made = read_questions(folder / "q.jsonl")
        path = folder / "q.jsonl"
        retrieval = {"retriever": "bm25", "corpus": "c.jsonl", "k": 4, "fewer_than_k": 0}
        about = Manifest("birds", "dev", len(made), questions_hash(made), file_sha256(path), retrieval=retrieval)
        write_manifest(path, about)
        build_index(BM25(), str(folder / "c.jsonl"), folder / "index")
        return cls(folder)


def cases(world: World, folder: Path, kind: str, seeds: Sequence[int]) -> Iterator[Damaged]:
    """A case for each seed, written into a folder of its own."""
    for seed in seeds:
        there = folder / f"{kind}-{seed}"
        there.mkdir()
        yield KINDS[kind](world, there, random.Random(f"{kind} {seed}"))


def of_questions(world: World, path: Path, folder: Path) -> tuple[tuple[str, ...], ...]:
    """What reads a question file."""
    return (
        ("data", "check", str(path)),
        ("data", "show", str(path)),
        ("data", "prepare", "mine", "--input", str(path), "--split", "dev", "--output", str(folder / "made.jsonl")),
        ("retrieve", str(world.folder / "index"), str(path), "--k", "3", "--output", str(folder / "found.jsonl")),
        ("retrieval", "report", str(path)),
        ("train", str(path)),
    )


def of_corpora(path: Path, folder: Path) -> tuple[tuple[str, ...], ...]:
    """What reads a corpus."""
    return (
        ("data", "check", str(path), "--format", "corpus"),
        ("index", "bm25", str(path), str(folder / "index")),
    )


def run(case: Damaged) -> list[str]:
    """What is wrong with how the commands take a case; nothing where all is well."""
    wrong = []
    for command in case.commands:
        said, code, error = invoke(command)
        if error:
            wrong.append(f"{' '.join(command)}: {error}")
        elif code not in (0, 2):
            wrong.append(f"{' '.join(command)}: exit status {code}: {said}")
        elif code == 2 and not any(word in said.replace("\n", "") for word in case.told):
            wrong.append(f"{' '.join(command)}: the error does not say where: {said}")
    return wrong


def invoke(command: Sequence[str]) -> tuple[str, int, str]:
    """What a command says, its exit status, and its traceback where there is one."""
    if command[0] == "train":
        try:
            load_questions(command[1], "train")
            return "", 0, ""
        except InputError as error:
            return f"error: {error}", 2, ""
        except Exception:
            return "", 1, traceback.format_exc()
    result = CliRunner().invoke(app, list(command))
    expected = result.exception is None or isinstance(result.exception, SystemExit)
    return result.output, result.exit_code, "" if expected else "".join(traceback.format_exception(result.exception))


# Damages ------------------------------------------------------------------------------------------------------


def _odd_value(value: Any, draw: random.Random) -> Any:
    """The value with one thing within it replaced, removed, renamed or added."""
    value = copy.deepcopy(value)
    places: list[tuple[Any, Any]] = []

    def visit(inner: Any) -> None:
        keys = list(inner) if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ()
        for key in keys:
            places.append((inner, key))
            visit(inner[key])

    visit(value)
    inner, key = draw.choice(places)
    what = draw.randrange(8)
    if what == 0:
        del inner[key]
    elif what == 1 and isinstance(inner, dict):
        inner[draw.choice([str(key).upper(), f"{key} ", f"{key}s", ""])] = inner.pop(key)
    elif what == 2 and isinstance(inner, dict):
        inner[draw.choice(["extra", "SUPPORTING", "Title", ""])] = draw.choice(ODD)
    elif what == 3:
        for _ in range(draw.choice([3, 70, 500])):
            inner[key] = [inner[key]]
    else:
        inner[key] = draw.choice(ODD)
    return value


def _odd_bytes(raw: bytes, draw: random.Random) -> bytes:
    """The bytes with some of them cut, changed, doubled or put in."""
    at = draw.randrange(len(raw) + 1)
    size = draw.choice([1, 2, 10, 100])
    what = draw.randrange(9)
    if what == 0:
        return raw[:at]
    if what == 1:
        return raw[:at] + draw.randbytes(size) + raw[at + size :]
    if what == 2:
        return raw[:at] + draw.randbytes(size) + raw[at:]
    if what == 3:
        return raw[:at] + raw[max(0, at - size) :]
    if what == 4:
        return raw[:at] + draw.choice([b"\n", b"\r", b"\0", b'"', b"'", b",", b"[", b"]", b"{", b"NaN"]) + raw[at:]
    if what == 5:
        return draw.choice([b"", b"\n", b"\xef\xbb\xbf" + raw, raw + raw, raw[::-1], raw.replace(b'"', b"'")])
    if what == 6:
        return gzip.compress(raw)
    if what == 7:
        return raw.decode("utf-8", "replace").encode("utf-16")
    return raw.replace(draw.choice([b"\n", b":", b",", b'"id"', b"}"]), draw.choice([b"", b" ", b"\r"]))


def _encoded(rows: list[Any], suffix: str, draw: random.Random) -> bytes:
    """Rows as a file of that kind."""
    if suffix == "json":
        return json.dumps(rows).encode()
    if suffix == "parquet":
        return _table(rows, draw)
    if suffix in ("csv", "tsv"):
        by = "," if suffix == "csv" else "\t"
        cells = [
            list(rows[0]),
            *([json.dumps(v) if isinstance(v, list) else str(v) for v in row.values()] for row in rows),
        ]
        quoted = ('"' + cell.replace('"', '""') + '"' for row in cells for cell in row)
        return "\n".join(by.join(next(quoted) for _ in row) for row in cells).encode()
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return gzip.compress(lines) if suffix == "jsonl.gz" else lines


def _table(rows: list[Any], draw: random.Random) -> bytes:
    table = pa.Table.from_pylist(rows)
    what = draw.randrange(4)
    if what == 0:
        table = table.drop_columns([draw.choice(table.column_names)])
    elif what < 3:
        at = draw.randrange(table.num_columns)
        table = table.set_column(at, table.column_names[at], draw.choice(COLUMNS)(len(rows)))
    else:
        table = table.append_column(draw.choice([*table.column_names, "extra"]), draw.choice(COLUMNS)(len(rows)))
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def _file(rows: list[dict[str, Any]], suffixes: Sequence[str], folder: Path, draw: random.Random) -> Path:
    """A file of some kind, damaged as rows, as bytes, or by another kind's name."""
    suffix = draw.choice(suffixes)
    how = draw.randrange(5)
    if suffix in ("parquet", "csv", "tsv"):
        raw = _encoded(rows, suffix, draw)
        if (suffix == "parquet" and how == 0) or suffix != "parquet":
            raw = _odd_bytes(raw, draw)
    elif how < 3:
        damaged = [*rows]
        at = draw.randrange(len(rows))
        damaged[at] = _odd_value(rows[at], draw) if how else draw.choice(ODD)
        raw = _encoded(damaged, suffix, draw)
    else:
        raw = _odd_bytes(_encoded(rows, suffix, draw), draw)
    if how == 4:
        suffix = draw.choice([*suffixes, "txt", "json.gz"])
    path = folder / f"damaged.{suffix}"
    path.write_bytes(raw)
    return path


def _questions(world: World, folder: Path, draw: random.Random) -> Damaged:
    path = _file(QUESTIONS, ("jsonl", "jsonl", "json", "jsonl.gz", "parquet", "parquet", "csv"), folder, draw)
    return Damaged("questions", path, (str(path),), of_questions(world, path, folder))


def _corpus(world: World, folder: Path, draw: random.Random) -> Damaged:
    path = _file(PASSAGES, ("jsonl", "json", "jsonl.gz", "parquet", "parquet", "csv", "tsv"), folder, draw)
    return Damaged("corpus", path, (str(path), "corpus (id"), of_corpora(path, folder))


def _manifest(world: World, folder: Path, draw: random.Random) -> Damaged:
    shutil.copytree(world.folder, folder / "world")
    world = World(folder / "world")
    which = draw.choice(["q.jsonl.manifest.json", "index/index.json", "index/building.json"])
    path = world.folder / which
    if which == "index/building.json":
        (world.folder / "index" / "index.json").rename(path)
    values = json.loads(path.read_text())
    if draw.randrange(3):
        raw = json.dumps(_odd_value(values, draw)).encode()
    else:
        raw = _odd_bytes(path.read_bytes(), draw)
    path.write_bytes(raw)
    found = str(world.folder / "found.jsonl")
    commands = (
        ("data", "check", str(world.folder / "q.jsonl")),
        ("retrieval", "report", str(world.folder / "q.jsonl")),
        ("retrieve", str(world.folder / "index"), str(world.folder / "q.jsonl"), "--k", "3", "--output", found),
        ("index", "bm25", str(world.folder / "c.jsonl"), str(world.folder / "index")),
    )
    return Damaged("manifest", path, (str(path), str(path.parent), "q.jsonl"), commands)


def _index(world: World, folder: Path, draw: random.Random) -> Damaged:
    shutil.copytree(world.folder, folder / "world")
    world = World(folder / "world")
    index = world.folder / "index"
    files = sorted(path for path in index.rglob("*") if path.is_file() and path.name != "index.json")
    path = draw.choice(files)
    if draw.randrange(4) == 0:
        path.unlink()
    elif path.suffix == ".json" and draw.randrange(2):
        path.write_text(json.dumps(_odd_value({"": json.loads(path.read_text())}, draw).get("")))
    else:
        path.write_bytes(_odd_bytes(path.read_bytes(), draw))
    questions, found = str(world.folder / "asked.jsonl"), str(folder / "found.jsonl")
    return Damaged("index", path, (str(index),), (("retrieve", str(index), questions, "--k", "3", "--output", found),))


# The long run -------------------------------------------------------------------------------------------------


KINDS = {"questions": _questions, "corpus": _corpus, "manifest": _manifest, "index": _index}


def main(count: int, kinds: Sequence[str]) -> int:
    """Run so many cases of each kind, each in a process of its own: one that dies is a finding like any other."""
    import os
    import resource
    import signal

    failed: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        (home / "world").mkdir()
        world = World.make(home / "world")
        for kind in kinds or KINDS:
            started = time.monotonic()
            for seed in range(count):
                child = os.fork()
                if not child:
                    signal.alarm(60)
                    resource.setrlimit(resource.RLIMIT_DATA, (3 * 2**30, 3 * 2**30))
                    (case,) = cases(world, home, kind, [seed])
                    wrong = run(case)
                    print("".join(f"{kind} {seed} {case.path.name}: {each}\n" for each in wrong), end="", flush=True)
                    os._exit(len(wrong) > 0)
                status = os.waitpid(child, 0)[1]
                if status:
                    failed[kind] += 1
                    if os.WIFSIGNALED(status):
                        print(f"{kind} {seed}: killed by signal {os.WTERMSIG(status)}", flush=True)
                shutil.rmtree(home / f"{kind}-{seed}", ignore_errors=True)
            print(f"{kind}: {failed[kind]} of {count} files, {time.monotonic() - started:.0f} s", flush=True)
    return int(failed.total() > 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
