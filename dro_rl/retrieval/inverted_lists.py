"""faiss's inverted lists over the vectors of a dense index: built block by block, merged on the disk, mapped to search.

No more than the sample for the centroids, or a block of vectors, is in memory at once. Vectors are kept as they are,
not compressed: a search of all lists finds what a plain one does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from dro_rl.files import written_whole

SAMPLE = 64
"""Vectors for each centroid that k-means sees at most."""

BLOCK = 64
"""Shards whose lists are made in memory, and written, at once."""

INDEX, LISTS, TRAINED = "ivf.faiss", "ivf.lists", "ivf.trained"


def is_finished(folder: Path) -> bool:
    """Whether `build` came to its end there."""
    return (folder / INDEX).is_file()


def build(folder: Path, shards: Sequence[Path], nlist: int, dtype: str) -> None:
    """Make the lists of all vectors. What was killed begins again, but for the blocks of lists that are whole.

    Args:
        folder: of the index.
        shards: .npy files of (rows, dimension) each, in the order of their rows.
        nlist: how many lists.
        dtype: what the lists hold, float32 or float16.
    """
    import faiss
    from faiss.contrib.ondisk import merge_ondisk

    trained = folder / TRAINED
    if not trained.is_file():
        with written_whole(trained) as beside:
            faiss.write_index(_trained(shards, nlist, dtype), str(beside))
    blocks: list[Path] = []
    start = 0
    with tqdm(total=len(shards), desc="lists", unit="shard", disable=None) as bar:
        for first in range(0, len(shards), BLOCK):
            vectors = [np.load(path, mmap_mode="r", allow_pickle=False) for path in shards[first : first + BLOCK]]
            path = folder / f"ivf.block-{len(blocks):05}"
            if not path.is_file():
                _write_block(path, faiss.read_index(str(trained)), vectors, start)
            blocks.append(path)
            start += sum(map(len, vectors))
            bar.update(len(vectors))
    index: Any = faiss.read_index(str(trained))
    with written_whole(folder / LISTS) as beside:
        beside.unlink(missing_ok=True)
        merge_ondisk(index, [str(path) for path in blocks], str(beside))
    lists: Any = faiss.downcast_InvertedLists(index.invlists)
    lists.filename = LISTS
    with written_whole(folder / INDEX) as beside:
        faiss.write_index(index, str(beside))


def clean(folder: Path) -> None:
    """Remove what a build needed on its way."""
    for path in (folder / TRAINED, *folder.glob("ivf.block-*")):
        path.unlink(missing_ok=True)


def opened(folder: Path, nprobe: int) -> Any:
    """faiss's index with its lists memory-mapped, of whose lists a search looks into the `nprobe` nearest."""
    import faiss

    index: Any = faiss.read_index(str(folder / INDEX), faiss.IO_FLAG_READ_ONLY | faiss.IO_FLAG_ONDISK_SAME_DIR)
    index.nprobe = min(nprobe, index.nlist)
    return index


def _trained(shards: Sequence[Path], nlist: int, dtype: str) -> Any:
    """An index without vectors, its centroids from a sample that is the same each time."""
    import faiss

    counts = [len(np.load(path, mmap_mode="r", allow_pickle=False)) for path in shards]
    total = sum(counts)
    rows = np.sort(np.random.default_rng(0).choice(total, min(total, SAMPLE * nlist), replace=False))
    parts, start = [], 0
    for path, count in zip(shards, counts, strict=True):  # mapped one after the other: a map holds a file open
        inside = rows[(rows >= start) & (rows < start + count)] - start
        parts.append(np.asarray(np.load(path, mmap_mode="r", allow_pickle=False)[inside], np.float32))
        start += count
    sample = np.concatenate(parts)
    dimension = sample.shape[1]
    quantizer, metric = faiss.IndexFlatIP(dimension), faiss.METRIC_INNER_PRODUCT
    if dtype == "float16":
        kind = faiss.ScalarQuantizer.QT_fp16
        index: Any = faiss.IndexIVFScalarQuantizer(quantizer, dimension, nlist, kind, metric, False)
    else:
        index = faiss.IndexIVFFlat(quantizer, dimension, nlist, metric)
    index.cp.min_points_per_centroid = 1  # faiss would warn of each corpus that is smaller than it likes
    index.train(sample)
    return index


def _write_block(path: Path, index: Any, vectors: Sequence[np.ndarray], start: int) -> None:
    import faiss

    for shard in vectors:
        index.add_with_ids(np.asarray(shard, np.float32), np.arange(start, start + len(shard)))
        start += len(shard)
    with written_whole(path) as beside:
        faiss.write_index(index, str(beside))
