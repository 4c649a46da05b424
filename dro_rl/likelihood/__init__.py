"""Log-probabilities of completions, and only of completions: logits over the prompt are never made.

A `Row` is one prompt with its completions. On the plain path each completion is a padded sequence of its own. On the
shared-prefix path rows are packed without padding (`packing`, `attention`) and the head is applied to a few tokens at a
time. Both give the same numbers and gradients; the second computes a prompt once instead of m times. This module knows
of causal LMs, not of trainers or engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dro_rl.likelihood.attention import NO_MASK, keeps_state, takes_packed_rows
from dro_rl.likelihood.packing import Layout, Row, lay_out, lay_out_after

if TYPE_CHECKING:
    from dro_rl.likelihood.prefill import Prefill

TOKENS_PER_PASS = 16384
"""Tokens that go through a model at once, unless told."""
LOGITS_PER_CHUNK = 2**26
"""Numbers of the largest block of logits that packed rows make: 256 MiB in float32."""
LIKELIHOODS = ("sum", "mean")
"""Values of `answer_likelihood`, in the order of `answer_logps`."""


class Model(Protocol):
    """A causal LM, or what stands for one.

    Called with `input_ids`, `attention_mask`, `position_ids`, `logits_to_keep` and a cache, it returns an object with
    `.logits`. What stands for a sharded model also has `within(function, *arguments)`, which calls the function with
    the causal LM itself while its parameters are there.
    """

    config: Any

    @property
    def device(self) -> Any: ...

    def set_attn_implementation(self, name: str) -> None: ...

    def __call__(self, **inputs: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Scoring:
    """How rows are scored.

    Args:
        answer_likelihood: `sum` over the answer's tokens, or `mean`.
        answer_aliases: how several accepted answers make one likelihood: `first`, `max` or `logsumexp`.
        shared_prefix: compute each prompt once for all its completions, where that is exact.
        prefix_tree: compute what generator prompts begin with alike once.
        tokens: that go through a model at once, at most; a longer row goes alone.
    """

    answer_likelihood: str = "sum"
    answer_aliases: str = "first"
    shared_prefix: bool = True
    prefix_tree: bool = True
    tokens: int = TOKENS_PER_PASS


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


def row_logps(
    model: Model,
    rows: Sequence[Row],
    *,
    shared_prefix: bool = True,
    prefix_tree: bool = False,
    prefills: Sequence[Prefill] = (),
) -> list[list[Tensor]]:
    """`completion_logps` for several rows in one forward pass.

    With `prefix_tree`, rows whose prompts begin alike share their beginnings. With `prefills`, one a row, the prompts
    have been through the model, and completions alone go through it.
    """
    for row in rows:
        if not len(row.prompt) or not row.completions or not all(len(c) for c in row.completions):
            raise ValueError("a row has a prompt token, at least one completion, and no empty completion")
    if shared_prefix and takes_packed_rows(model, max(depth(row) for row in rows)):
        within = getattr(model, "within", None)
        layout = lay_out_after(rows) if prefills else lay_out(rows, prefix_tree=prefix_tree)
        logps = _packed(model, layout, rows, prefills) if within is None else within(_packed, layout, rows)
    else:
        pairs = [(row.prompt, completion) for row in rows for completion in row.completions]
        logps = _padded(model, pairs, _allowed(rows))
    flat = iter(logps)
    return [[next(flat) for _ in row.completions] for row in rows]


def _allowed(rows: Sequence[Row]) -> list[Sequence[int]] | None:
    """What each token of each completion was chosen among, in order; None where all rows are unconstrained."""
    if all(row.allowed is None for row in rows):
        return None
    if any(row.allowed is None for row in rows):
        raise ValueError("rows are scored together that are all constrained, or none")
    return [ids for row in rows for completion in row.allowed or () for ids in completion]


@torch.no_grad()
def score_rows(
    model: Model,
    rows: Sequence[Row],
    tokens: int = TOKENS_PER_PASS,
    shared_prefix: bool = True,
    prefix_tree: bool = False,
) -> list[list[Tensor]]:
    """`row_logps` without gradient for any number of rows, at most `tokens` tokens a pass (or one row that has more).

    On the plain path rows of similar length share a pass, so that it pads little. Packed rows stay in order: prompts
    that begin alike, a question's, stand together.
    """
    packed = shared_prefix and takes_packed_rows(model, max(map(depth, rows), default=0))
    order = list(range(len(rows))) if packed else sorted(range(len(rows)), key=lambda i: -depth(rows[i]))
    costs = [len(rows[i]) if packed else unshared(rows[i]) for i in order]
    scored: list[list[Tensor]] = [[] for _ in rows]
    for run in passes(costs, tokens):
        chunk = [order[place] for place in run]
        found = row_logps(model, [rows[i] for i in chunk], shared_prefix=shared_prefix, prefix_tree=prefix_tree)
        for i, logps in zip(chunk, found, strict=True):
            scored[i] = [each.cpu() for each in logps]
    return scored


def passes(sizes: Sequence[int], tokens: int) -> list[list[int]]:
    """Indices in order, in runs whose sizes sum to at most `tokens`; a larger one goes alone."""
    runs: list[list[int]] = []
    room = 0
    for i, size in enumerate(sizes):
        if not runs or size > room:
            runs.append([])
            room = tokens
        runs[-1].append(i)
        room -= size
    return runs


def depth(row: Row) -> int:
    """Tokens of the prompt with its longest completion."""
    return len(row.prompt) + max(len(completion) for completion in row.completions)


def unshared(row: Row) -> int:
    """Tokens of the row on the plain path, where each completion has the prompt to itself."""
    return len(row.completions) * depth(row)


def without_adapters(model: Any) -> Any:
    """The causal LM itself: what a PEFT model is around, or the model."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def hidden_states(
    plain: Any,
    layout: Layout,
    prefills: Sequence[Prefill] = (),
    keep: dict[int, tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """(tokens, width) that a decoder makes of a layout, before its head.

    Args:
        plain: a causal LM that takes packed rows.
        layout: what goes through it.
        prefills: what stands before the layout, one after another.
        keep: filled with the keys and values of each layer.
    """
    device = plain.device
    hidden: Tensor = plain.base_model(
        input_ids=torch.tensor([layout.ids], device=device),
        position_ids=torch.tensor([layout.positions], device=device),
        attention_mask=NO_MASK.to(device),
        packing=[segment.to(device) for segment in layout.segments],
        before=[prefill.states for prefill in prefills],
        keep=keep,
        use_cache=False,
    ).last_hidden_state[0]
    return hidden


def _packed(model: Any, layout: Layout, rows: Sequence[Row], prefills: Sequence[Prefill] = ()) -> list[Tensor]:
    """One pass over all rows without padding; each completion's token log-probabilities, in order."""
    device = model.device
    plain = without_adapters(model)
    hidden = hidden_states(plain, layout, prefills)
    if prefills:
        hidden = torch.cat([*(prefill.last for prefill in prefills), hidden])
    # The last token of a prompt predicts the first of each completion: its logits are made once for all of them.
    sources = [place for row in layout.sources for completion in row for place in completion]
    kept, where = (each.to(device) for each in torch.tensor(sources).unique(return_inverse=True))
    completions = [completion for row in rows for completion in row.completions]
    targets = torch.tensor([token for completion in completions for token in completion], device=device)
    logps = _head_logps(plain, hidden[kept], where, targets, _allowed(rows))
    return list(logps.split([len(completion) for completion in completions]))


def head_logits(model: Any, hidden: Tensor) -> Tensor:
    """Float32 logits of hidden states, scaled and softcapped as the architectures that pack have them."""
    config = model.config.get_text_config()
    logits: Tensor = model.get_output_embeddings()(hidden).float()
    if scaling := getattr(config, "logits_scaling", None):
        logits = logits / scaling
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = cap * (logits / cap).tanh()
    return logits


def _head_logps(
    model: Any, hidden: Tensor, where: Tensor, targets: Tensor, allowed: Sequence[Sequence[int]] | None
) -> Tensor:
    """log p of `targets`, each under the logits of row `where` of `hidden`, float32; a chunk of logits at a time.

    Each chunk is computed again for its gradient, so at most `LOGITS_PER_CHUNK` numbers are held.
    """
    among = () if allowed is None else _padded_ids(allowed, hidden.device)

    def chunk(hidden: Tensor, where: Tensor, targets: Tensor, *among: Tensor) -> Tensor:
        return _pick(head_logits(model, hidden), where, targets, *among)

    # A sharded head is gathered each time it is called, by all processes together, so it is called once.
    sharded = hasattr(model.get_output_embeddings().weight, "ds_id")
    size = len(hidden) if sharded else max(1, LOGITS_PER_CHUNK // model.config.get_text_config().vocab_size)
    if len(hidden) <= size:
        return chunk(hidden, where, targets, *among)
    logps = torch.zeros(len(targets), device=hidden.device)
    for start in range(0, len(hidden), size):
        mine = ((where >= start) & (where < start + size)).nonzero().squeeze(-1)
        inputs = (hidden[start : start + size], where[mine] - start, targets[mine], *(part[mine] for part in among))
        piece = checkpoint(chunk, *inputs, use_reentrant=False)
        logps = logps.index_copy(0, mine, piece)
    return logps


def _padded(
    model: Model, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], allowed: Sequence[Sequence[int]] | None
) -> list[Tensor]:
    """The plain path: one sequence a completion, padded. Padding stands on the left, so that the places whose logits
    are kept are few; for a decoder that keeps a state it stands on the right, where nothing before it knows of it."""
    device, width = model.device, max(len(prompt) + len(completion) for prompt, completion in pairs)
    right = keeps_state(model.config)
    starts = [0 if right else width - len(prompt) - len(completion) for prompt, completion in pairs]
    ids = torch.zeros(len(pairs), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, (start, (prompt, completion)) in enumerate(zip(starts, pairs, strict=True)):
        whole = slice(start, start + len(prompt) + len(completion))
        ids[i, whole] = torch.tensor([*prompt, *completion])
        mask[i, whole] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    told = {} if right else {"attention_mask": mask.to(device), "position_ids": positions.to(device)}
    # Where the last token of each prompt stands: its logits are of the first of the completion.
    ends = [start + len(prompt) - 1 for start, (prompt, _) in zip(starts, pairs, strict=True)]
    logits = model(input_ids=ids.to(device), logits_to_keep=width - min(ends), use_cache=False, **told).logits
    lengths = [len(completion) for _, completion in pairs]
    places = zip(ends, lengths, strict=True)
    picked = torch.cat([logits[i, end - width : end + n - width] for i, (end, n) in enumerate(places)]).float()
    targets = torch.tensor([token for _, completion in pairs for token in completion], device=device)
    among = () if allowed is None else _padded_ids(allowed, device)
    logps = _pick(picked, torch.arange(len(targets), device=device), targets, *among)
    return list(logps.split(lengths))


def _pick(logits: Tensor, where: Tensor, targets: Tensor, ids: Tensor | None = None, beyond: Any = None) -> Tensor:
    """log p of `targets`, each under row `where` of `logits`: among all words, or among its row of `ids` alone."""
    chosen = logits[where, targets]
    if ids is None:
        return chosen - logits.logsumexp(dim=-1)[where]
    return chosen - logits[where.unsqueeze(-1), ids].masked_fill(beyond, -torch.inf).logsumexp(dim=-1)


def among_allowed(logits: Tensor, allowed: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """The logits of some ids alone.

    Args:
        logits: (rows, vocabulary).
        allowed: the ids of each row, at least one.

    Returns:
        their logits (rows, most ids), −inf after the last id of a row, and the ids themselves.
    """
    ids, beyond = _padded_ids(allowed, logits.device)
    return logits.gather(-1, ids).masked_fill(beyond, -torch.inf), ids


def _padded_ids(allowed: Sequence[Sequence[int]], device: Any) -> tuple[Tensor, Tensor]:
    """Lists of ids as (lists, longest), and where they are beyond their end."""
    width = max(len(ids) for ids in allowed)
    ids = torch.tensor([[*row, *[row[0]] * (width - len(row))] for row in allowed], device=device)
    counts = torch.tensor([len(row) for row in allowed], device=device)
    return ids, torch.arange(width, device=device) >= counts.unsqueeze(-1)


def answer_logps(token_logps: Sequence[Tensor], aliases: str = "first") -> Tensor:
    """`answer_logp` as `sum` and as `mean`, side by side: (2,), nats, with gradient."""
    return torch.stack([answer_logp(token_logps, likelihood, aliases) for likelihood in LIKELIHOODS])


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
