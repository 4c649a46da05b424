"""Texts that spell a control token, made harmless: a document must not end a sequence, open a turn or begin to think.

What counts is not the spelling but what the tokenizer makes of it: some lower-case, some take full-width letters for
others, and control tokens need not be marked as special.
"""

from __future__ import annotations

import re
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

PASSES = 8
"""How often a text is broken up before what still spells a control token is taken out of it."""
REMEMBERED = 65536
"""Texts: questions share their documents."""

_MARKUP = re.compile(r"[^\w\s].+[^\w\s]", re.DOTALL)
_NUMBER = re.compile(r"\[\d+\]")


class Defuser:
    """Breaks up the spellings of a tokenizer's control tokens, with a space after their first character.

    Control tokens are those that it calls special, and added ones that look like markup (`<think>`, `[INST]`, but not
    `COVID-19`). A token of one character becomes a space.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._controls = {
            number
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.content.strip()
            and (token.special or _MARKUP.fullmatch(token.content.strip()))
            # Numbers of documents are a format of ours, and text elsewhere.
            and not _NUMBER.fullmatch(token.content)
        }
        self._controls |= {number for number in tokenizer.all_special_ids if number is not None}
        unknown = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
        if getattr(unknown, "unk_token", None) is not None and tokenizer.unk_token_id != tokenizer.eos_token_id:
            self._controls.discard(tokenizer.unk_token_id)  # any word may be unknown
        self.defuse = lru_cache(REMEMBERED)(self._defuse)

    def _defuse(self, text: str) -> str:
        for _ in range(PASSES):
            places = self._spelled(text)
            if not places:
                return text
            for start, end in reversed(places):
                text = (
                    text[: start + 1] + " " + text[start + 1 :] if end - start > 1 else text[:start] + " " + text[end:]
                )
        while places := self._spelled(text):
            for start, end in reversed(places):
                text = text[:start] + text[end:]
        return text

    def _spelled(self, text: str) -> list[tuple[int, int]]:
        """Where control tokens stand, without the space around them that some take in."""
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        spelled = [(start, text[start:end]) for token, (start, end) in spans if token in self._controls]
        return [
            (start + len(found) - len(found.lstrip()), start + len(found.rstrip()))
            for start, found in spelled
            if found.strip()
        ]
