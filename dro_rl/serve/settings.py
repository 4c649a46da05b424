"""How much the server takes of a client, of all of them, and for how long."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """What is refused, and when.

    Args:
        body: bytes of a request's body.
        documents: of one question.
        waiting: questions in the queue, those in work not among them.
        connections: open at once.
        rate: questions a second of one address, in the long run; 0 for any number.
        burst: questions of one address at once, before the rate counts.
        header_seconds: for the first line and the headers of a request.
        body_seconds: for its body.
        answer_seconds: from a question's place in the queue to its answer.
        send_seconds: for a client to take what it is sent.
        stop_seconds: for what is asked already, once the server is told to stop.
    """

    body: int = 2 * 2**20
    documents: int = 100
    waiting: int = 64
    connections: int = 256
    rate: float = 20.0
    burst: int = 100
    header_seconds: float = 10.0
    body_seconds: float = 10.0
    answer_seconds: float = 120.0
    send_seconds: float = 30.0
    stop_seconds: float = 30.0
