"""What a rollout is worth: the true answer's likelihood, what an answer scores, a function of one's own, a mixture.

A recipe says `reward: likelihood`, `reward: f1`, `reward: package.module:function`, `reward: {f1: 10, likelihood: 1}`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dro_rl.errors import InputError, Phrase, did_you_mean, first_line
from dro_rl.metrics import contains, exact_match, f1, rouge_l
from dro_rl.records import Document, Question

LIKELIHOOD = "likelihood"
SCORES: dict[str, Callable[[str, Sequence[str]], float]] = {
    "em": exact_match,
    "f1": f1,
    "contains": contains,
    "rouge_l": rouge_l,
}
"""Rewards of an answer that the generator wrote, 0..1."""


@dataclass(frozen=True, slots=True)
class Read:
    """What a reward looks at: a question, the documents that were read in their order, what was answered, and ℓ.

    Args:
        question: with its accepted answers.
        documents: those selected.
        answer: what the generator wrote.
        likelihood: log p(true answer | question, documents), nats.
    """

    question: Question
    documents: tuple[Document, ...]
    answer: str
    likelihood: float


@dataclass(frozen=True, slots=True)
class Reward:
    """A sum of named rewards, each with its factor.

    Args:
        parts: (name, factor), in the recipe's order.
        document_cost: taken off for each document that was selected.
    """

    parts: tuple[tuple[str, float], ...] = ((LIKELIHOOD, 1.0),)
    document_cost: float = 0.0

    @property
    def is_likelihood(self) -> bool:
        """Whether it is the answer's log-likelihood and nothing else, but for what documents cost."""
        return self.parts == ((LIKELIHOOD, 1.0),)

    @property
    def others(self) -> tuple[str, ...]:
        """The rewards beside the likelihood: they need an answer."""
        return tuple(name for name, _ in self.parts if name != LIKELIHOOD)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.parts)

    def total(self, likelihood: float, rewards: Mapping[str, float], documents: int = 0) -> float:
        """The sum for one rollout that selects so many documents; NaN where a part is."""
        total = math.fsum(
            factor * (likelihood if name == LIKELIHOOD else rewards.get(name, math.nan)) for name, factor in self.parts
        )
        return total - self.document_cost * documents


def parse_reward(value: object, place: str = "reward") -> Reward:
    """What a recipe's `reward` says. Raises `InputError` for a name that there is not, or a factor that is none."""
    parts = {value: 1.0} if isinstance(value, str) else value
    if not isinstance(parts, Mapping) or not parts:
        raise InputError(place, value, "this is a reward's name, or names with factors", "Use likelihood, or {f1: 1}.")
    for name, factor in parts.items():
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not math.isfinite(factor) or factor == 0:
            raise InputError(place, {name: factor}, "a factor is a finite number other than 0", f"Use {{{name}: 1}}.")
        if name != LIKELIHOOD and name not in SCORES:
            _named(str(name), place)
    return Reward(tuple((str(name), float(factor)) for name, factor in parts.items()))


def check_functions(reward: Reward) -> None:
    """Import the functions that a reward names. Raises `InputError` for one that cannot be."""
    for name in reward.others:
        if name not in SCORES:
            _function(name)


def score(names: Sequence[str], read: Sequence[Read]) -> list[tuple[tuple[str, float], ...]]:
    """Each reward of what was read, by name, in order.

    Raises:
        InputError: a function raised, or gave something else than one finite number each; it names the question.
    """
    columns = []
    for name in names:
        if name in SCORES:
            columns.append([SCORES[name](each.answer, each.question.answers) for each in read])
        else:
            columns.append(_called(name, read))
    return [tuple(zip(names, row, strict=True)) for row in zip(*columns, strict=True)] if columns else [()] * len(read)


def _called(name: str, read: Sequence[Read]) -> list[float]:
    if not read:
        return []
    function, place = _function(name), f"reward: {name}"
    try:
        values = list(function(read))
    except Exception as error:  # whatever a user's function raises
        asked = read[0].question.id if len(read) == 1 else f"{read[0].question.id} to {read[-1].question.id}"
        raise InputError(
            f"{place}, questions {asked}",
            Phrase(f"{type(error).__name__}: {first_line(error)}"),
            "a reward is a function of a list of dro_rl.rewards.Read",
            "Correct the function.",
        ) from error
    if len(values) != len(read):
        found = Phrase(f"{len(values)} values of {len(read)}")
        raise InputError(place, found, "a reward gives one number each", "Correct the function.")
    for value, each in zip(values, read, strict=True):
        if isinstance(value, bool | int | float) and math.isfinite(value):
            continue
        raise InputError(f"{place}, question {each.question.id}", value, "a reward is a finite number", "Correct it.")
    return [float(value) for value in values]


def _named(name: str, place: str) -> tuple[str, str]:
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        known = [LIKELIHOOD, *SCORES]
        raise InputError(
            place,
            name,
            f"this is {', '.join(known)} or package.module:function",
            did_you_mean(name, known, "Use one of them."),
        )
    return module, attribute


def _function(name: str) -> Callable[[Sequence[Read]], Any]:
    place, (module, attribute) = "reward", _named(name, "reward")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a user's module runs as it is imported
        raise InputError(
            place, name, f"it names a function that can be imported ({first_line(error)})", "Correct the name."
        ) from None
    if not callable(function):
        raise InputError(place, name, "it names a function", "Correct the name.")
    return function
