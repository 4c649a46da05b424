"""The one way to read rows out of a file: JSON lines, a JSON array, Parquet, tables in text; gzipped or not.

Everything is a stream: what stands in memory is a row, or a batch of them. Each row comes with its place, for errors.
A row that cannot be read goes to `bad`, which by default raises it; a file that breaks off always raises. Knows
nothing of what the rows mean.

bad           what is done with a bad row
text          bytes and lines
strict_json   JSON by one rule, in lines and arrays
tables        tabs and commas
parquet       columns that are read
spelled       lists and objects within a text
small         files that are one object: manifests, settings
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dro_rl.errors import InputError, Phrase
from dro_rl.rows.bad import Bad, Skips, kind, refuse
from dro_rl.rows.parquet import Wanted, parquet_rows
from dro_rl.rows.strict_json import json_array, json_lines
from dro_rl.rows.tables import comma_separated, tab_separated, with_names
from dro_rl.rows.text import Watch

__all__ = [
    "SUFFIXES", "TABLES", "Bad", "Rows", "Skips", "Wanted", "Watch", "is_readable", "kind", "refuse", "rows", "stem",
    "suffix", "with_names",
]  # fmt: skip

Rows = Iterator[tuple[str, Any]]
"""Rows with their places, `file: line 3`."""

TABLES: dict[str, Callable[..., Rows]] = {"tsv": tab_separated, "csv": comma_separated}
READERS: dict[str, Callable[..., Rows]] = {"jsonl": json_lines, "json": json_array, **TABLES}
SUFFIXES = (*READERS, "parquet")
"""What the name of a file may end in."""


def suffix(path: Path) -> str:
    """What a file's name says that it holds: `jsonl`, also for `.jsonl.gz`."""
    return path.name.lower().removesuffix(".gz").rpartition(".")[2]


def stem(path: Path) -> str:
    """A file's name without what `suffix` tells: `dev` of `dev.jsonl.gz`."""
    name = path.name[:-3] if path.name.lower().endswith(".gz") else path.name
    return name.rpartition(".")[0]


def is_readable(path: Path) -> bool:
    """Whether a file of this name is one that `rows` reads."""
    return "." in path.name and suffix(path) in SUFFIXES


def rows(path: Path, *, bad: Bad = refuse, watch: Watch | None = None, wanted: Wanted = lambda name: True) -> Rows:
    """Rows of a file by what its name says: `.jsonl`, `.json` (an array), `.parquet`: objects; `.tsv` or `.csv`: lists
    of fields, of which `with_names` makes objects.

    Args:
        path: the file.
        bad: what is done with a bad row.
        watch: wraps the raw file as it is opened, to draw a progress bar of its bytes.
        wanted: the columns to read, of a file that is one of columns.

    Raises:
        InputError: the file is missing, has another ending, breaks off, or has a row that cannot be read.
    """
    if not path.is_file():
        raise InputError(str(path), Phrase("no such file"), "a file to read exists", "Check the path.")
    found = suffix(path)
    if found == "parquet":
        return parquet_rows(path, wanted=wanted, watch=watch)
    if found in READERS:
        return READERS[found](path, bad=bad, watch=watch)
    raise InputError(
        str(path),
        path.suffix,
        f"files end in {', '.join(f'.{name}' for name in SUFFIXES)}, or one of these and .gz",
        "Rename or convert the file.",
    )
