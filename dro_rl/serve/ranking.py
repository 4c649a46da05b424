"""The order that a selection gives to all candidates, and scores that say no more than it does.

A list-wise selector names K documents, best first, and says nothing of how much better one is than the next. So the
score is a place: 1/1, 1/2, … for those that it named, and 0 for the others, which keep the order in which they came.
"""

from __future__ import annotations

from dro_rl.records import Selection


def ranked(selection: Selection, count: int) -> list[int]:
    """The numbers of all `count` candidates, from 1: those selected in their order, then the others in theirs."""
    named = set(selection.numbers)
    return [*selection.numbers, *(number for number in range(1, count + 1) if number not in named)]


def score(selection: Selection, rank: int) -> float:
    """What the document in a place, from 1, is given: one over the place if it was selected, else 0."""
    return 1 / rank if rank <= len(selection.numbers) else 0.0
