"""Which path each role's rows take in a training, and whether the fast one is right: said once, verified once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from dro_rl.config import DROConfig
from dro_rl.errors import InputError
from dro_rl.likelihood.attention import takes_packed_rows
from dro_rl.likelihood.packing import Row
from dro_rl.likelihood.verify import check, difference
from dro_rl.models.quantization import settings_in
from dro_rl.roles import Role

logger = logging.getLogger(__name__)


class FastPath:
    """The shared-prefix path of both roles.

    Args:
        config: `shared_prefix`, `verify_fast_path`, the precision.
        module: a role's module as it is now.
        open_role: opens a role whose parameters are sharded, for values alone.
        sharded: whether they are.
    """

    def __init__(
        self,
        config: DROConfig,
        module: Callable[[Role], Any],
        open_role: Callable[[Role], AbstractContextManager[Any]],
        *,
        sharded: bool,
    ) -> None:
        self.config, self.module, self.open_role, self.sharded = config, module, open_role, sharded
        self._verified: set[Role] = set()
        self._plain: set[Role] = set()  # those that were said to take the plain path

    def takes(self, role: Role, positions: int) -> bool:
        """Whether a role takes packed rows of so many positions. Says so once where it does not.

        Raises:
            InputError: it does not, and `shared_prefix: on` insists.
        """
        if self.config.shared_prefix == "off":
            return False
        model = self.module(role)
        if takes_packed_rows(model, positions):
            return True
        config = model.config.get_text_config()
        why = f"{config.model_type} under {config._attn_implementation}, {positions} tokens"
        if window := getattr(config, "sliding_window", None):
            why += f", a window of {window}"
        if self.config.shared_prefix == "on":
            raise InputError(
                "shared_prefix",
                f"on, for the {role}: {why}",
                "a model that shares prefixes packs rows, under sdpa, with no window narrower than a row",
                "Use auto, which takes the plain path here, or lower max_prompt_length.",
            )
        if role not in self._plain:
            self._plain.add(role)
            logger.warning(f"{role}: {why}: the plain path, which computes a prompt once for each completion")
        return False

    def verify(self, role: Role, rows: Sequence[Row]) -> None:
        """Compare it with the plain path on a role's first rows. Raises `InputError` where they differ."""
        if not self.config.verify_fast_path or role in self._verified:
            return
        if self.sharded:
            with self.open_role(role) as model:
                found = difference(model, rows, self.config.scoring, gradients=False)
        else:
            found = difference(self.module(role), rows, self.config.scoring, gradients=True)
        self._verified.add(role)  # not before: memory may have run out
        if found is None:
            return
        half = torch.bfloat16 if self.config.bf16 else torch.float16 if self.config.fp16 else None
        held = settings_in(self.module(role))
        if half is None and held is not None and held.load_in_8bit:
            half = torch.float16  # which its products are rounded to
        check(role, found, half or self.module(role).dtype)
        gradients = "" if found.gradients is None else f", gradients by {found.gradients:.1e} of their norm"
        logger.info(f"{role}: shared prefixes differ from the plain path by {found.logps:.1e} nats{gradients}")
