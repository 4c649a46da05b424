"""Why a selection won: one question's rollouts, and in words what sets the heaviest apart, or that none is.

Selections whose weights lie within `TIE` of each other tie, and no document is credited for what a tie shares out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dro_rl.rollouts.diagnostics import TIE
from dro_rl.selection import format_selection


@dataclass(frozen=True, slots=True)
class SelectedDocument:
    """A document that a rollout selected: its 1-based number among the candidates, and what the log keeps."""

    number: int
    id: str
    title: str
    supporting: bool


@dataclass(frozen=True, slots=True)
class ShownWindow:
    """A window of a rollout: the numbers of the candidates as the selector was shown them, those that it picked, best
    first, and what it wrote."""

    shown: tuple[int, ...]
    picked: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True)
class GroupRollout:
    """One rollout of a `Group`. Log-probabilities in nats; the fields are the columns of the log.

    `windows` are all that it went through, the last one last; empty where the list was shown whole.
    """

    sample: int
    weight: float
    documents: tuple[SelectedDocument, ...]
    valid: bool
    problems: tuple[str, ...]
    text: str
    answer_logp: float
    selection_logp: float
    proposal_logp: float
    answer_logp_sum: float = math.nan
    answer_logp_mean: float = math.nan
    answer: str | None = None
    rewards: Mapping[str, float] = field(default_factory=dict)
    reward: float = math.nan
    advantage: float = math.nan
    windows: tuple[ShownWindow, ...] = ()

    @property
    def worth(self) -> float:
        """What its weight comes from: the reward, or the answer's log-likelihood under an objective of advantages."""
        return self.reward if self.rewarded else self.answer_logp

    @property
    def rewarded(self) -> bool:
        """Whether its weight comes from another reward than the likelihood."""
        known = not math.isnan(self.reward) and math.isnan(self.advantage)
        return known and self.reward != self.answer_logp

    @property
    def numbers(self) -> tuple[int, ...]:
        """The selection: document numbers, best first."""
        return tuple(document.number for document in self.documents)

    @property
    def log_ratio(self) -> float:
        """log p − log q, nats."""
        return self.selection_logp - self.proposal_logp


@dataclass(frozen=True, slots=True)
class Group:
    """One question at one iteration, with its m rollouts in the order of their weights.

    Args:
        ess: effective sample size of the weights, 0..m.
        evidence_bound: nats; see `dro_rl.rollouts.diagnostics`.
        kinds: those of `dro_rl.rollouts.diagnostics.KINDS` that it is of.
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
    kinds: tuple[str, ...]
    rollouts: tuple[GroupRollout, ...]
    why: str


def explain(rollouts: Sequence[GroupRollout], weight_temperature: float = 1.0) -> str:
    """Say why the first of a question's rollouts, which are ordered by weight, has the most weight, or that it has not.

    Args:
        weight_temperature: of the weights.
    """
    distinct: dict[tuple[int, ...], list[GroupRollout]] = {}
    for rollout in rollouts:
        if rollout.valid:
            distinct.setdefault(rollout.numbers, []).append(rollout)
    if not distinct:
        return "No rollout names a valid document: every weight is 0, and this question teaches nothing."
    selections = [same[0] for same in distinct.values()]
    if len(selections) == 1:
        return f"Every valid rollout selects {_written(selections[0])}: there is nothing to compare."
    best = [selection for selection in selections if _ties(selections[0], selection)]
    rest = selections[len(best) :]
    said = _tie(best, rest) if len(best) > 1 else _win(best[0], rest[0], distinct[best[0].numbers])
    if weight_temperature != 1:
        said.append(f"Weights are at temperature {weight_temperature:.3g}.")
    said.append(_difference(best, rest) if rest else _common(best))
    return " ".join(filter(None, said))


def _ties(first: GroupRollout, other: GroupRollout) -> bool:
    """Whether the lighter of two has nearly the weight of the heavier."""
    return first.weight == other.weight or (other.weight > 0 and math.log(first.weight / other.weight) <= TIE)


def _tie(best: Sequence[GroupRollout], rest: Sequence[GroupRollout]) -> list[str]:
    """Several selections share the largest weight; with others behind them, or not."""
    low, high = min(s.worth for s in best), max(s.worth for s in best)
    name, unit = ("reward", "") if best[0].rewarded else ("answer log-likelihood", " nats")
    at = f"{high:.2f}{unit}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}{unit}"
    if low == high:
        alike = f"have the same {name}, {at}"
    elif high - low <= TIE:
        alike = f"have nearly the same {name}, {at}"
    else:
        alike = f"have the same weight, though their {name} is {at}"
    if not rest:
        return [f"A tie: all {len(best)} distinct selections {alike}: the weights prefer none."]
    named = ", ".join(map(_written, best[:3])) + (", …" if len(best) > 3 else "")
    ahead = low - rest[0].worth
    behind = f"; that of the next, {_written(rest[0])}, is {ahead:.2f}{unit} lower" if ahead > TIE else ""
    return [f"A tie of the first {len(best)} selections, {named}: they {alike}{behind}."]


def _win(first: GroupRollout, second: GroupRollout, same: Sequence[GroupRollout]) -> list[str]:
    """One selection has the largest weight: by its likelihood, or by the correction for the proposal."""
    share = sum(rollout.weight for rollout in same)
    times = "" if len(same) == 1 else f" over {len(same)} rollouts"
    ahead, ratio = first.worth - second.worth, first.log_ratio - second.log_ratio
    name, unit = ("reward", "") if first.rewarded or second.rewarded else ("answer log-likelihood", " nats")
    said = [f"{_written(first)} has weight {share:.2f}{times}:"]
    if ahead < -TIE:
        said.append(
            f"its {name} is {-ahead:.2f}{unit} below that of {_written(second)}, "
            f"but its log p − log q is {ratio:.2f} nats above."
        )
        return said
    if ahead > TIE:
        said.append(
            f"its {name} exceeds that of the next distinct selection, {_written(second)}, by {ahead:.2f}{unit}."
        )
    else:
        said.append(f"its {name} equals that of the next distinct selection, {_written(second)}.")
    if abs(ratio) > TIE:
        said.append(f"log p − log q differs by {ratio:+.2f} nats.")
    return said


def _difference(best: Sequence[GroupRollout], rest: Sequence[GroupRollout]) -> str:
    """In words: which documents all of the best read and the others do not."""
    one = len(best) == 1
    shared, runner_up = _shared(best), rest[0]
    elsewhere = {number for loser in rest for number in loser.numbers}
    alone = [document for document in shared if document.number not in elsewhere]
    if alone:
        return f"Only {'it reads' if one else 'they all read'} {_named(alone)}."
    extra = [document for document in shared if document.number not in runner_up.numbers]
    if extra:
        return f"{'It reads' if one else 'They all read'} {_named(extra)}, which {_written(runner_up)} does not."
    read = {number for selection in best for number in selection.numbers}
    left_out = [document for document in runner_up.documents if document.number not in read]
    if left_out:
        return f"{'It leaves' if one else 'They leave'} out {_named(left_out)}, which {_written(runner_up)} reads."
    if one:
        return f"It reads the documents of {_written(runner_up)} in another order."
    return ""


def _common(best: Sequence[GroupRollout]) -> str:
    """What all that tie read, which may be what explains the answer."""
    shared = _shared(best)
    return f"All of them read {_named(shared)}." if shared else "They have no document in common."


def _shared(selections: Sequence[GroupRollout]) -> list[SelectedDocument]:
    everywhere = set.intersection(*(set(selection.numbers) for selection in selections))
    return [document for document in selections[0].documents if document.number in everywhere]


def _written(rollout: GroupRollout) -> str:
    return format_selection(rollout.numbers)


def _named(documents: Sequence[SelectedDocument]) -> str:
    return ", ".join(
        f"[{document.number}] {document.title}{' (supporting)' if document.supporting else ''}"
        for document in documents
    )
