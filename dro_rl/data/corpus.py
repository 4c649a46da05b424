"""Corpora: the passages to retrieve from, read as a stream. Twenty-one million of them never stand in memory.

A corpus is a file (`.tsv` as DPR published it, `.csv`, `.jsonl`, `.json`, `.parquet`; gzipped or not), a folder of
such files (shards, read in the order of their names), or a hub dataset. Passages have an id, a title, which may be
empty, and a text.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dro_rl.data.hub import hub_rows, is_local
from dro_rl.errors import InputError, Phrase
from dro_rl.files import write_json_lines
from dro_rl.records import Document, check_id, check_text, check_unicode
from dro_rl.rows import SUFFIXES, TABLES, Bad, Rows, Watch, is_readable, refuse, rows, suffix, with_names

ID_FIELDS = ("id", "_id", "docid", "passage_id")
TEXT_FIELDS = ("text", "contents")
COLUMNS = (*ID_FIELDS, *TEXT_FIELDS, "title")
BATCH = 8192
"""Passages whose ids are checked together. A passage leaves the stream when its batch is checked."""


def read_corpus(
    source: str | Path,
    *,
    config: str | None = None,
    split: str = "train",
    bad: Bad = refuse,
    watch: Watch | None = None,
) -> Iterator[Document]:
    """The passages of a corpus, one after the other.

    Args:
        source: a file, a folder of files, or the name of a hub dataset, which is streamed.
        config: configuration of a hub dataset.
        split: split of a hub dataset.
        bad: what is done with a bad passage: refuse the corpus, or with `dro_rl.rows.Skips()` leave it out and count.
        watch: wraps each raw file as it is opened, to draw a progress bar.

    Raises:
        InputError: naming the file, the line, the field, what is wrong and what to do. An id that stands twice is
            found within `BATCH` passages; the ids themselves are not kept, but eight bytes of a hash of each.
    """
    if is_local(source):
        files = corpus_files(Path(source).expanduser())
        found: Rows = itertools.chain.from_iterable(_file_rows(file, bad, watch) for file in files)
    else:
        found = hub_rows(str(source), config, [split], place="corpus", wanted=_is_column)
    empty = True
    for document in _without_twins(_parsed(found, bad), bad):
        empty = False
        yield document
    if empty:
        raise InputError(str(source), Phrase("no passages"), "a corpus has at least one passage", "Check the file.")


def write_corpus(path: Path, documents: Iterable[Document]) -> int:
    """Write passages (`.jsonl` or `.jsonl.gz`), whole, each id once.

    Returns:
        How many were written.
    """

    def unique() -> Iterator[dict[str, str]]:
        seen: set[str] = set()
        for document in documents:
            if document.id not in seen:
                seen.add(document.id)
                yield asdict(document)

    return write_json_lines(path, unique())


def corpus_files(path: Path) -> list[Path]:
    """The files of a corpus that is a file or a folder of shards, in the order they are read."""
    if not path.is_dir():
        return [path]
    files = shards(path)
    if not files:
        raise InputError(
            str(path), Phrase("no corpus files"), f"a folder has files in .{', .'.join(SUFFIXES)}", "Name another."
        )
    return files


def shards(folder: Path) -> list[Path]:
    """The files of a folder that are a corpus's, by their names, in order."""
    return sorted(file for file in folder.iterdir() if file.is_file() and is_readable(file))


def corpus_hash(documents: Iterable[Document]) -> str:
    """Hash of ids, titles and texts, in order: the same for the same passages, however their file is written."""
    digest = CorpusHash()
    for document in documents:
        digest.add(document)
    return digest.hexdigest()


class CorpusHash:
    """`corpus_hash` beside other work on the same stream."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self.count = 0

    def add(self, document: Document) -> None:
        """Take the next passage in."""
        self.count += 1
        for value in (document.id, document.title, document.text):
            data = value.encode()
            self._digest.update(len(data).to_bytes(8, "little"))
            self._digest.update(data)

    def hexdigest(self) -> str:
        """The hash of the passages so far."""
        return self._digest.hexdigest()


def _file_rows(path: Path, bad: Bad, watch: Watch | None) -> Rows:
    """Rows of a file as objects. A table without a header has DPR's columns: id, text, title if three."""
    found = rows(path, bad=bad, watch=watch, wanted=_is_column)
    if suffix(path) in TABLES:
        return with_names(found, (*ID_FIELDS, *TEXT_FIELDS), ("id", "text", "title"), bad=bad)
    return found


def _is_column(name: str) -> bool:
    return name in COLUMNS


def _parsed(found: Rows, bad: Bad) -> Iterator[tuple[str, Document]]:
    for place, row in found:
        try:
            document = _document(row, place)
        except InputError as error:
            bad(error)
        else:
            yield place, document


def _document(row: Any, place: str) -> Document:
    if not isinstance(row, dict):
        raise InputError(place, row, "a passage is an object with id, title and text", "Write an object.")
    identifier = check_id(_first_of(ID_FIELDS, row, place), f"{place}: id")
    place = f"{place} (id {identifier})"
    title, text = row.get("title") or "", _first_of(TEXT_FIELDS, row, place)
    if not isinstance(title, str):
        raise InputError(f"{place}: title", title, "a title is text, empty when there is none", "Write a string.")
    if isinstance(text, str) and "contents" in row and "text" not in row and "title" not in row:
        title, text = split_contents(text)
    check_unicode(title, f"{place}: title")
    return Document(identifier, title, check_text(text, f"{place}: text"))


def split_contents(contents: str) -> tuple[str, str]:
    """Title and text of a `contents` field as FlashRAG and Search-R1 write it: the quoted title is the first line."""
    first, line_break, rest = contents.partition("\n")
    if line_break and len(first) > 1 and first[0] == first[-1] == '"' and rest.strip():
        return first[1:-1].replace('""', '"').strip(), rest
    return "", contents


def _first_of(names: tuple[str, ...], row: dict[str, Any], place: str) -> Any:
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise InputError(
        f"{place}: {names[0]}",
        Phrase("missing"),
        f"a passage has {names[0]} (or {', '.join(names[1:])})",
        "Add the field.",
    )


def _without_twins(documents: Iterator[tuple[str, Document]], bad: Bad) -> Iterator[Document]:
    """The documents without their places, after a check that no id stands twice."""
    seen = SeenHashes()
    while batch := list(itertools.islice(documents, BATCH)):
        repeated = seen.add([document.id for _, document in batch])
        for (place, document), again in zip(batch, repeated, strict=True):
            if again:
                bad(
                    InputError(
                        f"{place}: id",
                        Phrase(f"{document.id!r}, which an earlier passage has too"),
                        "ids of a corpus are unique",
                        "Remove or rename one of the two.",
                    )
                )
            else:
                yield document


def hash_ids(ids: Iterable[str]) -> np.ndarray:
    """A hash of 64 bits for each id, the same on every machine."""
    digests = b"".join(hashlib.blake2b(identifier.encode(), digest_size=8).digest() for identifier in ids)
    return np.frombuffer(digests, dtype=np.uint64)


class SeenHashes:
    """A set of ids that grows by eight bytes for each: hashes of 64 bits, in sorted runs that are merged as they grow.

    Two ids of 21 million share a hash with a probability of one in 80,000.
    """

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []

    def add(self, ids: list[str]) -> np.ndarray:
        """Take ids in; returns for each whether it was there before, among these or earlier ones."""
        hashes = hash_ids(ids)
        unique, first = np.unique(hashes, return_index=True)
        repeated = np.ones(len(ids), dtype=bool)
        repeated[first] = False
        for run in self._runs:
            places = np.minimum(np.searchsorted(run, hashes), len(run) - 1)
            repeated |= run[places] == hashes
        self._runs.append(unique)
        while len(self._runs) > 1 and len(self._runs[-1]) * 2 > len(self._runs[-2]):
            last = self._runs.pop()
            merged = np.concatenate([self._runs.pop(), last])
            merged.sort(kind="stable")
            self._runs.append(merged)
        return repeated
