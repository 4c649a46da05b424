"""A tokenizer's chat template: what it writes around a message, what it ends an answer with, and what is wrong with it.

transformers renders it, in a sandbox of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from dro_rl.errors import InputError, Phrase, first_line

OURS = ("conversation", "add_generation_prompt", "continue_final_message", "tokenize", "return_dict", "return_tensors")
"""Arguments of `apply_chat_template` that are not a recipe's to say."""

PROBE = "the answer of this turn"


@dataclass(frozen=True, slots=True)
class Ends:
    """What ends a completion, as token ids.

    Args:
        written: the one that completions to imitate or to score are given: the chat template's own, where it ends an
            assistant's turn in a token, else the tokenizer's end of sequence, unless the model declares others alone.
        stops: ascending, all that end what a model writes: that one, the tokenizer's, and those the model declares.
    """

    written: int
    stops: tuple[int, ...]


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer that has one, with its arguments.

    Thinking is off where the template has the switch and the arguments do not say otherwise.

    Raises:
        InputError: the arguments are not for a template, or there are several templates and none is named.
    """

    tokenizer: PreTrainedTokenizerBase
    arguments: Mapping[str, Any]

    def __post_init__(self) -> None:
        for name in OURS:
            if name in self.arguments:
                raise InputError(
                    "chat_template_kwargs", name, "these are variables of the chat template", "Take it off the list."
                )
        if re.search(r"\benable_thinking\b", self._source()):
            object.__setattr__(self, "arguments", {"enable_thinking": False, **self.arguments})

    def _source(self) -> str:
        own, named = self.tokenizer.chat_template, self.arguments.get("chat_template")
        if not isinstance(own, dict):
            return str(named or own)
        if named is None and "default" not in own:
            raise InputError(
                "chat_template_kwargs",
                Phrase(f"no template is named, and {self.tokenizer.name_or_path} has {', '.join(sorted(own))}"),
                "one of a tokenizer's chat templates is the default, or is named",
                f"Use chat_template_kwargs: {{chat_template: {min(own)}}}.",
            )
        return str(own.get(named or "default", named))

    def ask(self, text: str) -> str:
        """The prompt that a message makes, up to where the answer begins."""
        return self._render([{"role": "user", "content": text}], add_generation_prompt=True)

    def follow(self, text: str) -> str | None:
        """What stands between an answer and the next one, where a second message asks for it: from the first answer's
        end on. None if the template takes no second turn."""
        turns = [
            {"role": "user", "content": "A question?"},
            {"role": "assistant", "content": PROBE},
            {"role": "user", "content": text},
        ]
        try:
            between = self._render(turns, add_generation_prompt=True).rpartition(PROBE)[2]
        except InputError:
            return None
        return between if text.strip() in between else None

    def end_of_turn(self) -> int | None:
        """The token that an assistant's turn ends in; None where it ends in none."""
        turn = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": PROBE}]
        try:
            tail = self._render(turn, add_generation_prompt=False).rpartition(PROBE)[2]
        except InputError:  # a template that takes no answers ends none
            return None
        controls = self.tokenizer.added_tokens_decoder
        for token in self.tokenizer(tail, add_special_tokens=False)["input_ids"]:
            if token in controls and controls[token].content.strip():
                return token
            if str(self.tokenizer.decode([token])).strip():
                return None
        return None

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=add_generation_prompt, tokenize=False, **self.arguments
            )
        # A template raises its own errors, and those of the expressions in it.
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise InputError(
                f"chat template of {self.tokenizer.name_or_path or 'the tokenizer'}",
                Phrase(first_line(error)),
                "it renders a user's message and its chat_template_kwargs",
                "Correct chat_template_kwargs, or the template.",
            ) from None
        return str(rendered)


def ends_of(tokenizer: PreTrainedTokenizerBase, chat: ChatTemplate | None, declared: Sequence[int]) -> Ends:
    """What ends a completion.

    Args:
        tokenizer: with an end of sequence.
        chat: its chat template, where it has one.
        declared: what the model says: `eos_token_id` of its generation config.
    """
    known = [token for token in declared if 0 <= token < len(tokenizer)]
    turn = chat.end_of_turn() if chat is not None else None
    own = tokenizer.eos_token_id if not known or tokenizer.eos_token_id in known else known[0]
    written = own if turn is None else turn
    return Ends(written, tuple(sorted({written, tokenizer.eos_token_id, *known})))
