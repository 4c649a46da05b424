"""From a request to what is asked of the pair, and from what it did to a response."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any
from uuid import uuid4

from dro_rl.errors import InputError, Phrase
from dro_rl.records import Document, check_id, check_text, check_unicode
from dro_rl.serve.ranking import ranked, score
from dro_rl.serve.refusals import Refusal
from dro_rl.serve.schemas import (
    AnswerMessage,
    ChatMessage,
    ChatRequest,
    ChatResponse,
    Choice,
    Citation,
    DocumentData,
    DocumentObject,
    RankedText,
    RerankRequest,
    RerankResponse,
    RerankResult,
    Retrieved,
    SelectionSaid,
    Usage,
)
from dro_rl.serve.work import Asked, Served

SPEAKERS = ("user", "assistant")


def check_model(asked: str | None, served: str) -> None:
    """Refuse a question to another model than the one that is served."""
    if asked is not None and asked != served:
        raise Refusal(404, f"there is no model {asked[:80]!r} here, but {served!r}", "model_not_found", "model")


def documents_of(given: Sequence[str | DocumentObject], most: int) -> tuple[Document, ...]:
    """The documents of a request.

    Raises:
        InputError: there is none, or are more than `most`; one has no text, or its id is another's too.
    """
    if not 1 <= len(given) <= most:
        raise InputError(
            "documents", Phrase(f"{len(given)} documents"), f"a question comes with 1 to {most}", "Send the best ones."
        )
    documents: list[Document] = []
    ids: set[str] = set()
    for index, each in enumerate(given):
        document = _document(each, index, f"documents[{index}]")
        if document.id in ids:
            raise InputError(
                f"documents[{index}].id", document.id, "a document stands once in a request", "Give each its own id."
            )
        ids.add(document.id)
        documents.append(document)
    return tuple(documents)


def _document(given: str | DocumentObject, index: int, place: str) -> Document:
    if isinstance(given, str):
        return Document(str(index), "", check_text(given, place))
    text, title, data = given.text, given.title, given.data
    if isinstance(data, str):
        text = data if text is None else text
    elif isinstance(data, DocumentData):
        text = next((each for each in (text, data.text, data.snippet) if each is not None), None)
        title = data.title if title is None else title
    if text is None:
        raise InputError(f"{place}.text", Phrase("missing"), "a document has a text", "Send {text, title?, id?}.")
    check_unicode(title or "", f"{place}.title")
    identifier = str(index) if given.id is None else check_id(given.id, f"{place}.id")
    return Document(identifier, title or "", check_text(text, f"{place}.text"))


def rerank_asked(request: RerankRequest, most: int) -> Asked:
    """What a request for a ranking asks."""
    return Asked(check_text(request.query, "query"), documents_of(request.documents, most))


def chat_asked(request: ChatRequest, most: int, has_index: bool) -> Asked:
    """What a chat asks.

    Raises:
        InputError: something in it cannot be answered.
    """
    if request.documents is None and not has_index:
        raise InputError(
            "documents",
            Phrase("missing"),
            "a question comes with the documents to answer it from",
            "Send documents, or start the server with --corpus INDEX.",
        )
    documents = () if request.documents is None else documents_of(request.documents, most)
    bounds = [bound for bound in (request.max_tokens, request.max_completion_tokens) if bound is not None]
    return Asked(question_of(request.messages), documents, True, min(bounds, default=None))


def question_of(messages: Sequence[ChatMessage]) -> str:
    """The question in a chat: its utterances, one a line, the last of them the user's.

    Raises:
        InputError: an instruction is given, which the pair does not follow; a message has no text.
    """
    texts = [_utterance(message, f"messages[{number}]") for number, message in enumerate(messages)]
    if messages[-1].role != "user":
        raise InputError(
            f"messages[{len(messages) - 1}].role", messages[-1].role, "the last message is the user's", "Put it last."
        )
    return "\n".join(texts)


def _utterance(message: ChatMessage, place: str) -> str:
    if message.role not in SPEAKERS:
        raise InputError(
            f"{place}.role",
            message.role,
            "the pair answers by the prompt that it was trained with: a message is the user's or the assistant's",
            "Leave it out.",
        )
    if isinstance(message.content, list):
        for number, part in enumerate(message.content):
            if part.type != "text" or part.text is None:
                raise InputError(f"{place}.content[{number}]", part.type, "a message is text", "Send text alone.")
        return check_text("".join(part.text or "" for part in message.content), f"{place}.content")
    return check_text("" if message.content is None else message.content, f"{place}.content")


def rerank_response(request: RerankRequest, served: Served, model: str, repeats: bool) -> RerankResponse:
    """The ranking. `repeats`: whether documents are, where the request does not say."""
    with_documents = repeats if request.return_documents is None else request.return_documents
    order = ranked(served.selection, len(served.documents))
    return RerankResponse(
        id=f"rerank-{uuid4().hex}",
        model=model,
        results=[
            RerankResult(
                number - 1,
                score(served.selection, rank),
                _repeated(request.documents[number - 1], served.documents[number - 1]) if with_documents else None,
            )
            for rank, number in enumerate(order[: request.top_n or None], start=1)
        ],
        selection=_selection(served),
        usage=_usage(served),
        meta={"api_version": {"version": "2"}},
    )


def _repeated(given: str | DocumentObject, document: Document) -> RankedText:
    """What was given of a document; an id that it was given here is none."""
    identifier = None if isinstance(given, str) or given.id is None else document.id
    return RankedText(document.text, document.title or None, identifier)


def chat_response(served: Served, model: str) -> ChatResponse:
    """The answer.

    Raises:
        Refusal: the index had nothing to answer it from.
    """
    if not served.documents:
        raise Refusal(404, "the index has no document that shares a word with the question", "nothing_found")
    retrieved = None
    if served.scores is not None:
        retrieved = [
            Retrieved(document.id, document.title, document.text, score)
            for document, score in zip(served.documents, served.scores, strict=True)
        ]
    return ChatResponse(
        id=f"chatcmpl-{uuid4().hex}",
        created=int(time.time()),
        model=model,
        choices=[Choice(AnswerMessage(served.text), "length" if served.cut else "stop")],
        usage=_usage(served),
        citations=[
            Citation(document.id, document.title, number - 1)
            for number in served.numbers
            for document in [served.documents[number - 1]]
        ],
        selection=_selection(served),
        retrieved=retrieved,
    )


def chat_events(response: ChatResponse, with_usage: bool) -> Iterator[str]:
    """An answer as server-sent events: who speaks, the text, why it ends and where it comes from, `[DONE]`."""
    head = {"id": response.id, "object": "chat.completion.chunk", "created": response.created, "model": response.model}

    def event(delta: dict[str, Any], finish_reason: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return f"data: {json.dumps({**head, 'choices': [choice], **more})}\n\n"

    (choice,) = response.choices
    whole = asdict(response)
    names = ("citations", "selection", "retrieved")
    yield event({"role": "assistant", "content": ""})
    yield event({"content": choice.message.content})
    yield event({}, choice.finish_reason, **{name: whole[name] for name in names if whole[name] is not None})
    if with_usage:
        yield f"data: {json.dumps({**head, 'choices': [], 'usage': whole['usage']})}\n\n"
    yield "data: [DONE]\n\n"


def _selection(served: Served) -> SelectionSaid:
    selection = served.selection
    return SelectionSaid([number - 1 for number in selection.numbers], selection.valid, list(selection.problems))


def _usage(served: Served) -> Usage:
    return Usage(served.prompt_tokens, served.completion_tokens, served.prompt_tokens + served.completion_tokens)
