"""Rows laid out one after another without padding, each shared piece of text once.

A `Row` is a prompt with its completions. A row's prompt stands once, its completions after it at the positions that
follow it. As a prefix tree, prompts that begin alike share their beginnings too: the piece stands once, and what
differs branches off it. Who attends to whom is a list of `Segment`s, which `dro_rl.likelihood.attention` carries out.

This module knows of token ids, not of models.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

WORTH_SHARING = 64
"""Tokens. A shorter common beginning is computed again: attending to it apart costs more than it saves."""
WORTH_SAVING = 0.1
"""Share of the tokens of the prompts that begin alike; less is not worth a branch either."""


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
        """Tokens of the row when its prompt stands once."""
        return len(self.prompt) + sum(len(completion) for completion in self.completions)


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens that attend together.

    Args:
        queries: where they stand.
        keys: where what they look at stands, in order; the queries themselves come last.
        mask: (queries, keys) bool, True where one may look. None: the keys are the queries, causally.
    """

    queries: slice
    keys: tuple[slice, ...]
    mask: Tensor | None

    def to(self, device: torch.device | str) -> Segment:
        """The segment with its mask on a device."""
        return self if self.mask is None else replace(self, mask=self.mask.to(device))


@dataclass(slots=True)
class Layout:
    """One sequence that holds rows.

    Args:
        ids, positions: of every token.
        segments: in the order of their queries; together they cover the sequence.
        sources: for each row and completion, the places whose outputs predict its tokens.
    """

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    sources: list[list[list[int]]] = field(default_factory=list)

    def _write(self, tokens: Sequence[int], position: int) -> slice:
        start = len(self.ids)
        self.ids += tokens
        self.positions += range(position, position + len(tokens))
        return slice(start, len(self.ids))

    def _attend(self, context: tuple[slice, ...], queries: slice, owners: Sequence[int], shift: int = 0) -> None:
        """Let tokens see the context, and those before them of the same owner; their keys stand `shift` places on."""
        if not context and len(set(owners)) == 1:
            self.segments.append(Segment(queries, (queries,), None))
            return
        owner = torch.tensor(owners)
        own = (owner.unsqueeze(1) == owner).tril()
        seen = torch.ones(len(owner), sum(piece.stop - piece.start for piece in context), dtype=torch.bool)
        mine = slice(queries.start + shift, queries.stop + shift)
        self.segments.append(Segment(queries, _joined((*context, mine)), torch.cat([seen, own], dim=1)))


def lay_out(rows: Sequence[Row], *, prefix_tree: bool = False) -> Layout:
    """Rows as one sequence.

    Args:
        rows: each with at least one prompt token; completions may be missing, as in a prefill.
        prefix_tree: let prompts that begin alike share their beginnings, where that saves enough.
    """
    layout = Layout(sources=[[[] for _ in row.completions] for row in rows])
    if prefix_tree:
        _branch(layout, rows, list(range(len(rows))), 0, ())
    else:
        for i in range(len(rows)):
            _branch(layout, rows, [i], 0, ())
    return layout


def lay_out_after(rows: Sequence[Row]) -> Layout:
    """Completions alone, as one sequence, after prompts that stand elsewhere.

    Keys are counted over all prompts, one after another, and then the sequence; sources over the last token of each
    prompt, and then the sequence.
    """
    layout = Layout(sources=[[[] for _ in row.completions] for row in rows])
    shift, start = sum(len(row.prompt) for row in rows), 0
    for i, row in enumerate(rows):
        prompt = slice(start, start + len(row.prompt))
        start, written = prompt.stop, []
        for j, completion in enumerate(row.completions):
            piece = layout._write(completion, len(row.prompt))
            layout.sources[i][j] = [i, *range(len(rows) + piece.start, len(rows) + piece.stop - 1)]
            written.append(piece)
        owners = [owner for owner, piece in enumerate(written) for _ in range(piece.stop - piece.start)]
        layout._attend((prompt,), slice(written[0].start, written[-1].stop), owners, shift)
    return layout


def _branch(layout: Layout, rows: Sequence[Row], members: list[int], depth: int, context: tuple[slice, ...]) -> None:
    """Lay out rows whose prompts agree up to `depth`, where the pieces of `context` end."""
    prompts = [tuple(rows[i].prompt) for i in members]
    end = _agreement(min(prompts), max(prompts))
    ended = [i for i in members if len(rows[i].prompt) == end]
    parted: dict[int, list[int]] = defaultdict(list)
    for i in members:
        if i not in ended:
            parted[rows[i].prompt[end]].append(i)
    saved, whole = (end - depth) * (len(members) - 1), sum(len(prompt) - depth for prompt in prompts)
    if parted and len(members) > 1 and (end - depth < WORTH_SHARING or saved < WORTH_SAVING * whole):
        for group in ([ended] if ended else []) + list(parted.values()):
            _branch(layout, rows, group, depth, context)
        return

    leaves = [(i, j) for i in ended for j in range(len(rows[i].completions))]
    stem = layout._write(prompts[0][depth:end], depth)
    if len(leaves) <= 1 and not parted:  # nothing branches off: prompt and completion are one causal piece
        tail = stem
        for i, j in leaves:
            tail = _write_completion(layout, rows, i, j, stem, end)
        layout._attend(context, slice(stem.start, tail.stop), [0] * (tail.stop - stem.start))
        return
    layout._attend(context, stem, [0] * (stem.stop - stem.start))
    context = (*context, stem)
    if leaves:
        written = [_write_completion(layout, rows, i, j, stem, end) for i, j in leaves]
        owners = [owner for owner, piece in enumerate(written) for _ in range(piece.stop - piece.start)]
        layout._attend(context, slice(written[0].start, written[-1].stop), owners)
    for group in parted.values():
        _branch(layout, rows, group, end, context)


def _write_completion(layout: Layout, rows: Sequence[Row], i: int, j: int, stem: slice, position: int) -> slice:
    piece = layout._write(rows[i].completions[j], position)
    layout.sources[i][j] = [stem.stop - 1, *range(piece.start, piece.stop - 1)]
    return piece


def _agreement(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    differ = (place for place, (one, other) in enumerate(zip(first, second, strict=False)) if one != other)
    return next(differ, min(len(first), len(second)))


def _joined(pieces: Sequence[slice]) -> tuple[slice, ...]:
    """Pieces that touch, as one."""
    joined = [pieces[0]]
    for piece in pieces[1:]:
        if piece.start == joined[-1].stop:
            joined[-1] = slice(joined[-1].start, piece.stop)
        else:
            joined.append(piece)
    return tuple(joined)
