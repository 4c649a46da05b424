"""What a client is told that is not answered: a status, and an error in OpenAI's shape."""

from __future__ import annotations

import json
import math
from typing import Any

KINDS = {
    400: "invalid_request_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    421: "invalid_request_error",
    429: "rate_limit_error",
    499: "client_closed_request",
    502: "upstream_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class Refusal(Exception):
    """A request that is not answered.

    Args:
        status: of the response.
        message: what is wrong and what to do, for a person.
        code: the same for a program.
        param: the field of the request that it is about.
        retry_after: seconds after which it is worth asking again.
    """

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, retry_after: float | None = None
    ) -> None:
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after = retry_after
        super().__init__(message)

    @property
    def headers(self) -> dict[str, str]:
        """`Retry-After`, in whole seconds, where asking again may help."""
        return {} if self.retry_after is None else {"Retry-After": str(max(1, math.ceil(self.retry_after)))}

    @property
    def content(self) -> dict[str, Any]:
        """The body."""
        kind = KINDS.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def body(self) -> bytes:
        """The body, as it is sent."""
        return json.dumps(self.content).encode()
