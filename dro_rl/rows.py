"""The one way to read rows out of a file: JSON lines, a JSON array, Parquet, tab-separated values; gzipped or not.

Everything is a stream: what stands in memory is a row, or a batch of them. Each row comes with its place, for errors.
A row that cannot be read goes to `bad`, which by default raises it; a file that breaks off always raises. Knows
nothing of what the rows mean.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from dro_rl.errors import InputError, Phrase, first_line

Rows = Iterator[tuple[str, Any]]
"""Rows with their places, `file: line 3`."""

Bad = Callable[[InputError], None]
"""What is done with a bad row: `refuse` it and the file, count it (`Skips`), or list it."""

Watch = Callable[[BinaryIO], BinaryIO]
"""Wraps the raw file as it is opened, to draw a progress bar of its bytes."""


def refuse(error: InputError) -> None:
    """Refuse the file for its first bad row."""
    raise error


class Skips:
    """Leaves bad rows out and counts them by kind. Pass it as `bad`."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, InputError] = {}

    def __call__(self, error: InputError) -> None:
        self.counts[kind(error)] += 1
        self.first.setdefault(kind(error), error)

    @property
    def total(self) -> int:
        """How many rows were left out."""
        return self.counts.total()


def kind(error: InputError) -> str:
    """What sort of error it is, whatever its line: the field and the rule, `documents[].text: this is not empty`."""
    field = re.search(r": ([\w.\[\]]+)$", error.place)
    return f"{re.sub(r'[0-9]+', '', field[1])}: {error.rule}" if field else error.rule


@contextmanager
def open_bytes(path: Path, watch: Watch | None = None) -> Iterator[BinaryIO]:
    """A file's bytes, unpacked where its name ends in `.gz`."""
    with path.open("rb") as raw:
        # A buffer of our own above the watch: lines would otherwise be counted one by one.
        file = cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, watch(raw)), 1 << 20)) if watch else raw
        if path.name.lower().endswith(".gz"):
            with gzip.GzipFile(fileobj=file, mode="rb") as unpacked:
                yield cast(BinaryIO, unpacked)
        else:
            yield file


def text_lines(path: Path, *, bad: Bad = refuse, watch: Watch | None = None) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file with their numbers from 1, a byte order mark left out, line ends kept."""
    number = 0
    try:
        with open_bytes(path, watch) as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    text = line.decode("utf-8")
                except UnicodeDecodeError as error:
                    packed = number == 1 and line.startswith(b"\x1f\x8b")
                    wrong = InputError(
                        f"{path}: line {number}",
                        Phrase(f"byte {error.start} is not UTF-8"),
                        "files are UTF-8",
                        "It is a gzip file: name it .gz." if packed else "Convert the file.",
                    )
                    if packed:
                        raise wrong from None
                    bad(wrong)
                    continue
                yield number, text.removeprefix("\ufeff") if number == 1 else text
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(
            f"{path}: after line {number}", Phrase(str(error)), "the gzip file is whole", "Copy or compress it again."
        ) from None


def json_lines(path: Path, *, bad: Bad = refuse, watch: Watch | None = None) -> Rows:
    """The values of a file with one JSON value a line. Blank lines are passed over."""
    for number, text in text_lines(path, bad=bad, watch=watch):
        text = text.strip()
        if not text:
            continue
        place = f"{path}: line {number}"
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            why = f"column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)
            wrong = InputError(
                place,
                Phrase(f"{text[:60]!r} ({why[:40]})"),
                "each line is one JSON object",
                "Write one object a line, not an array over many lines.",
            )
            if number == 1 and text[0] == "[":
                raise wrong from None
            bad(wrong)
            continue
        yield place, value


def json_array(path: Path, *, watch: Watch | None = None) -> Rows:
    """The items of a file that is one JSON array, read as a stream.

    The parser puts a question mark for half of a surrogate pair, which lines keep, so that they are refused later.
    """
    import ijson

    number = 0
    try:
        with open_bytes(path, watch) as file:
            start = file.read(1)
            while start in (b"\xef", b"\xbb", b"\xbf", b" ", b"\t", b"\r", b"\n"):
                start = file.read(1)
            if start != b"[":
                raise InputError(
                    str(path),
                    Phrase(f"begins with {start.decode('latin-1')!r}" if start else "nothing"),
                    "a .json file is one JSON array",
                    "Name it .jsonl if it has an object a line, or write an array.",
                )
            for number, value in enumerate(ijson.items(_Again(start, file), "item", use_float=True), start=1):
                yield f"{path}: item {number}", value
    except (ijson.JSONError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: after item {number}",
            Phrase(" ".join(str(error).split())[:100]),
            "this is one whole JSON array, its text UTF-8",
            "Copy or write it again.",
        ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(
            f"{path}: after item {number}", Phrase(str(error)), "the gzip file is whole", "Copy or compress it again."
        ) from None


class _Again:
    """A file with its first byte put back."""

    def __init__(self, start: bytes, file: BinaryIO) -> None:
        self.start, self.file = start, file

    def read(self, size: int) -> bytes:
        if size == 0:
            return b""
        start, self.start = self.start, b""
        return start or self.file.read(size)


def parquet_rows(path: Path, *, watch: Watch | None = None) -> Rows:
    """The rows of a Parquet file as dictionaries, a batch in memory at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with path.open("rb") as raw:
            for batch in pq.ParquetFile(watch(raw) if watch else raw).iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: after row {number}",
            Phrase(first_line(error)),
            "this is a whole Parquet file, its text UTF-8",
            "Write it again.",
        ) from None


def tab_separated(path: Path, *, bad: Bad = refuse, watch: Watch | None = None) -> Iterator[tuple[str, list[str]]]:
    """The fields of each row of a tab-separated file, quoted as CSV is: `"a ""b"" c"`. Blank lines are passed over."""
    last = 0

    def lines() -> Iterator[str]:
        nonlocal last
        for number, text in text_lines(path, bad=bad, watch=watch):
            last = number
            yield text

    reader = csv.reader(lines(), delimiter="\t", strict=True)
    while True:
        place = f"{path}: line {last + 1}"
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            bad(
                InputError(
                    place,
                    Phrase(str(error)),
                    'a field that holds a quote is quoted, its quotes doubled ("a ""b"" c")',
                    "Quote it so, or write JSON lines.",
                )
            )
            continue
        if fields:
            yield place, fields


BY_LINE: dict[str, Callable[..., Rows]] = {"jsonl": json_lines, "tsv": tab_separated, "csv": tab_separated}
WHOLE: dict[str, Callable[..., Rows]] = {"json": json_array, "parquet": parquet_rows}
"""Readers by the end of a file's name."""


def _suffix(path: Path) -> str:
    return path.name.lower().removesuffix(".gz").rpartition(".")[2]


def is_readable(path: Path) -> bool:
    """Whether a file of this name is one that `rows` reads."""
    return "." in path.name and _suffix(path) in (*BY_LINE, *WHOLE)


def rows(path: Path, *, bad: Bad = refuse, watch: Watch | None = None) -> Rows:
    """Rows of a file by what its name says: `.jsonl`, `.json` (an array), `.parquet`, `.tsv` or `.csv` (by tabs).

    Raises:
        InputError: the file is missing, has another ending, breaks off, or has a row that cannot be read.
    """
    suffix = _suffix(path)
    if not path.is_file():
        raise InputError(str(path), Phrase("no such file"), "a file to read exists", "Check the path.")
    if suffix in WHOLE:
        return WHOLE[suffix](path, watch=watch)
    if suffix in BY_LINE:
        return BY_LINE[suffix](path, bad=bad, watch=watch)
    raise InputError(
        str(path),
        path.suffix,
        f"files end in {', '.join(f'.{name}' for name in (*BY_LINE, *WHOLE))}, or one of these and .gz",
        "Rename or convert the file.",
    )
