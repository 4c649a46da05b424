"""Places in an iteration whose rollouts all tie: which they are, and what is asked for them again.

A place that ties tells the selector nothing: no rollout of its question is better than another. It may be drawn again,
or another question may take it (the dynamic sampling of DAPO, arXiv 2503.14476). What that does to the gradient stands
in docs/objectives.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dro_rl.em.e_step import Asked
from dro_rl.proposal import rollout_seed
from dro_rl.records import Question, Rollout
from dro_rl.rollouts.diagnostics import GroupFigures, columns


def tied(groups: Sequence[Sequence[Rollout]], questions: Sequence[Question]) -> list[int]:
    """The places of the groups that tie, as `rollouts/all_tie` counts them.

    Args:
        groups: the rollouts of each place.
        questions: the training set.
    """
    return [int(place) for place in np.flatnonzero(GroupFigures(columns(groups, questions)).tie)] if groups else []


def asked_again(
    part: Asked, places: Sequence[int], indices: Sequence[int], questions: Sequence[Question], draw: int
) -> Asked:
    """What is asked for some places of a part in a later draw: a function of the places' seeds and of which draw it is.

    Args:
        part: what was asked first.
        places: in the part.
        indices: of the questions that now stand there.
        questions: the training set.
        draw: 2 for the second.
    """
    seeds = [rollout_seed(part.seeds[place], "draw", draw) for place in places]
    return Asked(indices, [questions[index] for index in indices], seeds, part.temperature)
