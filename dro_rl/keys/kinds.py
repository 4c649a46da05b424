"""Which values of YAML are of a type, and what the type is called in a sentence."""

from __future__ import annotations

import math
import typing
import unicodedata
from types import NoneType
from typing import Any, Literal

LARGEST = 2**53
"""Whole numbers beyond it are not what JSON, or a float, holds."""


def as_kind(value: Any, kind: Any) -> tuple[bool, Any]:
    """Whether a value is of a type, and the value as that type."""
    origin = typing.get_origin(kind)
    if kind is NoneType:
        return value is None, value
    if origin is Literal:
        if isinstance(value, bool) and "off" in typing.get_args(kind):  # YAML reads on and off as booleans
            value = "on" if value else "off"
        return isinstance(value, str) and value in typing.get_args(kind), value
    if origin is list:
        inner = typing.get_args(kind)[0]
        value = [value] if isinstance(value, str) else value  # a list of one, as the command line gives it
        return isinstance(value, list) and all(as_kind(item, inner)[0] for item in value), value
    if kind is dict or origin is dict:
        return isinstance(value, dict) and _is_plain(value), value
    if kind is bool:
        return isinstance(value, bool), value
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST, value
    if kind is float:
        return _as_float(value)
    return isinstance(value, str) and _is_text(value), value


def _as_float(value: Any) -> tuple[bool, Any]:
    if isinstance(value, str):  # YAML reads 1e-5 as text
        try:
            value = float(value)
        except ValueError:
            return False, value
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False, value
    return abs(value) < LARGEST if isinstance(value, int) else math.isfinite(value), value


def _is_text(value: str) -> bool:
    """Without control characters, and each part of it short enough to be a file's name."""
    return len(value) <= 4096 and all(
        len(part.encode(errors="replace")) <= 255 and not {"Cc", "Cs"} & {*map(unicodedata.category, part)}
        for part in value.split("/")
    )


def _is_plain(value: Any, depth: int = 0) -> bool:
    """Whether JSON holds this value as it is."""
    if depth > 10:
        return False
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_plain(part, depth + 1) for name, part in value.items())
    if isinstance(value, list):
        return all(_is_plain(part, depth + 1) for part in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _as_float(value)[0]
    if isinstance(value, str):
        return not any(unicodedata.category(character) == "Cs" for character in value)
    return value is None or isinstance(value, bool)


def name_of_kind(kind: Any) -> str:
    """The type in a sentence: "this is a whole number"."""
    if kind is NoneType:
        return "null"
    origin = typing.get_origin(kind)
    if origin is Literal:
        values = [str(value) for value in typing.get_args(kind)]
        return values[0] if len(values) == 1 else "one of " + ", ".join(values)
    if origin is list:
        return f"a list of {name_of_kind(typing.get_args(kind)[0])}"
    if kind is dict or origin is dict:
        return "a dictionary of plain values"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[kind]
