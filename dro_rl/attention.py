"""Attention over packed rows: a prompt once, its completions after it, and no padding.

Rows stand one after another in a batch of one. Within a row the prompt attends to itself causally, and every completion
to the prompt and causally to itself: two calls of scaled-dot-product attention, the first of which is the fast causal
kernel and the second small. Decoders of transformers take it through their attention interface; without a packing it is
their own `sdpa`, so a model that has it behaves as before everywhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "packed_rows"

ARCHITECTURES = frozenset(
    {"llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "granite"}
)
"""Decoders whose every layer is attention through the interface; all are tested."""


@dataclass(frozen=True, slots=True)
class PackedRow:
    """Where a row stands: from `start`, `prompt` tokens and then its completions, `length` tokens in all.

    `mask`: None for a single completion, else (tokens of completions, tokens of the row), True where it may look.
    """

    start: int
    prompt: int
    length: int
    mask: Tensor | None


def pack(lengths: Sequence[tuple[int, Sequence[int]]], device: torch.device | str) -> list[PackedRow]:
    """The packing of rows given as (prompt tokens, tokens of each completion)."""
    rows, start = [], 0
    for prompt, completions in lengths:
        length = prompt + sum(completions)
        mask = None
        if len(completions) > 1:
            owner = torch.repeat_interleave(torch.arange(len(completions)), torch.tensor(completions))
            own = (owner.unsqueeze(1) == owner).tril()
            mask = torch.cat([torch.ones(len(owner), prompt, dtype=torch.bool), own], dim=1).to(device)
        rows.append(PackedRow(start, prompt, length, mask))
        start += length
    return rows


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Sequence[PackedRow] | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function, from (1, heads, tokens, head size) to (1, tokens, heads, head size)."""
    if packing is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )

    def attend(queries: slice, keys: slice, mask: Tensor | None) -> Tensor:
        q, k, v = query[:, :, queries], key[:, :, keys], value[:, :, keys]
        mask = None if mask is None else mask[None, None]
        return sdpa_attention_forward(module, q, k, v, mask, dropout=dropout, scaling=scaling, is_causal=mask is None)[
            0
        ]

    pieces = []
    for row in packing:
        end = row.start + row.length
        if row.mask is None:
            pieces.append(attend(slice(row.start, end), slice(row.start, end), None))
        else:
            middle = row.start + row.prompt
            pieces.append(attend(slice(row.start, middle), slice(row.start, middle), None))
            pieces.append(attend(slice(middle, end), slice(row.start, end), row.mask))
    return torch.cat(pieces, dim=1), None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def takes_packed_rows(model: Any, positions: int) -> bool:
    """Whether packed rows are exact for a model up to `positions`, after giving it this attention if so.

    The model must be one of `ARCHITECTURES` under `sdpa`, and no sliding window may be narrower than the positions.
    """
    config: PretrainedConfig = model.config.get_text_config()
    if config.model_type not in ARCHITECTURES or config._attn_implementation not in ("sdpa", NAME):
        return False
    layer_types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    slides = window is not None if layer_types is None else "sliding_attention" in layer_types
    if slides and (window is None or positions > window):
        return False
    if config._attn_implementation != NAME:
        model.set_attn_implementation(NAME)
    return True


NO_MASK = torch.zeros(1, 1, 1, 1)
"""Passed as the attention mask of a packed batch: transformers makes a mask of its own unless it is given a 4D one."""
