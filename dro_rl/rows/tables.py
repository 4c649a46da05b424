"""Tables in text: fields between tabs, or CSV with commas or semicolons."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from dro_rl.errors import InputError, Phrase
from dro_rl.rows.bad import Bad, refuse
from dro_rl.rows.text import LONGEST, Watch, text_lines

Fields = Iterator[tuple[str, list[str]]]


def tab_separated(path: Path, *, bad: Bad = refuse, watch: Watch | None = None) -> Fields:
    """The fields of each line, split at tabs and lines alone: a quote within a text is a quote.

    A field that is quoted whole, as CSV would, is unquoted: `"a ""b"" c"`. Blank lines are passed over.
    """
    for number, text in text_lines(path, bad=bad, watch=watch):
        line = text.rstrip("\n").removesuffix("\r")
        if not line:
            continue
        place = f"{path}: line {number}"
        if "\r" in line:
            bad(
                InputError(
                    place,
                    Phrase(f"{line[:40]!r}, with a carriage return in it"),
                    "a line ends in a line feed, and a text has no line ends",
                    "Convert the line ends, or put a space there.",
                )
            )
            continue
        yield place, [_unquoted(field) for field in line.split("\t")]


def _unquoted(field: str) -> str:
    if len(field) > 1 and field[0] == field[-1] == '"' and '"' not in field[1:-1].replace('""', ""):
        return field[1:-1].replace('""', '"')
    return field


def comma_separated(path: Path, *, bad: Bad = refuse, watch: Watch | None = None) -> Fields:
    """The fields of each row of a `.csv`, by RFC 4180: quoted where they hold commas, quotes or line breaks.

    The first line says what separates: tabs, as in DPR's files, which are split as above; else commas or semicolons.
    """
    _, first = next(text_lines(path, bad=bad), (0, ""))
    if "\t" in first:
        yield from tab_separated(path, bad=bad, watch=watch)
        return
    last = 0

    def lines() -> Iterator[str]:
        nonlocal last
        for number, text in text_lines(path, bad=bad, watch=watch):
            last = number
            yield text

    csv.field_size_limit(LONGEST)
    reader = csv.reader(lines(), delimiter=";" if first.count(";") > first.count(",") else ",", strict=True)
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
                    'a field that holds a quote, or begins with one, is quoted, its quotes doubled ("a ""b"" c")',
                    "Quote it so, or write JSON lines.",
                )
            )
            continue
        if fields:
            yield place, fields


def with_names(fields: Fields, known: Collection[str], columns: Sequence[str] = (), *, bad: Bad = refuse) -> Any:
    """The rows of a table as objects, an empty field left out.

    Args:
        fields: of each row.
        known: names by which a header is known: a first row with one of them.
        columns: the names where there is no header; of these as many as the first row has fields.
        bad: what is done with a row that has more fields or fewer than the first.
    """
    names: list[str] = []
    for place, values in fields:
        if not names:
            names = _header(place, values, known) or list(columns[: max(len(values), 2)])
            if not names:
                raise InputError(
                    place,
                    Phrase(", ".join(values)[:80]),
                    f"the first line names the columns, one of which is {' or '.join(known)}",
                    "Write the names above the rows, or convert the file to .jsonl, .jsonl.gz, .parquet.",
                )
            if names == [value.strip() for value in values]:
                continue
        if len(values) == len(names):
            yield place, {name: value for name, value in zip(names, values, strict=True) if value}
        else:
            bad(
                InputError(
                    place,
                    Phrase(f"{len(values)} fields"),
                    f"each line has the fields {', '.join(names)}",
                    "Correct the line. Between tabs a text has no tabs and no line breaks, even in quotes: write CSV "
                    "with commas or JSON lines for these.",
                )
            )


def _header(place: str, values: Sequence[str], known: Collection[str]) -> list[str]:
    names = [value.strip() for value in values]
    if not {*names} & {*known}:
        return []
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise InputError(place, twice, "a column stands once", "Remove or rename one of the two.")
    return names
