"""What is done with a row that cannot be read: refuse the file, or leave the row out and count it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

from dro_rl.errors import InputError

Bad = Callable[[InputError], None]
"""What is done with a bad row: `refuse` it and the file, count it (`Skips`), or list it."""


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
