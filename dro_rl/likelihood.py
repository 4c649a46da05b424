"""Log-probabilities of completions, and only of completions: logits over the prompt are never made.

A `Row` is one prompt with its completions. On the plain path each completion is a sequence of its own. On the
shared-prefix path the row is one sequence: the prompt once, then every completion, each of which sees the prompt and
itself and stands at the positions that follow the prompt. Both give the same numbers and gradients; the second
computes the prompt once instead of m times. This module knows of causal LMs, not of trainers or engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PretrainedConfig


class Model(Protocol):
    """A causal LM, or what stands for one.

    Called with `input_ids`, `attention_mask`, `position_ids`, `logits_to_keep` and a cache, it returns an object with
    `.logits`.
    """

    config: Any

    @property
    def device(self) -> Any: ...

    @property
    def dtype(self) -> Any: ...

    def __call__(self, **inputs: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt and the completions to score after it, as token ids."""

    prompt: Sequence[int]
    completions: Sequence[Sequence[int]]

    def __len__(self) -> int:
        """Tokens of the row on the shared-prefix path."""
        return len(self.prompt) + sum(len(completion) for completion in self.completions)


def completion_logps(
    model: Model,
    prompt_ids: Sequence[int],
    completions: Sequence[Sequence[int]],
    *,
    shared_prefix: bool = True,
) -> list[Tensor]:
    """log p of every token of every completion after one prompt.

    Args:
        model: a Hugging Face causal LM.
        prompt_ids: at least one token.
        completions: m token sequences of any lengths, each of at least one token.
        shared_prefix: compute the prompt once. Architectures for which that is not exact take the plain path.

    Returns:
        m float32 tensors of shape (len(completion),), in nats, with gradient.
    """
    row = Row(prompt_ids, completions)
    return row_logps(model, [row], shared_prefix=shared_prefix)[0]


def row_logps(model: Model, rows: Sequence[Row], *, shared_prefix: bool = True) -> list[list[Tensor]]:
    """`completion_logps` for several rows in one forward pass."""
    for row in rows:
        if not len(row.prompt) or not row.completions or not all(len(c) for c in row.completions):
            raise ValueError("a row has a prompt token, at least one completion, and no empty completion")
    if shared_prefix and shares_prefix(model.config, max(_depth(row) for row in rows)):
        return _forward(model, rows)
    singles = [Row(row.prompt, [completion]) for row in rows for completion in row.completions]
    flat = iter(_forward(model, singles))
    return [[next(flat)[0] for _ in row.completions] for row in rows]


@torch.no_grad()
def score_rows(model: Model, rows: Sequence[Row], batch_size: int, shared_prefix: bool = True) -> list[list[Tensor]]:
    """`row_logps` without gradient for any number of rows; rows of similar length share a pass."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    scored: list[list[Tensor]] = [[] for _ in rows]
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        for i, logps in zip(
            chunk, row_logps(model, [rows[i] for i in chunk], shared_prefix=shared_prefix), strict=True
        ):
            scored[i] = [each.cpu() for each in logps]
    return scored


def shares_prefix(config: PretrainedConfig, length: int) -> bool:
    """Whether one row with an attention mask of our own is exact for this architecture, up to `length` positions.

    The mask replaces the model's, so every layer must be attention that takes a dense mask, and a sliding window must
    not be narrower than the sequence. Elsewhere the plain path is taken.
    """
    config = config.get_text_config()
    if config._attn_implementation not in ("sdpa", "eager") or config.model_type not in SHARED_PREFIX_ARCHITECTURES:
        return False
    layer_types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    slides = window is not None if layer_types is None else "sliding_attention" in layer_types
    return not slides or (window is not None and length <= window)


SHARED_PREFIX_ARCHITECTURES = frozenset(
    {"llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "granite"}
)
"""Decoders whose every layer is attention under the mask passed in (llama, qwen2, mistral, gemma2 are tested)."""


def _depth(row: Row) -> int:
    return len(row.prompt) + max(len(completion) for completion in row.completions)


def _forward(model: Model, rows: Sequence[Row]) -> list[list[Tensor]]:
    """One pass over rows padded on the left, so that completions end together and `logits_to_keep` is one number."""
    device = model.device
    width = max(len(row) for row in rows)
    tails = [sum(len(completion) for completion in row.completions) for row in rows]
    keep = max(tails) + 1
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    positions = torch.zeros_like(ids)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        start = width - len(row)
        ids[i, start:] = torch.tensor([*row.prompt, *(t for completion in row.completions for t in completion)])
        p = len(row.prompt)
        positions[i, start:] = torch.tensor([*range(p), *(p + t for c in row.completions for t in range(len(c)))])
        mask[i, start:] = 1
    packed = any(len(row.completions) > 1 for row in rows)
    logits = model(
        input_ids=ids.to(device),
        attention_mask=_tree_mask(rows, width, model.dtype, device) if packed else mask.to(device),
        position_ids=positions.to(device),
        logits_to_keep=keep,
        use_cache=False,
    ).logits
    # Logit j of the kept ones predicts after position width - keep + j. The first token of a completion is predicted
    # by the last prompt token, every other one by the token before it.
    sources, targets, owners = [], [], []
    for i, (row, tail) in enumerate(zip(rows, tails, strict=True)):
        last_prompt = keep - 1 - tail
        offset = last_prompt + 1
        for completion in row.completions:
            sources += [last_prompt, *range(offset, offset + len(completion) - 1)]
            targets += list(completion)
            owners += [i] * len(completion)
            offset += len(completion)
    picked = logits[torch.tensor(owners, device=device), torch.tensor(sources, device=device)].float()
    target = torch.tensor(targets, device=device).unsqueeze(-1)
    logps = picked.gather(-1, target).squeeze(-1) - picked.logsumexp(dim=-1)
    pieces = iter(logps.split([len(completion) for row in rows for completion in row.completions]))
    return [[next(pieces) for _ in row.completions] for row in rows]


def _tree_mask(rows: Sequence[Row], width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(rows, 1, width, width), 0 where attention may look and the dtype's minimum elsewhere.

    A token sees itself and what precedes it in the prompt or in its own completion. Padding sees itself alone, so that
    no softmax is empty.
    """
    segment = torch.full((len(rows), width), -1, dtype=torch.long)  # -1 padding, 0 prompt, 1.. completions
    for i, row in enumerate(rows):
        at = width - len(row)
        segment[i, at : at + len(row.prompt)] = 0
        at += len(row.prompt)
        for number, completion in enumerate(row.completions, start=1):
            segment[i, at : at + len(completion)] = number
            at += len(completion)
    segment = segment.to(device)
    query, key = segment.unsqueeze(2), segment.unsqueeze(1)
    causal = torch.ones(width, width, dtype=torch.bool, device=device).tril()
    visible = causal & (query >= 0) & ((key == 0) | (key == query))
    visible |= torch.eye(width, dtype=torch.bool, device=device)
    mask = torch.zeros(visible.shape, dtype=dtype, device=device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min).unsqueeze(1)


def answer_logp(token_logps: Sequence[Tensor], likelihood: str = "sum", aliases: str = "first") -> Tensor:
    """ℓ, one log-likelihood of the accepted answers, from the token log-probabilities of each.

    Args:
        token_logps: one tensor an alias, end-of-sequence included.
        likelihood: `sum` over tokens is log p(y|x, d_z); `mean` is another posterior, p^(1/|y|).
        aliases: `first`, `max`, or `logsumexp` (the probability of any of them).

    Returns:
        A scalar, nats, with gradient.
    """
    totals = torch.stack([logps.sum() if likelihood == "sum" else logps.mean() for logps in token_logps])
    if aliases == "first":
        return totals[0]
    return totals.max() if aliases == "max" else totals.logsumexp(dim=0)
