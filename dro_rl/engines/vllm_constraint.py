"""The constraint inside vLLM: a logits processor that leaves the tokens a selection may go on with, and no others.

vLLM reads `SelectionLogits` off this module, in the trainer's process or in a server's (`--logits-processors`). Tokens
that are not allowed get −inf before temperature and truncations, so a sampled token's log-probability is constrained.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from dro_rl.selection.constraint import SelectionConstraint

CONSTRAINT = ("num_documents", "num_selected", "end", "least")
"""What a request says of its constraint: the arguments of `SelectionConstraint`, in order."""


def __getattr__(name: str) -> Any:
    if name == "SelectionLogits":
        return _processor()
    raise AttributeError(name)


@cache
def _processor() -> type:
    """The class. It stands in a function because its base is vLLM's, which may not be installed."""
    from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

    class SelectionLogits(AdapterLogitsProcessor):
        """Constrains the requests that say how many documents to select of how many; see `vllm_common.constrained`."""

        def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
            super().__init__(vllm_config, device, is_pin_memory)
            model = vllm_config.model_config
            tokenizer = AutoTokenizer.from_pretrained(
                model.tokenizer, revision=model.tokenizer_revision, trust_remote_code=model.trust_remote_code
            )
            self._constraint = lru_cache(lambda *which: SelectionConstraint(tokenizer, *which))

        def is_argmax_invariant(self) -> bool:
            """The likeliest token of all need not be one that is allowed."""
            return False

        def new_req_logits_processor(self, params: Any) -> Callable[[list[int], Tensor], Tensor] | None:
            """What to do with the logits of one request; None where it asks for no constraint."""
            asked = params.extra_args or {}
            if CONSTRAINT[0] not in asked:
                return None
            constraint = self._constraint(*(asked[name] for name in CONSTRAINT))

            def allow(written: list[int], logits: Tensor) -> Tensor:
                ids = torch.tensor(constraint.allowed(written), device=logits.device)
                return torch.full_like(logits, -math.inf).index_copy_(0, ids, logits[ids])

            return allow

    return SelectionLogits
