"""A page to put a question by hand: one file, that fetches nothing but answers from where it came."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from dro_rl.shown import visible


def page(model: str, has_index: bool) -> str:
    """The page of a server. Texts from anywhere are text in it: here by the template, there by the script."""
    source = files("dro_rl.serve").joinpath("page.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source).render(model=visible(model), has_index=has_index)


def policy(text: str) -> str:
    """The page's Content-Security-Policy: its own script and style by their hashes, its own server, nothing else."""
    digests = {
        tag: base64.b64encode(hashlib.sha256(re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[1].encode()).digest())  # type: ignore[index]
        for tag in ("script", "style")
    }
    own = {tag: f"{tag}-src 'sha256-{digest.decode()}'" for tag, digest in digests.items()}
    return "; ".join(
        ("default-src 'none'", *own.values(), "connect-src 'self'", "base-uri 'none'", "frame-ancestors 'none'")
    )
