"""uvicorn's part: connections that send nothing are closed, and a stop finishes what it can and refuses the rest.

This file alone knows uvicorn, and has it only where it is called: it is an extra.
"""

import asyncio
import errno
import math
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dro_rl.errors import InputError, LackError, Phrase
from dro_rl.serve.batching import Batcher
from dro_rl.serve.limits import App
from dro_rl.serve.refusals import Refusal
from dro_rl.serve.settings import Limits

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1", "[::1]"})
CROSSING_SECONDS = 0.5
"""How long a connection without a request is kept once the server stops."""


def check_installed() -> None:
    """Refuse to serve where the extra is missing.

    Raises:
        LackError: naming it.
    """
    for name in ("fastapi", "uvicorn", "prometheus_client"):
        try:
            __import__(name)
        except ImportError:
            raise LackError(
                "serve", Phrase(f"{name} is not installed"), "the server needs it", "pip install 'dro_rl[serve]'"
            ) from None


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, from now on: whoever connects before the models are loaded waits.

    Raises:
        InputError: there is no such interface, or something else listens there.
    """
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError, OverflowError) as error:
        raise InputError(
            "--host", host, f"this names an interface of this machine ({error})", "127.0.0.1 is loopback."
        ) from None
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(1024)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise InputError("--host", host, "this is an interface of this machine", "127.0.0.1 is loopback.") from None
        found = "in use" if error.errno == errno.EADDRINUSE else error.strerror
        raise InputError(
            "--port", Phrase(f"{port} ({found})"), "nobody listens there, and this user may",
            "Choose another, or 0 for any that is free.",
        ) from None  # fmt: skip
    return listening


def address_of(listening: socket.socket) -> str:
    """Where it listens, as a URL."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_server(app: App, batcher: Batcher[Any, Any], limits: Limits, ready: Callable[[], None]) -> Any:
    """uvicorn's server, with a stop that goes through the queue."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            """Take nothing new, finish what is there, and after a while refuse what is not finished."""
            batcher.stop()
            asyncio.get_running_loop().call_later(limits.stop_seconds, batcher.abandon)
            await super().shutdown(sockets)

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            """As uvicorn does, but that a signal which was obeyed does not end the process once more."""
            if threading.current_thread() is not threading.main_thread():
                yield
                return
            loop = asyncio.get_running_loop()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, self.handle_exit, number, None)
            try:
                yield
            finally:
                for number in (signal.SIGINT, signal.SIGTERM):
                    loop.remove_signal_handler(number)

    config = uvicorn.Config(
        app,
        http=protocol_class(limits),
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,  # the rate is that of the address that connects, whatever it says
        server_header=False,
        timeout_graceful_shutdown=math.ceil(limits.stop_seconds) + 5,
    )
    return Server(config)


def protocol_class(limits: Limits) -> Any:
    """uvicorn's protocol, with bounds on connections, on how long one may stay between two requests, and on how long
    it may leave an answer unread.

    uvicorn closes a connection that is idle after an answer. One that sends nothing at first, or half a head, or goes
    on sending a body that was refused, or does not read, it would keep for ever.
    """
    from uvicorn.protocols.http.h11_impl import H11Protocol

    full = Refusal(503, f"{limits.connections} connections are open already", "too_many_connections", retry_after=1)
    late = Refusal(408, f"a request's head arrives within {limits.header_seconds:g} seconds", "head_too_slow")

    class Protocol(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None
        _unread: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                self._end_with(full)
            else:
                self._watch()

        def data_received(self, data: bytes) -> None:
            if not self.transport.is_closing():
                super().data_received(data)
                self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._unread = self.loop.call_later(limits.send_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._unread is not None:
                self._unread.cancel()
                self._unread = None

        def shutdown(self) -> None:
            """The server stops: a request that is on its way already is still refused in words, a moment later not."""
            if self._between():
                self.loop.call_later(CROSSING_SECONDS, self._close_idle)

        def _close_idle(self) -> None:
            if self._between():
                self.transport.close()

        def connection_lost(self, exc: Exception | None) -> None:
            self._unwatch()
            super().connection_lost(exc)

        def _watch(self) -> None:
            if not self._between():
                self._unwatch()
            elif self._deadline is None and not self.transport.is_closing():
                self._deadline = self.loop.call_later(limits.header_seconds, self._end_with, late)

        def _between(self) -> bool:
            """Whether no request is in work."""
            return self.cycle is None or self.cycle.response_complete

        def _unwatch(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _end_with(self, refusal: Refusal) -> None:
            if self.cycle is None and not self.transport.is_closing():
                self.transport.write(as_http(refusal))
            self.transport.close()

    return Protocol


def as_http(refusal: Refusal) -> bytes:
    """A refusal as it goes over a connection that has no request."""
    headers = {
        "content-type": "application/json", "content-length": str(len(refusal.body)), "connection": "close",
        **refusal.headers,
    }  # fmt: skip
    lines = [f"HTTP/1.1 {refusal.status} Refused", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + refusal.body
