"""Command lines that nobody should give, and run folders that a hand or a disk has damaged: a line each, no traceback.

    python -m benchmarks.hostile_commands                     every command, every option, every value; then damage
    python -m benchmarks.hostile_commands --command ask

Each command is run as it should be with one thing changed: an argument or an option's value is another, or is missing,
or the run folder that it reads has one file that is not what it was.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from typer.testing import CliRunner

from benchmarks.hostile_settings import TINY
from dro_rl.cli import app
from dro_rl.errors import first_line

SECONDS = 60
"""A command's deadline."""

Line = tuple[str, ...]


def build_world(folder: Path) -> dict[str, Line]:
    """A trained run, a question file, documents, a corpus and an index; returns a good line for each command."""
    from dro_rl import train
    from dro_rl.data import load_questions
    from dro_rl.records import write_questions

    folder.mkdir(parents=True, exist_ok=True)
    recipe, run, questions, corpus = (
        folder / name for name in ("recipe.yaml", "run", "questions.jsonl", "corpus.jsonl")
    )
    paths = {"output_dir": str(run), "warmup_cache_dir": str(folder / "cache")}
    recipe.write_text(yaml.safe_dump({**TINY, **paths, "save_total_limit": None}), encoding="utf-8")
    status = train.run_job([str(recipe)])
    assert status == 0
    logging.getLogger().handlers.clear()  # they hold this moment's stderr, and each command is given its own
    found = load_questions("toy", "test", limit=2)
    write_questions(questions, found)
    rows = [{"id": f"p{i}", "title": "", "text": document.text} for i, document in enumerate(found[0].documents)]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "documents.jsonl").write_text('{"text": "home_of mira oslo"}\n{"text": "home_of uma rome"}\n')
    (folder / "empty").write_bytes(b"")
    (folder / "noise").write_bytes(bytes(range(256)) * 16)
    (folder / "dangling").symlink_to(folder / "nowhere")
    candidates = [{"docid": row["id"], "score": 0, "doc": {"text": row["text"]}} for row in rows]
    request = {"query": {"qid": "q", "text": found[0].question}, "candidates": candidates}
    (folder / "requests.jsonl").write_text(json.dumps(request) + "\n")
    index = folder / "index"
    CliRunner().invoke(app, ["index", "bm25", str(corpus), str(index), "--processes", "1"])
    r, q, c = str(run), str(questions), str(corpus)
    return {
        "train": (str(recipe), "--launch", "--cpu"),
        "plan": (str(recipe),),
        "doctor": ("--no-self-test",),
        "report": (r, "--output", str(folder / "report.html")),
        "explain": (r, "toy-train-0-0"),
        "runs ls": (str(folder),),
        "runs show": (r,),
        "recipe diff": (str(recipe), str(recipe)),
        "recipe resolve": (str(recipe),),
        "data export": (q, "--to", "flashrag", "--output", str(folder / "exported")),
        "model scratch": ("toy", str(folder / "scratch")),
        "ask": (r, "home_of mira ?", "--documents", str(folder / "documents.jsonl")),
        "evaluate": (r, "--data", q, "--limit", "1", "--output", str(folder / "evaluated"), "--overwrite"),
        "compare": (r, r),
        "serve-rollouts": (str(recipe), "--dry-run"),
        "retrieve": (str(index), q, "--output", str(folder / "retrieved.jsonl"), "--k", "2", "--overwrite"),
        "rollouts ls": (r,),
        "rollouts show": (r, "--limit", "1"),
        "rollouts stats": (r,),
        "rollouts top": (r, "--limit", "1"),
        "rollouts diff": (r, r),
        "rollouts export": (r, "--output", str(folder / "exported.jsonl")),
        "rollouts sql": (r, "select count(*) from rollouts"),
        "study ls": (),
        "study show": ("smoke",),
        "model convert": (str(folder / "noise"), str(folder / "converted")),
        "recipe ls": (),
        "recipe show": (str(recipe),),
        "recipe cp": (str(recipe), str(folder / "copied.yaml"), "--force"),
        "recipe keys": ("seed",),
        "recipe validate": (str(recipe),),
        "data prepare": ("nq", "--input", q, "--output", str(folder / "prepared.jsonl")),
        "data check": (q,),
        "data show": (q,),
        "index bm25": (c, str(folder / "made"), "--processes", "1"),
        "index colbert": (c, str(folder / "colbert"), "--checkpoint", str(folder / "none")),
        "index dense": (c, str(folder / "dense"), "--checkpoint", str(folder / "none")),
        "retrieval report": (q,),
        "rerank": (r, "--input", str(folder / "requests.jsonl"), "--output", str(folder / "r.trec"), "--overwrite"),
        "model card": (r,),
        "push": (r, "--repo-selector", "me/selector", "--dry-run"),
    }


WITHOUT_AN_END = {"rollouts watch", "study run", "study gradients", "model fetch", "data fetch", "serve"}
"""They wait, serve, train, or ask the network, as soon as their line is right."""


def commands() -> dict[str, Any]:
    """Every command of `dro-rl` that ends soon, by its words."""
    found: dict[str, Any] = {}

    def walk(command: Any, words: Line) -> None:
        for name, below in getattr(command, "commands", {}).items():
            walk(below, (*words, name))
        if not hasattr(command, "commands") and " ".join(words) not in WITHOUT_AN_END:
            found[" ".join(words)] = command

    walk(typer.main.get_command(app), ())
    return found


def hostile_arguments(folder: Path) -> list[str]:
    """What an argument or a value may be that it should not."""
    there = [
        folder,
        folder / "empty",
        folder / "noise",
        folder / "dangling",
        folder / "run",
        folder / "run" / "selector",
    ]
    there += [*(folder / "run").glob("checkpoint-*")][:1]
    return [
        "", " ", "x", "-1", "0", "1", "1.5", "nan", "inf", "1e999", "9" * 25, "toy", "-", "--", "--json", "no/such",
        "/", ".", "~", "/dev/null", "a" * 300, "a/" * 3000, "\x1b[31m", "[/red]", "日本", "{", "[1", "a=b", "{}",
        *map(str, there),
    ]  # fmt: skip


def command_lines(name: str, command: Any, good: Line, hostile: list[str]) -> Iterator[Line]:
    """A command's good line with one thing changed in it, in every way."""
    words = tuple(name.split())
    yield words
    yield (*words, *good)
    yield (*words, *good, "--no-such-option", "1")
    yield (*words, *good, "one", "more", "argument")
    for place in range(len(good)):
        yield (*words, *good[:place], *good[place + 1 :])
        for value in hostile:
            yield (*words, *good[:place], value, *good[place + 1 :])
    for option in command.params:
        flag = next((word for word in option.opts if word.startswith("--")), None)
        if flag is None or flag in good:
            continue
        yield (*words, *good, flag)
        if not getattr(option, "is_flag", False):
            for value in hostile:
                yield (*words, *good, flag, value)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "half of it": lambda content: content[: len(content) // 2],
    "a list": lambda content: b"[]",
    "null": lambda content: b"null",
    "an empty object": lambda content: b"{}",
    "a number": lambda content: b"7",
    "noise": lambda content: bytes(range(256)) * 8,
    "other values": lambda content: content.replace(b'": ', b'": -').replace(b": ", b": -1"),
    "text for numbers": lambda content: b"".join(b'"x"' if chr(b).isdigit() else bytes([b]) for b in content),
    "a thousand levels": lambda content: b'{"a": ' + b"[" * 1000 + b"]" * 1000 + b"}",
}


def damaged_runs(run: Path, scratch: Path) -> Iterator[tuple[str, Path]]:
    """Copies of a run in which one file is missing, a folder, a link, or not what it was; each after the other."""
    for path in sorted(path for path in run.rglob("*") if path.is_file() and "checkpoint" not in str(path)):
        inside = path.relative_to(run)
        ways: dict[str, Callable[[Path], Any]] = {
            "missing": lambda copy: copy.unlink(),
            "a folder": lambda copy: (copy.unlink(), copy.mkdir()),
            "a dangling link": lambda copy: (copy.unlink(), copy.symlink_to("nowhere")),
        }
        ways |= {
            how: lambda copy, change=change: copy.write_bytes(change(copy.read_bytes()))
            for how, change in DAMAGE.items()
        }
        for how, harm in ways.items():
            shutil.rmtree(scratch, ignore_errors=True)
            shutil.copytree(run, scratch, ignore=shutil.ignore_patterns("checkpoint-*"))
            harm(scratch / inside)
            yield f"{inside}: {how}", scratch


def verdict(line: Line) -> tuple[str, str]:
    """What a command comes to: `done`, `refused` or `traceback`, and its words."""

    def enough(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, enough)
    signal.alarm(SECONDS)
    try:
        result = CliRunner().invoke(app, list(line))
    finally:
        signal.alarm(0)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return "traceback", f"{type(result.exception).__name__}: {first_line(result.exception)}"
    if result.exit_code not in (0, 1, 2) or "Traceback" in result.output:
        return "traceback", f"exit status {result.exit_code}: {result.output[-200:]}"
    return ("done", "") if result.exit_code == 0 else ("refused", (result.output.splitlines() or [""])[-1])


def launch_nothing() -> None:
    """From now on `dro-rl train` goes as far as the moment before its job starts."""
    from dro_rl.job import launch

    def stop(*_: object) -> None:
        raise SystemExit(0)

    os.execvpe = stop  # type: ignore[assignment]
    launch._launch_several = lambda args: 0


def main(
    command: Annotated[list[str] | None, typer.Option(help="Only this command; may be repeated.")] = None,
    damage: Annotated[bool, typer.Option(help="Read damaged runs too.")] = True,
) -> None:
    """Run every line, and count."""
    folder = Path(tempfile.mkdtemp())
    good = build_world(folder)
    launch_nothing()
    os.chdir(folder)
    counts: Counter[str] = Counter()

    def judge(line: Line, place: str = "") -> None:
        found, words = verdict(line)
        counts[found] += 1
        if found == "traceback":
            print(f"{place} {' '.join(word[:60] for word in line)!r}: {words[:200]}", flush=True)

    for name, each in commands().items():
        if not command or name in command:
            for line in command_lines(name, each, good[name], hostile_arguments(folder)):
                judge(line)
    print(f"{counts.total()} command lines: {dict(counts)}")
    counts.clear()
    readers = [
        name for name in ("ask", "rollouts ls", "rollouts show", "rollouts stats", "compare", "evaluate") if damage
    ]
    for place, run in damaged_runs(folder / "run", folder / "damaged"):
        for name in readers:
            line = tuple(str(run) if word == str(folder / "run") else word for word in good[name])
            judge((*name.split(), *line), place)
    print(f"{counts.total()} damaged runs: {dict(counts)}")
    shutil.rmtree(folder, ignore_errors=True)
    sys.exit(1 if counts["traceback"] else 0)


if __name__ == "__main__":
    typer.run(main)
