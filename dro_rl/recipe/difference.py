"""What differs between two recipes, by what their keys mean: not how values are written, nor whether a default is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dro_rl.keys import Key
from dro_rl.keys.reference import KEYS


@dataclass(frozen=True)
class Difference:
    """A key that two recipes give different values.

    Args:
        key: the key.
        a, b: its values.
        kind: `changed`, or whose value is the key's default: `a_default`, `b_default`.
    """

    key: Key
    a: Any
    b: Any
    kind: Literal["changed", "a_default", "b_default"]


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Difference]:
    """The keys that differ, in the order of the reference page.

    Args:
        a, b: every key with its checked value.
    """
    found = []
    for name, key in KEYS.items():
        if a[name] != b[name]:
            default = key.check(key.default) if key.default != "" else ""
            kind: Literal["changed", "a_default", "b_default"] = "changed"
            if default in (a[name], b[name]):
                kind = "a_default" if a[name] == default else "b_default"
            found.append(Difference(key, a[name], b[name], kind))
    return found
