"""Parquet: of a file with any columns, those that somebody reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dro_rl.errors import InputError, Phrase, first_line
from dro_rl.rows.text import Watch

Wanted = Callable[[str], bool]
"""Whether a column of this name is read. The others may hold what they like."""

BATCH = 1024
TIMES = ("TIMESTAMP", "DATE", "TIME", "INTERVAL")
"""Nobody reads times; some of Parquet's are beyond Python's."""


def parquet_rows(
    path: Path, *, wanted: Wanted = lambda name: True, watch: Watch | None = None
) -> Iterator[tuple[str, Any]]:
    """The rows of a Parquet file as dictionaries, a batch in memory at a time.

    Args:
        path: the file.
        wanted: the columns to read. Of these, times within other values are left out.
        watch: wraps the raw file, to draw a progress bar.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    number, column = 0, ""
    try:
        with path.open("rb") as raw:
            file = pq.ParquetFile(watch(raw) if watch else raw)
            names = [name for name in file.schema_arrow.names if wanted(name)]
            if len({*names}) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise InputError(f"{path}: {twice}", Phrase("twice"), "a column stands once", "Write the file again.")
            leaves = [
                path for path, kind in _leaves(file) if _top(path) in names and not ("." in path and kind in TIMES)
            ]
            for batch in file.iter_batches(batch_size=BATCH, columns=leaves):
                values = {}
                for column in names:
                    values[column] = batch.column(column).to_pylist()
                for place in range(batch.num_rows):
                    number += 1
                    yield f"{path}: row {number}", {name: values[name][place] for name in names}
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path}: after row {number}",
            Phrase(f"column {column}: {first_line(error)}" if column else first_line(error)),
            "this is a whole Parquet file, its text UTF-8",
            "Write it again.",
        ) from None


def _leaves(file: Any) -> list[tuple[str, str]]:
    """The columns of a file down to their last fields, as paths with dots, and what they hold."""
    columns = (file.schema.column(number) for number in range(len(file.schema)))
    return [(column.path, column.logical_type.type) for column in columns]


def _top(path: str) -> str:
    return path.partition(".")[0]
