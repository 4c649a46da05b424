"""The routes. This file alone knows FastAPI, and has it only where it is called: it is an extra."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

from dro_rl import __version__
from dro_rl.errors import InputError, LackError, did_you_mean, is_out_of_memory
from dro_rl.serve.batching import Batcher
from dro_rl.serve.limits import App, gone
from dro_rl.serve.metrics import Metrics
from dro_rl.serve.page import page, policy
from dro_rl.serve.refusals import Refusal
from dro_rl.serve.requests import (
    chat_asked,
    chat_events,
    chat_response,
    check_model,
    rerank_asked,
    rerank_response,
)
from dro_rl.serve.schemas import (
    ChatRequest,
    ChatResponse,
    ErrorResponse,
    Health,
    ModelCard,
    ModelList,
    RerankRequest,
    RerankResponse,
)
from dro_rl.serve.settings import Limits
from dro_rl.serve.work import Asked, Served
from dro_rl.shown import visible

logger = logging.getLogger(__name__)

RERANK = ("/v1/rerank", "/rerank", "/v2/rerank")
PATHS = frozenset({"/", "/health", "/metrics", "/openapi.json", "/v1/models", "/v1/chat/completions", *RERANK})
REFUSED = {
    400: "Something in the request is wrong; `param` names it.",
    404: "There is no such model, or nothing was found.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    429: "This address asks too often.",
    502: "The generator's endpoint fails.",
    503: "The queue is full, or the server stops.",
    504: "It took too long.",
}


def create_app(model: str, batcher: Batcher[Asked, Served], metrics: Metrics, limits: Limits, has_index: bool) -> App:
    """The application; `limits.Gate` goes before it.

    Args:
        model: the name of what is served.
        batcher: has the pair.
        metrics: what is counted.
        limits: what is refused.
        has_index: whether documents are found where none come along.
    """
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
    from starlette.exceptions import HTTPException

    began = int(time.time())
    shown = page(model, has_index)
    app = FastAPI(
        title="dro_rl",
        version=__version__,
        description="A selector that ranks documents and a generator that answers from those it selects.",
        docs_url=None,  # FastAPI's pages of documentation fetch scripts from a CDN
        redoc_url=None,
        responses={status: {"model": ErrorResponse, "description": words} for status, words in REFUSED.items()},
    )

    async def served(request: Request, asked: Asked) -> Served:
        """What the pair does, as long as the client waits for it."""
        result = asyncio.wrap_future(batcher.submit(asked))
        hung_up = asyncio.create_task(disconnected(request))
        both: set[asyncio.Future[Any]] = {result, hung_up}
        await asyncio.wait(both, timeout=limits.answer_seconds, return_when=asyncio.FIRST_COMPLETED)
        if result.done():
            hung_up.cancel()
            done = result.result()
            metrics.tokens(done.prompt_tokens, done.completion_tokens)
            return done
        result.cancel()
        if hung_up.done():
            raise gone()
        hung_up.cancel()
        raise Refusal(
            504, f"not answered within {limits.answer_seconds:g} seconds; ask again when there is less to do", "timeout"
        )

    async def disconnected(request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    async def rerank(request: Request, body: RerankRequest) -> RerankResponse:
        check_model(body.model, model)
        done = await served(request, rerank_asked(body, limits.documents))
        return rerank_response(body, done, model, repeats=request.url.path != "/v2/rerank")

    for path in RERANK:
        app.post(path, response_model=RerankResponse, response_model_exclude_none=True, summary="Rank documents")(
            rerank
        )

    @app.post(
        "/v1/chat/completions",
        response_model=ChatResponse,
        response_model_exclude_none=True,
        summary="Answer a question from documents, and cite those that were read",
    )
    async def chat(request: Request, body: ChatRequest) -> Any:
        check_model(body.model, model)
        response = chat_response(await served(request, chat_asked(body, limits.documents, has_index)), model)
        if not body.stream:
            return response
        with_usage = body.stream_options is not None and body.stream_options.include_usage

        async def events() -> AsyncIterator[str]:
            for event in chat_events(response, with_usage):
                yield event

        return StreamingResponse(events(), media_type="text/event-stream")

    @app.get("/v1/models", summary="What is served")
    async def models() -> ModelList:
        return ModelList([ModelCard(model, began)])

    @app.get("/health", response_model=Health, summary="Whether questions are taken")
    async def health(response: Response) -> Health:
        response.status_code = 503 if batcher.stopping else 200
        return Health("stopping" if batcher.stopping else "ok", model, batcher.waiting, batcher.working)

    @app.get("/metrics", response_class=Response, summary="Counters, as Prometheus reads them")
    async def counted() -> Response:
        text, kind = metrics.text()
        return Response(text, headers={"content-type": kind})

    @app.get("/", response_class=HTMLResponse, summary="A page to ask by hand")
    async def by_hand() -> HTMLResponse:
        return HTMLResponse(shown, headers={"content-security-policy": policy(shown)})

    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> JSONResponse:
        return JSONResponse(error.content, error.status, error.headers)

    @app.exception_handler(InputError)
    async def wrong(request: Request, error: InputError) -> JSONResponse:
        return await refused(request, of_input(error))

    @app.exception_handler(RequestValidationError)
    async def misshapen(request: Request, error: RequestValidationError) -> JSONResponse:
        return await refused(request, of_shape(error.errors()))

    @app.exception_handler(HTTPException)
    async def elsewhere(request: Request, error: HTTPException) -> JSONResponse:
        said = f"{request.method} {visible(request.url.path)}: {error.detail}"
        return await refused(
            request, Refusal(error.status_code, said, "not_found" if error.status_code == 404 else "http")
        )

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        if is_out_of_memory(error):
            return await refused(
                request, Refusal(503, "memory ran out; send fewer or shorter documents", "out_of_memory")
            )
        return await refused(request, Refusal(500, "something went wrong here; the server's log says what", "internal"))

    return app


def of_input(error: InputError) -> Refusal:
    """What is said of a wrong request, or of an endpoint that the server leans on."""
    if error.place == "generator_endpoint":
        return Refusal(502, str(error), "generator_endpoint")
    if isinstance(error, LackError):
        return Refusal(503, str(error), "lack")
    return Refusal(400, str(error), "invalid_value", error.place)


def of_shape(errors: Any) -> Refusal:
    """What is said of a request that has not the fields of its schema: of the first thing that is wrong, in full."""
    error = max(errors, key=lambda each: len(each["loc"]))
    if error["type"] == "json_invalid":
        return Refusal(400, f"the body is not JSON: {error['ctx']['error']}", "invalid_json")
    *above, last = error["loc"][1:] or [""]
    unknown = error["type"] == "unexpected_keyword_argument"
    # Between the fields stand names of what was tried, where one may be several things.
    tried = ("str", "int")
    loc = [part for part in above if isinstance(part, int) or (part.islower() and part not in tried)]
    if isinstance(last, int) or unknown or (last.islower() and last not in tried):
        loc.append(last)
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")
    if unknown:
        known = (*ChatRequest.__dataclass_fields__, *RerankRequest.__dataclass_fields__)
        fix = did_you_mean(last, known, "Leave it out.")
        return Refusal(400, visible(f"{place}: there is no such parameter here. {fix}"), "unknown_parameter", place)
    words = error["msg"]
    if not place:
        place, words = "body", "this is a JSON object with the fields of /openapi.json, sent as application/json"
    elif last in tried:
        words = "this is a string, or an object with the fields of /openapi.json"
    return Refusal(400, visible(f"{place}: {words}"), "invalid_type", place)
