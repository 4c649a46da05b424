"""Lists and objects that are spelled within a text, as tables and some mirrors of data sets have them."""

from __future__ import annotations

import ast
import io
import itertools
import tokenize
from typing import Any

from dro_rl.rows.strict_json import NotStrict, decode, is_deep


def spelled(text: str) -> list[Any] | dict[str, Any] | None:
    """The list or object that a text spells, as JSON or as Python prints it; None where it is neither.

    numpy prints lists without commas, `['a' 'b']`, which Python reads as one text: they are neither.
    """
    text = text.strip()
    if text[:1] not in ("[", "{"):
        return None
    try:
        value = decode(text)
    except NotStrict:
        return None
    except ValueError:
        value = _python(text)
    return value if isinstance(value, list | dict) and not is_deep(value) else None


def _python(text: str) -> Any:
    try:
        kinds = [
            token.type
            for token in tokenize.generate_tokens(io.StringIO(text).readline)
            if token.type not in (tokenize.NL, tokenize.NEWLINE)
        ]
        if (tokenize.STRING, tokenize.STRING) in itertools.pairwise(kinds):
            return None
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError):
        return None
