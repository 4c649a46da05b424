"""The one door for text from data, files and models to whoever reads: on a terminal, in Markdown, in a chart.

Nothing in such a text steers what shows it: no escape sequence, no second line, no reversed order, no markup.
`terminal.console` lets every string through `visible` by itself.
"""

from __future__ import annotations

import re
import unicodedata

JOINERS = "\u200c\u200d"
"""Invisible, and part of how Persian, Hindi or an emoji is written."""
MARKUP = re.compile(r"[\\`*<|~]|\](?=[(\[:])|(?<![^\W_])_|_(?![^\W_])")


def visible(text: object) -> str:
    """The text on one line, with what steers a terminal or a reader's eye written out: `\\x1b`, `\\n`, `\\u202e`."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if _is_shown(c) else c.encode("unicode_escape").decode("ascii") for c in text)


def plain(text: str) -> str:
    """A longer text on one line: white space of any kind is one space, the rest as in `visible`."""
    return visible(" ".join(text.split()))


def markdown(text: object) -> str:
    """The text as Markdown, or HTML made of it, shows it: in a sentence, an item or the cell of a table."""
    return MARKUP.sub(lambda found: "\\" + found[0], visible(text).replace("&", "&amp;")).replace("\\<", "&lt;")


def chart(text: object) -> str:
    """The text as a title or label of a chart, where dollars are formulas and a first underscore hides."""
    text = visible(text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _is_shown(character: str) -> bool:
    return character.isprintable() or character in JOINERS or unicodedata.category(character) == "Zs"
