"""A recipe's file: the keys that it gives, over those of the file that it extends, and of what that one extends."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from dro_rl.errors import InputError, Phrase
from dro_rl.flat_yaml import read_yaml
from dro_rl.keys.reference import as_yaml
from dro_rl.shipped import RECIPES, find, names

EXTENDS = "extends"
"""In a file, no key of a recipe: the file whose keys it goes over, relative to its own folder, or a shipped name."""
DEEPEST = 8
"""Files one over another."""


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The keys that a recipe's file gives, those of the files that it extends below them.

    Args:
        path: the file, a run's folder, or the name of a shipped recipe.

    Raises:
        InputError: a file is missing or broken, or extends itself through others, or too many lie over one another.
    """
    given: dict[str, Any] = {}
    for file in files_of(path):
        given = {**read_yaml(file), **given}
    given.pop(EXTENDS, None)
    return given


def files_of(path: str | Path) -> list[Path]:
    """A recipe's file and those below it, the lowest last. Arguments and errors as in `read_recipe`."""
    files = [recipe_file(path)]
    while (base := _base_of(files[-1])) is not None:
        if any(base.samefile(file) for file in files):
            raise InputError(
                f"{files[-1]}: {EXTENDS}",
                Phrase(" > ".join(map(str, [*files, base]))),
                "a recipe lies over others, never over itself",
                "Break the circle; a shipped recipe is named without .yaml.",
            )
        files.append(base)
        if len(files) > DEEPEST:
            raise InputError(
                f"{files[0]}: {EXTENDS}",
                Phrase(f"more than {DEEPEST} files, one over another"),
                f"a reader can follow {DEEPEST}",
                "Put some together.",
            )
    return files


def recipe_file(path: str | Path) -> Path:
    """The file at a path, of the run in a folder, or the shipped one of that name. Raises `InputError` for none."""
    of_run = Path(path) / "recipe.yaml"
    return of_run if of_run.is_file() else find(path)


def moved(file: Path, target: Path) -> bytes:
    """A recipe's file as it stands in another place: what it extends beside it is named from there."""
    content, base = file.read_bytes(), _base_of(file)
    if base is None or base.parent == RECIPES:
        return content
    seen = os.path.relpath(base.resolve(), target.resolve().parent)
    line = f"{EXTENDS}: {as_yaml(seen)}".encode()
    return re.sub(rb"(?m)^extends:.*$", lambda _: line, content, count=1)


def _base_of(file: Path) -> Path | None:
    """The file that a file extends."""
    named = read_yaml(file).get(EXTENDS)
    if named is None:
        return None
    place = f"{file}: {EXTENDS}"
    if not isinstance(named, str) or not named:
        raise InputError(place, named, "this is one file, or one shipped name", "Name it.")
    beside = file.parent / Path(named).expanduser()
    if beside.is_file():
        return beside
    if named in names():
        return RECIPES / f"{named}.yaml"
    raise InputError(
        place,
        named,
        f"this is a file, seen from {file.parent}, or one of {', '.join(names())}",
        "Check the path.",
    )
