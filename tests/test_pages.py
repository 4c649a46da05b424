"""The pages that lead by the hand do what they say: their commands run, and print what stands beneath them.

Of a page, blocks named `bash` run in their order in one empty folder (`sh` is for another machine). A block named
`text` after one is what it prints: each line in its order, with any number for a number and anything for `…`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NUMBER = re.compile(r"[-+]?\d[\d.,]*\d|[-+]?\d")
BAR = re.compile("[█-▏*]+")


def steps(page: str) -> Iterator[tuple[str, list[str]]]:
    """Each run of commands, with the lines that it prints."""
    blocks = re.findall(r"^```(bash|text)\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    for (kind, text), (after, printed) in zip(blocks, [*blocks[1:], ("bash", "")], strict=True):
        if kind == "bash":
            yield text, printed.splitlines() if after == "text" else []


def plain(text: str) -> str:
    """Numbers are one number, and how wide a column or a bar is does not matter."""
    return " ".join(BAR.sub(" ", NUMBER.sub("0", text)).split())


def missing(lines: list[str], printed: str) -> str | None:
    """The first line that was not printed after those above it."""
    rest = plain(printed)
    for line in lines:
        found = re.search(".*?".join(re.escape(part.strip()) for part in plain(line).split("…")), rest)
        if found is None:
            return line
        rest = rest[found.end() :]
    return None


def follow(page: str, folder: Path) -> None:
    """Run a page's commands in a folder."""
    programs = folder.parent / "bin"
    programs.mkdir()
    folder.mkdir()
    for name, called in ("dro-rl", f'"{sys.executable}" -m dro_rl'), ("python", f'"{sys.executable}"'):
        (programs / name).write_text(f'#!/bin/sh\nexec {called} "$@"\n')
        (programs / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    for commands, lines in steps((ROOT / "docs" / page).read_text(encoding="utf-8")):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", commands], cwd=folder, env=environment, text=True, timeout=900,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{page}: {commands}{done.stdout[-3000:]}"
        lost = missing(lines, done.stdout)
        assert lost is None, f"{page}: {commands}does not print\n{lost}\nbut\n{done.stdout[-6000:]}"


def test_a_line_that_is_not_printed_is_missed() -> None:
    printed = "em    12.50 ███ [3]* > [1]\nkept iteration-12, with f1 3\n"
    assert missing(["em 99", "kept iteration-3, … f1 7"], printed) is None
    assert missing(["f1 7", "em 99"], printed) == "em 99"
    assert missing(["[3] < [1]"], printed) == "[3] < [1]"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_first_hour(tmp_path: Path) -> None:
    """From the shipped recipe to a pair trained on files that the page writes; training is seen to help."""
    follow("first-hour.md", tmp_path / "folder")
    stages = json.loads((tmp_path / "folder/runs/first/evaluation/summary.json").read_text())["stages"]
    assert stages[-1]["f1"] > stages[0]["f1"]
    assert stages[-1]["recall@3"] > stages[0]["recall@3"]


@pytest.mark.parametrize("page", ["own-data.md", "prompts.md"])
def test_a_how_to_page(page: str, tmp_path: Path) -> None:
    follow(page, tmp_path / "folder")
