"""JSON as RFC 8259 has it, by one rule for lines, arrays and whole files.

Refused beyond what is no JSON: NaN and infinities, also as 1e999; a field that stands twice in an object, of which one
would silently win; more than `DEEPEST` values within each other; numbers of more digits than Python reads.
"""

from __future__ import annotations

import codecs
import itertools
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dro_rl.errors import InputError, Phrase
from dro_rl.rows.bad import Bad, refuse
from dro_rl.rows.text import LONGEST, Watch, open_bytes, text_lines, too_long, whole_gzip

DEEPEST = 64
"""Lists and objects within each other. Released data sets have six."""

CHUNK = 1 << 20
SPACE = " \t\r\n"
_SPACES = re.compile(f"[{SPACE}]*")


class NotStrict(ValueError):
    """JSON that breaks a rule of ours.

    Args:
        what: stands there.
        rule: it breaks.
        fix: what to do.
        lost: whether nobody knows where the value ends.
    """

    def __init__(self, what: str, rule: str, fix: str, lost: bool = False) -> None:
        super().__init__(what)
        self.rule, self.fix, self.lost = rule, fix, lost

    def at(self, place: str, text: str = "") -> InputError:
        """The error of a row."""
        return InputError(place, Phrase(f"{text[:60]!r} ({self})" if text else str(self)), self.rule, self.fix)


class Decoder:
    """Decodes values one by one. What breaks a rule is raised once the value's end is known, as `end`."""

    def __init__(self) -> None:
        self.end = 0
        self._broken: list[NotStrict] = []
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object,
            parse_constant=self._constant,
            parse_float=self._float,
            parse_int=self._int,
        )

    def decode(self, text: str, start: int = 0) -> Any:
        """The value that begins at `start`.

        Raises:
            json.JSONDecodeError: there is none, or not all of it.
            NotStrict: it breaks a rule.
        """
        self._broken = []
        try:
            value, self.end = self._decoder.raw_decode(text, start)
        except RecursionError:
            raise _too_deep(lost=True) from None
        if text.count("[", start, self.end) + text.count("{", start, self.end) > DEEPEST and is_deep(value):
            raise _too_deep()
        if self._broken:
            raise self._broken[0]
        return value

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            self._breaks(
                f"{twice[:40]!r} twice", "a field stands once in an object", "Remove or rename one of the two."
            )
        return made

    def _constant(self, name: str) -> None:
        self._breaks(name, "JSON has no NaN and no infinity", "Write null, or leave the field out.")

    def _float(self, digits: str) -> float:
        value = float(digits)
        if math.isinf(value):
            self._breaks(digits[:40], "numbers are below 1.8e308", "Write it as text, in quotes.")
        return value

    def _int(self, digits: str) -> int:
        try:
            return int(digits)
        except ValueError:
            about = f"a number of {len(digits):,} digits"
            self._breaks(
                about, f"a number has at most {sys.get_int_max_str_digits():,}", "Write it as text, in quotes."
            )
            return 0

    def _breaks(self, what: str, rule: str, fix: str) -> None:
        self._broken.append(NotStrict(what, rule, fix))


def _too_deep(lost: bool = False) -> NotStrict:
    rule = f"lists and objects stand within at most {DEEPEST} others"
    return NotStrict("a recursion without end" if lost else "a deeper recursion", rule, "Correct the row.", lost)


def is_deep(value: Any) -> bool:
    """Whether a value holds more lists and objects within each other than `DEEPEST`."""
    level = [value]
    for _ in range(DEEPEST + 1):
        inner = [each for each in level if isinstance(each, list | dict)]
        level = [item for each in inner for item in (each.values() if isinstance(each, dict) else each)]
        if not inner:
            return False
    return True


def decode(text: str) -> Any:
    """The one value of a text. Raises what `Decoder.decode` does."""
    decoder = Decoder()
    start = len(text) - len(text.lstrip(SPACE))
    value = decoder.decode(text, start)
    if text[decoder.end :].strip(SPACE):
        raise json.JSONDecodeError("Extra data", text, decoder.end)
    return value


def json_lines(path: Path, *, bad: Bad = refuse, watch: Watch | None = None) -> Iterator[tuple[str, Any]]:
    """The objects of a file with one JSON object a line. Blank lines are passed over."""
    decoder = Decoder()
    for number, text in text_lines(path, bad=bad, watch=watch):
        text = text.strip()
        if not text:
            continue
        place = f"{path}: line {number}"
        try:
            value = decoder.decode(text)
            if decoder.end < len(text):
                raise json.JSONDecodeError("Extra data", text, decoder.end)
        except NotStrict as error:
            bad(error.at(place, text))
        except json.JSONDecodeError as error:
            wrong = InputError(
                place, Phrase(f"{text[:60]!r} ({_why(error)})"), "each line is one JSON object", _advice(text)
            )
            if number == 1 and text[0] == "[":
                raise wrong from None
            bad(wrong)
        else:
            yield place, value


def json_array(path: Path, *, bad: Bad = refuse, watch: Watch | None = None) -> Iterator[tuple[str, Any]]:
    """The objects of a file that is one JSON array, read as a stream: an item in memory at a time."""
    number = 0

    def reached() -> str:
        return f"{path}: after item {number}"

    with whole_gzip(reached), open_bytes(path, watch) as file:
        text = _Text(file, reached)
        start = text.next()
        if start != "[":
            raise InputError(
                str(path),
                Phrase(f"begins with {start!r}" if start else "nothing"),
                "a .json file is one JSON array",
                "Rename or convert it: .jsonl has an object a line.",
            )
        text.position += 1
        if text.next() == "]":
            text.position += 1
        else:
            for number, value in text.items():
                place = f"{path}: item {number}"
                if isinstance(value, NotStrict):
                    bad(value.at(place))
                else:
                    yield place, value
        if rest := text.next():
            raise InputError(reached(), Phrase(f"{rest!r} after its end"), _WHOLE, "Remove what follows the array.")


_WHOLE = "this is one whole JSON array, its text UTF-8"


class _Text:
    """The text of an array, of which what is not read yet, and the value under way, stand in memory."""

    def __init__(self, file: BinaryIO, reached: Any) -> None:
        self.position = 0
        self._file, self._reached = file, reached
        self._buffer, self._ended, self._lines = "", False, 1
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._decoder = Decoder()

    def next(self) -> str:
        """The next character that is no space, where reading goes on; nothing at the end."""
        while True:
            self.position = _SPACES.match(self._buffer, self.position).end()  # type: ignore[union-attr]
            if self.position < len(self._buffer) or self._ended:
                return self._buffer[self.position : self.position + 1]
            self._more()

    def items(self) -> Iterator[tuple[int, Any]]:
        """The values up to the closing bracket, or the rules that they break, with their numbers from 1."""
        for number in itertools.count(1):
            if not self.next():
                raise self._wrong("the array does not end", self.position)
            try:
                value = self._value()
            except NotStrict as error:
                if error.lost:
                    raise error.at(self._reached()) from None
                value = error
            self.position = self._decoder.end
            yield number, value
            after = self.next()
            if after not in (",", "]"):
                raise self._wrong("no comma follows" if after else "the array does not end", self.position)
            self.position += 1
            if after == "]":
                return

    def _value(self) -> Any:
        """The value that begins here, for which more is read until all of it is there."""
        while True:
            try:
                value = self._decoder.decode(self._buffer, self.position)
                if self._decoder.end < len(self._buffer) or self._ended:
                    return value
            except json.JSONDecodeError as error:
                if self._ended:
                    raise self._wrong(error.msg, error.pos) from None
            if len(self._buffer) - self.position > LONGEST:
                raise too_long(self._reached())
            self._more()

    def _more(self) -> None:
        """Read as much again as there is, and forget what was read."""
        self._lines += self._buffer.count("\n", 0, self.position)
        data = self._file.read(max(CHUNK, len(self._buffer) - self.position))
        self._ended = not data
        try:
            read = self._utf8.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            raise InputError(
                self._reached(), Phrase(f"a byte {error.object[error.start]:#04x} is not UTF-8"), _WHOLE,
                "Convert the file.",
            ) from None  # fmt: skip
        self._buffer = self._buffer[self.position :] + read
        self.position = 0

    def _wrong(self, why: str, place: int) -> InputError:
        line = self._lines + self._buffer.count("\n", 0, place)
        return InputError(self._reached(), Phrase(f"line {line}: {why}"), _WHOLE, "Copy or write it again.")


def _advice(text: str) -> str:
    if text.startswith(("{'", "['")):
        return "JSON has double quotes, not single ones: write the rows with json.dumps."
    if text[0] == "[":
        return "Write one object a line, not an array over many lines, or name it .json."
    if text[0] == "{" and text[-1] != "}":
        return "Write each object whole on one line, as jq -c . does."
    return "Write one object a line."


def _why(error: ValueError) -> str:
    return f"column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)[:80]
