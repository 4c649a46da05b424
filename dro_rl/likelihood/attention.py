"""Attention over packed rows (`dro_rl.likelihood.packing`): a prompt once, its completions after it, and no padding.

One call of scaled-dot-product attention a segment. A prompt attends to itself by the fast causal kernel; its
completions attend to it, and causally to themselves, by a small masked one. Decoders of transformers take it through
their attention interface; without a packing it is their own `sdpa`, so a model that has it behaves as before elsewhere.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from dro_rl.likelihood.packing import Segment

NAME = "packed_rows"

ARCHITECTURES = frozenset(
    {"llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "granite"}
)
"""Decoders whose every layer is attention through the interface; all are tested."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Sequence[Segment] | None = None,
    before: Sequence[Mapping[int, tuple[Tensor, Tensor]]] = (),
    keep: dict[int, tuple[Tensor, Tensor]] | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function, from (1, heads, tokens, head size) to (1, tokens, heads, head size).

    Keys and values may begin with what stands `before`, by layer; with `keep` those of this layer are left there.
    """
    if packing is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )

    layer: Any = module.layer_idx
    if keep is not None:
        keep.setdefault(layer, (key, value))  # a layer that is recomputed comes here again
    if before:
        key, value = (
            torch.cat([*(states[layer][which] for states in before), own], dim=2)
            for which, own in enumerate((key, value))
        )
    # The gradient of a slice is as long as what it is cut from, that of a split is made once: rows are split first.
    starts = cuts(packing)
    sizes = [stop - start for start, stop in itertools.pairwise([*starts, key.shape[2]])]

    def seen(parts: Sequence[Tensor], piece: slice) -> Tensor:
        at = bisect_right(starts, piece.start) - 1
        return parts[at][:, :, piece.start - starts[at] : piece.stop - starts[at]]

    def look(segment: Segment, queries: Tensor, *states: Sequence[Tensor]) -> Tensor:
        keys, values = (
            torch.cat([seen(parts, piece) for piece in segment.keys], dim=2)
            if len(segment.keys) > 1
            else seen(parts, segment.keys[0])
            for parts in states
        )
        mask = None if segment.mask is None else segment.mask[None, None]
        return sdpa_attention_forward(
            module, queries, keys, values, mask, dropout=dropout, scaling=scaling, is_causal=mask is None
        )[0]

    asked = query.split([segment.queries.stop - segment.queries.start for segment in packing], dim=2)
    states = key.split(sizes, dim=2), value.split(sizes, dim=2)
    return torch.cat([look(*each, *states) for each in zip(packing, asked, strict=True)], dim=1), None


def cuts(packing: Sequence[Segment]) -> list[int]:
    """Where the keys of a packing may be cut: at places that no slice of them reaches over, 0 the first."""
    starts, reach = [0], 0
    for piece in sorted((piece for segment in packing for piece in segment.keys), key=lambda piece: piece.start):
        if piece.start >= reach > 0:
            starts.append(piece.start)
        reach = max(reach, piece.stop)
    return starts


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


ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Kinds of layers that look at tokens alone."""


def drops_out(model: Any) -> bool:
    """Whether dropout disturbs the passes of a model that trains: in its layers, its adapters or its attention."""
    inside = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    return inside or bool(getattr(model.config.get_text_config(), "attention_dropout", 0))


def keeps_state(config: PretrainedConfig) -> bool:
    """Whether a decoder carries a state from token to token, as convolutions, linear attention and recurrences do.

    Padding on the left goes through that state, and it is no cache that can be expanded to more rows.
    """
    text = config.get_text_config()
    if not ATTENTION.issuperset(getattr(text, "layer_types", None) or ()):
        return True
    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return getattr(known, "_is_stateful", False)


NO_MASK = torch.zeros(1, 1, 1, 1)
"""Passed as the attention mask of a packed batch: transformers makes a mask of its own unless it is given a 4D one."""
