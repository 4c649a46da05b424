"""What may stand in for the selector in an evaluation, to see what the selector adds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from dro_rl.proposal import rollout_seed
from dro_rl.records import Question, Selection

Control = Literal["none", "retriever-order", "random", "gold"]
CONTROLS: tuple[str, ...] = get_args(Control)


def applies(control: str, question: Question) -> bool:
    """Whether a control can answer for a question: gold documents need labels."""
    return control != "gold" or bool(question.supporting)


def control_selection(control: str, question: Question, k: int, seed: int) -> Selection:
    """The selection that a control makes for one question.

    `retriever-order` is the first K candidates; `random` is K of them in random order, a function of the seed and the
    question's id alone; `gold` is the supporting documents in the retriever's order, at most K.
    """
    count = len(question.documents)
    if control == "retriever-order":
        numbers: Sequence[int] = range(1, min(k, count) + 1)
    elif control == "random":
        order = np.random.default_rng(rollout_seed(seed, question.id)).permutation(count)
        numbers = [int(number) + 1 for number in order[:k]]
    elif control == "gold":
        numbers = question.supporting_numbers[:k]
    else:
        raise ValueError(f"control is one of {', '.join(CONTROLS[1:])}, not {control!r}")
    return Selection(tuple(numbers), valid=bool(numbers))
