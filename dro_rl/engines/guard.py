"""The key between the trainer and its vLLM servers, and the guard that asks for it.

New weights need vLLM's development mode, whose calls read files by path and run methods of the engine, and vLLM's own
`--api-key` does not cover them. The guard stands before every path but `/health`, in the server's process: it must
import nothing that a server could lack.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dro_rl.errors import InputError, Phrase

KEY = "DRO_RL_SERVER_KEY"
"""Environment variable with the key itself, for machines that share no folder. It goes before a file."""
KEY_FILE = "DRO_RL_SERVER_KEY_FILE"
"""Environment variable with the key's file, as `serve-rollouts` hands it to the server."""
KEY_PLACE = "vllm_server_key_file"
MIDDLEWARE = "dro_rl.engines.guard.Guard"

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def server_key(file: str | Path) -> str:
    """The key in the environment, else in the file: made at random where there is none, for its owner's eyes alone.

    Raises:
        InputError: others may read the file, or it holds no key, or it cannot be read or written.
    """
    if os.environ.get(KEY):
        return os.environ[KEY]
    path = Path(file).expanduser()
    try:
        if not path.exists():
            _make(path)
        if path.stat().st_mode & 0o077:
            raise _refused(path, "others may read it", f"Make another: rm {path}, and start the server again.")
        key = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise _refused(path, str(error), f"Name another file, or set {KEY} for trainer and server.") from None
    if not key.isprintable() or len(key) < 16:
        raise _refused(path, f"{len(key)} characters", f"Make another: rm {path}, and start the server again.")
    return key


def _refused(path: Path, found: str, fix: str) -> InputError:
    return InputError(KEY_PLACE, Phrase(f"{path}, {found}"), "this is a file of its owner's, with a key in it", fix)


def _make(path: Path) -> None:
    """Write a key, whole: trainer and server may both be first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
        with suppress(FileExistsError):  # the other was first
            os.link(beside, path)
    finally:
        beside.unlink()


class Guard:
    """ASGI middleware, as vLLM's `--middleware` takes it: no key, no answer; nor for a page in a browser.

    The key comes as a bearer's, or as the password of an address (`http://any:KEY@host`), for clients that take no
    header.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app
        self._key = server_key(os.environ.get(KEY_FILE, "")).encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through, or answer it with 401 or 403."""
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        headers = dict(scope["headers"])
        if b"origin" in headers:
            return await _answer(scope, send, 403, "no page in a browser steers this server")
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path != "/health" and not self._fits(headers.get(b"authorization", b"")):
            return await _answer(scope, send, 401, "the key of this server is missing or another")
        return await self._app(scope, receive, send)

    def _fits(self, authorization: bytes) -> bool:
        scheme, _, given = authorization.partition(b" ")
        if scheme.lower() == b"basic":
            try:
                given = base64.b64decode(given, validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        elif scheme.lower() != b"bearer":
            return False
        return hmac.compare_digest(given, self._key)


async def _answer(scope: Scope, send: Send, status: int, why: str) -> None:
    if scope["type"] == "websocket":
        return await send({"type": "websocket.close", "code": 1008, "reason": why})
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    return await send({"type": "http.response.body", "body": why.encode()})
