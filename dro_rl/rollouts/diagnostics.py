"""What rollouts say about a run: one set of figures for the step log, the signals, the guard and the command line.

Pure functions of arrays, numpy alone. `columns` and `dro_rl.rollouts.read.columns_of` make the arrays, from records and
from a table of the log.

What speaks of the policy p (evidence bound, likelihood, entropy, divergence, recall) is corrected where rollouts were
drawn from another proposal q: the bound by p/q, so that its exponential still has expectation p(y|x), the others by p/q
normalised over the question. What speaks of the rollouts (`rollouts/…` and `sampling/…` in the step log) is as drawn.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np

from dro_rl.records import Question, Rollout, Selection

RECALL_AT = (1, 3, 5)
KINDS = ("missed", "unselected", "tie", "collapsed", "invalid")
"""Of questions, by one time that they were sampled: fields of `GroupFigures`. A question may be of several."""
TIE = 0.05
"""Nats, or units of another reward. Selections that lie closer have weights within 5 % of each other: they tie."""


@dataclass(frozen=True, slots=True)
class Columns:
    """The rollouts of some questions: groups one after another, all rollouts of a group together.

    Args:
        size, num_documents, num_supporting: (questions,) m, N, and how many of the N are labelled as supporting.
        ess, weight_temperature: (questions,) effective sample size of the weights, 0..m, and their temperature.
        prompt_cut: (questions,) the selector read documents cut to fit.
        valid, clean: (rollouts,) a document is named; the selection is exactly as asked.
        answer_logp, selection_logp, proposal_logp, reference_logp: (rollouts,) log p(y|x,d_z), log p(z|x), log q(z|x),
            and log p(z|x) under the initial selector, nats; NaN where there is none.
        reward, weight, temperature: (rollouts,) what the objective weighs, the log-likelihood unless told; the weight;
            what it was sampled at.
        length: (rollouts,) documents selected.
        numbers, supporting: (documents selected,) the selections one after another: 1-based numbers, best first, and
            whether each is labelled as supporting.
        shown: (documents selected,) the place of each in the list that the selector saw, from 1; 0 where it saw the
            list window by window: there places are of what was picked before.
        problems: how many rollouts have each problem.
        draw: (questions,) which draw for its place each group is, from 1.
    """

    size: np.ndarray
    num_documents: np.ndarray
    num_supporting: np.ndarray
    ess: np.ndarray
    weight_temperature: np.ndarray
    prompt_cut: np.ndarray
    valid: np.ndarray
    clean: np.ndarray
    answer_logp: np.ndarray
    selection_logp: np.ndarray
    proposal_logp: np.ndarray
    reference_logp: np.ndarray
    reward: np.ndarray
    weight: np.ndarray
    temperature: np.ndarray
    length: np.ndarray
    numbers: np.ndarray
    supporting: np.ndarray
    shown: np.ndarray
    problems: Mapping[str, int]
    draw: np.ndarray

    @property
    def start(self) -> np.ndarray:
        """(questions,) where each group begins."""
        return np.cumsum(self.size) - self.size

    @property
    def group(self) -> np.ndarray:
        """(rollouts,) the place of each rollout's question."""
        return np.repeat(np.arange(len(self.size)), self.size)

    @property
    def row(self) -> np.ndarray:
        """(documents selected,) the rollout that selected each."""
        return np.repeat(np.arange(len(self.length)), self.length)

    @property
    def saw_all(self) -> np.ndarray:
        """(rollouts,) whether it names a document, of a list that it saw whole."""
        return np.bincount(self.row, self.shown > 0, minlength=len(self.length)) > 0

    @property
    def place(self) -> np.ndarray:
        """(documents selected,) its 0-based place in the selection."""
        return np.arange(len(self.numbers)) - np.repeat(np.cumsum(self.length) - self.length, self.length)


def columns(groups: Sequence[Sequence[Rollout]], questions: Sequence[Question]) -> Columns:
    """Weighed rollouts as columns.

    Args:
        groups: the rollouts of each question.
        questions: the training set, indexed by `Rollout.question`.
    """
    asked = [questions[group[0].question] for group in groups]
    gold = {group[0].question: frozenset(q.supporting_numbers) for group, q in zip(groups, asked, strict=True)}
    everything = [rollout for group in groups for rollout in group]

    def of_group(value: Callable[[Rollout], float], kind: type = float) -> np.ndarray:
        return np.array([value(group[0]) for group in groups], dtype=kind)

    def of_rollout(value: Callable[[Rollout], float], kind: type = float) -> np.ndarray:
        return np.array([value(rollout) for rollout in everything], dtype=kind)

    return Columns(
        size=np.array([len(group) for group in groups], dtype=int),
        num_documents=np.array([len(question.documents) for question in asked], dtype=int),
        num_supporting=of_group(lambda r: len(gold[r.question]), int),
        ess=of_group(lambda r: r.ess),
        weight_temperature=of_group(lambda r: r.weight_temperature),
        prompt_cut=of_group(lambda r: r.prompt_cut, bool),
        valid=of_rollout(lambda r: r.selection.valid, bool),
        clean=of_rollout(lambda r: not r.selection.problems, bool),
        answer_logp=of_rollout(lambda r: r.answer_logp),
        selection_logp=of_rollout(lambda r: r.selection_logp),
        proposal_logp=of_rollout(lambda r: r.proposal_logp),
        reference_logp=of_rollout(lambda r: r.reference_logp),
        reward=of_rollout(lambda r: r.reward),
        weight=of_rollout(lambda r: r.weight),
        temperature=of_rollout(lambda r: r.temperature),
        length=of_rollout(lambda r: len(r.selection.numbers), int),
        numbers=np.array([n for r in everything for n in r.selection.numbers], dtype=int),
        supporting=np.array([n in gold[r.question] for r in everything for n in r.selection.numbers], dtype=bool),
        shown=np.array(
            [place for r in everything for place in _places(r, len(questions[r.question].documents))], dtype=int
        ),
        problems=Counter(problem for rollout in everything for problem in rollout.selection.problems),
        draw=of_group(lambda r: r.draw, int),
    )


def _places(rollout: Rollout, num_documents: int) -> Sequence[int]:
    """The places, from 1, in the list that the selector saw, of what it selected; 0 where that was no whole list."""
    numbers = rollout.selection.numbers
    if len(rollout.order) not in (0, num_documents):
        return [0] * len(numbers)
    return [rollout.order.index(number) + 1 for number in numbers] if rollout.order else numbers


# One question -----------------------------------------------------------------------------------------------


class GroupFigures:
    """Arrays of (questions,), each computed when it is first asked for, of the columns that it takes.

    Args:
        rollouts: the questions' rollouts.
    """

    def __init__(self, rollouts: Columns) -> None:
        self._of = rollouts
        self._start, self._group = rollouts.start, rollouts.group

    @cached_property
    def valid(self) -> np.ndarray:
        """How many rollouts name a document."""
        return self._total(self._of.valid).astype(int)

    @cached_property
    def distinct(self) -> np.ndarray:
        """How many different selections these make; order counts."""
        return _distinct(self._of.size, self._of.length, self._of.numbers)

    @cached_property
    def tie(self) -> np.ndarray:
        """Whether the rewards of all valid rollouts, of which there is one, lie within `TIE`."""
        valid, reward = self._of.valid, self._of.reward
        highest = np.maximum.reduceat(np.where(valid, reward, -np.inf), self._start)
        lowest = np.minimum.reduceat(np.where(valid, reward, np.inf), self._start)
        with np.errstate(invalid="ignore"):
            return (self.valid > 0) & ((highest == lowest) | (highest - lowest <= TIE))

    @cached_property
    def missed(self) -> np.ndarray:
        """Whether supporting documents are among the candidates, and no rollout selects any."""
        return self._without_gold(np.ones_like(self._of.row, dtype=bool))

    @cached_property
    def unselected(self) -> np.ndarray:
        """The same of the rollouts with the largest weight."""
        heaviest = self._of.weight == self.max_weight[self._group]
        return self._without_gold(heaviest[self._of.row])

    @cached_property
    def collapsed(self) -> np.ndarray:
        """Whether all valid rollouts, of which there are several, select the same."""
        return (self.distinct == 1) & (self.valid > 1)

    @cached_property
    def invalid(self) -> np.ndarray:
        """Whether a rollout names no document."""
        return self.valid < self._of.size

    def kinds(self) -> list[tuple[str, ...]]:
        """Of each question those of `KINDS` that it is of."""
        are = [getattr(self, kind) for kind in KINDS]
        return [tuple(kind for kind, of in zip(KINDS, are, strict=True) if of[i]) for i in range(len(self._start))]

    @cached_property
    def max_weight(self) -> np.ndarray:
        """The largest weight, 0..1."""
        return np.maximum.reduceat(self._of.weight, self._start)

    @cached_property
    def weight_entropy(self) -> np.ndarray:
        """−Σ w log w, nats."""
        weight = self._of.weight
        return self._total(-weight * np.log(np.where(weight > 0, weight, 1.0)))

    @cached_property
    def evidence_bound(self) -> np.ndarray:
        """log((1/m) Σ p/q p(y|x,d_z)), nats; −inf where no rollout is valid."""
        with np.errstate(invalid="ignore"):
            terms = np.where(self._of.valid, self._log_ratio + self._answers, -np.inf)
        return _log_sums(terms, self._start) - np.log(self._of.size)

    @cached_property
    def answer_logp(self) -> np.ndarray:
        """Mean of log p(y|x,d_z) under p over what is valid, nats; NaN where nothing is."""
        return self._expected(self._answers)

    @cached_property
    def reward(self) -> np.ndarray:
        """Mean of what the objective weighs, under p over what is valid; NaN where nothing is."""
        return self._expected(self._of.reward)

    @cached_property
    def policy_valid(self) -> np.ndarray:
        """Probability under p that a rollout is valid."""
        return self._total(np.where(self._of.valid, self.policy, 0.0))

    @cached_property
    def selector_entropy(self) -> np.ndarray:
        """−Σ p log p, nats."""
        return -self._total(self.policy * self._of.selection_logp)

    @cached_property
    def kl(self) -> np.ndarray:
        """Divergence from the initial selector, nats; NaN where that was not asked."""
        return self._total(self.policy * (self._of.selection_logp - self._of.reference_logp))

    @cached_property
    def recall(self) -> dict[int, np.ndarray]:
        """By k: the share of the supporting documents among the first k selected, under p; NaN without labels.

        An invalid rollout counts as 0.
        """
        return {k: self._found(self.policy, k) for k in RECALL_AT}

    @cached_property
    def weighted_recall(self) -> dict[int, np.ndarray]:
        """The same by weight."""
        return {k: self._found(self._of.weight, k) for k in RECALL_AT}

    @cached_property
    def _log_ratio(self) -> np.ndarray:
        return self._of.selection_logp - self._of.proposal_logp

    @cached_property
    def policy(self) -> np.ndarray:
        """(rollouts,) p/q, normalised over each question."""
        policy = np.exp(self._log_ratio - np.maximum.reduceat(self._log_ratio, self._start)[self._group])
        return policy / self._total(policy)[self._group]

    @cached_property
    def _answers(self) -> np.ndarray:
        return np.where(self._of.valid, self._of.answer_logp, -np.inf)

    @cached_property
    def _hits(self) -> dict[int, np.ndarray]:
        """By k: (rollouts,) how many of the first k selected are supporting."""
        row, supporting, place = self._of.row, self._of.supporting, self._of.place
        return {k: np.bincount(row[supporting & (place < k)], minlength=len(self._group)) for k in RECALL_AT}

    def _expected(self, values: np.ndarray) -> np.ndarray:
        """Means over the valid rollouts of each question, which count as `policy` would draw them."""
        weighed = np.where(self._of.valid & (self.policy > 0), self.policy * values, 0.0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return self._total(weighed) / self.policy_valid

    def _found(self, share: np.ndarray, k: int) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return self._total(share * self._hits[k]) / self._of.num_supporting

    def _without_gold(self, looked_at: np.ndarray) -> np.ndarray:
        """Whether gold is among the candidates, and not among the documents selected that are looked at."""
        owner = self._group[self._of.row[self._of.supporting & looked_at]]
        return (self._of.num_supporting > 0) & (np.bincount(owner, minlength=len(self._start)) == 0)

    def _total(self, values: np.ndarray) -> np.ndarray:
        return np.add.reduceat(values, self._start, dtype=float)


def _log_sums(values: np.ndarray, start: np.ndarray) -> np.ndarray:
    """log Σ exp over each group."""
    with np.errstate(invalid="ignore"):
        return np.logaddexp.reduceat(values, start)


def _distinct(size: np.ndarray, length: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """How many different selections, of which the empty one is none, each group makes. Arguments as in `Columns`."""
    group = np.repeat(np.arange(len(size)), size)
    begin, code = np.cumsum(length) - length, group
    for place in range(int(length.max(initial=0))):
        named, here = np.zeros(len(code), dtype=np.int64), length > place
        named[here] = numbers[begin[here] + place]
        code = np.unique(code * (named.max() + 1) + named, return_inverse=True)[1]
    _, first = np.unique(code[length > 0], return_index=True)
    return np.bincount(group[length > 0][first], minlength=len(size))


def duplicate_share(groups: Sequence[Sequence[Selection]]) -> float:
    """Of the valid selections that could repeat an earlier one of their group, the share that does: 0..1 for any m, NaN
    where none could. `Summary.duplicate`, of selections alone."""
    size, length = (np.array([len(g) for g in groups]), np.array([len(s.numbers) for g in groups for s in g]))
    numbers = np.array([number for group in groups for selection in group for number in selection.numbers], dtype=int)
    valid = np.add.reduceat(length > 0, np.cumsum(size) - size, dtype=int)
    return _duplicate_share(valid, _distinct(size, length, numbers))


def _duplicate_share(valid: np.ndarray, distinct: np.ndarray) -> float:
    return _ratio((valid - distinct).sum(), np.maximum(valid - 1, 0).sum())


# Some questions ---------------------------------------------------------------------------------------------


def _mean_over(count: str, log: str | None = None) -> Any:
    """A field that is a mean over what `count` counts, and its name in the step log."""
    return field(metadata={"count": count, "log": log})


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The rollouts of a step, an iteration or a window in figures. Shares are 0..1; NaN where nothing is to average.

    Args:
        questions, rollouts, valid_rollouts, valid_questions, repeatable, labelled: how many; valid rollouts name a
            document, valid questions have one, repeatable rollouts are valid and not the first such of their question,
            labelled questions have supporting documents among their candidates.
        likely_rollouts: how many would be valid, were all drawn from the policy.
        evidence_bound, evidence_bound_sd: nats, mean and standard deviation over the valid questions.
        answer_logp: nats, mean over the likely rollouts.
        reward, reward_sd: what the objective weighs, nats for the likelihood; mean and standard deviation over the
            valid questions.
        ess, ess_share: effective sample size in rollouts, 0..m, and over m; means over questions.
        weight_entropy, weight_temperature: mean over questions; the first in nats.
        selector_entropy: nats, mean over questions.
        kl: nats from the initial selector, mean over questions; NaN without `beta`.
        valid, clean: shares of the rollouts: a document is named; the selection is exactly as asked.
        duplicate: share of the repeatable rollouts that repeat an earlier selection of their question: 0 when all
            differ and 1 when all are the same, whatever m is.
        documents: how many a valid rollout selects, mean.
        prompt_cut, all_tie, all_invalid: shares of the questions.
        resampled: share of the places that were drawn again because they tied (`resample_ties`).
        temperature: mean sampling temperature.
        log_ratio_mean, log_ratio_max, ratio_mean: log p − log q in nats, and p/q.
        truncated: share of the rollouts whose ratio was truncated.
        dropped_mass: weight that the generator does not learn from (`min_weight`), mean over questions.
        recall, recall_sd, weighted_recall: by k, over the labelled questions; see `GroupFigures`.
        first, selected: for each place in the list that the selector saw, in order, the share of the likely rollouts
            that name it first, and at all; of those that saw the whole list.
        first_chance: what the share of a place would be if it were drawn at random: the mean of 1/N.
        problems: how many rollouts have each problem, the most frequent first.
    """

    questions: int
    rollouts: int
    valid_rollouts: int
    valid_questions: int
    repeatable: int
    labelled: int
    likely_rollouts: float = field(metadata={"sum": True})
    evidence_bound: float = _mean_over("valid_questions", "evidence_bound")
    evidence_bound_sd: float
    answer_logp: float = _mean_over("likely_rollouts", "answer_logp")
    reward: float = field(default=math.nan, metadata={"count": "valid_questions", "log": "reward"})
    reward_sd: float = math.nan
    ess: float = _mean_over("questions", "ess")
    ess_share: float = _mean_over("questions", "ess_share")
    weight_entropy: float = _mean_over("questions", "weight_entropy")
    weight_temperature: float = _mean_over("questions", "weight_temperature")
    selector_entropy: float = _mean_over("questions", "selector_entropy")
    kl: float = _mean_over("questions", "kl")
    valid: float = _mean_over("rollouts", "rollouts/valid")
    clean: float = _mean_over("rollouts", "rollouts/clean")
    duplicate: float = _mean_over("repeatable", "rollouts/duplicate")
    documents: float = _mean_over("valid_rollouts", "rollouts/documents")
    prompt_cut: float = _mean_over("questions", "rollouts/prompt_cut")
    all_tie: float = _mean_over("questions", "rollouts/all_tie")
    all_invalid: float = _mean_over("questions", "rollouts/all_invalid")
    resampled: float = _mean_over("questions", "rollouts/resampled")
    temperature: float = _mean_over("rollouts", "sampling/temperature")
    log_ratio_mean: float = _mean_over("rollouts", "sampling/log_ratio_mean")
    log_ratio_max: float = field(metadata={"log": "sampling/log_ratio_max"})
    ratio_mean: float = _mean_over("rollouts", "sampling/ratio_mean")
    truncated: float = _mean_over("rollouts", "sampling/truncated")
    dropped_mass: float = _mean_over("questions", "dropped_mass")
    recall: dict[int, float] = _mean_over("labelled", "recall")
    recall_sd: dict[int, float]
    weighted_recall: dict[int, float] = _mean_over("labelled", "weighted_recall")
    first: tuple[float, ...] = _mean_over("likely_rollouts")
    selected: tuple[float, ...] = _mean_over("likely_rollouts")
    first_chance: float = _mean_over("valid_rollouts")
    problems: dict[str, int]


def summarize(rollouts: Columns, *, max_log_ratio: float = math.nan, min_weight: float = 0.0) -> Summary:
    """The figures of some questions together.

    Args:
        max_log_ratio: where the ratios were truncated, nats; NaN where that is not known, and neither is `truncated`.
        min_weight: the least weight that the generator learned from.
    """
    return summarize_groups(rollouts, GroupFigures(rollouts), max_log_ratio=max_log_ratio, min_weight=min_weight)


def summarize_groups(rollouts: Columns, groups: GroupFigures, *, max_log_ratio: float, min_weight: float) -> Summary:
    """`summarize`, of figures that there are."""
    valid = groups.valid > 0
    count = {
        "questions": len(rollouts.size),
        "rollouts": len(rollouts.valid),
        "valid_rollouts": int(groups.valid.sum()),
        "valid_questions": int(valid.sum()),
        "labelled": int((rollouts.num_supporting > 0).sum()),
    }
    bound, labelled = groups.evidence_bound[valid], rollouts.num_supporting > 0
    log_ratio = rollouts.selection_logp - rollouts.proposal_logp
    dropped = np.where(rollouts.weight < min_weight, rollouts.weight, 0.0)
    likely = rollouts.size * groups.policy_valid
    first, selected = rollouts.place == 0, np.ones_like(rollouts.row, dtype=bool)
    chance = (1 / rollouts.num_documents)[rollouts.group][rollouts.saw_all]
    with np.errstate(invalid="ignore", over="ignore"):
        return Summary(
            **count,
            repeatable=count["valid_rollouts"] - count["valid_questions"],
            likely_rollouts=float(likely[valid].sum()),
            evidence_bound=_mean(bound),
            evidence_bound_sd=_deviation(bound),
            answer_logp=_ratio((likely * groups.answer_logp)[valid].sum(), likely[valid].sum()),
            reward=_mean(groups.reward[valid]),
            reward_sd=_deviation(groups.reward[valid]),
            ess=_mean(rollouts.ess),
            ess_share=_mean(rollouts.ess / rollouts.size),
            weight_entropy=_mean(groups.weight_entropy),
            weight_temperature=_mean(rollouts.weight_temperature),
            selector_entropy=_mean(groups.selector_entropy),
            kl=_mean(groups.kl),
            valid=_mean(rollouts.valid),
            clean=_mean(rollouts.clean),
            duplicate=_duplicate_share(groups.valid, groups.distinct),
            documents=_mean(rollouts.length[rollouts.valid]),
            prompt_cut=_mean(rollouts.prompt_cut),
            all_tie=_mean(groups.tie),
            all_invalid=_mean(~valid),
            resampled=_mean(rollouts.draw > 1),
            temperature=_mean(rollouts.temperature),
            log_ratio_mean=_mean(log_ratio),
            log_ratio_max=float(log_ratio.max(initial=-math.inf)),
            ratio_mean=_mean(np.exp(log_ratio)),
            truncated=math.nan if math.isnan(max_log_ratio) else _mean(log_ratio > max_log_ratio),
            dropped_mass=_ratio(dropped.sum(), count["questions"]) if min_weight else math.nan,
            recall={k: _mean(values[labelled]) for k, values in groups.recall.items()},
            recall_sd={k: _deviation(values[labelled]) for k, values in groups.recall.items()},
            weighted_recall={k: _mean(values[labelled]) for k, values in groups.weighted_recall.items()},
            first=_shares(rollouts, groups.policy, first),
            selected=_shares(rollouts, groups.policy, selected),
            first_chance=_mean(chance),
            problems=_most_first(rollouts.problems),
        )


def pooled(summaries: Sequence[Summary]) -> Summary:
    """Several summaries of different questions as one: every figure by the count of what it is a mean over."""
    merged: dict[str, Any] = {}
    for item in fields(Summary):
        values = [getattr(summary, item.name) for summary in summaries]
        if item.type == "int" or "sum" in item.metadata:
            merged[item.name] = sum(values)
        elif "count" in item.metadata:
            merged[item.name] = _pool(values, [getattr(summary, item.metadata["count"]) for summary in summaries])
    questions = [summary.valid_questions for summary in summaries]
    labelled = [summary.labelled for summary in summaries]
    return Summary(
        **merged,
        evidence_bound_sd=_pool_deviation(
            [summary.evidence_bound for summary in summaries], [s.evidence_bound_sd for s in summaries], questions
        ),
        reward_sd=_pool_deviation([s.reward for s in summaries], [s.reward_sd for s in summaries], questions),
        recall_sd={
            k: _pool_deviation([s.recall[k] for s in summaries], [s.recall_sd[k] for s in summaries], labelled)
            for k in RECALL_AT
        },
        log_ratio_max=max(summary.log_ratio_max for summary in summaries),
        problems=_most_first(sum((Counter(summary.problems) for summary in summaries), Counter())),
    )


def logged(summary: Summary) -> dict[str, float]:
    """A summary as the step log has it: its figures by the names there, but for those that are NaN."""
    found: dict[str, float] = {}
    for item in fields(Summary):
        if name := item.metadata.get("log"):
            value = getattr(summary, item.name)
            found.update({f"{name}@{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value})
    return {name: value for name, value in found.items() if not math.isnan(value)}


def _mean(values: np.ndarray) -> float:
    """The mean of what is known; NaN where nothing is."""
    known = values[~np.isnan(values)] if values.dtype.kind == "f" else values
    return float(known.mean()) if len(known) else math.nan


def _deviation(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.std()) if len(known) else math.nan


def _ratio(total: float, count: float) -> float:
    return float(total) / float(count) if count else math.nan


def _shares(rollouts: Columns, policy: np.ndarray, which: np.ndarray) -> tuple[float, ...]:
    """For each place in the list, how many of the documents selected, of those asked for, stood there, a valid rollout.

    Rollouts count as `policy` would draw them.
    """
    most = int(rollouts.num_documents.max(initial=0))
    likely = rollouts.size[rollouts.group] * policy
    counts = np.bincount(rollouts.shown[which], likely[rollouts.row[which]], minlength=most + 1)[1:]
    of = likely[rollouts.saw_all].sum()
    return tuple((counts / of).tolist()) if of else ()


def _most_first(problems: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(problems.items(), key=lambda item: (-item[1], item[0])))


def _pool(values: Sequence[Any], counts: Sequence[int]) -> Any:
    """The mean of means: numbers, or by k, or by place in the list, where a missing one is 0."""
    if isinstance(values[0], dict):
        return {k: _pool([value[k] for value in values], counts) for k in values[0]}
    if isinstance(values[0], tuple):
        padded = ([*value, *[0.0] * (max(map(len, values)) - len(value))] for value in values)
        return tuple(_pool(place, counts) for place in zip(*padded, strict=True))
    known = [(value, count) for value, count in zip(values, counts, strict=True) if count and not math.isnan(value)]
    return _ratio(sum(value * count for value, count in known), sum(count for _, count in known))


def _pool_deviation(means: Sequence[float], deviations: Sequence[float], counts: Sequence[int]) -> float:
    """Within and between: the variance of all about the mean of all."""
    mean = _pool(means, counts)
    squares = [d**2 + (m - mean) ** 2 for m, d in zip(means, deviations, strict=True)]
    return math.sqrt(_pool(squares, counts))
