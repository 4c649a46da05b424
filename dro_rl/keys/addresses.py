"""Which addresses a recipe may name: those of servers, and of an API."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from dro_rl.keys import Rule


def _is_address(url: str) -> bool:
    """Whether this is a scheme, a host and perhaps a port, and nothing more."""
    try:
        return bool(re.fullmatch(r"https?://[^/\s?#]+/?", url)) and urlsplit(url).port != 0
    except ValueError:  # no number, or none that a port has
        return False


def _is_api(url: str) -> bool:
    """Whether this is an address of an API: no name and password in it, and nothing after its path."""
    parts = re.fullmatch(r"(https?://[^/\s?#@]+)(/[^\s?#]*)?", url)
    return parts is not None and _is_address(parts[1])


API = Rule(
    "a scheme, a host and a port, and the path of an API in OpenAI's style",
    "Use http://127.0.0.1:8001/v1; a key goes into DRO_RL_ENDPOINT_KEY in the environment.",
    _is_api,
)


def urls(value: str | list[str] | None) -> list[str]:
    """Addresses without a closing slash."""
    return [url.rstrip("/") for url in ([value] if isinstance(value, str) else value or [])]


ADDRESSES = Rule(
    "a server as a scheme, a host and a port, or a list of them",
    "Use http://127.0.0.1:8000.",
    lambda value: bool(value) and all(map(_is_address, [value] if isinstance(value, str) else value)),
)
