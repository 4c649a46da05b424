"""Questions of a log by where their rollouts stand: in a line, in full, or as rows. One file is in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from dro_rl.rollouts import log
from dro_rl.rollouts.diagnostics import Columns, GroupFigures
from dro_rl.rollouts.explain import Group, GroupRollout, SelectedDocument, ShownWindow, explain
from dro_rl.rollouts.read import COLUMNS, as_arrow, column, columns_of, in_order
from dro_rl.selection import format_selection


class Place(NamedTuple):
    """Where a question's rollouts stand: the file, and the question's position in its iteration."""

    path: Path
    position: int


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


def briefs_at(places: Sequence[Place]) -> list[Brief]:
    """The questions at some places in a line each, in their order."""
    found: dict[Place, Brief] = {}
    for path, positions in _by_file(places):
        rows = _rows(path, positions, [*COLUMNS, "question_id", "question"])
        rollouts = columns_of(rows)
        heads = rows.select(["question_id", "question", "iteration", "position", "selection", "weight"])
        lines = heads.take(as_arrow(_heaviest(rollouts))).to_pylist()
        for brief, line in zip(_briefs(rollouts, lines), lines, strict=True):
            found[Place(path, line["position"])] = brief
    return [found[place] for place in places]


def groups_at(places: Sequence[Place]) -> list[Group]:
    """The questions at some places with all their rollouts, in their order."""
    found: dict[Place, Group] = {}
    for path, positions in _by_file(places):
        table = _rows(path, positions)
        figures = GroupFigures(columns_of(table))
        rows: dict[int, list[dict[str, Any]]] = {}
        for row in table.to_pylist():
            rows.setdefault(row["position"], []).append(row)
        judged = zip(rows.items(), figures.evidence_bound.tolist(), figures.kinds(), strict=True)
        for (position, group), bound, kinds in judged:
            found[Place(path, position)] = _group(group, bound, kinds)
    return [found[place] for place in places]


def rows_at(places: Sequence[Place]) -> Iterator[pa.Table]:
    """The rows of the questions at some places, with all columns, a file after another."""
    for path, positions in _by_file(places):
        yield _rows(path, positions)


def _by_file(places: Sequence[Place]) -> list[tuple[Path, list[int]]]:
    files: dict[Path, list[int]] = {}
    for path, position in places:
        files.setdefault(path, []).append(position)
    return list(files.items())


def _rows(path: Path, positions: Sequence[int], columns: Sequence[str] | None = None) -> pa.Table:
    table = log.read([path], columns)
    return in_order(table.filter(as_arrow(np.isin(column(table, "position"), positions))))


def _heaviest(rollouts: Columns) -> np.ndarray:
    """(questions,) the row of each question's largest weight, the first of equals."""
    highest = np.maximum.reduceat(rollouts.weight, rollouts.start)
    rows = np.flatnonzero(rollouts.weight == highest[rollouts.group])
    return rows[np.unique(rollouts.group[rows], return_index=True)[1]]


def _briefs(rollouts: Columns, lines: Sequence[dict[str, Any]]) -> list[Brief]:
    figures = GroupFigures(rollouts)
    return [
        Brief(
            question_id=line["question_id"],
            question=line["question"],
            iteration=line["iteration"],
            selection=format_selection(line["selection"]),
            weight=line["weight"],
            distinct=int(figures.distinct[i]),
            rollouts=int(rollouts.size[i]),
            ess=float(rollouts.ess[i]),
            evidence_bound=float(figures.evidence_bound[i]),
            selector_entropy=float(figures.selector_entropy[i]),
            recall=float(figures.recall[5][i]),
        )
        for i, line in enumerate(lines)
    ]


def _group(rows: Sequence[dict[str, Any]], bound: float, kinds: tuple[str, ...]) -> Group:
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
            windows=tuple(
                ShownWindow(tuple(each["order"]), tuple(each["selection"]), each["text"])
                for each in ([*row["windows"], row] if row["windows"] else ())
            ),
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
        kinds=kinds,
        rollouts=tuple(rollouts),
        why=explain(rollouts, head["weight_temperature"]),
    )
