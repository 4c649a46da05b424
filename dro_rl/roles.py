"""The two roles: a policy role is sampled and weighed, a likelihood role scores answers and is fitted to them."""

from __future__ import annotations

from typing import Literal

Role = Literal["selector", "generator"]
ROLES: tuple[Role, ...] = ("selector", "generator")

POLICIES: frozenset[Role] = frozenset({"selector"})
"""Of these each sampled completion is scored; of the others, the answers that samples lead to."""
