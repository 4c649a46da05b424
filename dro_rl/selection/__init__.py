"""The selection format: `[5] > [2] > [9]`, 1-based, best first. Written and read here and nowhere else."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dro_rl.records import Selection
from dro_rl.selection.thinking import without_thinking

SEPARATOR = " > "
# Brackets are required: digits in prose ("the top 5 of 2018") are not document numbers.
_NUMBER = re.compile(r"\[\s*([0-9]+)\s*\]")
_WELL_FORMED = re.compile(r"\[\s*[0-9]+\s*\](\s*>\s*\[\s*[0-9]+\s*\])*")


@dataclass(frozen=True, slots=True)
class SelectionSpec:
    """What the selector is asked for: from `least` to `most` documents, as distinct valid numbers by construction where
    constrained. Where the two differ, the end of the list is part of what it chooses."""

    least: int
    most: int
    constrained: bool = False

    @classmethod
    def of(cls, num_selected: int | Mapping[str, Any], constrained: bool = False) -> SelectionSpec:
        """What a recipe's `num_selected` says: `5`, or `{min: 1, max: 5}`. Raises `ValueError` for what is neither."""
        given = {"min": num_selected, "max": num_selected} if isinstance(num_selected, int) else num_selected
        least, most = given.get("min"), given.get("max")
        if len(given) != 2 or type(least) is not int or type(most) is not int or not 1 <= least <= most:
            raise ValueError(f"{num_selected} is neither a number from 1 upward nor {{min: 1, max: 5}}")
        return cls(least, most, constrained)

    @property
    def chooses(self) -> bool:
        """Whether the selector decides how many."""
        return self.least < self.most

    def count(self, num_documents: int) -> int:
        """How many selections of N documents there are: N!/(N−k)! of each length k, or of N where that is less."""
        lengths = range(min(self.least, num_documents), min(self.most, num_documents) + 1)
        return sum(math.perm(num_documents, length) for length in lengths)

    def __str__(self) -> str:
        """How many, as people say it: `5`, or `1 to 5`."""
        return f"{self.least} to {self.most}" if self.chooses else str(self.most)


def format_selection(numbers: Sequence[int]) -> str:
    """Write document numbers in the selection format: `[3, 1]` becomes `"[3] > [1]"`."""
    return SEPARATOR.join(f"[{number}]" for number in numbers)


def parse_selection(text: str, num_documents: int, k: int, least: int | None = None) -> Selection:
    """Read a selector's text.

    What stands in a thinking block (`selection.thinking`) is not the selection. Numbers out of 1..`num_documents` are
    dropped, then repeats (the first counts), then all after the K-th: in that order, so that a bad number never costs a
    good one its place.

    Args:
        text: the selector's completion, without special tokens.
        num_documents: N, the number of candidates.
        k: K, the number of documents asked for, at most.
        least: the fewest that will do; K itself, unless told.
    """
    text = without_thinking(text)
    problems: list[str] = []
    if not _WELL_FORMED.fullmatch(text.strip()):
        problems.append("format")
    # Ten digits bound int(), and are out of range for any list of candidates.
    named = [int(number.lstrip("0")[:10] or 0) for number in _NUMBER.findall(text)]
    in_range = [number for number in named if 1 <= number <= num_documents]
    distinct = list(dict.fromkeys(in_range))
    if len(in_range) < len(named):
        problems.append("out_of_range")
    if len(distinct) < len(in_range):
        problems.append("repeated")
    if len(distinct) < (k if least is None else least):
        problems.append("too_few")
    if len(distinct) > k:
        problems.append("too_many")
    numbers = tuple(distinct[:k])
    return Selection(numbers=numbers, valid=bool(numbers), problems=tuple(problems))
