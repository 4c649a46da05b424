"""From a question to the tokens a model reads, and from text to the tokens it writes.

Sampling, scoring, training, evaluation and serving all come through `Prompter.encode`: one template, one
tokenisation, one way to cut. It knows of tokenizers and templates, not of models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from dro_rl.errors import InputError, Phrase
from dro_rl.prompts.chat import ChatTemplate, Ends, ends_of
from dro_rl.prompts.defusing import Defuser
from dro_rl.prompts.templates import TEMPLATES, PromptTemplate, load_template, template_path
from dro_rl.records import Document, Question
from dro_rl.selection import SelectionSpec, format_selection
from dro_rl.selection.constraint import SelectionConstraint
from dro_rl.selection.thinking import is_mark

__all__ = ["TEMPLATES", "Ends", "Prompt", "PromptTemplate", "Prompter", "load_template", "template_path"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids of a prompt, and whether its documents were cut to fit."""

    ids: tuple[int, ...]
    cut: bool


@dataclass
class Prompter:
    """Renders one role's prompts with one tokenizer.

    Args:
        tokenizer: a fast tokenizer. Its chat template is used when it has one.
        template: a Jinja template: the name of one shipped in this folder (`selector`, `generator`, …) or a path.
            It receives `question`, `documents`, and for the selector `k` (a number, or `1 to 5`), `least` and `most`
            (numbers), and `example`.
        max_prompt_length: in tokens. Longer prompts have their documents cut evenly; the question never is.
        chat_template_kwargs: passed to the chat template. Thinking is off where it has the switch, unless they say
            `{"enable_thinking": true}`.
        declared_ends: token ids that the model's own configuration names as ends of a sequence.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str
    max_prompt_length: int | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    declared_ends: Sequence[int] = ()

    def __post_init__(self) -> None:
        self._template = load_template(self.template)
        self._chat = ChatTemplate(self.tokenizer, self.chat_template_kwargs) if self.tokenizer.chat_template else None
        self.ends: Ends = ends_of(self.tokenizer, self._chat, self.declared_ends)
        self._defused = Defuser(self.tokenizer).defuse
        special = [token for token in self.tokenizer.added_tokens_decoder.items() if token[1].special]
        self._thinking = {number: token.content for number, token in special if is_mark(token.content)}
        self._constraints: dict[tuple[int, int, int | None], SelectionConstraint] = {}

    @property
    def eos_token_id(self) -> int:
        """The token that ends what the model should write: `ends.written`."""
        return self.ends.written

    @property
    def source(self) -> str:
        """The template's text, saved beside a trained model so that serving asks as training did."""
        return self._template.source

    def selector_prompt(self, question: Question, k: int, least: int | None = None) -> Prompt:
        """The prompt that asks for K of the question's candidates, numbered from 1, or for `least` to K of them."""
        return self.selector_prompt_and_shown(question, k, least)[0]

    def selector_prompt_and_shown(
        self, question: Question, k: int, least: int | None = None
    ) -> tuple[Prompt, Sequence[Document]]:
        """The same, and the candidates as it shows them: cut to fit."""
        return self._fit(question, question.documents, **_asked_of(question, k, least))

    def selector_asks_again(self, question: Question, k: int, least: int | None = None) -> str:
        """What a next turn asks about the same candidates: the prompt's end, from the line in which the question stands
        behind them. Where the template has it before them alone, a line of its own comes first."""
        text = self._template.render(question.question, question.documents, **_asked_of(question, k, least))
        last = question.documents[-1].text
        behind = text[text.rfind(last) + len(last) :].partition("\n")[2].strip("\n")
        before, found, after = behind.rpartition(question.question)
        if found:
            return before.rpartition("\n")[2] + found + after
        return f"Question: {question.question}\n{behind}".strip()

    def next_turn(self, message: str) -> tuple[int, ...] | None:
        """Token ids of a user's next message, which stand behind a completion, up to where the next one begins.

        None if the chat template takes no second turn.
        """
        message = self._defused(message)
        text = f"\n{message}\n" if self._chat is None else self._chat.follow(message)
        if text is None:
            return None
        ids = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return ids[1:] if ids[:1] == (self.ends.written,) else ids

    def generator_prompt(self, question: Question, numbers: Sequence[int]) -> Prompt:
        """The prompt that asks for the answer from the selected documents, in the selected order."""
        return self._fit(question, [question.documents[number - 1] for number in numbers])[0]

    def completion(self, text: str) -> tuple[int, ...]:
        """Token ids of what the model should write: `text` and its end."""
        ids = self.tokenizer(self._defused(text), add_special_tokens=False)["input_ids"]
        return (*ids, self.ends.written)

    def constraint(self, num_documents: int, k: int, least: int | None = None) -> SelectionConstraint:
        """What keeps a selection valid, made once for each N, K and `least`. It admits what `completion` writes."""
        which = num_documents, k, least
        if which not in self._constraints:
            self._constraints[which] = SelectionConstraint(self.tokenizer, num_documents, k, self.ends.written, least)
        return self._constraints[which]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of sampled tokens, without special tokens but those that say what is thinking."""
        pieces: list[list[int]] = [[]]
        for token in ids:
            pieces += [[token], []] if token in self._thinking else []
            pieces[-1] += [] if token in self._thinking else [token]
        texts = [self._thinking.get(piece[0]) if piece else "" for piece in pieces]
        return "".join(
            str(self.tokenizer.decode(piece, skip_special_tokens=True)) if text is None else text
            for piece, text in zip(pieces, texts, strict=True)
        ).strip()

    def render(self, question: str, documents: Sequence[Document], **variables: Any) -> str:
        """The prompt as text, chat template included.

        Raises:
            InputError: a template does not render, or the chat template leaves the question out.
        """
        text = self._template.render(question, documents, **variables).strip("\n") + "\n"
        if self._chat is None:
            return text
        rendered = self._chat.ask(text.rstrip("\n"))
        if question in text and question.strip() not in rendered:
            raise InputError(
                f"chat template of {self.tokenizer.name_or_path or 'the tokenizer'}",
                rendered,
                "the prompt holds the question, and this template leaves a message of plain text out",
                "Use a tokenizer whose chat template takes text as content, or take chat_template off this one.",
            )
        return rendered

    def _encode(self, text: str) -> tuple[int, ...]:
        # A chat template writes its own special tokens; plain text gets the tokenizer's, less a closing one.
        ids = self.tokenizer(text, add_special_tokens=not self.tokenizer.chat_template)["input_ids"]
        if not self.tokenizer.chat_template and ids and ids[-1] == self.tokenizer.eos_token_id:
            ids = ids[:-1]
        return tuple(ids)

    def _fit(
        self, question: Question, documents: Sequence[Document], **variables: Any
    ) -> tuple[Prompt, Sequence[Document]]:
        text = self._defused(question.question)
        documents = [
            replace(document, title=self._defused(document.title), text=self._defused(document.text))
            for document in documents
        ]
        ids = self._encode(self.render(text, documents, **variables))
        if self.max_prompt_length is None or len(ids) <= self.max_prompt_length:
            return Prompt(ids, cut=False), documents
        encoded = self.tokenizer(
            [document.text for document in documents], add_special_tokens=False, return_offsets_mapping=True
        )
        ends = [[end for _, end in offsets] for offsets in encoded["offset_mapping"]]
        cap = max(0, _even_cap([len(end) for end in ends], excess=len(ids) - self.max_prompt_length))
        while cap >= 0:
            cut = [
                document if len(end) <= cap else replace(document, text=document.text[: end[cap - 1] if cap else 0])
                for document, end in zip(documents, ends, strict=True)
            ]
            ids = self._encode(self.render(text, cut, **variables))
            over = len(ids) - self.max_prompt_length
            if over <= 0:
                return Prompt(ids, cut=True), cut
            # A text cut short need not give the first tokens of the whole: give back what is still over.
            cap = max(0, cap + (-over // len(documents))) if cap else -1
        raise InputError(
            f"question {question.id}",
            Phrase(f"{len(ids)} tokens with every document cut to its title"),
            f"a prompt has at most max_prompt_length = {self.max_prompt_length} tokens, and the question is never cut",
            "Raise max_prompt_length, or drop the question.",
        )


def asks_for(k: int, least: int | None = None) -> dict[str, Any]:
    """How many documents are asked for, as a template is told."""
    spec = SelectionSpec(k if least is None else least, k)
    return {"k": str(spec) if spec.chooses else k, "least": spec.least, "most": spec.most}


def _asked_of(question: Question, k: int, least: int | None) -> dict[str, Any]:
    """`asks_for`, and an example of a selection."""
    return {**asks_for(k, least), "example": format_selection(range(min(k, len(question.documents)), 0, -1))}


def _even_cap(lengths: Sequence[int], excess: int) -> int:
    """The largest cap c with sum(max(0, length - c)) >= excess: long documents give first. -1 if there is none."""
    low, high = -1, max(lengths)
    while low < high:
        middle = (low + high + 1) // 2
        if sum(max(0, length - middle) for length in lengths) >= excess:
            low = middle
        else:
            high = middle - 1
    return low
