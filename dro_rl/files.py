"""The one way to write a file, or a folder: whole and on the disk, or not at all."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

SEAL = "files.json"
"""In a sealed folder: its files, with their sizes and hashes."""


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its place when the block ends without an error.

    Who reads `path` meanwhile, or after a kill, finds the file as it was before. Folders above it are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = beside_of(path)
    if beside.is_symlink():
        beside.unlink()  # what it leads to is not ours to write to
    try:
        yield beside
        _sync(beside)
        beside.replace(path)
    except BaseException:
        if beside.is_file():
            beside.unlink()
        raise


@contextmanager
def folder_written_whole(folder: Path, *, sealed: bool = False) -> Iterator[Path]:
    """A fresh folder beside `folder` to fill, which takes its place, on the disk, when the block ends without an error.

    Args:
        sealed: leave a list of its files in it, by which `damage` tells later whether it is whole.
    """
    beside, before = beside_of(folder), beside_of(folder.with_name(f"{folder.name}.old"))
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        if sealed:
            (beside / SEAL).write_text(json.dumps(_facts(beside), indent=2) + "\n", encoding="utf-8")
        for path in (*beside.rglob("*"), beside):
            _sync(path)
        if folder.exists():
            folder.rename(before)
        beside.rename(folder)
        _sync(folder.parent)
        shutil.rmtree(before, ignore_errors=True)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def beside_of(path: Path) -> Path:
    """Where a file or a folder is written before it takes its place."""
    return path.with_name(f".{path.name}.tmp")


def damage(folder: Path) -> str | None:
    """What is wrong with a folder that was written whole and sealed, in a few words; None where it is as it was.

    Every byte is read. Hidden files, as file browsers leave them, are no matter.
    """
    if not folder.is_dir():
        return "no such folder"
    try:
        known = {name: (size, digest) for name, size, digest in json.loads((folder / SEAL).read_text("utf-8"))}
    except FileNotFoundError:
        return f"{SEAL} is missing"
    except (OSError, ValueError, TypeError):
        return f"{SEAL} is damaged"
    there = {name: (size, digest) for name, size, digest in _facts(folder)}
    for name in known:
        if name not in there:
            return f"{name} is missing"
        if there[name] != known[name]:
            (size, _), (was, _) = there[name], known[name]
            return f"{name} has {size} bytes, and had {was}" if size != was else f"{name} holds other bytes"
    extra = next((name for name in there if name not in known), None)
    return extra and f"{extra} is not of it"


def _facts(folder: Path) -> list[tuple[str, int, str]]:
    """Name, bytes and sha256 of every file in a folder, except those that the seal leaves out."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    names = [name for name in names if name != SEAL and not any(part.startswith(".") for part in Path(name).parts)]
    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter's lock
        digests = pool.map(file_sha256, (folder / name for name in names))
        return [(name, (folder / name).stat().st_size, digest) for name, digest in zip(names, digests, strict=True)]


def file_sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sampled_sha256(path: Path, blocks: int = 16, block: int = 2**16) -> str:
    """Hash of a file's size and of `blocks` blocks all over it, its first and its last among them; of a file of no more
    than these, of all its bytes. Takes no longer for a file of any size.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for number in range(blocks):
            if size > blocks * block:
                file.seek(number * (size - block) // (blocks - 1))
            digest.update(file.read(block))
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk before anything that follows."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json_lines(path: Path, rows: Iterable[Any]) -> int:
    """`write_lines` of one JSON value each."""
    return write_lines(path, (json.dumps(row, ensure_ascii=False) for row in rows))


def write_lines(path: Path, lines: Iterable[str]) -> int:
    """Write lines, whole, from a stream; packed where the name ends in `.gz`. Equal lines, equal bytes.

    Returns:
        How many were written.
    """
    count = 0
    with written_whole(path) as beside, beside.open("wb") as raw, ExitStack() as stack:
        file: Any = raw
        if path.name.lower().endswith(".gz"):
            file = stack.enter_context(gzip.GzipFile("", "wb", fileobj=raw, mtime=0, compresslevel=6))
        for line in lines:
            file.write(line.encode() + b"\n")
            count += 1
    return count
