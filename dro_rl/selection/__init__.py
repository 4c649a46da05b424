"""The selection format: `[5] > [2] > [9]`, 1-based, best first. Written and read here and nowhere else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from dro_rl.records import Selection
from dro_rl.selection.thinking import without_thinking

SEPARATOR = " > "
# Brackets are required: digits in prose ("the top 5 of 2018") are not document numbers.
_NUMBER = re.compile(r"\[\s*([0-9]+)\s*\]")
_WELL_FORMED = re.compile(r"\[\s*[0-9]+\s*\](\s*>\s*\[\s*[0-9]+\s*\])*")


@dataclass(frozen=True, slots=True)
class SelectionSpec:
    """What the selector is asked for: K documents, as distinct valid numbers by construction where constrained."""

    num_selected: int
    constrained: bool = False


def format_selection(numbers: Sequence[int]) -> str:
    """Write document numbers in the selection format: `[3, 1]` becomes `"[3] > [1]"`."""
    return SEPARATOR.join(f"[{number}]" for number in numbers)


def parse_selection(text: str, num_documents: int, k: int) -> Selection:
    """Read a selector's text.

    What stands in a thinking block (`selection.thinking`) is not the selection. Numbers out of 1..`num_documents` are
    dropped, then repeats (the first counts), then all after the K-th: in that order, so that a bad number never costs a
    good one its place.

    Args:
        text: the selector's completion, without special tokens.
        num_documents: N, the number of candidates.
        k: K, the number of documents asked for.
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
    if len(distinct) < k:
        problems.append("too_few")
    if len(distinct) > k:
        problems.append("too_many")
    numbers = tuple(distinct[:k])
    return Selection(numbers=numbers, valid=bool(numbers), problems=tuple(problems))
