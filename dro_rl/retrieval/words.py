"""From text to the words that BM25 matches, by the same rules in passages and in questions.

A change of these rules is a new `BM25.format`: an index built by other rules is refused.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from typing import Any

import regex

CACHE = 1_000_000
"""Words of which it is remembered at once what is matched."""

ASCII_WORD = re.compile(r"\w+")
WORD = regex.compile(r"[\p{L}\p{N}_][\p{L}\p{N}\p{M}_]*")
"""Letters, digits, and the marks on them, without which Hindi's words fall apart."""

INVISIBLE = regex.compile(r"(?V1)[\p{Default_Ignorable_Code_Point}--\u200b]+")
"""What joins, hyphenates or turns letters unseen. The space of no width is a space."""

UNSPACED = regex.compile(
    r"(?V1)[[\p{L}\p{M}\p{Nl}]&&[\p{scx=Hani}\p{scx=Hira}\p{scx=Kana}\p{scx=Hang}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]]+"
)
"""Scripts that have no spaces between words; and Hangul, whose words take endings, as Lucene's CJKAnalyzer has it."""

TURKISH = str.maketrans({"I": "ı", "İ": "i"})


def normalize(text: str, language: str = "none") -> str:
    """Text in which letters that are the same are written the same: NFKC, full case folding, nothing invisible.

    `ﬁ` is fi, `ß` is ss, `Ａ` is a, and `İ` is i; in Turkish `I` is ı.
    """
    if text.isascii() and language != "turkish":
        return text.lower()
    text = unicodedata.normalize("NFKC", INVISIBLE.sub("", text))
    if language == "turkish":
        text = text.translate(TURKISH)
    return unicodedata.normalize("NFKC", text.casefold().replace("i\u0307", "i"))


class Analyzer:
    """The words of a text: normalized, letters and digits, without stop words, stemmed.

    Of a run of characters in a script without spaces, each two that stand together are matched.

    Args:
        language: one of `dro_rl.retrieval.bm25.LANGUAGES`; or `none`, which keeps every word as it is.
    """

    def __init__(self, language: str) -> None:
        self._language = language
        self._known: dict[str, tuple[str, ...]] = {}
        self._stopwords: frozenset[str] = frozenset()
        self._stem: Any = str
        if language != "none":
            import Stemmer
            from bm25s import stopwords

            name = "EN" if language == "english" else language.upper()
            self._stopwords = frozenset(normalize(word, language) for word in getattr(stopwords, f"STOPWORDS_{name}"))
            self._stem = Stemmer.Stemmer(language, 0).stemWord

    def __call__(self, text: str) -> list[str]:
        """The words in order, each as often as it stands there."""
        known = self._known
        if len(known) > CACHE:
            known.clear()
        text = normalize(text, self._language)
        words: list[str] = []
        for word in (ASCII_WORD if text.isascii() else WORD).findall(text):
            matched = known.get(word)
            if matched is None:
                matched = known[word] = self._matched(word)
            words += matched
        return words

    def _matched(self, word: str) -> tuple[str, ...]:
        if not word.isascii() and UNSPACED.search(word):
            matched: list[str] = []
            start = 0
            for run in UNSPACED.finditer(word):
                matched += self._matched(word[start : run.start()])
                matched += _pairs(run[0])
                start = run.end()
            return (*matched, *self._matched(word[start:]))
        stem = "" if word in self._stopwords else self._stem(word)
        return (stem,) if stem else ()


def _pairs(run: str) -> list[str]:
    """Each two characters that stand together, with their marks; of a single one, itself."""
    characters = regex.findall(r"\X", run)
    return [a + b for a, b in itertools.pairwise(characters)] or characters
