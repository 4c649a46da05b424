"""What is refused before a request is read by anything else: by host, rate, size and time. Plain ASGI.

A body is read here, whole and bounded, so that a client that lies about its length or sends a byte a second costs a
buffer and nothing more.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

from dro_rl.serve.refusals import Refusal
from dro_rl.serve.settings import Limits

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]
ADDRESSES = 4096
"""Clients that are remembered; the one that asked longest ago is forgotten first."""
HEADERS = ((b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store"))


class Rate:
    """A token bucket for each address.

    Args:
        rate: questions a second; 0 for any number.
        burst: at once.
        clock: seconds, for tests.
    """

    def __init__(self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = rate, float(burst), clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, address: str) -> float:
        """0 where the address may ask now, which is then counted; else after how many seconds it may."""
        if not self._rate:
            return 0.0
        now = self._clock()
        left, then = self._buckets.pop(address, (self._burst, now))
        left = min(self._burst, left + (now - then) * self._rate)
        self._buckets[address] = (left - 1, now) if left >= 1 else (left, now)
        if len(self._buckets) > ADDRESSES:
            self._buckets.popitem(last=False)
        return 0.0 if left >= 1 else (1 - left) / self._rate


class Counter(Protocol):
    """Told of each request: its path, the status that it came to, and in how many seconds."""

    def request(self, path: str, status: int, seconds: float) -> None:
        """Count it."""
        ...


class Gate:
    """The application behind the limits.

    Args:
        app: the application.
        limits: of size and time.
        rate: of questions.
        counter: of requests.
        hosts: names by which the server may be called, None for any: a page of elsewhere that has its name lead to
            loopback is not among them.
        stopping: whether connections end with the answers that they wait for.
    """

    def __init__(
        self,
        app: App,
        limits: Limits,
        rate: Rate,
        counter: Counter,
        hosts: frozenset[str] | None,
        stopping: Callable[[], bool],
    ) -> None:
        self._app, self._limits, self._rate, self._counter, self._hosts = app, limits, rate, counter, hosts
        self._stopping = stopping

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 499

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                end = ((b"connection", b"close"),) if self._stopping() else ()
                message["headers"] = [*message.get("headers", ()), *HEADERS, *end]
            await send(message)

        try:
            self._check(scope)
            body = await self._read(scope, receive) if scope["method"] not in ("GET", "HEAD") else b""
            await self._app(scope, replayed(body, receive), sent)
        except Refusal as refusal:
            if refusal.status != 499:
                await refuse(sent, refusal)
        finally:
            self._counter.request(scope["path"], status, time.monotonic() - began)

    def _check(self, scope: MutableMapping[str, Any]) -> None:
        """What the head of a request tells."""
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        if self._hosts is not None and name_of(host) not in self._hosts:
            raise Refusal(
                421, "this server listens on loopback, and is called localhost or by its address", "unknown_host"
            )
        if scope["method"] in ("GET", "HEAD"):
            return
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared[:20]) > self._limits.body:
            raise self._too_large()
        wait = self._rate.take((scope.get("client") or ("",))[0])
        if wait:
            raise Refusal(
                429,
                f"an address may ask {self._limits.rate:g} questions a second, and {self._limits.burst} at once",
                "rate_limit_exceeded",
                retry_after=wait,
            )

    async def _read(self, scope: MutableMapping[str, Any], receive: Receive) -> bytes:
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise gone()
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self._limits.body:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise Refusal(
                408, f"a request's body arrives within {self._limits.body_seconds:g} seconds", "body_too_slow"
            ) from None

    def _too_large(self) -> Refusal:
        return Refusal(
            413, f"a request's body has at most {self._limits.body} bytes; send fewer or shorter documents",
            "body_too_large",
        )  # fmt: skip


def gone() -> Refusal:
    """For a client that hung up: nobody reads it."""
    return Refusal(499, "the client is gone", "client_closed_request")


def name_of(host: str) -> str:
    """The name or the address in a Host header, without the port."""
    name = host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
    return name.lower()


def replayed(body: bytes, receive: Receive) -> Receive:
    """`receive` for whoever comes after: the body that was read, once, and then what comes."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def refuse(send: Send, refusal: Refusal) -> None:
    """Answer with a refusal."""
    body = refusal.body
    headers = {"content-type": "application/json", "content-length": str(len(body)), **refusal.headers}
    encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
