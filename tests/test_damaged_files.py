"""Whatever is wrong with a data file, the commands that read it take it or say where: never a traceback.

The cases are drawn by `damaged_files.py`, which runs thousands of them when it is asked to.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from damaged_files import World, cases, invoke, of_corpora, of_questions, run


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.make(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("first", range(0, 24, 6))
@pytest.mark.parametrize("kind", ["questions", "corpus", "manifest", "index"])
def test_damaged_files_are_read_or_refused_with_their_place(
    world: World, tmp_path: Path, kind: str, first: int
) -> None:
    for case in cases(world, tmp_path, kind, range(first, first + 6)):
        assert run(case) == []


def test_whole_files_are_taken(world: World, tmp_path: Path) -> None:
    """What is refused above is refused for its damage."""
    commands = of_questions(world, world.folder / "q.jsonl", tmp_path) + of_corpora(world.folder / "c.jsonl", tmp_path)
    for command in commands:
        said, code, _ = invoke(command)
        assert code == 0, said
