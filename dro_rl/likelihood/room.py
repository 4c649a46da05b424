"""For how many tokens a pass has room: what the recipe says, or with `auto` what was found to fit."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch

from dro_rl.errors import Phrase, is_out_of_memory
from dro_rl.likelihood import TOKENS_PER_PASS

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
AUTO = "auto"


class Room:
    """How many tokens go through the models at once, at most.

    Args:
        tokens: what the recipe says. With `auto` it is tried out, and less whenever memory runs out all the same.
    """

    def __init__(self, tokens: int | str) -> None:
        self.auto = tokens == AUTO
        self.tokens = TOKENS_PER_PASS if isinstance(tokens, str) else tokens
        self.found = not self.auto
        """Whether it is known, or has been tried out."""
        self.alone: Phrase | None = None
        """What goes whole and is all of a pass, and how much it takes."""

    def within(self, work: Callable[[int], Result], sizes: Iterable[int]) -> Result:
        """`work(tokens)`, from the start with half the tokens whenever memory runs out.

        Args:
            work: without gradient, so that nothing is left of it where it fails.
            sizes: of the rows, each of which goes whole.
        """
        largest = max(sizes, default=0)
        while True:
            try:
                return work(self.tokens)
            except Exception as error:
                if not (self.auto and is_out_of_memory(error)):
                    raise
                if self.tokens <= largest:
                    self.alone = Phrase(f"a prompt with its completions takes {largest:,} tokens")
                    raise
            self.lower(self.tokens // 2)

    def lower(self, tokens: int) -> None:
        """Hold fewer at once from here on; what the failure left is let go."""
        self.tokens = tokens
        free()
        logger.warning(f"out of memory: {tokens:,} tokens at a time from here on")

    def find(self, sizes: Sequence[int], fits: Callable[[Sequence[int]], bool]) -> int | None:
        """Try how many questions fit together, the largest first: one, twice as many, and what lies between.

        Args:
            sizes: of each question, in tokens.
            fits: whether the questions at some indices go through both models, forward and backward.

        Returns:
            The index of the largest one where it does not fit alone.
        """
        order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
        low, high, count = 0, len(order) + 1, 1
        while high - low > 1:
            low, high = (count, high) if fits(order[:count]) else (low, count)
            count = min(2 * low, len(order)) if high > len(order) else (low + high) // 2
        if not low:
            return order[0]
        self.tokens, self.found = sum(sizes[i] for i in order[:low]), True
        logger.info(f"{self.tokens:,} tokens go through the models at once: {low} of {len(order)} questions fit")
        return None


def free() -> None:
    """Give back what an error's frames held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
