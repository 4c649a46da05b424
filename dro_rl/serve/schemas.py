"""Requests and responses. FastAPI checks requests by these fields and prints them as OpenAPI; nothing else reads them.

What a client of another server sends and this one has no use for is a field whose description begins with "Ignored";
a name that is no field is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

STRICT: Mapping[str, str] = {"extra": "forbid"}
LOOSE: Mapping[str, str] = {"extra": "ignore"}
"""Said of each part: one that says nothing is as strict as what it is in."""


def told(description: str, **rules: Any) -> Any:
    """A field that must be there, with what is said of it and the rules that it is checked by."""
    return field(metadata={"description": description, **rules})


def may(description: str, default: Any = None, **rules: Any) -> Any:
    """A field that may be left out."""
    return field(default=default, metadata={"description": description, **rules})


def ignored(why: str) -> Any:
    """A field that is taken and not read."""
    return field(default=None, metadata={"description": f"Ignored: {why}."})


@dataclass(frozen=True)
class TextPart:
    """A part of a message."""

    type: str = told("`text`, nothing else.")
    text: str | None = may("The text.")
    __pydantic_config__: ClassVar[Mapping[str, str]] = LOOSE


@dataclass(frozen=True)
class DocumentData:
    """What Cohere's clients put a document's fields in."""

    text: str | None = may("The text.")
    snippet: str | None = may("The text, where `text` is missing.")
    title: str | None = may("The title.")
    __pydantic_config__: ClassVar[Mapping[str, str]] = LOOSE


@dataclass(frozen=True)
class DocumentObject:
    """A document. Other fields than these are not read."""

    text: str | None = may("The text, which is not empty.")
    title: str | None = may("The title.")
    id: str | int | None = may("By which it is cited; its place from 0 where it is missing.")
    data: DocumentData | str | None = may("Text and title, as Cohere's clients have them.")
    __pydantic_config__: ClassVar[Mapping[str, str]] = LOOSE


@dataclass(frozen=True)
class RerankRequest:
    """A question and documents, as clients of vLLM, Jina and Cohere send them."""

    query: str = told("The question.")
    documents: list[str | DocumentObject] = told("What is ranked.")
    model: str | None = may("The name in `/v1/models`; any where it is missing.")
    top_n: int | None = may("Results to return; all where it is missing or 0.", ge=0, strict=True)
    return_documents: bool | None = may(
        "Whether results repeat their documents. Without it they do, but on /v2/rerank.", strict=True
    )
    max_tokens_per_doc: Any = ignored("documents are cut evenly, where the prompt has no room for them")
    max_chunks_per_doc: Any = ignored("a document is one piece")
    truncate_prompt_tokens: Any = ignored("documents are cut evenly, where the prompt has no room for them")
    truncation: Any = ignored("documents are cut evenly, where the prompt has no room for them")
    priority: Any = ignored("who came first is served first")
    user: Any = ignored("clients are told apart by address")
    __pydantic_config__: ClassVar[Mapping[str, str]] = STRICT


@dataclass(frozen=True)
class RankedText:
    """A document in a result."""

    text: str
    title: str | None = None
    id: str | None = None


@dataclass(frozen=True)
class RerankResult:
    """A document in its place, best first."""

    index: int = told("Its place in the request, from 0.")
    relevance_score: float = told("1/place for a document that the selector named, 0 for the others: not a likelihood.")
    document: RankedText | None = may("The document, where it is asked for.")


@dataclass(frozen=True)
class SelectionSaid:
    """What the selector said."""

    indices: list[int] = told("The documents that it named, best first, by place from 0.")
    valid: bool = told("Whether it named any. If not, an answer was written from the first ones.")
    problems: list[str] = told("What is not as asked: format, out_of_range, repeated, too_few, too_many.")


@dataclass(frozen=True)
class Usage:
    """Tokens, by the models' tokenizers."""

    prompt_tokens: int = told("Of the generator's prompt; of a ranking, of the question and all documents, whole.")
    completion_tokens: int = told("Of the answer, its end included.")
    total_tokens: int = told("Both.")


@dataclass(frozen=True, kw_only=True)
class RerankResponse:
    """All that vLLM's, Jina's and Cohere's clients look for."""

    id: str
    model: str
    results: list[RerankResult]
    selection: SelectionSaid
    usage: Usage
    meta: dict[str, Any] = told("The version of the API, where Cohere's clients look for it.")


@dataclass(frozen=True)
class ChatMessage:
    """One utterance."""

    role: str = told("`user` or `assistant`.")
    content: str | list[TextPart] | None = may("The text.")
    __pydantic_config__: ClassVar[Mapping[str, str]] = LOOSE


@dataclass(frozen=True)
class StreamOptions:
    """What a stream has besides the answer."""

    include_usage: bool = may("Whether a last chunk tells the tokens.", False, strict=True)
    __pydantic_config__: ClassVar[Mapping[str, str]] = LOOSE


@dataclass(frozen=True)
class ChatRequest:
    """A question, and documents or none, as OpenAI's clients send it, with `documents` as vLLM and Cohere have it."""

    messages: list[ChatMessage] = told(
        "The question. Several utterances are one a line, as a dialogue is in a question file.", min_length=1
    )
    model: str | None = may("The name in `/v1/models`; any where it is missing.")
    documents: list[str | DocumentObject] | None = may("To answer from. Without them, they are found in the index.")
    stream: bool | None = may("Whether the answer comes as server-sent events: in one piece.", strict=True)
    stream_options: StreamOptions | None = may("Of a stream.")
    max_tokens: int | None = may("Of the answer; never more than it was trained to write.", ge=1, strict=True)
    max_completion_tokens: int | None = may("The same.", ge=1, strict=True)
    n: Literal[1] | None = may("One answer is given.")
    temperature: Any = ignored("answers are greedy")
    top_p: Any = ignored("answers are greedy")
    top_k: Any = ignored("answers are greedy")
    min_p: Any = ignored("answers are greedy")
    seed: Any = ignored("answers are greedy, and the same each time")
    presence_penalty: Any = ignored("answers are greedy")
    frequency_penalty: Any = ignored("answers are greedy")
    repetition_penalty: Any = ignored("answers are greedy")
    user: Any = ignored("clients are told apart by address")
    safety_identifier: Any = ignored("clients are told apart by address")
    metadata: Any = ignored("nothing is kept")
    store: Any = ignored("nothing is kept")
    service_tier: Any = ignored("who came first is served first")
    priority: Any = ignored("who came first is served first")
    __pydantic_config__: ClassVar[Mapping[str, str]] = STRICT


@dataclass(frozen=True)
class Citation:
    """A document that the answer was written from."""

    id: str
    title: str
    index: int = told("Its place among the documents of the request, or in `retrieved`, from 0.")


@dataclass(frozen=True)
class Retrieved:
    """A document that was found in the index."""

    id: str
    title: str
    text: str
    score: float = told("The retriever's.")


@dataclass(frozen=True)
class AnswerMessage:
    """The answer."""

    content: str
    role: Literal["assistant"] = "assistant"


@dataclass(frozen=True)
class Choice:
    """The one answer."""

    message: AnswerMessage
    finish_reason: Literal["stop", "length"]
    index: int = 0


@dataclass(frozen=True, kw_only=True)
class ChatResponse:
    """OpenAI's completion, and where the answer comes from."""

    id: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    citations: list[Citation] = told("The documents that the generator read, in the order in which it read them.")
    selection: SelectionSaid
    retrieved: list[Retrieved] | None = may("All candidates, best first, where they come from the index.")
    object: Literal["chat.completion"] = "chat.completion"


@dataclass(frozen=True)
class ModelCard:
    """What is served."""

    id: str
    created: int
    object: Literal["model"] = "model"
    owned_by: str = "dro_rl"


@dataclass(frozen=True)
class ModelList:
    """The one model."""

    data: list[ModelCard]
    object: Literal["list"] = "list"


@dataclass(frozen=True)
class Health:
    """Whether questions are taken."""

    status: Literal["ok", "stopping"]
    model: str
    waiting: int = told("Questions in the queue.")
    working: int = told("Questions in work.")


@dataclass(frozen=True)
class ErrorSaid:
    """What is wrong."""

    message: str = told("For a person.")
    type: str = told("OpenAI's kind of error.")
    param: str | None = told("The field of the request that it is about.")
    code: str | None = told("For a program.")


@dataclass(frozen=True)
class ErrorResponse:
    """Every answer with a status from 400 upward."""

    error: ErrorSaid
