"""Signals: what says that a run needs a hand, what it means, and which recipe keys to turn.

The trainer judges them when an iteration ends, `dro-rl rollouts stats` afterwards, both from the same figures. Levels
are those of the latest iterations that together hold `QUESTIONS` questions; trends go over several such windows, or
narrower ones while a run is young, and count only beyond two standard errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from dro_rl.errors import InputError, Phrase
from dro_rl.rollouts.diagnostics import Summary, pooled

QUESTIONS = 100
"""A window is one iteration, or as many as together hold this many questions."""
WINDOWS = 4
"""A trend goes over so many windows."""
RECALL = 5
"""The recall whose trend is followed."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its standard error, in one unit."""

    value: float
    error: float


@dataclass(frozen=True, slots=True)
class Iteration:
    """What is known of an iteration when it has ended.

    Args:
        number: 1-based.
        first_step, last_step: optimizer steps taken before its first and its last rollouts were sampled.
        rollouts: their figures.
        engine_difference: mean |log p − log q| of what was sampled plainly, nats a token; NaN where not compared.
        dev: the dev metric that chooses the best iteration, in percent, higher is better; None where not evaluated.
    """

    number: int
    first_step: int
    last_step: int
    rollouts: Summary
    engine_difference: float = math.nan
    dev: Estimate | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """A value against its limit; NaN, which is beyond none, where there is nothing to judge."""

    value: float
    limit: float
    above: bool

    @property
    def beyond(self) -> bool:
        """Whether the limit is passed."""
        return self.value > self.limit if self.above else self.value < self.limit


NOTHING = Measured(math.nan, math.nan, True)


@dataclass(frozen=True, slots=True)
class Rule:
    """A signal that there is.

    Args:
        name: as the log has it, under `signals/`.
        unit: `share`, `nats` or `points`.
        measure: the value and its limit, of all iterations so far.
        meaning: what it says about the run when it fires.
        keys: recipe keys to turn, the first one first.
        advice: how to turn them.
    """

    name: str
    unit: str
    measure: Callable[[Sequence[Iteration]], Measured]
    meaning: str
    keys: tuple[str, ...]
    advice: str


@dataclass(frozen=True, slots=True)
class Signal:
    """A rule with what was measured.

    Args:
        rule: the rule.
        measured: value and limit.
        first_iteration, last_iteration: what the latest window holds.
        questions: of how many questions.
    """

    rule: Rule
    measured: Measured
    first_iteration: int
    last_iteration: int
    questions: int

    @property
    def fired(self) -> bool:
        """Whether the run needs a hand."""
        return self.measured.beyond


def of_iteration(history: Sequence[Iteration]) -> list[Signal]:
    """Every signal after the last of the iterations given, which are a run's from its first one on, fired or not."""
    if not history:
        return []
    latest = windows(history, 1)[-1]
    return [
        Signal(
            rule=rule,
            measured=rule.measure(history),
            first_iteration=latest[0].number,
            last_iteration=latest[-1].number,
            questions=sum(iteration.rollouts.questions for iteration in latest),
        )
        for rule in RULES
    ]


def refuse_hopeless(history: Sequence[Iteration]) -> None:
    """Raise `InputError` where no rollout of a whole window names a document: there is nothing to learn from."""
    window = windows(history, 1)[-1]
    rollouts = pooled([iteration.rollouts for iteration in window])
    if rollouts.valid_rollouts == 0 and _is_whole(window):
        problems = ", ".join(f"{name} {count}" for name, count in rollouts.problems.items())
        raise InputError(
            f"rollouts of {span(window[0].number, window[-1].number)}",
            Phrase(f"none of {rollouts.rollouts} names a document ({problems})"),
            "selections that name a document are all that there is to learn from",
            "Use constrain_selection: true, or a warm-up that teaches the format (warmup), and give "
            "max_completion_length the tokens that a selection takes.",
        )


def windows(history: Sequence[Iteration], count: int, questions: float = QUESTIONS) -> list[list[Iteration]]:
    """The latest `count` windows of so many questions, or as many as there are, oldest first; the first one may hold
    fewer questions."""
    found: list[list[Iteration]] = []
    for iteration in reversed(history):
        if not found or _is_whole(found[0], questions):
            if len(found) == count:
                break
            found.insert(0, [])
        found[0].insert(0, iteration)
    return found


def reading(signal: Signal) -> str:
    """What was measured against which limit, in the rule's unit: `clean 42 % (signals below 90 %)`."""
    shown = [_in_unit(value, signal.rule.unit) for value in (signal.measured.value, signal.measured.limit)]
    return f"{signal.rule.name} {shown[0]} (signals {'above' if signal.measured.above else 'below'} {shown[1]})"


def _in_unit(value: float, unit: str) -> str:
    return f"{100 * value:.0f} %" if unit == "share" else f"{value:.2f} {unit}"


def span(first: int, last: int) -> str:
    """`iteration 3`, or `iterations 3-7`."""
    return f"iteration {last}" if first == last else f"iterations {first}-{last}"


def _is_whole(window: Sequence[Iteration], questions: float = QUESTIONS) -> bool:
    return _questions(window) >= questions


def _questions(window: Sequence[Iteration]) -> int:
    return sum(iteration.rollouts.questions for iteration in window)


# What is measured -------------------------------------------------------------------------------------------


def _latest(history: Sequence[Iteration]) -> Summary:
    return pooled([iteration.rollouts for iteration in windows(history, 1)[-1]])


def _start(history: Sequence[Iteration]) -> Summary:
    """The first window."""
    chosen: list[Iteration] = []
    for iteration in history:
        chosen.append(iteration)
        if _is_whole(chosen):
            break
    return pooled([iteration.rollouts for iteration in chosen])


def _level(figure: Callable[[Summary], float], limit: float, *, above: bool) -> Callable[..., Measured]:
    return lambda history: Measured(figure(_latest(history)), limit, above)


def _engine(history: Sequence[Iteration]) -> Measured:
    known = [i.engine_difference for i in windows(history, 1)[-1] if not math.isnan(i.engine_difference)]
    return Measured(sum(known) / len(known), 0.1, True) if known else NOTHING


def _ess(history: Sequence[Iteration]) -> Measured:
    """A fifth of the rollouts, or 1.05 of them where they are few: one holds all but a fortieth of the weight then."""
    latest = _latest(history)
    m = latest.ess / latest.ess_share if latest.ess_share > 0 else math.nan
    return Measured(latest.ess_share, max(0.2, 1.05 / m), False) if m > 1.5 else NOTHING


def _position(history: Sequence[Iteration]) -> Measured:
    """The limit is half way from chance to always."""
    latest = _latest(history)
    if not latest.first or latest.first_chance == 1:
        return NOTHING
    return Measured(max(latest.first), (1 + latest.first_chance) / 2, True)


def _entropy(history: Sequence[Iteration]) -> Measured:
    return Measured(_latest(history).selector_entropy, 0.1 * _start(history).selector_entropy, False)


def _kl(history: Sequence[Iteration]) -> Measured:
    """The first selector, sharpened onto any one selection of its own, is as far from itself as its entropy."""
    return Measured(_latest(history).kl, _start(history).selector_entropy + math.log(20), True)


def _evidence(summary: Summary) -> Estimate:
    return _estimate(summary.evidence_bound, summary.evidence_bound_sd, summary.valid_questions)


def _reward(summary: Summary) -> Estimate:
    return _estimate(summary.reward, summary.reward_sd, summary.valid_questions)


def _recall(summary: Summary) -> Estimate:
    return _estimate(summary.recall[RECALL], summary.recall_sd[RECALL], summary.labelled)


def _estimate(mean: float, deviation: float, count: int) -> Estimate:
    return Estimate(mean, deviation / math.sqrt(count) if count else math.nan)


def _change(before: Estimate, after: Estimate) -> Estimate:
    return Estimate(after.value - before.value, math.hypot(before.error, after.error))


def _rises(change: Estimate) -> bool:
    return change.value > 2 * change.error


def _trend(history: Sequence[Iteration]) -> list[Summary]:
    """The latest windows, oldest first. A run of fewer questions than they hold, but of one window's, is cut into as
    many; before that there is none."""
    seen = _questions(history)
    if seen < QUESTIONS:
        return []
    found = windows(history, WINDOWS, min(QUESTIONS, seen / WINDOWS))
    return [pooled([iteration.rollouts for iteration in window]) for window in found]


def _falling(history: Sequence[Iteration]) -> Measured:
    """From window to window, each time, and by more than two standard errors in all."""
    found = _trend(history)
    values = [summary.evidence_bound for summary in found]
    if len(found) < WINDOWS or any(after >= before for before, after in pairwise(values)):
        return NOTHING
    change = _change(_evidence(found[0]), _evidence(found[-1]))
    return Measured(change.value, -2 * change.error, False)


def _forgetting(history: Sequence[Iteration]) -> Measured:
    found = _trend(history)
    if len(found) < WINDOWS:
        return NOTHING
    first, last = found[0], found[-1]
    if not _rises(_change(_evidence(first), _evidence(last))):
        return NOTHING
    recall = _change(_recall(first), _recall(last))
    return Measured(recall.value, -2 * recall.error, False)


def _not_followed(history: Sequence[Iteration]) -> Measured:
    """How far recall by weight is above the policy's, where that one has not moved since the run began."""
    first, last = _start(history), _latest(history)
    change = _change(_recall(first), _recall(last))
    if len(windows(history, WINDOWS)) < WINDOWS or abs(change.value) > 2 * change.error:
        return NOTHING
    return Measured(last.weighted_recall[RECALL] - last.recall[RECALL], 0.2, True)


def _overfitting(history: Sequence[Iteration]) -> Measured:
    """The last evaluation against the best before it, where evidence or reward in training have risen since."""
    evaluated = [(place, i.dev) for place, i in enumerate(history, start=1) if i.dev is not None]
    if len(evaluated) < 2:
        return NOTHING
    (best, dev_then), (now, dev_now) = max(evaluated[:-1], key=lambda item: item[1].value), evaluated[-1]
    then, after = _latest(history[:best]), _latest(history[:now])
    if not any(_rises(_change(figure(then), figure(after))) for figure in (_evidence, _reward)):
        return NOTHING
    change = _change(dev_then, dev_now)
    return Measured(change.value, -2 * change.error, False)


RULES = (
    Rule(
        "clean",
        "share",
        _level(lambda s: s.clean, 0.9, above=False),
        "Selections are not written as asked: the selector may win by writing more than it was asked for.",
        ("constrain_selection", "warmup_selector_steps"),
        "Set constrain_selection: true, which leaves nothing else to write, or warm up longer; `rollouts show` has the "
        "texts.",
    ),
    Rule(
        "valid",
        "share",
        _level(lambda s: s.valid, 0.9, above=False),
        "Rollouts name no document: they teach nothing about documents.",
        ("constrain_selection", "warmup", "max_completion_length"),
        "Set constrain_selection: true, or teach the format by a warm-up; raise max_completion_length where selections "
        "break off before they name one.",
    ),
    Rule(
        "all_invalid",
        "share",
        _level(lambda s: s.all_invalid, 0.1, above=True),
        "Questions without one valid rollout: nothing is learned from them.",
        ("constrain_selection", "warmup", "max_completion_length"),
        "As for valid.",
    ),
    Rule(
        "all_tie",
        "share",
        _level(lambda s: s.all_tie, 0.5, above=True),
        "On most questions all rollouts explain the answer equally well, so no weight is larger.",
        ("num_generations", "temperature"),
        "Raise num_generations, or the temperature, for rollouts that differ.",
    ),
    Rule(
        "duplicate",
        "share",
        _level(lambda s: s.duplicate, 0.8, above=True),
        "The selector samples the same selection over and over and no longer explores.",
        ("duplicate_threshold", "entropy_coef"),
        "Set duplicate_threshold, 0.8 to begin, which raises the temperature when needed, or entropy_coef.",
    ),
    Rule(
        "position",
        "share",
        _position,
        "Most rollouts begin with one place in the list, whatever stands there: a collapse onto a position, unless the "
        "retriever's order is kept and is that good.",
        ("temperature", "candidate_orders", "shuffle_documents", "selector_learning_rate", "warmup_steps"),
        "Raise the temperature, to 1.5 to begin, and candidate_orders, to 2, for rollouts that differ. Or shuffle the "
        "candidates, lower selector_learning_rate or give it more warmup_steps.",
    ),
    Rule(
        "ess_share",
        "share",
        _ess,
        "One rollout holds nearly all the weight of its question, and few teach. Where rollout_engine: enumeration "
        "lists every selection, that is what a pair comes to that knows.",
        ("target_ess", "num_generations"),
        "Set target_ess, 0.5 to begin, or raise num_generations.",
    ),
    Rule(
        "truncated",
        "share",
        _level(lambda s: s.truncated, 0.1, above=True),
        "The proposal is far from the policy: ratios p/q are cut off, and the weights are biased.",
        ("temperature", "max_log_ratio", "top_p"),
        "Bring temperature (top_p, top_k, min_p) nearer to 1, or raise max_log_ratio.",
    ),
    Rule(
        "engine",
        "nats",
        _engine,
        "The engine's log-probabilities a token are not the trainer's: by rounding they would differ by less.",
        ("vllm_dtype", "vllm_model_impl", "vllm_weight_sync"),
        "Does it hold the weights it was sent? Give it the trainer's dtype (vllm_dtype) and code (vllm_model_impl).",
    ),
    Rule(
        "entropy",
        "nats",
        _entropy,
        "The selector has lost nine tenths of the entropy that it began with: it hardly varies its selections.",
        ("entropy_coef", "temperature", "selector_learning_rate"),
        "Set entropy_coef or a higher temperature, or lower selector_learning_rate.",
    ),
    Rule(
        "kl",
        "nats",
        _kl,
        "The selector writes what the initial one would hardly have written.",
        ("beta", "selector_learning_rate"),
        "Raise beta, or lower selector_learning_rate.",
    ),
    Rule(
        "evidence_falling",
        "nats",
        _falling,
        "Window after window the pair explains the answers less well: training does not help it.",
        ("selector_learning_rate", "generator_learning_rate", "max_grad_norm"),
        "Lower the learning rates.",
    ),
    Rule(
        "recall_falling",
        "share",
        _forgetting,
        "Recall falls while the evidence rises: the generator learns to do without documents.",
        ("generator_learning_rate", "warmup_generator_steps"),
        "Lower generator_learning_rate against selector_learning_rate, or set it to 0.",
    ),
    Rule(
        "not_followed",
        "share",
        _not_followed,
        "The weights lie on labelled documents, and the selector does not come to name them: it may never have bound a "
        "number to a text.",
        ("warmup_selector_order", "selector_prompt_template", "selector_learning_rate"),
        "Warm the selector up with warmup_selector_order: quotes, which needs no labels, or raise "
        "selector_learning_rate.",
    ),
    Rule(
        "dev_falling",
        "points",
        _overfitting,
        "Dev falls while evidence or reward on the training questions rise: the pair learns them by heart.",
        ("early_stopping_patience", "selector_learning_rate", "generator_learning_rate", "m_step_epochs"),
        "Stop early (early_stopping_patience), lower the learning rates or m_step_epochs, or give more questions.",
    ),
)
