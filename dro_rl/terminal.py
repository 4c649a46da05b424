"""A terminal of any width and encoding, for text from anywhere: see `shown`."""

from __future__ import annotations

import io
import logging
import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from dro_rl.shown import visible


class _Plain(Console):
    """Prints each string as it is: brackets are not markup, and a string is a line, in a table's cell and alone."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **{**options, "markup": False, "emoji": False})


def console(*, stderr: bool = False) -> Console:
    """A console on stdout, or on stderr. What its encoding cannot write becomes `?`."""
    stream = sys.stderr if stderr else sys.stdout
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")
    return _Plain(stderr=stderr, highlight=False, markup=False, emoji=False)


class PlainFormatter(logging.Formatter):
    """A log record's message, on one line whatever it quotes."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = visible(record.message)
        return super().formatMessage(record)
