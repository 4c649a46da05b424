"""How long a model's sequences may be, as its config says."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

SWITCHING = frozenset({"longrope", "dynamic"})
"""Rotary embeddings of which one pass has one kind, by the longest of its rows."""


def positions_of(config: PretrainedConfig) -> tuple[int | None, str]:
    """How many tokens prompt and completion may have together, None for any number; and what they are."""
    text = config.get_text_config()
    known = getattr(text, "max_position_embeddings", None)
    ropes: Any = getattr(text, "rope_parameters", None) or {}
    for rope in (ropes, *(each for each in ropes.values() if isinstance(each, dict))):
        if rope.get("rope_type") in SWITCHING:
            original = rope.get("original_max_position_embeddings")
            return original or known, (
                f"positions before its rotary embeddings change ({rope['rope_type']}): beyond them the longest row of "
                "a pass decides what the others are worth"
            )
    return known, "positions"
