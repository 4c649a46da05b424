"""The two roles: a policy role is sampled and weighed, a likelihood role scores answers and is fitted."""

from __future__ import annotations

from typing import Literal

Role = Literal["selector", "generator"]
ROLES: tuple[Role, Role] = ("selector", "generator")
