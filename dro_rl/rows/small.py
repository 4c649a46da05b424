"""Small files that are one JSON object: manifests and settings, whose fields are checked before anybody trusts them."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, Union

from dro_rl.errors import InputError, Phrase
from dro_rl.rows.strict_json import decode
from dro_rl.rows.text import LONGEST, too_long

Record = TypeVar("Record")


def read_object(path: Path, what: str, fix: str) -> dict[str, Any]:
    """The object of a file.

    Args:
        path: the file, which is there.
        what: what it is, for errors: "a manifest".
        fix: what to do when it is not.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(LONGEST + 1)
    except OSError as error:
        raise InputError(str(path), Phrase(str(error.strerror)), f"{what} can be read", fix) from None
    if len(raw) > LONGEST:
        raise too_long(str(path))
    try:
        value = decode(raw.decode("utf-8-sig"))
        json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair could not be written on
    except ValueError as error:
        where = f"line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)[:80]
        raise InputError(str(path), Phrase(f"not JSON ({where})"), f"{what} is one JSON object", fix) from None
    if not isinstance(value, dict):
        raise InputError(str(path), value, f"{what} is one JSON object", fix)
    return value


def record(kind: type[Record], values: Mapping[str, Any], place: str, what: str, fix: str) -> Record:
    """A dataclass of an object's fields, of which none is unknown, missing or of another type.

    Args:
        kind: the dataclass.
        values: the object.
        place, what, fix: for errors.
    """
    known = {each.name: each for each in dataclasses.fields(kind) if each.init}  # type: ignore[arg-type]
    absent = (dataclasses.MISSING, dataclasses.MISSING)
    required = {name for name, each in known.items() if (each.default, each.default_factory) == absent}
    if wrong := sorted({*values} - {*known}) + sorted(required - {*values}):
        raise InputError(
            place, Phrase(f"other fields ({', '.join(wrong)[:60]})"), f"{what} has the fields {', '.join(known)}", fix
        )
    hints = typing.get_type_hints(kind)
    for name, value in values.items():
        if not fits(value, hints[name]):
            raise InputError(f"{place}: {name}", value, f"this is {_described(hints[name])}", fix)
    return kind(**values)


def fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value is of a type."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, each) for each in inner)
    if typing.is_typeddict(kind):
        hints = typing.get_type_hints(kind)
        return isinstance(value, dict) and all(name in value and fits(value[name], hints[name]) for name in hints)
    if origin is list:
        return isinstance(value, list) and all(fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(item, inner[1]) for item in value.values())
    if kind is None or kind is type(None):
        return value is None
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def _described(kind: Any) -> str:
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    return names.get(kind) or str(kind).replace("typing.", "")
