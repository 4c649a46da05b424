"""Which questions of a log to look at: filters and orders.

One file is in memory at a time, and of it the columns that the filters and the order take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dro_rl.errors import InputError, Phrase, closest
from dro_rl.rollouts import log
from dro_rl.rollouts.changes import BOUND, Pair, since
from dro_rl.rollouts.diagnostics import TIE, Columns, GroupFigures
from dro_rl.rollouts.explain import Group
from dro_rl.rollouts.places import Brief, Place, briefs_at, groups_at, rows_at
from dro_rl.rollouts.read import chosen_parts, column, columns_of, in_order, is_text, parts_of, ranges, recipe_value

Order = Literal["weight", "evidence", "ess", "uncertain", "worse", "improved"]
"""What comes first: the largest weight, which is the most decided; the lowest evidence bound, which is the hardest; the
smallest ESS/m, which is the least spread; the highest entropy of the selector; the bound that fell, or rose, most."""

Only = Literal["missed", "unselected", "tie", "collapsed", "invalid", "worse", "improved"]
"""Questions of one of `diagnostics.KINDS`, or whose answer is explained worse, or better, than it was."""

ENOUGH = 5000
"""Ids among which one like a mistyped one is looked for."""
CHANGES: tuple[Only | Order, ...] = ("worse", "improved")
"""What compares two times."""
NEEDS: Mapping[str, Sequence[str]] = {
    "weight": ("weight",),
    "evidence": BOUND,
    "ess": ("ess",),
    "uncertain": ("selection_logp", "proposal_logp"),
    "missed": ("selection", "supporting", "num_supporting"),
    "unselected": ("selection", "supporting", "num_supporting", "weight"),
    "tie": ("valid", "reward"),
    "collapsed": ("valid", "selection"),
    "invalid": ("valid",),
    "problem": ("problems",),
    "text": ("question_id", "question", "text"),
}
"""The columns that each order and filter takes."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which questions: those that meet all that is given.

    Args:
        only: a kind of question.
        problem: a rollout has it.
        text: stands in the question, its id, or what a rollout wrote, in any case of letters.
        min_weight, max_weight: of its largest weight.
        since: compare its last time with its last one up to this iteration; None with its first one.
        split: of the data; rollouts are of the training split alone.
        question_id: its id.
    """

    only: Only | None = None
    problem: str | None = None
    text: str | None = None
    min_weight: float | None = None
    max_weight: float | None = None
    since: int | None = None
    split: str | None = None
    question_id: str | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """Questions of a log.

    Args:
        iterations: where was looked.
        places: where they stand, best first.
        changes: by place, two times of each, where those were compared.
    """

    iterations: Sequence[int]
    places: Sequence[Place]
    changes: Mapping[Place, Pair]

    @property
    def where(self) -> str:
        """The iterations, in words."""
        return ranges(self.iterations)


def find(
    run: str | Path,
    question_id: str | None = None,
    *,
    iteration: int | Sequence[int] | None = None,
    sort: Order = "weight",
    wanted: Wanted | None = None,
) -> Found:
    """Questions of a log, in an order.

    Args:
        run: the run's `output_dir`.
        question_id: one question, or None for all that are `wanted`.
        iteration: 1-based, or several; None for the last one, or the last one that sampled `question_id`. Where two
            times are compared, the last time of each question.
        sort: what comes first.

    Raises:
        InputError: no such run, iteration or question, or a broken part.
    """
    wanted = replace(wanted or Wanted(), question_id=question_id or (wanted.question_id if wanted else None))
    _check_split(run, wanted.split)
    pairs: Mapping[str, Pair] = {}
    chosen: Mapping[int, Sequence[Path]]
    twice = wanted.since is not None or wanted.only in CHANGES or sort in CHANGES
    if twice:
        pairs = since(run, wanted.since)
        chosen = parts_of(run)
    elif question_id is not None:
        chosen = _sampled(run, question_id, iteration)
    else:
        chosen = chosen_parts(run, iteration)
    changes = {pair.after.place: pair for pair in pairs.values()}
    files = {place.path for place in changes}
    keys: list[float] = []
    places: list[Place] = []
    for path in (path for paths in chosen.values() for path in paths):
        if twice and path not in files:
            continue
        for place, key in _scan(path, sort, wanted):
            if not twice or place in changes:
                keys.append(key if sort not in CHANGES else _signed(changes[place], sort))
                places.append(place)
    order = np.argsort(np.array(keys), kind="stable")
    if twice:
        order = np.array([i for i in order if _changed(changes[places[i]], wanted.only)], dtype=int)
    return Found(list(chosen), [places[i] for i in order], changes)


def find_groups(found: Found, limit: int | None = None) -> list[Group]:
    """Questions with their rollouts, and why the first one won."""
    return groups_at(found.places[:limit])


def briefly(found: Found, limit: int | None = None) -> list[Brief]:
    """Questions in a line each."""
    return briefs_at(found.places[:limit])


def rows_of(
    run: str | Path, iteration: int | Sequence[int] | None, wanted: Wanted, question_id: str | None = None
) -> Iterator[pa.Table]:
    """The rows of the questions that are wanted, of some iterations, or of all, in the order of the log."""
    numbers = list(parts_of(run)) if iteration is None else iteration
    if question_id is not None:
        _sampled(run, question_id, numbers)
    return rows_at(sorted(find(run, iteration=numbers, wanted=replace(wanted, question_id=question_id)).places))


def _scan(path: Path, sort: Order, wanted: Wanted) -> Iterator[tuple[Place, float]]:
    """The questions of a file that are wanted, with the key of the order, in the order of sampling."""
    filters = {"problem": wanted.problem, "text": wanted.text, wanted.only or "": wanted.only}
    needed = {"position", "sample", *NEEDS.get(sort, ())}
    needed.update(name for kind, value in filters.items() if value is not None for name in NEEDS.get(kind, ()))
    if wanted.min_weight is not None or wanted.max_weight is not None:
        needed.add("weight")
    if wanted.question_id is not None:
        ids = log.read([path], ["question_id"])["question_id"]
        if not pc.any(is_text(ids, wanted.question_id)).as_py():
            return
        needed.add("question_id")
    table = in_order(log.read([path], sorted(needed)))
    if wanted.question_id is not None:
        table = table.filter(is_text(table["question_id"], wanted.question_id))
    if not table.num_rows:
        return
    rollouts = columns_of(table)
    figures = GroupFigures(rollouts)
    keys: dict[str, Callable[[], np.ndarray]] = {
        "weight": lambda: -figures.max_weight,
        "evidence": lambda: figures.evidence_bound,
        "ess": lambda: rollouts.ess / rollouts.size,
        "uncertain": lambda: -figures.selector_entropy,
    }
    key = keys[sort]() if sort in keys else np.zeros(len(rollouts.size))
    position = column(table, "position")[rollouts.start]
    for i in np.flatnonzero(_meets(table, rollouts, figures, wanted)).tolist():
        yield Place(path, int(position[i])), float(key[i])


def _meets(table: pa.Table, rollouts: Columns, figures: GroupFigures, wanted: Wanted) -> np.ndarray:
    """(questions,) whether each is wanted."""

    def has(rows: pa.ChunkedArray) -> np.ndarray:
        found = np.from_dlpack(rows.combine_chunks().cast(pa.uint8()))
        return np.logical_or.reduceat(found.astype(bool), rollouts.start)

    meets = np.ones(len(rollouts.size), dtype=bool)
    if wanted.only is not None and wanted.only not in CHANGES:
        meets &= getattr(figures, wanted.only)
    if wanted.problem is not None:
        joined = pc.binary_join(table["problems"].combine_chunks(), ",")
        meets &= has(pa.chunked_array([pc.match_substring(joined, wanted.problem)]))
    if wanted.text is not None:
        anywhere = [pc.match_substring(table[name], wanted.text, ignore_case=True) for name in NEEDS["text"]]
        meets &= has(pc.or_(pc.or_(*anywhere[:2]), anywhere[2]))
    if wanted.min_weight is not None:
        meets &= figures.max_weight >= wanted.min_weight
    if wanted.max_weight is not None:
        meets &= figures.max_weight <= wanted.max_weight
    return meets


def _signed(pair: Pair, sort: Order) -> float:
    return pair.change if sort == "worse" else -pair.change


def _changed(pair: Pair, only: Only | None) -> bool:
    """Whether a change is of the kind; within a tie it is of neither."""
    return not (only == "worse" and pair.change >= -TIE) and not (only == "improved" and pair.change <= TIE)


def _sampled(run: str | Path, question_id: str, iteration: int | Sequence[int] | None) -> Mapping[int, Sequence[Path]]:
    """The last iteration that sampled a question: of all, or of those asked for."""
    searched = parts_of(run) if iteration is None else chosen_parts(run, iteration)
    some: dict[str, None] = {}
    for number, paths in reversed(searched.items()):
        for path in paths:
            ids = log.read([path], ["question_id"])["question_id"]
            if pc.any(is_text(ids, question_id)).as_py():
                return {number: paths}
            if len(some) < ENOUGH:
                some.update(dict.fromkeys(ids.unique().to_pylist()))
    raise InputError(
        f"{run}: question id",
        question_id,
        f"this id was sampled in none of {ranges(list(searched))}",
        f"Leave the id out to see some; ones that were sampled are {closest(question_id, some)}.",
    )


def _check_split(run: str | Path, split: str | None) -> None:
    """Refuse a split that the run did not sample."""
    if split is None:
        return
    sampled = recipe_value(run, "dataset_train_split") or "train"
    if split != sampled:
        raise InputError(
            f"{run}: split",
            split,
            Phrase(f"rollouts are of the split that is trained on, {sampled}"),
            "`dro-rl compare` shows the questions of evaluated splits.",
        )
