"""Late interaction by colbert-ai: every token of a passage is a vector; a question's tokens each find their best.

A build goes on chunk by chunk. Each of its processes encodes chunks of its own; they do not talk to each other, so one
that dies is seen at once, and costs a chunk.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import math
import random
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from tqdm.auto import tqdm

from dro_rl.errors import InputError, Phrase
from dro_rl.files import file_sha256
from dro_rl.records import Document
from dro_rl.retrieval.checkpoint import checkpoint_folder
from dro_rl.retrieval.colbert_runtime import check_runtime, load_colbert
from dro_rl.retrieval.passages import PassageStore
from dro_rl.retrieval.protocol import Hit
from dro_rl.retrieval.workers import side_by_side, take_gpu

CHUNKS = 40
LARGEST_CHUNK = 25_000
"""A corpus is encoded in so many chunks, or in more of this size."""


def passage_text(document: Document) -> str:
    """What of a passage is encoded: title and text as ColBERT's Wikipedia collections join them."""
    return f"{document.title} | {document.text}" if document.title else document.text


@dataclass
class ColBERT:
    """The `colbert` retriever.

    Args:
        checkpoint: a ColBERT checkpoint: a folder, or a hub name such as colbert-ir/colbertv2.0.
        nbits: bits of each dimension's residual in the index, 1, 2, 4 or 8.
        doc_maxlen: tokens of a passage; the rest is cut off. 180 as in ColBERTv2.
        query_maxlen: tokens of a question, masks included.
        batch_size: passages encoded at once. Scores do not depend on it but for rounding.
    """

    checkpoint: str = ""
    nbits: int = 2
    doc_maxlen: int = 180
    query_maxlen: int = 32
    batch_size: int = 64
    name: str = field(default="colbert", init=False)
    format: ClassVar[int] = 1

    def settings(self) -> dict[str, Any]:
        """What its scores depend on. A build can go on with another batch size."""
        return {key: value for key, value in asdict(self).items() if key not in ("name", "batch_size")}

    def versions(self) -> Mapping[str, str]:
        """The packages, and the weights by their hash."""
        versions = {package: importlib.metadata.version(package) for package in ("colbert-ai", "torch", "transformers")}
        return {**versions, "weights": file_sha256(_weights(self.folder()))}

    def check(self) -> None:
        """Raise `InputError` for a setting, a checkpoint, a package or a compiler that is not as it must be."""
        if self.nbits not in (1, 2, 4, 8):
            raise InputError("nbits", self.nbits, "this is 1, 2, 4 or 8", "Use 2, as ColBERTv2.")
        for name in ("doc_maxlen", "query_maxlen", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(name, getattr(self, name), "this is at least 1", "Use a positive number.")
        check_runtime()
        check_checkpoint(self.folder())

    def build(self, passages: PassageStore, folder: Path, processes: int) -> None:
        """Centroids from a sample, then the passages chunk by chunk, then the table from centroids to passages."""
        folder.mkdir(parents=True, exist_ok=True)
        size = _chunk_size(len(passages))
        indexer = _indexer(self, passages, folder)
        _drop_torn(folder)
        if not indexer.saver.try_load_codec():
            (folder / "plan.json").unlink(missing_ok=True)
            with _quiet():
                indexer.setup()
                indexer.train([])
        indexer.setup()  # reads the plan, where it is
        missing = [n for n in range(math.ceil(len(passages) / size)) if not indexer.saver.check_chunk_exists(n)]
        with tqdm(total=len(passages), desc="encode", unit="passage", disable=None) as bar:
            bar.update(len(passages) - sum(min(size, len(passages) - n * size) for n in missing))
            if processes == 1 or len(missing) < 2:
                for number in missing:
                    bar.update(_encode_chunk(indexer, passages, number, size))
            else:
                given = (self, passages.folder, folder, size)
                side_by_side(_encode_chunks, given, missing, min(processes, len(missing)), bar)
        with _quiet():
            indexer.finalize()

    def open(self, folder: Path, rank: int = 0) -> None:
        """Load the index, and the checkpoint onto the GPU of this rank where there is one."""
        take_gpu(rank)
        checkpoint = self.folder()
        with _quiet():
            load_colbert()
            from colbert import Searcher
            from colbert.data import Collection

            self._searcher = Searcher(
                index=folder.name,
                index_root=str(folder.parent.absolute()),
                checkpoint=str(checkpoint),
                collection=Collection(data=["passages are looked up by row"]),
                config=_config(self, checkpoint),
                verbose=0,
            )

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """At most k passages for each query, best first. Those are fewer where the query's centroids hold fewer."""
        with _quiet():
            # What an earlier search set for its k would stay.
            self._searcher.configure(ncells=None, centroid_score_threshold=None, ndocs=None)
            encoded = self._searcher.encode(list(queries))
            found = [self._searcher.dense_search(encoded[n : n + 1], k=k) for n in range(len(queries))]
        hits = [[Hit(int(row), float(score)) for row, _, score in zip(*each, strict=False)] for each in found]
        return [sorted(each, key=lambda hit: (-hit.score, hit.row)) for each in hits]

    def folder(self) -> Path:
        """Where the checkpoint is."""
        return checkpoint_folder(self.checkpoint, "a ColBERT checkpoint")


def check_checkpoint(folder: Path) -> None:
    """Refuse what is no ColBERT checkpoint: without its projection, vectors would be projected at random.

    Refuses code that comes with a model too: colbert-ai would run it unasked.
    """
    from safetensors import SafetensorError, safe_open

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        with safe_open(_weights(folder), "pt") as weights:
            names = set(weights.keys())
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(
            f"checkpoint: {folder}",
            Phrase(str(error)[:120]),
            "a checkpoint has config.json and model.safetensors",
            "Name another, or save it anew with transformers.",
        ) from None
    if "linear.weight" not in names:
        raise InputError(
            f"checkpoint: {folder}",
            Phrase("no linear.weight"),
            "a ColBERT checkpoint holds an encoder and its projection",
            "Name a ColBERT checkpoint, such as colbert-ir/colbertv2.0.",
        )
    if "auto_map" in config:
        raise InputError(
            f"checkpoint: {folder}", Phrase("auto_map"), "code that comes with a model is not run", "Name another."
        )


def _weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def _config(retriever: ColBERT, checkpoint: Path) -> Any:
    from colbert.infra.config import ColBERTConfig

    return ColBERTConfig(
        checkpoint=str(checkpoint),
        model_name=str(checkpoint),  # without it, colbert-ai asks the hub for bert-base-uncased
        nbits=retriever.nbits,
        doc_maxlen=retriever.doc_maxlen,
        query_maxlen=retriever.query_maxlen,
        index_bsize=retriever.batch_size,
        resume=True,
    )


class _Texts(Sequence[str]):
    """The texts of a passage store, for colbert-ai, which asks for a list."""

    def __init__(self, passages: PassageStore) -> None:
        self._passages = passages

    def __len__(self) -> int:
        return len(self._passages)

    def __getitem__(self, row: Any) -> Any:
        return passage_text(self._passages[row])

    def __iter__(self) -> Iterator[str]:
        return map(passage_text, self._passages)


def _indexer(retriever: ColBERT, passages: PassageStore, folder: Path) -> Any:
    """colbert-ai's indexer over our passages. Its sample of passages is drawn from a fixed seed."""
    checkpoint = retriever.folder()
    with _quiet():
        load_colbert()
        import torch
        from colbert.data import Collection
        from colbert.indexing.collection_indexer import CollectionIndexer
        from colbert.infra.config import ColBERTConfig

        random.seed(12345)
        torch.manual_seed(12345)
        collection: Any = Collection(data=_Texts(passages))
        collection.get_chunksize = lambda: _chunk_size(len(passages))
        trained = ColBERTConfig.load_from_checkpoint(str(checkpoint))
        config = ColBERTConfig.from_existing(trained, _config(retriever, checkpoint))
        config.configure(index_path=str(folder.absolute()), rank=0, nranks=1)
        return CollectionIndexer(config, collection, verbose=0)


def _chunk_size(passages: int) -> int:
    return max(1, min(LARGEST_CHUNK, math.ceil(passages / CHUNKS)))


def _encode_chunk(indexer: Any, passages: PassageStore, number: int, size: int) -> int:
    """Encode and write one chunk; returns how many passages it has."""
    import torch

    start = number * size
    texts = [passage_text(passages[row]) for row in range(start, min(start + size, len(passages)))]
    with _quiet(), torch.inference_mode():
        vectors, lengths = indexer.checkpoint.docFromText(texts, bsize=indexer.config.index_bsize, keep_dims="flatten")
        with indexer.saver.thread():
            indexer.saver.save_chunk(number, start, vectors.half(), lengths)
    return len(texts)


def _encode_chunks(retriever: ColBERT, store: Path, folder: Path, size: int, numbers: list[int], done: Any) -> None:
    """A process's share of the chunks."""
    passages = PassageStore(store)
    indexer = _indexer(retriever, passages, folder)
    indexer.setup()
    for number in numbers:
        done.put(_encode_chunk(indexer, passages, number, size))


def _drop_torn(folder: Path) -> None:
    """Remove the last mark of a chunk whose files a kill left torn: the chunk is encoded again."""
    for path in folder.glob("*.metadata.json"):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            path.unlink()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what colbert-ai prints, and without torch's warnings that a CPU is no GPU. Errors go their way."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(_WithoutBars(sys.stderr)),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", module="torch.cuda.amp|colbert")
        yield


class _WithoutBars(io.TextIOBase):
    """Standard error without progress bars, which redraw their line."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if "\r" not in text and "it/s]" not in text:
            self._stream.write(text)
        return len(text)
