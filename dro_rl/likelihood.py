"""Log-probabilities of completions, and only of completions: logits over the prompt are never made.

A `Row` is one prompt with its completions. On the plain path each completion is a padded sequence of its own. On the
shared-prefix path rows are packed without padding (`attention`): each prompt once, then its completions, which stand at
the positions that follow it. Both give the same numbers and gradients; the second computes a prompt once instead of m
times. This module knows of causal LMs, not of trainers or engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dro_rl.attention import NO_MASK, pack, takes_packed_rows


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

    def set_attn_implementation(self, name: str) -> None: ...

    def __call__(self, **inputs: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt and the completions to score after it, as token ids.

    Args:
        prompt, completions: token ids.
        allowed: for each token of each completion the ids that it was chosen among (`SelectionConstraint`): its
            log-probability is under the distribution renormalised over them. None: over the vocabulary.
    """

    prompt: Sequence[int]
    completions: Sequence[Sequence[int]]
    allowed: Sequence[Sequence[Sequence[int]]] | None = None

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
    if shared_prefix and takes_packed_rows(model, max(_depth(row) for row in rows)):
        flat = iter(_packed(model, rows))
    else:
        pairs = [(row.prompt, completion) for row in rows for completion in row.completions]
        flat = iter(_padded(model, pairs, _allowed(rows)))
    return [[next(flat) for _ in row.completions] for row in rows]


def _allowed(rows: Sequence[Row]) -> list[Sequence[int]] | None:
    """What each token of each completion was chosen among, in order; None where all rows are unconstrained."""
    if all(row.allowed is None for row in rows):
        return None
    if any(row.allowed is None for row in rows):
        raise ValueError("rows are scored together that are all constrained, or none")
    return [ids for row in rows for completion in row.allowed or () for ids in completion]


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


def _depth(row: Row) -> int:
    return len(row.prompt) + max(len(completion) for completion in row.completions)


def _packed(model: Model, rows: Sequence[Row]) -> list[Tensor]:
    """One pass over all rows without padding; each completion's token log-probabilities, in order."""
    ids: list[int] = []
    positions: list[int] = []
    sources: list[int] = []  # the token that predicts each completion token: the last of the prompt, or the one before
    targets: list[int] = []
    for row in rows:
        p = len(row.prompt)
        ids += row.prompt
        positions += range(p)
        last_of_prompt = len(ids) - 1
        for completion in row.completions:
            sources += [last_of_prompt, *range(len(ids), len(ids) + len(completion) - 1)]
            targets += completion
            ids += completion
            positions += range(p, p + len(completion))
    device = model.device
    kept, where = torch.tensor(sources).unique(return_inverse=True)
    logits = model(
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.tensor([positions], device=device),
        attention_mask=NO_MASK.to(device),
        packing=pack([(len(row.prompt), [len(c) for c in row.completions]) for row in rows], device),
        logits_to_keep=kept.to(device),
        use_cache=False,
    ).logits[0]
    return _pick(logits[where.to(device)], targets, [len(c) for row in rows for c in row.completions], _allowed(rows))


def _padded(
    model: Model, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], allowed: list[Sequence[int]] | None
) -> list[Tensor]:
    """The plain path: one sequence a completion, padded on the left, so that `logits_to_keep` is one number."""
    device = model.device
    width = max(len(prompt) + len(completion) for prompt, completion in pairs)
    keep = max(len(completion) for _, completion in pairs) + 1
    ids = torch.zeros(len(pairs), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, (prompt, completion) in enumerate(pairs):
        start = width - len(prompt) - len(completion)
        ids[i, start:] = torch.tensor([*prompt, *completion])
        mask[i, start:] = 1
    logits = model(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0).to(device),
        logits_to_keep=keep,
        use_cache=False,
    ).logits
    lengths = [len(completion) for _, completion in pairs]
    picked = torch.cat([logits[i, keep - 1 - n : keep - 1] for i, n in enumerate(lengths)])
    return _pick(picked, [token for _, completion in pairs for token in completion], lengths, allowed)


def _pick(
    logits: Tensor, targets: Sequence[int], lengths: Sequence[int], allowed: list[Sequence[int]] | None
) -> list[Tensor]:
    """log softmax at the targets, float32, split by completion.

    `logits`: (tokens, vocabulary). `allowed`: the ids that each softmax is over; None: all.
    """
    target = torch.tensor(targets, device=logits.device).unsqueeze(-1)
    chosen = logits.gather(-1, target).squeeze(-1).float()
    among = logits.float() if allowed is None else among_allowed(logits, allowed)[0]
    return list((chosen - among.logsumexp(dim=-1)).split(list(lengths)))


def among_allowed(logits: Tensor, allowed: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """The logits of some ids alone.

    Args:
        logits: (rows, vocabulary).
        allowed: the ids of each row, at least one.

    Returns:
        their logits (rows, most ids), float32, −inf after the last id of a row, and the ids themselves.
    """
    width = max(len(ids) for ids in allowed)
    ids = torch.tensor([[*row, *[row[0]] * (width - len(row))] for row in allowed], device=logits.device)
    counts = torch.tensor([len(row) for row in allowed], device=logits.device)
    beyond = torch.arange(width, device=logits.device) >= counts.unsqueeze(-1)
    return logits.gather(-1, ids).float().masked_fill(beyond, -torch.inf), ids


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
