"""How the commands print: one JSON document, or text for a terminal of any width and encoding."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dro_rl.shown import plain, visible
from dro_rl.terminal import console

__all__ = ["bar", "console", "number", "percent", "plain", "print_json", "print_rows", "visible"]

TABLE_WIDTH = 78
"""Below this many columns, a list reads better than a table."""
SHORT = 14
"""Cells of a column whose longest is no longer are not folded."""
SCALE = "▏▎▍▌▋▊▉█"


def print_json(value: Any, *, line: bool = False) -> None:
    """Print one JSON document, on a line if told: dataclasses as objects, NaN and infinities as null, ASCII only."""
    print(json.dumps(_jsonable(value), indent=None if line else 2, allow_nan=False), flush=line)


def number(value: float, digits: int = 2) -> str:
    """A number in a table, `-` where there is none."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def percent(share: float) -> str:
    """A share as whole percent without the sign, `-` where there is none."""
    return "-" if math.isnan(share) else f"{100 * share:.0f}"


def bar(share: float, width: int = 8) -> str:
    """A share of 0..1 as a bar of at most `width` characters."""
    eighths = round(share * width * 8)
    full, rest = divmod(eighths, 8)
    return "█" * full + (SCALE[rest - 1] if rest else "")


def print_rows(out: Console, names: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table of anything; a list where the terminal is narrow."""
    cells = [[plain("-" if cell is None else str(cell)) for cell in row] for row in rows]
    if out.width < TABLE_WIDTH:
        for row in cells:
            out.print(", ".join(f"{name} {cell}".strip() for name, cell in zip(names, row, strict=True)))
        return
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for place, name in enumerate(names):
        short = all(len(row[place]) <= SHORT for row in cells)
        table.add_column(plain(name), overflow="fold", no_wrap=short)
    for row in cells:
        table.add_row(*row)
    out.print(table)


def _jsonable(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    return value
