"""All parts of the server together: a pair and a socket in, requests served until it is told to stop."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from dro_rl.serve.app import PATHS, create_app
from dro_rl.serve.batching import Batcher
from dro_rl.serve.connections import LOOPBACK, make_server
from dro_rl.serve.limits import Gate, Rate
from dro_rl.serve.metrics import Metrics
from dro_rl.serve.settings import Limits
from dro_rl.serve.work import Asked, Pair, Served


class Serving:
    """A server of one pair.

    Args:
        pair: what answers.
        model: its name, as clients give it.
        limits: what is refused.
        batch_size: questions in work together, at most.
    """

    def __init__(self, pair: Pair, model: str, limits: Limits, batch_size: int) -> None:
        self.metrics, self.limits = Metrics(PATHS), limits
        self.batcher: Batcher[Asked, Served] = Batcher(pair.work, batch_size, limits.waiting, self.metrics.batch)
        self.metrics.follow(self.batcher)
        self.app = create_app(model, self.batcher, self.metrics, limits, pair.index is not None)
        self._server: Any = None

    def run(self, listening: socket.socket, ready: Callable[[], None] = lambda: None) -> bool:
        """Serve until a signal says stop.

        Args:
            listening: where, bound already.
            ready: called once questions are taken.

        Returns:
            Whether the models' thread has ended. If not, it works on something that was given up.
        """
        address = str(listening.getsockname()[0])
        # A page of elsewhere whose name leads to loopback is in the user's browser, and must not be answered.
        hosts = LOOPBACK | {address} if is_loopback(address) else None
        rate = Rate(self.limits.rate, self.limits.burst)
        gate = Gate(self.app, self.limits, rate, self.metrics, hosts, lambda: self.batcher.stopping)
        self.batcher.start()
        self._server = make_server(gate, self.batcher, self.limits, ready)
        self._server.run(sockets=[listening])
        self.batcher.abandon()
        return self.batcher.join(1.0)

    @property
    def connections(self) -> int:
        """Those that are open."""
        return len(self._server.server_state.connections)

    def stop(self) -> None:
        """What a signal does, for whoever runs it in a thread."""
        self._server.should_exit = True


def is_loopback(address: str) -> bool:
    """Whether an interface is this machine's own."""
    return address == "::1" or address.startswith("127.")
