"""One vector a passage, by an encoder of sentence-transformers; the largest inner products with a question's are best.

Vectors are written shard by shard, each a whole .npy file: a kill costs the shard that was under way. `flat` compares a
question with every one of them, memory-mapped; `ivf` gathers them into faiss's inverted lists, and looks into the
`nprobe` nearest.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tqdm.auto import tqdm

from dro_rl.errors import InputError, LackError, Phrase
from dro_rl.files import written_whole
from dro_rl.records import Document
from dro_rl.retrieval import inverted_lists
from dro_rl.retrieval.checkpoint import checkpoint_folder
from dro_rl.retrieval.encoder import Encoder, check_encoder, encoder_sha256
from dro_rl.retrieval.passages import PassageStore
from dro_rl.retrieval.protocol import Hit
from dro_rl.retrieval.workers import side_by_side, take_gpu
from dro_rl.rows.small import read_object

SHARD = 16_384
"""Passages of a shard: what a kill can cost, and how many are compared at once."""

ENCODER = "encoder.json"
VECTORS = "vectors"


def passage_text(document: Document) -> str:
    """What of a passage is encoded, after the passage prompt: title and text as BEIR joins them."""
    return f"{document.title} {document.text}".strip()


@dataclass
class Dense:
    """The `dense` retriever.

    Args:
        checkpoint: an encoder as sentence-transformers saves it: a folder, or a hub name such as intfloat/e5-base-v2.
        revision: of a hub name: a commit, a tag or a branch. Whatever it names, the hash of the files is checked.
        query_prompt: what is put before a question; None: the encoder's own.
        passage_prompt: what is put before a passage; None: the encoder's own.
        similarity: cosine or dot; None: the encoder's own.
        dtype: of the vectors on disk, float32 or float16. On a GPU the encoder computes in it too.
        faiss_index: flat, or ivf.
        nlist: lists of ivf; 0: 4 √N of N passages, and no more than N / 39.
        nprobe: lists that a search of ivf looks into.
        batch_size: texts encoded at once. Scores do not depend on it but for rounding.
    """

    checkpoint: str = ""
    revision: str | None = None
    query_prompt: str | None = None
    passage_prompt: str | None = None
    similarity: str | None = None
    dtype: str = "float32"
    faiss_index: str = "flat"
    nlist: int = 0
    nprobe: int = 64
    batch_size: int = 64
    name: str = field(default="dense", init=False)
    format: ClassVar[int] = 1

    def settings(self) -> dict[str, Any]:
        """What its scores depend on. A build can go on with another batch size."""
        return {key: value for key, value in asdict(self).items() if key not in ("name", "batch_size")}

    def versions(self) -> Mapping[str, str]:
        """The packages, and the encoder by a hash over its files."""
        import faiss

        names = ("sentence-transformers", "torch", "transformers")
        versions = {package: importlib.metadata.version(package) for package in names}
        return {**versions, "faiss": faiss.__version__, "weights": encoder_sha256(self.folder())}

    def check(self) -> None:
        """Raise `InputError` for a setting, an encoder or a package that is not as it must be."""
        for name, known in (("dtype", ("float32", "float16")), ("faiss_index", ("flat", "ivf"))):
            if getattr(self, name) not in known:
                raise InputError(name, getattr(self, name), f"this is {' or '.join(known)}", f"Use {known[0]}.")
        if self.similarity not in (None, "cosine", "dot"):
            raise InputError("similarity", self.similarity, "this is cosine or dot", "Leave it to the encoder.")
        for name, least in (("nlist", 0), ("nprobe", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise InputError(name, getattr(self, name), f"this is at least {least}", f"Use {least} or more.")
        if 0 < self.nlist < self.nprobe and self.faiss_index == "ivf":
            raise InputError("nprobe", self.nprobe, f"this is at most nlist, {self.nlist}", "Look into fewer lists.")
        for module in ("sentence_transformers", "faiss"):
            if importlib.util.find_spec(module) is None:
                raise LackError(
                    "dense",
                    Phrase(f"{module} is not installed"),
                    "dense retrieval runs on sentence-transformers and faiss",
                    "pip install 'dro_rl[dense]'",
                )
        check_encoder(self.folder())

    def folder(self) -> Path:
        """Where the encoder is."""
        return checkpoint_folder(self.checkpoint, "an encoder of sentence-transformers", self.revision)

    def build(self, passages: PassageStore, folder: Path, processes: int) -> None:
        """Encode the shards that are missing; of `ivf`, gather all of them into lists then."""
        nlist = self._lists(len(passages))
        if self.faiss_index == "flat":
            self._encode(passages, folder, processes)
            return
        if not inverted_lists.is_finished(folder):
            shards = self._encode(passages, folder, processes)
            inverted_lists.build(folder, shards, nlist, self.dtype)
        inverted_lists.clean(folder)
        shutil.rmtree(folder / VECTORS, ignore_errors=True)  # the lists hold them

    def _encode(self, passages: PassageStore, folder: Path, processes: int) -> list[Path]:
        """Encode the shards that are missing; returns the files of all."""
        shards = range(math.ceil(len(passages) / SHARD))
        with tqdm(total=len(passages), desc="encode", unit="passage", disable=None) as bar:
            alone = processes == 1 or len(shards) == 1
            encoder = self._encoder(on_gpu=alone and take_gpu(0))
            _write_facts(folder, {**encoder.facts(), "passages": len(passages), "dtype": self.dtype})
            missing = [number for number in shards if not _is_whole(self, folder, number, passages, encoder.dimension)]
            bar.update(len(passages) - sum(_rows(number, passages) for number in missing))
            if alone:
                for number in missing:
                    bar.update(_encode_shard(self, encoder, passages, folder, number))
            elif missing:
                del encoder
                given = (self, passages.folder, folder)
                side_by_side(_encode_shards, given, missing, min(processes, len(missing)), bar)
        return [_shard_path(folder, number) for number in shards]

    def open(self, folder: Path, rank: int = 0) -> None:
        """Load the encoder, onto the GPU of this rank where there is one, and map the vectors."""
        self._encoded = self._encoder(on_gpu=take_gpu(rank))
        facts = read_object(folder / ENCODER, "what encoded an index", "Build the index again.")
        for name, now in self._encoded.facts().items():
            if facts.get(name) != now:
                raise InputError(
                    f"{folder / ENCODER}: {name}",
                    facts.get(name),
                    f"{self.checkpoint} has {now!r}, and a question is encoded as the passages were",
                    "Put the encoder back, or build the index again.",
                )
        if self.faiss_index == "ivf":
            self._lists_there = inverted_lists.opened(folder, self.nprobe)
            return
        self._shards = sorted((folder / VECTORS).glob("*.npy"))
        shapes = [_header(path) for path in self._shards]
        there = sum(shape[0] for shape, _ in shapes)
        if there != facts.get("passages") or any(shape[1] != facts["dimension"] for shape, _ in shapes):
            raise InputError(
                str(folder / VECTORS),
                Phrase(f"{there} vectors"),
                f"there is one of {facts['dimension']} dimensions for each of {facts.get('passages')} passages",
                "Build the index again.",
            )

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """The k best passages for each query, best first; of ivf fewer, where its nearest lists hold fewer."""
        vectors = self._encoded.queries(queries, self.batch_size)
        if self.faiss_index == "ivf":
            scores, rows = self._lists_there.search(vectors, k)
        else:
            shards = (np.load(path, mmap_mode="r", allow_pickle=False) for path in self._shards)
            scores, rows = nearest(vectors, shards, k, self._encoded.device)
        hits = [
            [Hit(int(row), float(score)) for row, score in zip(*each, strict=True) if row >= 0]
            for each in zip(rows, scores, strict=True)
        ]
        return [sorted(each, key=lambda hit: (-hit.score, hit.row)) for each in hits]

    def _encoder(self, *, on_gpu: bool) -> Encoder:
        half = on_gpu and self.dtype == "float16"
        return Encoder(self.folder(), self.query_prompt, self.passage_prompt, self.similarity, on_gpu=on_gpu, half=half)

    def _lists(self, passages: int) -> int:
        """How many lists there are for so many passages."""
        if self.nlist > passages and self.faiss_index == "ivf":
            raise InputError(
                "nlist", self.nlist, f"there are {passages} passages, and no more lists than these", "Use fewer."
            )
        return self.nlist or max(1, min(round(4 * math.sqrt(passages)), passages // 39))


def nearest(queries: np.ndarray, shards: Iterator[np.ndarray], k: int, device: str) -> tuple[np.ndarray, np.ndarray]:
    """The k largest inner products of each query with the vectors of all shards, exactly.

    Computed by faiss, and on a GPU by torch: faiss as PyPI has it knows no GPU.

    Args:
        queries: (n, dimension), float32.
        shards: (rows, dimension) each, float32 or float16, in order.
        k: how many.
        device: `cpu`, or torch's name of a GPU.

    Returns:
        Scores and rows, (n, k) each, best first, of equal score the earlier row; row -1 where there are no more.
    """
    scores = np.full((len(queries), k), -np.inf, np.float32)
    rows = np.full((len(queries), k), -1, np.int64)
    start = 0
    for shard in shards:
        best, there = (_by_faiss if device == "cpu" else _by_torch)(queries, shard, min(k, len(shard)), device)
        scores, rows = np.hstack([scores, best]), np.hstack([rows, there + start])
        order = np.lexsort((rows, -scores), axis=1)[:, :k]
        scores, rows = np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
        start += len(shard)
    return scores, rows


def _by_faiss(queries: np.ndarray, shard: np.ndarray, k: int, device: str) -> tuple[np.ndarray, np.ndarray]:
    import faiss

    return faiss.knn(queries, shard, k, metric=faiss.METRIC_INNER_PRODUCT)


def _by_torch(queries: np.ndarray, shard: np.ndarray, k: int, device: str) -> tuple[np.ndarray, np.ndarray]:
    import torch

    vectors = torch.from_numpy(np.array(shard)).to(device).float()
    best, there = (torch.from_numpy(queries).to(device) @ vectors.T).topk(k, dim=1)
    return best.cpu().numpy(), there.cpu().numpy()


def _encode_shards(retriever: Dense, store: Path, folder: Path, numbers: list[int], done: Any) -> None:
    """A process's share of the shards."""
    import torch

    passages, encoder = PassageStore(store), retriever._encoder(on_gpu=torch.cuda.is_available())
    for number in numbers:
        done.put(_encode_shard(retriever, encoder, passages, folder, number))


def _encode_shard(retriever: Dense, encoder: Encoder, passages: PassageStore, folder: Path, number: int) -> int:
    """Encode and write one shard; returns how many passages it has."""
    start = number * SHARD
    documents = [passages[row] for row in range(start, start + _rows(number, passages))]
    found = encoder.passages([passage_text(document) for document in documents], retriever.batch_size)
    with np.errstate(over="ignore"):
        vectors = found.astype(retriever.dtype)
    if len(wrong := np.flatnonzero(~np.isfinite(vectors).all(axis=1))):
        raise InputError(
            f"passage {documents[wrong[0]].id}",
            Phrase("a vector with NaN, or with numbers that float16 does not hold"),
            "a passage has a vector of finite numbers",
            "Use --dtype float32; if it stays so, another encoder.",
        )
    with written_whole(_shard_path(folder, number)) as beside, beside.open("wb") as file:
        np.save(file, vectors, allow_pickle=False)
    return len(documents)


def _rows(number: int, passages: PassageStore) -> int:
    return min(SHARD, len(passages) - number * SHARD)


def _shard_path(folder: Path, number: int) -> Path:
    return folder / VECTORS / f"{number:05}.npy"


def _is_whole(retriever: Dense, folder: Path, number: int, passages: PassageStore, dimension: int) -> bool:
    """Whether a shard is there as it was written; else it is encoded again."""
    path = _shard_path(folder, number)
    try:
        return path.is_file() and _header(path) == ((_rows(number, passages), dimension), retriever.dtype)
    except InputError:
        return False


def _header(path: Path) -> tuple[tuple[int, ...], str]:
    """Shape and type of a shard, all of whose bytes are there."""
    try:
        shard = np.load(path, mmap_mode="r", allow_pickle=False)
        return shard.shape, str(shard.dtype)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(
            str(path), Phrase(str(error)[:120]), "the vectors of an index are whole", "Build the index again."
        ) from None


def _write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    with written_whole(folder / ENCODER) as beside:
        beside.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
