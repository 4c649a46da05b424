"""Recipe keys: what each may be, what it is by default, whether a resumed run may change it, in words and in code.

A key is a dataclass field made by `option`; its rule stands in the field. Whatever reads keys (recipes, `--help`, the
reference page, resuming) reads them here. Nothing here knows torch: a wrong recipe is found before it is imported.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Union

from dro_rl.errors import InputError
from dro_rl.keys.kinds import as_kind, name_of_kind


@dataclass(frozen=True)
class Rule:
    """What a value obeys beyond its type.

    Args:
        says: completes the sentence "this is …".
        fix: what to do about a value that does not.
        holds: whether a value does. Null is not asked: where the type allows it, it means unset.
    """

    says: str
    fix: str
    holds: Callable[[Any], bool]


def at_least(low: float, fix: str = "") -> Rule:
    """A number from `low` upward."""
    return Rule(f"at least {low:g}", fix or f"Use {low:g} or more.", lambda value: value >= low)


def above(low: float, fix: str = "Use a positive number.") -> Rule:
    """A number above `low`."""
    return Rule(f"above {low:g}", fix, lambda value: value > low)


def within(interval: str, fix: str) -> Rule:
    """A number in an interval, as mathematics writes it: `(0, 1]` is above 0 and at most 1."""
    low, high = map(float, interval[1:-1].split(","))
    return Rule(
        f"in {interval}",
        fix,
        lambda value: (
            (low <= value if interval[0] == "[" else low < value)
            and (value <= high if interval[-1] == "]" else value < high)
        ),
    )


def either(special: float, rule: Rule, meaning: str) -> Rule:
    """A value with a meaning of its own, or what a rule allows."""
    return Rule(
        f"{rule.says}, or {special:g} for {meaning}", rule.fix, lambda value: value == special or rule.holds(value)
    )


def option(
    default: Any, help: str, rule: Rule | None = None, *, resumes: bool = False, group: str = "", fix: str = ""
) -> Any:
    """A dataclass field that is a recipe key.

    Args:
        default: its value when a recipe does not give it.
        help: what it is, in a sentence.
        rule: what its value obeys beyond its type.
        resumes: whether a resumed run may change it: how long the run goes and what it says, not what it computes.
        group: the heading that this key opens.
        fix: what to do about a value that breaks the rule, where the rule's own advice is too general.
    """
    if rule is not None and fix:
        rule = dataclasses.replace(rule, fix=fix)
    metadata = {"help": help, "rule": rule, "resumes": resumes, "group": group}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Key:
    """A recipe key.

    Args:
        name: as recipes write it.
        kind: its type, as Python annotates it.
        default: its value when it is not given.
        help: what it is.
        rule: what it obeys beyond its type.
        resumes: whether a resumed run may change it.
        group: the heading it stands under.
    """

    name: str
    kind: Any
    default: Any
    help: str
    rule: Rule | None
    resumes: bool
    group: str

    @property
    def allowed(self) -> str:
        """Its values, in a phrase: "a whole number, at least 1, or null"."""
        kinds = _alternatives(self.kind)
        phrase = " or ".join(name_of_kind(kind) for kind in kinds if kind is not types.NoneType)
        phrase += f", {self.rule.says}" if self.rule else ""
        return f"{phrase}, or null" if types.NoneType in kinds else phrase

    def is_text(self, value: Any) -> bool:
        """Whether what YAML reads as this scalar can only be meant as text: 12, true, 2026-01-02."""
        kinds = _alternatives(self.kind)
        other = value is None or isinstance(value, str | list | dict)
        return str in kinds and not other and not any(as_kind(value, kind)[0] for kind in kinds)

    def check(self, value: Any) -> Any:
        """The value as the key's type. Raises `InputError` for one that is not, or that breaks the key's rule."""
        for kind in _alternatives(self.kind):
            matches, converted = as_kind(value, kind)
            if matches:
                break
        else:
            kinds = " or ".join(map(name_of_kind, _alternatives(self.kind)))
            raise InputError(self.name, value, f"this is {kinds}", "Correct the value.")
        if self.rule is not None and converted is not None and not self.rule.holds(converted):
            raise InputError(self.name, value, f"this is {self.rule.says}", self.rule.fix)
        return converted


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,)


def keys_of(cls: type) -> dict[str, Key]:
    """The keys that a class of settings declares, by name, in their order."""
    return {key.name: key for key in _keys(cls)}


def _keys(cls: type) -> Iterator[Key]:
    hints = typing.get_type_hints(cls)
    group = ""
    for f in dataclasses.fields(cls):
        if "rule" not in f.metadata:
            continue  # of a base class that is not ours
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        group = f.metadata["group"] or group
        yield Key(f.name, hints[f.name], default, f.metadata["help"], f.metadata["rule"], f.metadata["resumes"], group)


def check_keys(settings: Any) -> None:
    """Check every key of a settings object, and leave each value as its key's type. Raises `InputError`."""
    for name, key in keys_of(type(settings)).items():
        setattr(settings, name, key.check(getattr(settings, name)))
