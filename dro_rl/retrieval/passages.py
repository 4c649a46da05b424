"""The passages of an index: memory-mapped Arrow parts, so that any passage is read without loading the corpus.

A corpus goes in once, as a stream. A part is written whole; a build that was killed goes on after the last one, and
finds out if the corpus is another one by then. Knows nothing of retrievers.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa

from dro_rl.data.corpus import CorpusHash, SeenHashes, hash_ids
from dro_rl.errors import InputError, Phrase, first_line
from dro_rl.files import written_whole
from dro_rl.records import Document
from dro_rl.rows import Bad, refuse

PART = 65_536
"""Passages of a part."""

BATCH = 2_048
"""Passages of a record batch: what is touched to read one of them is their offsets."""

SCHEMA = pa.schema([("id", pa.string()), ("title", pa.string()), ("text", pa.string())])
HASH_KEY = b"corpus_hash"


class PassageStore:
    """The passages of a finished index, by row: their place in the corpus.

    Args:
        folder: what `write_passages` filled.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._parts = [_open_part(path) for path in part_paths(folder)]
        counts = [part.num_rows for part in self._parts]
        self._starts = [sum(counts[:number]) for number in range(len(counts))]
        self._count = sum(counts)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> Document:
        if not 0 <= row < self._count:
            raise IndexError(f"row {row} of {self._count}")
        number = bisect.bisect_right(self._starts, row) - 1
        place = row - self._starts[number]
        part = self._parts[number]
        return Document(*(part.column(name)[place].as_py() for name in ("id", "title", "text")))

    def __iter__(self) -> Iterator[Document]:
        for number in range(len(self._parts)):
            yield from self.part(number)

    @property
    def num_parts(self) -> int:
        """How many parts there are."""
        return len(self._parts)

    def part(self, number: int) -> Iterator[Document]:
        """The passages of one part."""
        for batch in self._parts[number].to_batches():
            columns = (batch.column(name).to_pylist() for name in ("id", "title", "text"))
            yield from (Document(*values) for values in zip(*columns, strict=True))

    def row_of(self, identifier: str) -> int | None:
        """The row of a passage by its id; None where the corpus has none of that id."""
        hashes, rows = self._by_hash
        wanted = hash_ids([identifier])[0]
        for place in range(np.searchsorted(hashes, wanted), np.searchsorted(hashes, wanted, side="right")):
            if self[int(rows[place])].id == identifier:
                return int(rows[place])
        return None

    @cached_property
    def _by_hash(self) -> tuple[np.ndarray, np.ndarray]:
        return np.load(self.folder / "id_hashes.npy", mmap_mode="r"), np.load(self.folder / "rows.npy", mmap_mode="r")


def part_paths(folder: Path) -> list[Path]:
    """The parts that are there, in order."""
    return sorted(folder.glob("[0-9]*.arrow"))


def write_passages(folder: Path, documents: Iterable[Document], *, bad: Bad = refuse) -> str:
    """Fill a folder with the passages of a stream, part by part. Parts that a killed build left are kept.

    Args:
        folder: where the parts go.
        documents: the corpus, from its beginning.
        bad: what is done with a passage whose title and text an earlier one has too.

    Returns:
        The corpus hash: `dro_rl.data.corpus.corpus_hash` of the passages that were kept.

    Raises:
        InputError: a passage stands twice, or the parts that are there are of another corpus.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digest = CorpusHash()
    there = part_paths(folder)
    number = 0
    stream = _without_copies(documents, bad)
    while part := list(islice(stream, PART)):
        for document in part:
            digest.add(document)
        path = folder / f"{number:05}.arrow"
        if number < len(there):
            _check_same(path, digest.hexdigest())
        else:
            _write_part(path, part, digest.hexdigest())
        number += 1
    if number < len(there):
        raise _another_corpus(folder)
    return digest.hexdigest()


def write_lookup(store: PassageStore) -> None:
    """Write the table from ids to rows: sorted 64-bit hashes of the ids, and their rows."""
    hashes = np.empty(len(store), dtype=np.uint64)
    start = 0
    for part in store._parts:
        ids = part.column("id").to_pylist()
        hashes[start : start + len(ids)] = hash_ids(ids)
        start += len(ids)
    order = np.argsort(hashes, kind="stable")
    for name, values in (("id_hashes.npy", hashes[order]), ("rows.npy", order.astype(np.uint32))):
        with written_whole(store.folder / name) as beside, beside.open("wb") as file:
            np.save(file, values, allow_pickle=False)


def _write_part(path: Path, documents: Sequence[Document], corpus_hash: str) -> None:
    schema = SCHEMA.with_metadata({HASH_KEY: corpus_hash.encode()})
    with written_whole(path) as beside, pa.OSFile(str(beside), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for start in range(0, len(documents), BATCH):
            rows = documents[start : start + BATCH]
            columns = [[getattr(row, name) for row in rows] for name in ("id", "title", "text")]
            writer.write_batch(pa.record_batch([pa.array(column, pa.string()) for column in columns], schema=schema))


def _open_part(path: Path) -> pa.Table:
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(
            str(path), Phrase(first_line(error)), "the passages of an index are whole", "Build it again."
        ) from None


def _check_same(path: Path, corpus_hash: str) -> None:
    metadata = _open_part(path).schema.metadata or {}
    if metadata.get(HASH_KEY, b"").decode() != corpus_hash:
        raise _another_corpus(path)


def _another_corpus(path: Path) -> InputError:
    return InputError(
        str(path),
        Phrase("written from other passages"),
        "a build goes on with the corpus that it began with, unchanged",
        "Delete the index folder to begin anew, or name another.",
    )


def _without_copies(documents: Iterable[Document], bad: Bad) -> Iterator[Document]:
    seen = SeenHashes()
    stream = iter(documents)
    while batch := list(islice(stream, BATCH)):
        repeated = seen.add([json.dumps([document.title, document.text]) for document in batch])
        for document, again in zip(batch, repeated, strict=True):
            if again:
                bad(
                    InputError(
                        f"corpus (id {document.id}): text",
                        Phrase("title and text of an earlier passage"),
                        "a passage stands once in a corpus",
                        "Remove one of the two, or leave copies out with --skip-bad.",
                    )
                )
            else:
                yield document
