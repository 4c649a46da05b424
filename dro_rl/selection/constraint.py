"""Selections that are valid by construction: which tokens may come next, for any tokenizer. Knows of no model.

`SelectionConstraint(tokenizer, N, K)` admits exactly K distinct numbers of 1..N in the selection format, or, with
`least`, from so many to K of them: each list in one spelling, the tokenizer's own encoding of the text (what
`Prompter.completion` gives, and what a warm-up teaches), and then its end. One selection is one sequence of tokens, so
p(z|x) is the probability of a selection and not of a spelling, and the probabilities of all N!/(N−K)! of them, of each
length that there may be, sum to one.

**How.** Nothing is enumerated. The text `[a] > [b] > [c]` is cut into stretches, `[a]`, ` > [b]`, ` > [c]`, and a token
belongs to the stretch in which it ends. Merges reach over a cut (`] >`, ` [1`), so the tokens of a stretch depend on
the number before and on what comes after it, a number or the end. They are read off the tokenizer's encoding of
those numbers. Numbers that make no difference when they come after are one class, so tables of about N² spellings,
made as they are needed, serve all selections. What has been written is followed along all readings at once (is `[1`
the number 1, or the beginning of 12?), as an automaton without determinism is.

**Why it is exact.** Let the tokens of a stretch depend on no more than that. Then the tokens of any path through the
automaton are the tokenizer's encoding of a selection (soundness), and every selection's encoding is a path
(completeness). A spelling that none of the free numbers may follow is never begun, so no path ends in nothing. Real
tokenizers keep the condition: they merge within words, or within brackets, arrows and digits. `verify` does not take it
on trust: before a run it compares with the tokenizer itself, on every selection where there are few, and refuses what
does not agree.

Engines in other processes build their own from the same arguments: it holds caches and is not meant to be sent.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cache, lru_cache
from random import Random
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from dro_rl.errors import InputError
from dro_rl.selection import SelectionSpec, format_selection, parse_selection

KEPT_PREFIXES = 8192
"""Beginnings whose continuations are remembered; the others are followed again from the longest one that is."""

VERIFIED_SELECTIONS = 1000
"""Selections of a length that `verify` compares with the tokenizer: all, when there are no more."""

END = 1
"""Among the followers of a number, as bits, the end of the list: where no document number is."""


class _Reading(NamedTuple):
    """One way to read what has been written: `numbers` are chosen, `rest` is yet to be written of the last one.

    `followers` is what the spelling of the last one allows after it, as bits: numbers, and `END`.
    """

    numbers: tuple[int, ...]
    rest: tuple[int, ...]
    followers: int


class SelectionConstraint:
    """The set of next tokens that keeps a selection valid.

    Args:
        tokenizer: a fast tokenizer with an end-of-sequence token.
        num_documents: N, the number of candidates, at least 1.
        k: K, the number of documents asked for, at most; with fewer candidates, all of them.
        end: the token that ends a selection; the tokenizer's end of sequence, unless told.
        least: the fewest documents that will do, up to K; K itself, unless told.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        num_documents: int,
        k: int,
        end: int | None = None,
        least: int | None = None,
    ) -> None:
        least = k if least is None else least
        if num_documents < 1 or not 1 <= least <= k:
            raise ValueError(f"there is nothing to select: {least} to {k} of {num_documents}")
        self.num_documents, self.k, self.least = num_documents, min(k, num_documents), min(least, num_documents)
        self.tokenizer, self.end = tokenizer, tokenizer.eos_token_id if end is None else end
        self._everything = (1 << (num_documents + 1)) - 2
        self._spellings, self._followers = cache(self._spell), cache(self._classify)
        self._continuations = lru_cache(KEPT_PREFIXES)(self._continue)

    @property
    def count(self) -> int:
        """How many selections there are."""
        return SelectionSpec(self.least, self.k).count(self.num_documents)

    @property
    def _lengths(self) -> range:
        return range(self.least, self.k + 1)

    def allowed(self, written: Sequence[int]) -> tuple[int, ...]:
        """Token ids that may come after the tokens written so far, ascending; none after the end of the sequence.

        Raises:
            ValueError: `written` is not the beginning of any selection.
        """
        return tuple(self._continuations(tuple(written)))

    def allowed_along(self, completion: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """`allowed` before each token of a completion: what its tokens were chosen among."""
        return tuple(self.allowed(completion[:i]) for i in range(len(completion)))

    def _continue(self, written: tuple[int, ...]) -> dict[int, list[_Reading]]:
        """The next tokens, ascending, each with the readings that go on with it."""
        if written:
            token = written[-1]
            before = self._continuations(written[:-1])
            if token not in before:
                raise ValueError(f"{list(written)} is not the beginning of a selection")
            readings = [after for reading in before[token] for after in self._advance(reading, token)]
        else:
            readings = self._choose((), self._everything)
        by_token: dict[int, list[_Reading]] = {}
        for reading in readings:
            by_token.setdefault(reading.rest[0], []).append(reading)
        return dict(sorted(by_token.items()))

    def _advance(self, reading: _Reading, token: int) -> list[_Reading]:
        """What a reading becomes when its next token has been written; nothing, when that was the end."""
        if token == self.end:
            return []
        if len(reading.rest) > 1:
            return [_Reading(reading.numbers, reading.rest[1:], reading.followers)]
        return self._choose(reading.numbers, reading.followers)

    def _choose(self, numbers: tuple[int, ...], candidates: int) -> list[_Reading]:
        """The readings of what may come when `numbers` are written: one of the candidates, which are as followers."""
        readings = [_Reading(numbers, (self.end,), 0)] if candidates & END else []
        if candidates == END:
            return readings
        chosen = sum(1 << number for number in numbers)
        for number, spellings in self._table(len(numbers), numbers[-1] if numbers else None).items():
            if not candidates >> number & 1 or chosen >> number & 1:
                continue
            for tokens, followers in spellings:
                free = followers & ~chosen
                if not free:
                    continue
                if tokens:
                    readings.append(_Reading((*numbers, number), tokens, free))
                else:  # all of the stretch is within the first token of the next one
                    readings += self._choose((*numbers, number), free)
        return readings

    def _table(self, index: int, before: int | None) -> dict[int, list[tuple[tuple[int, ...], int]]]:
        """The spellings of each number at a place of the list, after the number that stands before it.

        With each spelling comes what may follow it, as bits.
        """
        return self._spellings(min(index, 2), index + 1 >= self.least, index + 1 < self.k, before)

    def _spell(
        self, index: int, ends: bool, goes_on: bool, before: int | None
    ) -> dict[int, list[tuple[tuple[int, ...], int]]]:
        numbers = [number for number in range(1, self.num_documents + 1) if number != before]
        following = self._followers(index) if goes_on else {}
        last: list[tuple[int | None, int]] = [(None, END)] if ends else []
        classes = {number: [*following.get(number, []), *last] for number in numbers}
        places = [(number, after, members) for number in numbers for after, members in classes[number]]
        stretches = self._stretches([(before, number, after) for number, after, _ in places], index)
        spelled: dict[int, dict[tuple[int, ...], int]] = {number: {} for number in numbers}
        for (number, _, members), tokens in zip(places, stretches, strict=True):
            spelled[number][tokens] = spelled[number].get(tokens, 0) | members
        return {number: list(spellings.items()) for number, spellings in spelled.items()}

    def _classify(self, index: int) -> dict[int, list[tuple[int | None, int]]]:
        """For each number the classes of what may follow it: one of the class, and all of it as bits."""
        pairs = list(itertools.permutations(range(1, self.num_documents + 1), 2))
        places = [(None if index == 0 else self._other(*pair), *pair) for pair in pairs]
        classes: dict[int, dict[tuple[int, ...], tuple[int | None, int]]] = {}
        for (number, after), tokens in zip(pairs, self._stretches(places, index), strict=True):
            one, members = classes.setdefault(number, {}).get(tokens, (after, 0))
            classes[number][tokens] = (one, members | 1 << after)
        return {number: list(found.values()) for number, found in classes.items()}

    def _stretches(self, places: Sequence[tuple[int | None, int, int | None]], index: int) -> list[tuple[int, ...]]:
        """The tokens that end in the stretch of a number, given the numbers before and after it and how many are before
        (2 for more): some tokenizers mark the beginning of a text, and merge the mark."""
        texts, bounds = [], []
        for before, number, after in places:
            earlier = [] if before is None else [before]
            if index == 2:
                earlier = [self._other(*(n for n in (before, number, after) if n is not None)), *earlier]
            start, up_to = format_selection(earlier), format_selection([*earlier, number])
            texts.append(up_to if after is None else format_selection([*earlier, number, after]))
            bounds.append((len(start) if earlier else -math.inf, math.inf if after is None else len(up_to)))
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        return [
            tuple(token for token, (_, end) in zip(ids, offsets, strict=True) if low < end <= high)
            for ids, offsets, (low, high) in zip(encoded["input_ids"], encoded["offset_mapping"], bounds, strict=True)
        ]

    def _other(self, *numbers: int) -> int:
        """A number that is none of these, where there is one."""
        return next((number for number in range(1, self.num_documents + 1) if number not in numbers), 1)

    def verify(self) -> int:
        """Compare with the tokenizer's own encoding, and read it back.

        Returns:
            The tokens of the longest selection at most, end of sequence included.

        Raises:
            InputError: the tokenizer's spelling of a number depends on more than its neighbours, or does not survive
                decoding.
        """
        n, k = self.num_documents, self.k
        selections = [selection for length in self._lengths for selection in self._verified(length)]
        texts = [format_selection(selection) for selection in selections]
        encoded = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        for selection, text, ids in zip(selections, texts, encoded, strict=True):
            read = parse_selection(str(self.tokenizer.decode(ids, skip_special_tokens=True)), n, k, self.least)
            if self._encode(selection) != ids or read.numbers != selection or read.problems:
                raise InputError(
                    "constrain_selection",
                    text,
                    "the selector's tokenizer writes a number of a selection by itself and its neighbours, and reads "
                    f"it back; here it writes {self.tokenizer.convert_ids_to_tokens(ids)}",
                    "Use another tokenizer, or constrain_selection: false.",
                )
        return self._max_length()

    def _verified(self, length: int) -> list[tuple[int, ...]]:
        """Selections of a length: all, or every number in every place, its neighbours at random."""
        n = self.num_documents
        if math.perm(n, length) <= VERIFIED_SELECTIONS:
            return list(itertools.permutations(range(1, n + 1), length))
        orders = [Random(i).sample(range(1, n + 1), n) for i in range(math.ceil(VERIFIED_SELECTIONS / n))]
        return [tuple([*order[i:], *order[:i]][:length]) for order in orders for i in range(n)]

    def _encode(self, selection: Sequence[int]) -> list[int]:
        """A selection's tokens from the tables, without the end of the sequence."""
        ids: list[int] = []
        before: int | None = None
        for index, (number, after) in enumerate(itertools.zip_longest(selection, selection[1:])):
            for tokens, followers in self._table(index, before)[number]:
                if followers & (END if after is None else 1 << after):
                    ids += tokens
            before = number
        return ids

    def _max_length(self) -> int:
        """The longest first number and the K − 1 longest of the others, and the end of the sequence."""
        first = max(len(tokens) for spelled in self._table(0, None).values() for tokens, _ in spelled)
        longest = dict.fromkeys(range(1, self.num_documents + 1), 0)
        for index in range(1, self.k):
            for before in longest:
                for number, spelled in self._table(index, before).items():
                    longest[number] = max(longest[number], *(len(tokens) for tokens, _ in spelled))
        return first + sum(sorted(longest.values(), reverse=True)[: self.k - 1]) + 1


def allowed_for(
    constraint: SelectionConstraint | None, completions: Sequence[Sequence[int]]
) -> list[tuple[tuple[int, ...], ...]] | None:
    """`SelectionConstraint.allowed_along` of several completions, for `likelihood.Row`; None without a constraint."""
    return None if constraint is None else [constraint.allowed_along(completion) for completion in completions]
