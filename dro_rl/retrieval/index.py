"""An index: passages, what a retriever made of them, and `index.json`, which is written last.

A folder without `index.json` is not an index yet. `build_index` on it goes on where it stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypedDict, cast

from tqdm.auto import tqdm

from dro_rl import __version__
from dro_rl.data.corpus import corpus_files, read_corpus, shards
from dro_rl.errors import InputError, Phrase
from dro_rl.files import file_sha256, sampled_sha256, written_whole
from dro_rl.locks import LOCK, claim, owned
from dro_rl.records import Document
from dro_rl.retrieval.bm25 import BM25
from dro_rl.retrieval.colbert import ColBERT
from dro_rl.retrieval.dense import Dense
from dro_rl.retrieval.passages import PassageStore, write_lookup, write_passages
from dro_rl.retrieval.protocol import Retriever
from dro_rl.rows import Skips, refuse
from dro_rl.rows.small import read_object, record

RETRIEVERS: dict[str, type[BM25] | type[ColBERT] | type[Dense]] = {"bm25": BM25, "colbert": ColBERT, "dense": Dense}


class FileFact(TypedDict):
    """A file of the corpus as it was."""

    path: str
    bytes: int
    changed: int
    sha256: str


@dataclass(frozen=True)
class IndexManifest:
    """`index.json`.

    Args:
        retriever: its name.
        settings: what its scores depend on.
        versions: the packages that compute them.
        corpus: path of the file or folder; of a hub dataset its name, configuration and split.
        corpus_hash: `dro_rl.data.corpus.corpus_hash` of the passages.
        passages: how many there are.
        files: the corpus's files as they were: path, bytes, time of change, sha256. Empty for a hub dataset.
        skipped: rows left out, by reason.
        format: version of these fields, and of the retriever's rules.
        parts: the index's own files, each with a hash of blocks all over it.
        dro_rl: the version that wrote it.
    """

    retriever: str
    settings: dict[str, Any]
    versions: dict[str, str]
    corpus: str
    corpus_hash: str
    passages: int
    files: list[FileFact]
    skipped: dict[str, int]
    format: int
    parts: dict[str, str] = field(default_factory=dict)
    dro_rl: str = __version__


class Candidate(NamedTuple):
    """A passage with the retriever's score."""

    document: Document
    score: float


class Index:
    """A finished index, open for search.

    Args:
        folder: what `build_index` filled.
        rank: of this process among those that search side by side: each takes a GPU of its own where there are several.

    Raises:
        InputError: there is no index, or not a whole one, or its corpus or the model's weights have changed since.

    Attributes:
        versions: the packages that search. Those that built are in the manifest.
    """

    def __init__(self, folder: str | Path, rank: int = 0) -> None:
        self.folder = Path(folder)
        self.manifest = read_index_manifest(self.folder)
        check_parts(self.manifest, self.folder)
        self.passages = PassageStore(self.folder / "passages")
        if len(self.passages) != self.manifest.passages:
            raise InputError(
                str(self.folder),
                Phrase(f"{len(self.passages)} passages"),
                f"index.json counts {self.manifest.passages}",
                "Build the index again.",
            )
        check_corpus(self.manifest, self.folder)
        self.retriever: Retriever = record(
            RETRIEVERS[self.manifest.retriever],
            self.manifest.settings,
            f"{self.folder / 'index.json'}: settings",
            f"the settings of {self.manifest.retriever}",
            "Build the index again.",
        )
        try:
            self.retriever.check()
        except InputError as error:
            place = f"{self.folder / 'index.json'}: {error.place}"
            raise InputError(place, error.value, error.rule, error.fix) from None
        self.versions = dict(self.retriever.versions())
        check_weights(self.manifest, self.versions, self.folder)
        self.retriever.open(self.folder / self.manifest.retriever, rank)

    def search(self, queries: Sequence[str], k: int) -> list[list[Candidate]]:
        """At most k passages for each query, best first; of equal score the earlier ones of the corpus.

        Raises:
            InputError: k is larger than the corpus.
        """
        check_k(k, self.manifest, self.folder)
        found = self.retriever.search(queries, k)
        return [[Candidate(self.passages[hit.row], hit.score) for hit in hits] for hits in found]


def build_index(
    retriever: Retriever,
    corpus: str,
    folder: str | Path,
    *,
    config: str | None = None,
    split: str = "train",
    processes: int = 1,
    skip_bad: bool = False,
) -> IndexManifest:
    """Index a corpus. Killed and called again with the same arguments, it goes on; on a finished index it does nothing.

    Args:
        retriever: with its settings.
        corpus: a file, a folder, or a hub dataset: see `dro_rl.data.corpus.read_corpus`.
        folder: where the index goes.
        config: configuration of a hub dataset.
        split: split of a hub dataset.
        processes: how many work side by side.
        skip_bad: leave bad and repeated passages out and count them; else the first one ends the build.

    Raises:
        InputError: something is wrong with a setting, the corpus or the folder.
    """
    folder = Path(folder)
    retriever.check()
    files = _file_facts(corpus)
    name = str(Path(corpus).expanduser().absolute()) if files else "/".join(filter(None, (corpus, config, split)))
    asked = _asked(retriever, name, files, skip_bad)
    read = partial(read_corpus, corpus, config=config, split=split)
    if (folder / "index.json").is_file():
        return _same_index(folder, asked)
    next(read(bad=Skips() if skip_bad else refuse))  # what is wrong with it at once, is said at once
    with owned(folder / LOCK, str(folder)):
        return _build(retriever, folder, asked, read, processes, skip_bad)


def _build(
    retriever: Retriever, folder: Path, asked: dict[str, Any], read: Callable[..., Any], processes: int, skip_bad: bool
) -> IndexManifest:
    """Make what is not there yet."""

    def differs(key: str, was: Any, wanted: Any) -> InputError:
        return InputError(
            f"{folder}: {key}",
            Phrase(f"begun with {was!r}"),
            f"a build goes on as it began, and this is {wanted!r}",
            "Give the same command, or delete the folder.",
        )

    files = asked["files"]
    claim(folder / "building.json", {**asked, "files": _hashes(files)}, differs)
    skips = Skips()
    bad = skips if skip_bad else refuse
    with _byte_progress(files) as watch:
        corpus_hash = write_passages(folder / "passages", read(bad=bad, watch=watch), bad=bad)
    passages = PassageStore(folder / "passages")
    write_lookup(passages)
    retriever.build(passages, folder / retriever.name, processes)
    for fact in files:
        if _stat(Path(fact["path"])) != (fact["bytes"], fact["changed"]):
            raise InputError(fact["path"], Phrase("changed while it was indexed"), "a corpus stays as it is", "Delete "
                             f"{folder} and build again.")  # fmt: skip
    manifest = IndexManifest(
        **{key: asked[key] for key in ("retriever", "settings", "versions", "corpus", "files", "format")},
        corpus_hash=corpus_hash,
        passages=len(passages),
        skipped=dict(skips.counts),
        parts=_parts(folder),
    )
    with written_whole(folder / "index.json") as beside:
        beside.write_text(json.dumps(asdict(manifest), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "building.json").unlink()
    return manifest


def read_index_manifest(folder: Path) -> IndexManifest:
    """The manifest of an index. Raises `InputError` where there is none, or one of another format."""
    path = folder / "index.json"
    if not path.is_file():
        begun = (folder / "building.json").is_file()
        raise InputError(
            str(folder),
            Phrase("an index that is not finished" if begun else "no index"),
            "an index is a folder that dro-rl index filled",
            "Give the same dro-rl index command again: it goes on." if begun else "Check the path, or build one.",
        )
    values = read_object(path, "an index manifest", "Build the index again.")
    retriever = values.get("retriever")
    if not isinstance(retriever, str) or retriever not in RETRIEVERS:
        raise InputError(
            f"{path}: retriever", retriever, f"this is one of {', '.join(RETRIEVERS)}", "Build the index again."
        )
    if values.get("format") != RETRIEVERS[retriever].format:
        raise InputError(
            f"{path}: format",
            values.get("format"),
            f"this version finds in {retriever} indexes of format {RETRIEVERS[retriever].format}; others were built by "
            "other rules",
            "Build the index again, once the folder is deleted.",
        )
    return record(IndexManifest, values, str(path), "an index manifest", "Build the index again.")


def check_parts(manifest: IndexManifest, folder: Path) -> None:
    """Refuse an index whose own files were damaged: the libraries that map them would die, or find something else."""
    for name, known in manifest.parts.items():
        path = folder / name
        there = os.path.isfile(path)  # of a name that no file can have, too
        if not there or sampled_sha256(path) != known:
            raise InputError(
                str(path),
                Phrase("other bytes than were written" if there else "missing"),
                "an index is whole",
                "Copy it again, or delete the folder and build it again.",
            )


def check_k(k: int, manifest: IndexManifest, folder: Path) -> None:
    """Refuse to look for more passages than there are."""
    if not 1 <= k <= manifest.passages:
        raise InputError(
            "k", k, f"this is 1 to {manifest.passages}, the passages of {folder}", "Use a smaller k, or another index."
        )


def check_weights(manifest: IndexManifest, versions: Mapping[str, str], folder: Path) -> None:
    """Refuse an index that other weights encoded: their vectors do not compare. Other packages may search."""
    there, now = (each.get("weights") for each in (manifest.versions, versions))
    if there != now:
        raise InputError(
            f"{folder}: checkpoint",
            Phrase(f"weights of sha256 {now}"),
            f"the index was built with {there}",
            "Put the checkpoint back, or build an index of its own with this one.",
        )


def check_corpus(manifest: IndexManifest, folder: Path) -> None:
    """Refuse an index whose corpus is another by now: files that changed or came. Files that are gone are no matter."""
    known = {fact["path"] for fact in manifest.files}
    there = shards(Path(manifest.corpus)) if known and os.path.isdir(manifest.corpus) else []
    if new := [str(file) for file in there if str(file) not in known]:
        raise InputError(
            new[0],
            Phrase(f"not there when {folder} was built from its folder"),
            "an index and its corpus belong together",
            "Build the index again, or move the file elsewhere.",
        )
    for fact in manifest.files:
        path = Path(fact["path"])
        changed = os.path.isfile(path) and _stat(path) != (fact["bytes"], fact["changed"])
        if changed and file_sha256(path) != fact["sha256"]:
            raise InputError(
                str(path),
                Phrase(f"changed since {folder} was built from it"),
                "an index and its corpus belong together",
                "Build the index again, or put the corpus back.",
            )


def _asked(retriever: Retriever, corpus: str, files: list[FileFact], skip_bad: bool) -> dict[str, Any]:
    return {
        "retriever": retriever.name,
        "settings": retriever.settings(),
        "versions": dict(retriever.versions()),
        "format": retriever.format,
        "corpus": corpus,
        "files": files,
        "skip_bad": skip_bad,
    }


def _same_index(folder: Path, asked: Mapping[str, Any]) -> IndexManifest:
    """The manifest of the index that is there, if it is what was asked for."""
    manifest = read_index_manifest(folder)
    hashes = [_hashes(files) for files in (manifest.files, asked["files"])]
    for place, there, wanted in (
        ("retriever", manifest.retriever, asked["retriever"]),
        ("settings", manifest.settings, asked["settings"]),
        ("corpus", hashes[0] or manifest.corpus, hashes[1] or asked["corpus"]),
    ):
        if there != wanted:
            raise InputError(
                f"{folder}: {place}",
                Phrase(f"an index of {place} {there!r}"),
                f"this is asked for with {wanted!r}",
                "Delete the folder, or name another.",
            )
    check_weights(manifest, asked["versions"], folder)
    return manifest


def _parts(folder: Path) -> dict[str, str]:
    """The files of the passages and of the retriever, which stand in folders within."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.parent != folder)
    return {path.relative_to(folder).as_posix(): sampled_sha256(path) for path in paths}


def _hashes(files: Any) -> list[Any]:
    return [fact.get("sha256") if isinstance(fact, Mapping) else fact for fact in files or ()]


def _file_facts(corpus: str) -> list[FileFact]:
    path = Path(corpus).expanduser()
    if not path.exists():
        return []
    facts: list[FileFact] = []
    for file in corpus_files(path.absolute()):
        size, changed = _stat(file)
        facts.append({"path": str(file), "bytes": size, "changed": changed, "sha256": file_sha256(file)})
    return facts


def _stat(path: Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


@contextmanager
def _byte_progress(files: Sequence[FileFact]) -> Iterator[Any]:
    """A bar of the corpus's bytes, and what draws it as files are read."""
    total = sum(fact["bytes"] for fact in files)
    with tqdm(total=total or None, desc="passages", unit="B", unit_scale=True, disable=None) as bar:

        class Watched:
            def __init__(self, file: BinaryIO) -> None:
                self._file = file

            def read(self, size: int = -1) -> bytes:
                data = self._file.read(size)
                bar.update(len(data))
                return data

            def __getattr__(self, name: str) -> Any:
                return getattr(self._file, name)

            def __iter__(self) -> Iterator[bytes]:
                for line in self._file:
                    bar.update(len(line))
                    yield line

        yield lambda file: cast(BinaryIO, Watched(file))
