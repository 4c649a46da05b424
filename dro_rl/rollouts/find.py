"""Which questions of a log to look at: filters, orders, and what changed between two times that one was sampled.

One iteration is in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dro_rl.errors import InputError
from dro_rl.rollouts import log
from dro_rl.rollouts.diagnostics import Columns, GroupFigures, diagnose
from dro_rl.rollouts.explain import Group, GroupRollout, SelectedDocument, explain
from dro_rl.rollouts.read import COLUMNS, columns_of, in_order, iterations, ranges, read_iteration
from dro_rl.selection import format_selection

Order = Literal["weight", "evidence", "ess", "uncertain"]
"""What comes first: the largest weight, which is the most decided; the lowest evidence bound, which is the hardest; the
smallest ESS/m, which is the least spread; the highest entropy of the selector."""

Only = Literal["missed", "tie", "collapsed", "invalid"]
"""Questions whose supporting documents no rollout selected; whose rollouts tie; whose rollouts all select the same;
with a rollout that names no document."""


CLOSEST_OF = 5000
"""Ids among which one like a mistyped one is looked for."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which questions: those that meet all that is given.

    Args:
        only: a kind of question.
        problem: a rollout has it.
        text: stands in the question, its id, or what a rollout wrote, in any case of letters.
    """

    only: Only | None = None
    problem: str | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """Questions of one iteration.

    Args:
        run, iteration: where they were found.
        table: the rows of the iteration in order, without the longer columns.
        rollouts, figures: of its questions.
        places: of those that were asked for, among its questions, best first.
    """

    run: str | Path
    iteration: int
    table: pa.Table
    rollouts: Columns
    figures: GroupFigures
    places: list[int]


@dataclass(frozen=True, slots=True)
class Brief:
    """A question in a line.

    Args:
        selection: the one with the largest weight.
        distinct, rollouts: different selections that the rollouts make, of how many.
        ess: effective sample size, 0..m.
        evidence_bound, selector_entropy: nats.
        recall: at 5, under the selector; NaN without labels.
    """

    question_id: str
    question: str
    iteration: int
    selection: str
    weight: float
    distinct: int
    rollouts: int
    ess: float
    evidence_bound: float
    selector_entropy: float
    recall: float


@dataclass(frozen=True, slots=True)
class Change:
    """A question that was sampled twice."""

    before: Brief
    after: Brief

    @property
    def evidence(self) -> float:
        """How much better the answer is explained, nats; 0 where neither time anything was valid."""
        change = self.after.evidence_bound - self.before.evidence_bound
        return 0.0 if math.isnan(change) else change


def find(
    run: str | Path,
    question_id: str | None = None,
    *,
    iteration: int | None = None,
    sort: Order = "weight",
    wanted: Wanted | None = None,
) -> Found:
    """Questions of one iteration, in an order.

    Args:
        run: the run's `output_dir`.
        question_id: one question, or None for all that are `wanted`.
        iteration: 1-based; None for the last one, or the last one that sampled `question_id`.
        sort: what comes first.

    Raises:
        InputError: no such run, iteration or question, or a broken part.
    """
    number, wanted = _iteration(run, question_id, iteration), wanted or Wanted()
    text = [] if wanted.text is None else ["text"]
    table = in_order(read_iteration(run, number, [*COLUMNS, "question_id", "question", *text]))
    if question_id is not None:
        table = table.filter(pc.equal(table["question_id"], question_id))
    rollouts = columns_of(table)
    figures = diagnose(rollouts)
    key = {
        "weight": -figures.max_weight,
        "evidence": figures.evidence_bound,
        "ess": rollouts.ess / rollouts.size,
        "uncertain": -figures.selector_entropy,
    }[sort]
    meets = _meets(table, rollouts, figures, wanted)
    places = [int(place) for place in np.argsort(key, kind="stable") if meets[place]]
    return Found(run, number, table, rollouts, figures, places)


def find_groups(found: Found, limit: int | None = None) -> list[Group]:
    """Questions with their rollouts, and why the first one won."""
    start = found.rollouts.start
    position = found.table["position"].to_numpy()[start]
    rows: dict[int, list[dict[str, Any]]] = {int(position[place]): [] for place in found.places[:limit]}
    for row in _whole_rows(found, list(rows)).to_pylist():
        rows[row["position"]].append(row)
    return [
        _group(rows[int(position[place])], float(found.figures.evidence_bound[place])) for place in found.places[:limit]
    ]


def briefly(found: Found, limit: int | None = None) -> list[Brief]:
    """Questions in a line each."""
    places = np.array(found.places[:limit], dtype=int)
    heaviest = _heaviest(found.rollouts)[places]
    rows = found.table.select(["question_id", "question", "iteration", "selection", "weight"]).take(heaviest)
    figures, size = found.figures, found.rollouts.size
    return [
        Brief(
            question_id=row["question_id"],
            question=row["question"],
            iteration=row["iteration"],
            selection=format_selection(row["selection"]),
            weight=row["weight"],
            distinct=int(figures.distinct[place]),
            rollouts=int(size[place]),
            ess=float(found.rollouts.ess[place]),
            evidence_bound=float(figures.evidence_bound[place]),
            selector_entropy=float(figures.selector_entropy[place]),
            recall=float(figures.recall[5][place]),
        )
        for place, row in zip(places.tolist(), rows.to_pylist(), strict=True)
    ]


def changes(
    run: str | Path, other: str | Path | None = None, *, first: int | None = None, last: int | None = None
) -> list[Change]:
    """Questions that were sampled twice, the one that became worst first.

    Args:
        run: the run.
        other: another one, whose last times are compared with the last times of `run`; None compares within `run`.
        first, last: the iterations to compare; None takes the first and the last time of each question.
    """
    if other is not None:
        before, after = _times(run, first)[1], _times(other, last)[1]
    elif first is None and last is None:
        before, after = _times(run, None)
    else:
        before, after = _times(run, first)[0], _times(run, last)[1]
    both = [Change(before[i], after[i]) for i in before if i in after]
    twice = [change for change in both if other is not None or change.before.iteration < change.after.iteration]
    return sorted(twice, key=lambda change: change.evidence)


def rows_of(run: str | Path, iteration: int | None, wanted: Wanted) -> Iterator[pa.Table]:
    """The rows of the questions that are wanted: of one iteration, or of all, one after another."""
    for number in iterations(run) if iteration is None else [iteration]:
        found = find(run, iteration=number, wanted=wanted)
        position = found.table["position"].to_numpy()[found.rollouts.start]
        yield in_order(_whole_rows(found, position[found.places].tolist()))


def _times(run: str | Path, iteration: int | None) -> tuple[dict[str, Brief], dict[str, Brief]]:
    """Each question the first and the last time that it was sampled: in an iteration, or in all."""
    first: dict[str, Brief] = {}
    last: dict[str, Brief] = {}
    for number in iterations(run) if iteration is None else [iteration]:
        for brief in briefly(find(run, iteration=number)):
            first.setdefault(brief.question_id, brief)
            last[brief.question_id] = brief
    return first, last


def _whole_rows(found: Found, positions: Sequence[int]) -> pa.Table:
    """All columns of some questions, by their positions in the iteration: one part is in memory at a time."""
    if not positions:
        return log.SCHEMA.empty_table()
    wanted = pa.array(positions, pa.int32())
    parts = (log.read([path]) for path in log.part_paths(found.run, found.iteration))
    return pa.concat_tables([part.filter(pc.is_in(part["position"], wanted)) for part in parts])


def _iteration(run: str | Path, question_id: str | None, iteration: int | None) -> int:
    """The iteration asked for, or the last one, or the last one that sampled a question."""
    searched = [iteration] if iteration is not None else iterations(run)
    if question_id is None:
        return searched[-1]
    for candidate in reversed(searched):
        ids = read_iteration(run, candidate, ["question_id"])["question_id"]
        if pc.any(pc.equal(ids, question_id)).as_py():
            return candidate
    some = ids.unique().to_pylist()[:CLOSEST_OF]
    known = get_close_matches(question_id, some, 3, 0.4) or some[:1]
    raise InputError(
        f"{run}: question id",
        question_id,
        f"this id was sampled in none of {ranges(searched)}",
        f"Leave the id out to see some; ones that were sampled are {', '.join(map(repr, known))}.",
    )


def _meets(table: pa.Table, rollouts: Columns, figures: GroupFigures, wanted: Wanted) -> np.ndarray:
    """(questions,) whether each is wanted."""

    def has(rows: pa.ChunkedArray) -> np.ndarray:
        return np.logical_or.reduceat(rows.to_numpy().astype(bool), rollouts.start)

    meets = np.ones(len(rollouts.size), dtype=bool)
    if wanted.only is not None:
        kinds: dict[Only, Callable[[], np.ndarray]] = {
            "missed": lambda: (
                (rollouts.num_supporting > 0)
                & (np.bincount(rollouts.group[rollouts.row], rollouts.supporting, len(meets)) == 0)
            ),
            "tie": lambda: figures.tie,
            "collapsed": lambda: (figures.distinct == 1) & (figures.valid > 1),
            "invalid": lambda: figures.valid < rollouts.size,
        }
        assert set(kinds) == set(get_args(Only))
        meets &= kinds[wanted.only]()
    if wanted.problem is not None:
        joined = pc.binary_join(table["problems"].combine_chunks(), ",")
        meets &= has(pa.chunked_array([pc.match_substring(joined, wanted.problem)]))
    if wanted.text is not None:
        anywhere = [
            pc.match_substring(table[name], wanted.text, ignore_case=True)
            for name in ("question_id", "question", "text")
        ]
        meets &= has(pc.or_(pc.or_(*anywhere[:2]), anywhere[2]))
    return meets


def _heaviest(rollouts: Columns) -> np.ndarray:
    """(questions,) the row of each question's largest weight, the first of equals."""
    highest = np.maximum.reduceat(rollouts.weight, rollouts.start)
    rows = np.flatnonzero(rollouts.weight == highest[rollouts.group])
    return rows[np.unique(rollouts.group[rows], return_index=True)[1]]


def _group(rows: list[dict[str, Any]], bound: float) -> Group:
    rollouts = [
        GroupRollout(
            sample=row["sample"],
            weight=row["weight"],
            documents=tuple(
                SelectedDocument(number, identifier, title, supporting)
                for number, identifier, title, supporting in zip(
                    row["selection"],
                    row["document_ids"],
                    row["document_titles"],
                    row["supporting"],
                    strict=True,
                )
            ),
            valid=row["valid"],
            problems=tuple(row["problems"]),
            text=row["text"],
            answer_logp=row["answer_logp"],
            selection_logp=row["selection_logp"],
            proposal_logp=row["proposal_logp"],
            answer_logp_sum=row["answer_logp_sum"],
            answer_logp_mean=row["answer_logp_mean"],
            answer=row["answer"],
            rewards=dict(row["rewards"]),
            reward=row["reward"],
            advantage=row["advantage"],
        )
        for row in rows
    ]
    rollouts.sort(key=lambda rollout: (-rollout.weight, not rollout.valid, rollout.sample))
    head = rows[0]
    return Group(
        question_id=head["question_id"],
        question=head["question"],
        answers=tuple(head["answers"]),
        iteration=head["iteration"],
        step=head["step"],
        position=head["position"],
        num_supporting=head["num_supporting"],
        ess=head["ess"],
        weight_temperature=head["weight_temperature"],
        evidence_bound=bound,
        rollouts=tuple(rollouts),
        why=explain(rollouts, head["weight_temperature"]),
    )
