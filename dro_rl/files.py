"""The one way to write a file: whole, or not at all."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its place when the block ends without an error.

    Who reads `path` meanwhile, or after a kill, finds the file as it was before. Folders above it are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    try:
        yield beside
        beside.replace(path)
    except BaseException:
        if beside.is_file():
            beside.unlink()
        raise


def write_json_lines(path: Path, rows: Iterable[Any]) -> int:
    """Write one JSON value a line, whole, from a stream; packed where the name ends in `.gz`. Equal rows, equal bytes.

    Returns:
        How many were written.
    """
    count = 0
    with written_whole(path) as beside, beside.open("wb") as raw, ExitStack() as stack:
        lines: Any = raw
        if path.name.lower().endswith(".gz"):
            lines = stack.enter_context(gzip.GzipFile("", "wb", fileobj=raw, mtime=0, compresslevel=6))
        for row in rows:
            lines.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            count += 1
    return count
