"""What stands beside a question file: where it came from, what was done to it, hashes that say it is still the same.

The manifest of `dev.jsonl.gz` is `dev.jsonl.gz.manifest.json`. It is optional for a file that somebody wrote by hand,
and always there for one that `dro-rl data prepare` or `dro-rl retrieve` wrote.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dro_rl import __version__
from dro_rl.errors import InputError, Phrase
from dro_rl.files import file_sha256, written_whole
from dro_rl.records import Question
from dro_rl.rows.small import read_object, record

FORMAT = 1
SPLITS = {"train": "train", "dev": "dev", "valid": "dev", "validation": "dev", "test": "test"}
"""Names of splits, by the words that files and folders are named with."""


@dataclass(frozen=True)
class Manifest:
    """The manifest of a question file.

    Args:
        dataset: name of the dataset.
        split: name of the split.
        num_questions: lines of the file.
        questions_hash: `questions_hash` of its questions: the same whatever their candidates are.
        sha256: hash of the file's bytes.
        licence: licence of the data, as its publishers name it; empty when unknown.
        sources: the files it was made from, `{"name", "sha256"}` each.
        skipped: rows left out, by reason.
        retrieval: for a candidate cache: the retriever, its settings and versions, the corpus and its hash, k.
        changes: what was done to the candidates on purpose, in order: cut, shuffled by seed, gold inserted.
        dro_rl: the version that wrote it.
        format: version of these fields.
    """

    dataset: str
    split: str
    num_questions: int
    questions_hash: str
    sha256: str
    licence: str = ""
    sources: list[dict[str, str]] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    retrieval: dict[str, Any] | None = None
    changes: list[dict[str, Any]] = field(default_factory=list)
    dro_rl: str = __version__
    format: int = FORMAT


def manifest_path(questions: Path) -> Path:
    """Where the manifest of a question file stands."""
    return questions.with_name(f"{questions.name}.manifest.json")


def write_manifest(questions: Path, manifest: Manifest) -> None:
    """Write the manifest beside its question file."""
    with written_whole(manifest_path(questions)) as beside:
        beside.write_text(json.dumps(asdict(manifest), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_manifest(questions: Path) -> Manifest | None:
    """The manifest of a question file; None when it has none.

    Raises:
        InputError: the manifest cannot be read, or the question file is not the one it describes.
    """
    path = manifest_path(questions)
    if not path.is_file():
        return None
    values = read_object(path, "a manifest", "Write the file again.")
    if values.get("format", FORMAT) != FORMAT:
        raise InputError(
            f"{path}: format", values["format"], f"this version reads format {FORMAT}", "Write the file again."
        )
    manifest = record(Manifest, values, str(path), "a manifest", "Write it again.")
    if file_sha256(questions) != manifest.sha256:
        raise InputError(
            str(questions),
            Phrase("its bytes are not those that its manifest describes"),
            f"sha256 is {manifest.sha256}",
            f"Write it again with the command that made it, or delete {path.name} if you changed it on purpose.",
        )
    return manifest


def split_of_path(path: str | Path) -> str | None:
    """The split that a file's name tells, `nq-dev.json`, else the name of its folder, `dev/nq.json`.

    Returns:
        train, dev (also for valid and validation) or test; None where neither tells one, or the file's name several.
    """
    path = Path(path).absolute()
    found = {SPLITS[word] for word in re.split(r"[^a-z]+", path.name.lower()) if word in SPLITS}
    if not found:
        return SPLITS.get(path.parent.name.lower())
    return found.pop() if len(found) == 1 else None


def questions_hash(questions: Iterable[Question]) -> str:
    """Hash of ids, question texts and answers, in order: two files with the same one ask the same questions."""
    digest = hashlib.sha256()
    for question in questions:
        row = [question.id, question.question, *question.answers]
        digest.update(json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()
