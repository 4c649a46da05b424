"""What a rollout log says about a run: per iteration, per question, over time. Pure functions of its tables.

The command line and the report print what this file computes. It knows of no trainer, engine or terminal.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from dro_rl.errors import InputError, Phrase
from dro_rl.objective import evidence_bound
from dro_rl.rollouts import log
from dro_rl.selection import format_selection

RECALL_AT = (1, 3, 5)
TIE = 1e-6
"""Nats. Equal selections are scored once, so a tie is exact but for rounding."""
RATIO_WORTH_SAYING = 0.05
"""Nats of log p − log q. Below this it is the rounding of two engines, not a different distribution."""
SIGNAL_QUESTIONS = 100
"""Signals are judged over the latest iterations that together hold this many questions."""

DIAGNOSTIC_COLUMNS = (
    "iteration",
    "step",
    "position",
    "question_id",
    "sample",
    "selection",
    "valid",
    "problems",
    "supporting",
    "num_supporting",
    "answer_logp",
    "weight",
    "ess",
)

SortKey = Literal["weight", "evidence", "ess"]


# Finding the parts ------------------------------------------------------------------------------------------


def iterations(run: str | Path) -> list[int]:
    """The iterations that a run has logged, ascending.

    Args:
        run: the run's `output_dir`.

    Raises:
        InputError: there is no such folder, or it holds no rollouts.
    """
    run = Path(run)
    if not run.is_dir():
        raise InputError(str(run), Phrase("no such folder"), "a run is the output_dir of a training", "Check the path.")
    names = (re.match(r"iteration-(\d+)-part-", path.name) for path in log.part_paths(run))
    found = sorted({int(name[1]) for name in names if name})
    if not found:
        if log.part_paths(run.parent):
            fix = f"Pass the folder above it: {run.parent}"
        else:
            fix = "Pass the output_dir of a run that has finished an E-step."
        raise InputError(
            str(run),
            Phrase("no rollouts"),
            "a run holds rollouts/iteration-*.parquet once it has sampled",
            fix,
        )
    return found


def read_iteration(run: str | Path, iteration: int, columns: Sequence[str] | None = None) -> pa.Table:
    """All rows of one iteration.

    Raises:
        InputError: the iteration was not logged, or a part of it is broken.
    """
    logged = iterations(run)
    if iteration not in logged:
        raise InputError(
            f"{run}: iteration",
            iteration,
            f"this run has logged {_ranges(logged)}",
            "Choose one of them.",
        )
    return log.read(log.part_paths(run, iteration), columns)


# Diagnostics ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GroupDiagnostics:
    """One number a question, for the questions of one iteration in the order of sampling: arrays of (G,).

    Args:
        position: place in the iteration.
        size: m, the rollouts of the question.
        valid: how many of them name a document.
        distinct: how many different selections the valid ones make; order counts.
        tie: there is a valid rollout, and all valid ones have one answer log-likelihood: comparing them says
            nothing.
        ess: effective sample size of the weights, 0..m, as logged.
        max_weight: largest weight, 0..1.
        evidence_bound: log((1/m) Σ p(y|x,d_z)), nats; −inf where no rollout is valid.
        answer_logp: sum of log p(y|x,d_z) over the valid rollouts, nats.
        recall, weighted_recall: by k, the share of the supporting documents among the first k selected,
            averaged over the rollouts evenly or by their weights; an invalid rollout counts as 0. NaN without
            labels.
    """

    position: np.ndarray
    size: np.ndarray
    valid: np.ndarray
    distinct: np.ndarray
    tie: np.ndarray
    ess: np.ndarray
    max_weight: np.ndarray
    evidence_bound: np.ndarray
    answer_logp: np.ndarray
    recall: dict[int, np.ndarray]
    weighted_recall: dict[int, np.ndarray]


def diagnose(table: pa.Table) -> GroupDiagnostics:
    """Diagnostics of every question of one iteration. `table` has at least `DIAGNOSTIC_COLUMNS`."""
    table = table.sort_by([("position", "ascending"), ("sample", "ascending")])
    position, first, group = np.unique(_numbers(table, "position"), return_index=True, return_inverse=True)
    count = len(position)
    size = np.bincount(group, minlength=count)
    valid = _numbers(table, "valid").astype(bool)
    logp = _numbers(table, "answer_logp")
    weight = _numbers(table, "weight")

    highest, lowest = np.full(count, -np.inf), np.full(count, np.inf)
    np.maximum.at(highest, group[valid], logp[valid])
    np.minimum.at(lowest, group[valid], logp[valid])
    max_weight = np.zeros(count)
    np.maximum.at(max_weight, group, weight)
    num_valid = np.bincount(group[valid], minlength=count)
    with np.errstate(invalid="ignore"):
        tie = (num_valid > 0) & ((highest == lowest) | (highest - lowest <= TIE))

    hits = _hits(table)
    labelled = _numbers(table, "num_supporting")[first]
    recall, weighted_recall = {}, {}
    with np.errstate(invalid="ignore", divide="ignore"):
        for k in RECALL_AT:
            recall[k] = np.bincount(group, hits[k], count) / size / labelled
            weighted_recall[k] = np.bincount(group, weight * hits[k], count) / labelled

    return GroupDiagnostics(
        position=position,
        size=size,
        valid=num_valid,
        distinct=_distinct_selections(table, group, valid, count),
        tie=tie,
        ess=_numbers(table, "ess")[first],
        max_weight=max_weight,
        evidence_bound=_evidence_bounds(logp, valid, size),
        answer_logp=np.bincount(group[valid], logp[valid], count),
        recall=recall,
        weighted_recall=weighted_recall,
    )


@dataclass(frozen=True, slots=True)
class IterationSummary:
    """One iteration in numbers. Shares are 0..1; NaN where there is nothing to average.

    Args:
        iteration: 1-based.
        first_step, last_step: optimizer steps taken before its first and its last rollouts were sampled.
        questions, rollouts: how many.
        valid_rollouts: how many rollouts name a document.
        valid: their share of the rollouts.
        valid_questions: how many questions have a valid rollout.
        duplicate: of the valid rollouts after the first of each question, the share that repeat an earlier
            selection: 0 when all differ and 1 when all are the same, whatever m is.
        all_tie: share of the questions whose valid rollouts all have one answer log-likelihood.
        all_invalid: share of the questions without a valid rollout.
        ess: mean over questions of ESS/m.
        evidence_bound: nats, mean over the questions with a valid rollout (the others have −inf).
        answer_logp: nats, mean over the valid rollouts.
        labelled: questions with supporting documents among their candidates; recalls are means over them.
        recall, weighted_recall: by k; see `GroupDiagnostics`.
        problems: how many rollouts have each problem, the most frequent first.
    """

    iteration: int
    first_step: int
    last_step: int
    questions: int
    rollouts: int
    valid_rollouts: int
    valid_questions: int
    valid: float
    duplicate: float
    all_tie: float
    all_invalid: float
    ess: float
    evidence_bound: float
    answer_logp: float
    labelled: int
    recall: dict[int, float]
    weighted_recall: dict[int, float]
    problems: dict[str, int]


def summarize(table: pa.Table) -> IterationSummary:
    """Summarize one iteration. `table` has its rows, in any order, and at least `DIAGNOSTIC_COLUMNS`."""
    groups = diagnose(table)
    rollouts, valid, answerable = (
        int(groups.size.sum()),
        int(groups.valid.sum()),
        int((groups.valid > 0).sum()),
    )
    steps = _numbers(table, "step")
    labelled = ~np.isnan(groups.recall[RECALL_AT[0]])
    names = pc.value_counts(_flat(table, "problems")).to_pylist()
    ordered = sorted(names, key=lambda item: (-item["counts"], item["values"]))
    return IterationSummary(
        iteration=int(_numbers(table, "iteration")[0]),
        first_step=int(steps.min()),
        last_step=int(steps.max()),
        questions=len(groups.position),
        rollouts=rollouts,
        valid_rollouts=valid,
        valid_questions=answerable,
        valid=valid / rollouts,
        duplicate=_mean(valid - int(groups.distinct.sum()), valid - answerable),
        all_tie=float(groups.tie.mean()),
        all_invalid=1 - answerable / len(groups.position),
        ess=float((groups.ess / groups.size).mean()),
        evidence_bound=_mean(groups.evidence_bound[groups.valid > 0].sum(), answerable),
        answer_logp=_mean(groups.answer_logp.sum(), valid),
        labelled=int(labelled.sum()),
        recall={k: _mean(v[labelled].sum(), labelled.sum()) for k, v in groups.recall.items()},
        weighted_recall={k: _mean(v[labelled].sum(), labelled.sum()) for k, v in groups.weighted_recall.items()},
        problems={item["values"]: item["counts"] for item in ordered},
    )


def summarize_run(run: str | Path, last: int | None = None) -> list[IterationSummary]:
    """The iterations of a run in order, or the `last` ones. Reads one at a time.

    Raises:
        InputError: see `iterations` and `dro_rl.rollouts.log.read`.
    """
    chosen = iterations(run)[-last:] if last else iterations(run)
    tables = (log.read(log.part_paths(run, iteration), DIAGNOSTIC_COLUMNS) for iteration in chosen)
    return [summarize(table) for table in tables if table.num_rows]


# Signals ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Threshold:
    """When a diagnostic says that a run needs a hand, and the recipe key to change first."""

    name: str
    above: bool
    limit: float
    recipe_key: str
    advice: str


THRESHOLDS = (
    Threshold(
        "all_tie",
        True,
        0.5,
        "num_generations",
        "On most questions all rollouts explain the answer equally well, so no weight is larger: raise it.",
    ),
    Threshold(
        "duplicate",
        True,
        0.8,
        "duplicate_threshold",
        "The selector samples the same selection over and over and no longer explores: set it, 0.8 to begin.",
    ),
    Threshold(
        "ess",
        False,
        0.2,
        "target_ess",
        "One rollout holds nearly all the weight of its question, and few teach: set it, 0.5 to begin.",
    ),
    Threshold(
        "valid",
        False,
        0.9,
        "max_completion_length",
        "Rollouts name no document, or break off before they do: raise it, and read them with `show`.",
    ),
)


@dataclass(frozen=True, slots=True)
class Signal:
    """A threshold and what was measured against it.

    Args:
        threshold: the rule.
        value: the diagnostic, pooled over the latest iterations that together hold `SIGNAL_QUESTIONS`.
        fired: whether the value is beyond the limit; never for NaN.
        first_iteration, last_iteration: what was pooled.
        questions: how many questions that were.
    """

    threshold: Threshold
    value: float
    fired: bool
    first_iteration: int
    last_iteration: int
    questions: int


def signals(summaries: Sequence[IterationSummary]) -> list[Signal]:
    """Judge the latest iterations against `THRESHOLDS`, in that order."""
    recent: list[IterationSummary] = []
    for summary in reversed(summaries):
        recent.insert(0, summary)
        if sum(s.questions for s in recent) >= SIGNAL_QUESTIONS:
            break
    if not recent:
        return []
    counted_in = {
        "all_tie": [s.questions for s in recent],
        "ess": [s.questions for s in recent],
        "duplicate": [s.valid_rollouts - s.valid_questions for s in recent],
        "valid": [s.rollouts for s in recent],
    }
    found = []
    for threshold in THRESHOLDS:
        shares = [(getattr(s, threshold.name), n) for s, n in zip(recent, counted_in[threshold.name], strict=True)]
        value = _mean(sum(share * n for share, n in shares if n), sum(n for _, n in shares))
        found.append(
            Signal(
                threshold=threshold,
                value=value,
                fired=value > threshold.limit if threshold.above else value < threshold.limit,
                first_iteration=recent[0].iteration,
                last_iteration=recent[-1].iteration,
                questions=sum(s.questions for s in recent),
            )
        )
    return found


def count_problems(summaries: Sequence[IterationSummary]) -> dict[str, int]:
    """How many rollouts have each problem over all iterations given, the most frequent first."""
    total: dict[str, int] = {}
    for summary in summaries:
        for name, count in summary.problems.items():
            total[name] = total.get(name, 0) + count
    return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))


# One question -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SelectedDocument:
    """A document that a rollout selected: its 1-based number among the candidates, and what the log keeps."""

    number: int
    id: str
    title: str
    supporting: bool


@dataclass(frozen=True, slots=True)
class GroupRollout:
    """One rollout of a `Group`. Log-probabilities in nats; the fields are the columns of the log."""

    sample: int
    weight: float
    selector_coefficient: float
    documents: tuple[SelectedDocument, ...]
    valid: bool
    problems: tuple[str, ...]
    text: str
    answer_logp: float
    selection_logp: float
    proposal_logp: float

    @property
    def numbers(self) -> tuple[int, ...]:
        """The selection: document numbers, best first."""
        return tuple(document.number for document in self.documents)


@dataclass(frozen=True, slots=True)
class Group:
    """One question at one iteration, with its m rollouts in the order of their weights.

    Args:
        ess: effective sample size of the weights, 0..m.
        evidence_bound: log((1/m) Σ p(y|x,d_z)), nats.
        why: in words, why the first rollout won, or why none did.
    """

    question_id: str
    question: str
    answers: tuple[str, ...]
    iteration: int
    step: int
    position: int
    num_supporting: int
    ess: float
    weight_temperature: float
    evidence_bound: float
    rollouts: tuple[GroupRollout, ...]
    why: str


def find_groups(
    run: str | Path,
    question_id: str | None = None,
    *,
    iteration: int | None = None,
    sort: SortKey = "weight",
    limit: int | None = None,
) -> list[Group]:
    """Questions of a run with their rollouts.

    Args:
        run: the run's `output_dir`.
        question_id: one question, or None for those that come first by `sort`.
        iteration: 1-based; None for the last one, or the last one that sampled `question_id`.
        sort: what comes first: `weight`, the largest single weight; `evidence`, the lowest evidence bound,
            which is the hardest question; `ess`, the smallest ESS/m.
        limit: how many groups at most.

    Raises:
        InputError: no such run, iteration or question, or a broken part.
    """
    searched = [iteration] if iteration is not None else iterations(run)
    if question_id is None:
        table = read_iteration(run, searched[-1])
    else:
        for candidate in reversed(searched):
            ids = read_iteration(run, candidate, ["question_id"])["question_id"]
            if pc.any(pc.equal(ids, question_id)).as_py():
                table = read_iteration(run, candidate)
                table = table.filter(pc.equal(table["question_id"], question_id))
                break
        else:
            raise InputError(
                f"{run}: question id",
                question_id,
                f"this id was sampled in none of {_ranges(searched)}",
                f"Leave the id out to see some; one that was sampled is {ids[0].as_py()!r}.",
            )
    groups = diagnose(table)
    key = {
        "weight": -groups.max_weight,
        "evidence": groups.evidence_bound,
        "ess": groups.ess / np.maximum(groups.size, 1),
    }[sort]
    places = groups.position[np.argsort(key, kind="stable")][:limit]
    bounds = dict(zip(groups.position.tolist(), groups.evidence_bound.tolist(), strict=True))
    table = table.filter(pc.is_in(table["position"], pa.array(places, table.schema.field("position").type)))
    rows: dict[int, list[dict]] = {place: [] for place in places.tolist()}
    for row in table.to_pylist():
        rows[row["position"]].append(row)
    return [_group(rows[place], bounds[place]) for place in places.tolist()]


def explain(rollouts: Sequence[GroupRollout], weight_temperature: float = 1.0) -> str:
    """Say why the first of a question's rollouts, which are ordered by weight, has the most weight."""
    distinct: dict[tuple[int, ...], list[GroupRollout]] = {}
    for rollout in rollouts:
        if rollout.valid:
            distinct.setdefault(rollout.numbers, []).append(rollout)
    valid = [rollout for same in distinct.values() for rollout in same]
    if not valid:
        return "No rollout names a valid document: every weight is 0, and this question teaches nothing."
    winner = format_selection(valid[0].numbers)
    if len(distinct) == 1:
        return f"Every valid rollout selects {winner}: there is nothing to compare."
    first, second = (same[0] for same in list(distinct.values())[:2])
    if len({rollout.answer_logp for rollout in valid}) == 1 and first.weight - valid[-1].weight < TIE:
        return (
            f"All {len(distinct)} distinct selections give the answer the same log-likelihood, "
            f"{first.answer_logp:.2f} nats: the weights prefer none."
        )
    runner_up = format_selection(second.numbers)
    same = distinct[first.numbers]
    share = sum(rollout.weight for rollout in same)
    times = "" if len(same) == 1 else f" over {len(same)} rollouts"
    ahead = first.answer_logp - second.answer_logp
    ratio = _log_ratio(first) - _log_ratio(second)
    said = [f"{winner} has weight {share:.2f}{times}:"]
    if ahead > TIE:
        said.append(
            f"its answer log-likelihood exceeds that of the next distinct selection, {runner_up}, by {ahead:.2f} nats."
        )
    elif ahead < -TIE:
        said.append(
            f"its answer log-likelihood is {-ahead:.2f} nats below that of {runner_up}, "
            f"but its log p − log q is {ratio:.2f} nats above."
        )
    else:
        said.append(f"its answer log-likelihood equals that of the next distinct selection, {runner_up}.")
    if ahead >= -TIE and abs(ratio) > RATIO_WORTH_SAYING:
        said.append(f"log p − log q differs by {ratio:+.2f} nats.")
    if weight_temperature != 1:
        said.append(f"Weights are at temperature {weight_temperature:.3g}.")
    said.append(_difference(first, second, [same[0] for same in distinct.values()][1:]))
    return " ".join(said)


def _difference(first: GroupRollout, second: GroupRollout, losers: Sequence[GroupRollout]) -> str:
    """In words: which documents the winner reads and the others do not."""
    elsewhere = {number for loser in losers for number in loser.numbers}
    alone = [document for document in first.documents if document.number not in elsewhere]
    if alone:
        return f"Only it reads {_named(alone)}."
    runner_up = format_selection(second.numbers)
    extra = [document for document in first.documents if document.number not in second.numbers]
    if extra:
        return f"It reads {_named(extra)}, which {runner_up} does not."
    left_out = [document for document in second.documents if document.number not in first.numbers]
    if left_out:
        return f"It leaves out {_named(left_out)}, which {runner_up} reads."
    return f"It reads the documents of {runner_up} in another order."


def _named(documents: Sequence[SelectedDocument]) -> str:
    return ", ".join(
        f"[{document.number}] {document.title}{' (supporting)' if document.supporting else ''}"
        for document in documents
    )


def _log_ratio(rollout: GroupRollout) -> float:
    return rollout.selection_logp - rollout.proposal_logp


def _group(rows: Sequence[dict], bound: float) -> Group:
    rollouts = [
        GroupRollout(
            sample=row["sample"],
            weight=row["weight"],
            selector_coefficient=row["selector_coefficient"],
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


# Columns ----------------------------------------------------------------------------------------------------


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    return table[name].to_numpy()


def _flat(table: pa.Table, name: str) -> pa.Array:
    return pc.list_flatten(table[name].combine_chunks())


def _hits(table: pa.Table) -> dict[int, np.ndarray]:
    """For each k, how many supporting documents stand among the first k of each row's selection."""
    lengths = pc.list_value_length(table["supporting"]).to_numpy()
    row = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    supporting = _flat(table, "supporting").to_numpy(zero_copy_only=False).astype(bool)
    return {k: np.bincount(row[supporting & (place < k)], minlength=len(lengths)) for k in RECALL_AT}


def _distinct_selections(table: pa.Table, group: np.ndarray, valid: np.ndarray, count: int) -> np.ndarray:
    """How many different selections the valid rows of each group make."""
    texts = pc.binary_join(table["selection"].combine_chunks().cast(pa.list_(pa.string())), ",")
    codes = texts.dictionary_encode().indices.to_numpy(zero_copy_only=False)
    pairs = np.unique(np.stack([group[valid], codes[valid]]), axis=1)
    return np.bincount(pairs[0], minlength=count)


def _evidence_bounds(logp: np.ndarray, valid: np.ndarray, size: np.ndarray) -> np.ndarray:
    """The evidence bound of each group of rows, which stand together."""
    start = np.cumsum(size) - size
    bounds = np.empty(len(size))
    for m in np.unique(size):
        of_size = size == m
        rows = start[of_size, None] + np.arange(m)
        bounds[of_size] = evidence_bound(torch.from_numpy(logp[rows]), mask=torch.from_numpy(valid[rows])).numpy()
    return bounds


def _mean(total: float, count: float) -> float:
    return float(total) / float(count) if count else float("nan")


def _ranges(numbers: Sequence[int]) -> str:
    """`iteration 3`, or `iterations 1-5, 7`; cut after a few."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    texts = [str(low) if low == high else f"{low}-{high}" for low, high in spans]
    shown = ", ".join(texts[:8]) + (", …" if len(texts) > 8 else "")
    return f"iteration{'s' if len(numbers) > 1 else ''} {shown}"
