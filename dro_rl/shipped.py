"""Recipes, studies and accelerate's configurations that travel with the package, found by their names.

They lie in `recipes/` of a checkout, and within the package once it is installed.
"""

from __future__ import annotations

import re
from pathlib import Path

from dro_rl.errors import InputError, Phrase, did_you_mean

_PACKAGE = Path(__file__).parent
RECIPES = next((folder for folder in (_PACKAGE / "recipes", _PACKAGE.parent / "recipes") if folder.is_dir()), _PACKAGE)
ACCELERATE = RECIPES / "accelerate"
STUDIES = RECIPES / "studies"
TESTED = next(
    (file for folder in (_PACKAGE, _PACKAGE.parent) if (file := folder / "constraints" / "tested.txt").is_file()), None
)
"""The versions that were tested together; None where the file did not travel."""


def names(folder: Path = RECIPES) -> list[str]:
    """What is shipped there, by name."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def find(name: str | Path, folder: Path = RECIPES) -> Path:
    """The file at a path or, where there is none, the shipped one of that name, with or without `.yaml`.

    Raises:
        InputError: there is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = names(folder)
    if str(path) in (path.stem, f"{path.stem}.yaml") and path.stem in shipped:
        return folder / f"{path.stem}.yaml"
    raise InputError(
        str(path),
        Phrase("no such file"),
        f"this is a YAML file, or one of {', '.join(shipped)}",
        did_you_mean(path.stem, shipped, "Check the path."),
    )


def headline(path: Path) -> str:
    """What a shipped file says of itself first, up to the end of the sentence or to a colon."""
    comment = path.read_text(encoding="utf-8").partition("#\n")[0]
    return re.split(r"[:.](?: |$)", " ".join(comment.replace("#", "").split()))[0]
