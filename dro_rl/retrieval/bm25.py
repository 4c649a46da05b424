"""BM25 by bm25s: scores are computed once, when the index is built, and memory-mapped to search.

score(q, d) = Σ over the words t of q: ln(1 + (N − n_t + ½) / (n_t + ½)) · f_td / (f_td + k1 (1 − b + b |d| / avg|d|))

is the form of Lucene, where n_t of N passages hold t, f_td is how often d does, and |d| counts d's words: those of its
title and text.
"""

from __future__ import annotations

import array
import importlib.metadata
import shutil
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tqdm.auto import tqdm

from dro_rl.errors import InputError, Phrase, first_line
from dro_rl.files import written_whole
from dro_rl.records import Document
from dro_rl.retrieval.passages import PassageStore
from dro_rl.retrieval.protocol import Hit
from dro_rl.retrieval.words import Analyzer

LANGUAGES = (
    "english", "danish", "dutch", "french", "german", "italian", "norwegian", "portuguese", "russian", "spanish",
    "swedish", "turkish",
)  # fmt: skip
"""Languages with a Snowball stemmer and a list of stop words."""

COMPILED = 200_000
"""Passages from which numba is worth the seconds that it takes to compile."""

BLOCK = 256
"""Scores of which one maximum is taken, on the way to the best of all."""


def passage_text(document: Document) -> str:
    """What of a passage is matched."""
    return f"{document.title} {document.text}"


@dataclass
class BM25:
    """The `bm25` retriever.

    Args:
        k1: how fast a word's count saturates; 0.9 as in Pyserini.
        b: how much a passage's length counts, 0..1; 0.4 as in Pyserini.
        language: of the stemmer and the stop words; `none` for neither.
    """

    k1: float = 0.9
    b: float = 0.4
    language: str = "english"
    name: str = field(default="bm25", init=False)
    format: ClassVar[int] = 2

    def settings(self) -> dict[str, Any]:
        """What its scores depend on."""
        return {key: value for key, value in asdict(self).items() if key != "name"}

    def versions(self) -> Mapping[str, str]:
        """bm25s computes, PyStemmer stems."""
        return {package: importlib.metadata.version(package) for package in ("bm25s", "PyStemmer")}

    def check(self) -> None:
        """Raise `InputError` for a setting that breaks its rule."""
        if self.k1 < 0:
            raise InputError("k1", self.k1, "this is not negative", "Use 0.9, or 1.2 as in Lucene.")
        if not 0 <= self.b <= 1:
            raise InputError("b", self.b, "this is a share, 0 to 1", "Use 0.4, or 0.75 as in Lucene.")
        if self.language not in (*LANGUAGES, "none"):
            raise InputError("language", self.language, f"this is one of {', '.join(LANGUAGES)}, none", "Use one.")

    def build(self, passages: PassageStore, folder: Path, processes: int) -> None:
        """Words of each part by so many processes, then the scores. Parts that are done are kept."""
        words = folder / "words"
        words.mkdir(parents=True, exist_ok=True)
        missing = [number for number in range(passages.num_parts) if not _words_path(words, number).is_file()]
        _find_words(passages, words, missing, self.language, processes)
        self._score(words, passages.num_parts, folder)
        shutil.rmtree(words)

    def _score(self, words: Path, num_parts: int, folder: Path) -> None:
        import bm25s

        vocabulary: dict[str, int] = {}
        rows: list[array.array[int]] = []
        for number in range(num_parts):
            with np.load(_words_path(words, number), allow_pickle=False) as part:
                names = bytes(part["vocabulary"]).decode().split("\n")
                places = np.array([vocabulary.setdefault(name, len(vocabulary)) for name in names], dtype=np.int32)
                ids, ends = places[part["ids"]], np.cumsum(part["lengths"])
            for start, end in zip(np.concatenate([[0], ends[:-1]]).tolist(), ends.tolist(), strict=True):
                rows.append(array.array("i", ids[start:end].tobytes()))
        scorer = bm25s.BM25(k1=self.k1, b=self.b, method="lucene")
        if len(rows) >= COMPILED:
            scorer.activate_numba_csc()
        scorer.index((rows, vocabulary), create_empty_token=False, show_progress=sys.stderr.isatty())
        scorer.save(folder, show_progress=False)

    def open(self, folder: Path, rank: int = 0) -> None:
        """Map the scores. All processes share them, whatever their rank."""
        import bm25s

        self._analyzer = Analyzer(self.language)
        try:
            self._index = bm25s.BM25.load(folder, mmap=True, allow_pickle=False)
        except Exception as error:
            # What torn files make numpy, json and bm25s raise is no list that anybody could keep.
            raise InputError(str(folder), Phrase(first_line(error)), "an index is whole", "Build it again.") from None
        if self._index.scores["num_docs"] >= COMPILED:
            self._index.activate_numba_scorer()

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """At most k passages for each query, best first. Passages that share no word with it score 0: left out."""
        known = self._index.vocab_dict
        found = []
        for query in queries:
            words = [known[word] for word in self._analyzer(query) if word in known]
            found.append(_best(self._index.get_scores_from_ids(words), k) if words else [])
        return found


def _best(scores: np.ndarray, k: int) -> list[Hit]:
    """The k best rows of positive score; of equal score the first.

    The k-th best of the maxima of blocks is a floor: at least k scores reach it, and few others do.
    """
    blocks = scores[: len(scores) // BLOCK * BLOCK].reshape(-1, BLOCK).max(axis=1)
    floor = np.partition(blocks, -k)[-k] if len(blocks) >= k else 0.0
    rows = np.flatnonzero(scores >= floor if floor > 0 else scores > 0)
    order = np.lexsort((rows, -scores[rows]))[:k]
    return [Hit(row, float(scores[row])) for row in rows[order].tolist()]


def _find_words(passages: PassageStore, words: Path, missing: Sequence[int], language: str, processes: int) -> None:
    """Write the words of the missing parts, each part by one process."""
    work = [(passages.folder, number, words, language) for number in missing]
    progress = tqdm(
        total=passages.num_parts, initial=passages.num_parts - len(missing), desc="words", unit="part", disable=None
    )
    with progress:
        if processes == 1 or len(work) == 1:
            for part in work:
                _write_words(*part)
                progress.update()
            return
        with ProcessPoolExecutor(min(processes, len(work) or 1), mp_context=get_context("spawn")) as pool:
            try:
                for _ in pool.map(_write_words, *zip(*work, strict=True)) if work else ():
                    progress.update()
            except BrokenProcessPool:
                raise InputError(
                    "index",
                    Phrase("a process that splits passages into words died, of too little memory as a rule"),
                    "what is done is kept",
                    "Give the same command with fewer --processes: it goes on where it stopped.",
                ) from None


def _write_words(passages: Path, number: int, words: Path, language: str) -> None:
    analyzer = Analyzer(language)
    vocabulary: dict[str, int] = {}
    ids = array.array("i")
    lengths = array.array("i")
    for document in PassageStore(passages).part(number):
        found = analyzer(passage_text(document))
        ids.extend(vocabulary.setdefault(word, len(vocabulary)) for word in found)
        lengths.append(len(found))
    names = np.frombuffer("\n".join(vocabulary).encode(), dtype=np.uint8)
    with written_whole(_words_path(words, number)) as beside, beside.open("wb") as file:
        np.savez(file, ids=np.array(ids), lengths=np.array(lengths), vocabulary=names)


def _words_path(words: Path, number: int) -> Path:
    return words / f"{number:05}.npz"
