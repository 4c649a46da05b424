"""A corpus that is made by code: passages of about 100 words over a Zipf vocabulary, and questions about them.

The most frequent words are English function words, most of which BM25 leaves out; the others are made of syllables.
Frequencies follow Zipf-Mandelbrot, p(r) ∝ 1 / (r + 2.7)^1.07, over 500,000 words, and a passage repeats the words of
its title, as real ones do. One seed makes one corpus: a larger one begins with the smaller.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from dro_rl.files import written_whole

VOCABULARY = 500_000
BLOCK = 10_000


def _listed(words: str) -> list[str]:
    return words.split()


FUNCTION_WORDS = _listed(
    "the of and in to a is was for as on with by that it from at his an were are which be this he had or not first has "
    "its also but they one their have new after who two her she been other when time during there into all"
)
ONSETS = _listed("b c d f g h j k l m n p r s t v w z br ch cl dr fl gr pl pr sh st th tr")
VOWELS = _listed("a e i o u ai ea io ou")


def vocabulary() -> np.ndarray:
    """The words, most frequent first."""
    syllables = [onset + vowel for onset in ONSETS for vowel in VOWELS]
    made = list(FUNCTION_WORDS)
    for number in range(VOCABULARY - len(made)):
        text, rest = "", number + len(syllables)
        while rest:
            rest, which = divmod(rest, len(syllables))
            text += syllables[which]
        made.append(text + "n")
    return np.array(made, dtype=object)


def passages(seed: int = 0) -> Iterator[tuple[str, str]]:
    """Title and text of one passage after the other, without end."""
    words = vocabulary()
    shares = 1 / (np.arange(1, VOCABULARY + 1) + 2.7) ** 1.07
    heights = np.cumsum(shares / shares.sum())
    for block in range(10**6):
        draw = np.random.default_rng([seed, block])
        lengths = np.clip(draw.normal(95, 25, BLOCK), 15, 200).astype(int)
        ranks = np.searchsorted(heights, draw.random(lengths.sum())).clip(max=VOCABULARY - 1)
        subjects = draw.integers(len(FUNCTION_WORDS), VOCABULARY, (BLOCK, 2))
        named = draw.random(len(ranks)) < 0.03  # words of the text that are words of the title
        owner = np.repeat(np.arange(BLOCK), lengths)
        ranks[named] = subjects[owner[named], draw.integers(0, 2, named.sum())]
        texts = np.split(words[ranks], np.cumsum(lengths)[:-1])
        for title, text in zip(words[subjects], texts, strict=True):
            yield " ".join(title), " ".join(text)


def questions(count: int, corpus_size: int, seed: int = 0) -> list[str]:
    """Questions about passages all over the corpus: a word of the title, four to ten of the text, five others."""
    draw = np.random.default_rng([seed, 1])
    wanted = set(np.linspace(0, corpus_size - 1, count).astype(int).tolist())
    made = []
    for number, (title, text) in enumerate(islice(passages(seed), corpus_size)):
        if number in wanted:
            asked = [
                title.split()[0],
                *draw.choice(text.split(), draw.integers(4, 11)),
                *draw.choice(FUNCTION_WORDS, 5),
            ]
            made.append(" ".join(asked))
    return made


def write(path: Path, count: int, seed: int = 0) -> None:
    """Write a corpus of `count` passages as JSONL, whole."""
    with written_whole(path) as beside, beside.open("w", encoding="utf-8") as lines:
        for number, (title, text) in enumerate(islice(passages(seed), count)):
            lines.write(json.dumps({"id": str(number), "title": title, "text": text}) + "\n")
