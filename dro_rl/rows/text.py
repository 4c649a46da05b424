"""The bytes and the lines of a file, gzipped or not, so that no more than a row of it stands in memory."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from dro_rl.errors import InputError, Phrase
from dro_rl.rows.bad import Bad, refuse

Watch = Callable[[BinaryIO], BinaryIO]
"""Wraps the raw file as it is opened, to draw a progress bar of its bytes."""

LONGEST = 32 * 2**20
"""Bytes, or characters, of a row. A file that unpacks into one endless row is no row of anybody's."""


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


@contextmanager
def whole_gzip(place: Callable[[], str]) -> Iterator[None]:
    """Turns what gzip says of a file that breaks off into an `InputError` at the place that was reached."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(place(), Phrase(str(error)), "the gzip file is whole", "Copy or compress it again.") from None


def text_lines(path: Path, *, bad: Bad = refuse, watch: Watch | None = None) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file with their numbers from 1, a byte order mark left out, line ends kept."""
    number = 0
    with whole_gzip(lambda: f"{path}: after line {number}"), open_bytes(path, watch) as file:
        while line := file.readline(LONGEST + 1):
            number += 1
            place = f"{path}: line {number}"
            if len(line) > LONGEST:
                raise too_long(place)
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                packed = number == 1 and line.startswith(b"\x1f\x8b")
                wrong = InputError(
                    place,
                    Phrase(f"byte {error.start} is not UTF-8"),
                    "files are UTF-8",
                    "It is a gzip file: name it .gz." if packed else "Convert the file.",
                )
                if packed:
                    raise wrong from None
                bad(wrong)
                continue
            yield number, text.removeprefix("\ufeff") if number == 1 else text


def too_long(place: str) -> InputError:
    """The error of a row that goes on and on."""
    return InputError(
        place,
        Phrase("no end in sight"),
        f"a row has at most {LONGEST // 2**20} MiB",
        "Check where the line, or the item, ends; split a longer one.",
    )
