"""From a question to the tokens a model reads, and from text to the tokens it writes.

Sampling, scoring, training, evaluation and serving all come through `Prompter.encode`: one template, one
tokenisation, one way to cut. It knows of tokenizers and templates, not of models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from dro_rl.errors import InputError, Phrase
from dro_rl.records import Document, Question
from dro_rl.selection import format_selection
from dro_rl.selection.constraint import SelectionConstraint

TEMPLATES = Path(__file__).parent


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
            It receives `question`, `documents`, and for the selector `k` and `example`.
        max_prompt_length: in tokens. Longer prompts have their documents cut evenly; the question never is.
        chat_template_kwargs: passed to the chat template (`{"enable_thinking": false}`).
    """

    tokenizer: PreTrainedTokenizerBase
    template: str
    max_prompt_length: int | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._template = load_template(self.template)
        self._special = tuple(
            token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special and token.content
        )
        self._constraints: dict[tuple[int, int], SelectionConstraint] = {}

    @property
    def eos_token_id(self) -> int:
        """The token that ends what the model writes."""
        return self.tokenizer.eos_token_id

    @property
    def source(self) -> str:
        """The template's text, saved beside a trained model so that serving asks as training did."""
        return template_path(self.template).read_text(encoding="utf-8")

    def selector_prompt(self, question: Question, k: int) -> Prompt:
        """The prompt that asks for exactly K of the question's candidates, numbered from 1."""
        example = format_selection(range(min(k, len(question.documents)), 0, -1))
        return self._fit(question, question.documents, k=k, example=example)

    def generator_prompt(self, question: Question, numbers: Sequence[int]) -> Prompt:
        """The prompt that asks for the answer from the selected documents, in the selected order."""
        return self._fit(question, [question.documents[number - 1] for number in numbers])

    def completion(self, text: str) -> tuple[int, ...]:
        """Token ids of what the model should write: `text` and the end of the sequence."""
        ids = self.tokenizer(self._defused(text), add_special_tokens=False)["input_ids"]
        return (*ids, self.tokenizer.eos_token_id)

    def constraint(self, num_documents: int, k: int) -> SelectionConstraint:
        """What keeps a selection valid, made once for each N and K. It admits what `completion` writes."""
        if (num_documents, k) not in self._constraints:
            self._constraints[num_documents, k] = SelectionConstraint(self.tokenizer, num_documents, k)
        return self._constraints[num_documents, k]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of sampled tokens, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def render(self, question: str, documents: Sequence[Document], **variables: Any) -> str:
        """The prompt as text, chat template included."""
        text = self._template.render(question=question, documents=documents, **variables).strip("\n") + "\n"
        if not self.tokenizer.chat_template:
            return text
        rendered = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text.rstrip("\n")}],
            add_generation_prompt=True,
            tokenize=False,
            **self.chat_template_kwargs,
        )
        assert isinstance(rendered, str)
        return rendered

    def _defused(self, text: str) -> str:
        """The text with the spelling of special tokens broken: a document must not end a sequence or open a turn."""
        for token in self._special:
            if token in text:
                text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def _encode(self, text: str) -> tuple[int, ...]:
        # A chat template writes its own special tokens; plain text gets the tokenizer's, less a closing one.
        ids = self.tokenizer(text, add_special_tokens=not self.tokenizer.chat_template)["input_ids"]
        if not self.tokenizer.chat_template and ids and ids[-1] == self.tokenizer.eos_token_id:
            ids = ids[:-1]
        return tuple(ids)

    def _fit(self, question: Question, documents: Sequence[Document], **variables: Any) -> Prompt:
        text = self._defused(question.question)
        documents = [
            replace(document, title=self._defused(document.title), text=self._defused(document.text))
            for document in documents
        ]
        ids = self._encode(self.render(text, documents, **variables))
        if self.max_prompt_length is None or len(ids) <= self.max_prompt_length:
            return Prompt(ids, cut=False)
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
                return Prompt(ids, cut=True)
            # A text cut short need not give the first tokens of the whole: give back what is still over.
            cap = max(0, cap + (-over // len(documents))) if cap else -1
        raise InputError(
            f"question {question.id}",
            Phrase(f"{len(ids)} tokens with every document cut to its title"),
            f"a prompt has at most max_prompt_length = {self.max_prompt_length} tokens, and the question is never cut",
            "Raise max_prompt_length, or drop the question.",
        )


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


def template_path(name: str) -> Path:
    """Where a template is: one shipped in this folder, by name, or any `.jinja` file."""
    return Path(name) if name.endswith(".jinja") else TEMPLATES / f"{name}.jinja"


def load_template(name: str) -> jinja2.Template:
    """Load a template by name or path. Raises `InputError` for one that is missing or is not Jinja."""
    path = template_path(name)
    if not path.is_file():
        shipped = ", ".join(sorted(p.stem for p in TEMPLATES.glob("*.jinja")))
        raise InputError(
            "prompt template", name, f"a template is one of {shipped}, or a path to a .jinja file", "Check the name."
        )
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    try:
        return environment.from_string(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(
            str(path), Phrase(f"byte {error.start} is not UTF-8"), "a template is UTF-8 text", "Convert the file."
        ) from None
    except jinja2.TemplateSyntaxError as error:
        raise InputError(
            f"{path}: line {error.lineno}", Phrase(str(error)), "a template is valid Jinja", "Correct it."
        ) from None
