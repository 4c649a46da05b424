"""Where questions come from: files, folders, hub datasets, and the toy world."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from dro_rl.data.hub import hub_rows, is_local
from dro_rl.data.manifest import read_manifest
from dro_rl.errors import InputError, Phrase
from dro_rl.records import SUFFIXES, Question, parse_questions, read_questions, renamed
from dro_rl.toy.world import make_world

TOY_SIZES = {"train": 2048, "dev": 256, "test": 512}
"""Questions of the toy world's splits, unless the recipe says how many."""


def load_questions(
    name: str,
    split: str,
    *,
    config: str | None = None,
    limit: int | None = None,
    columns: Mapping[str, str] = MappingProxyType({}),
    key: str = "dataset_name",
) -> list[Question]:
    """The questions of a split.

    Args:
        name: a question file; a folder with `<split>.jsonl`, `.jsonl.gz` or `.parquet` (given a config, with
            `<split>/<config>.jsonl` or `<config>/<split>.jsonl`); `toy`; or a hub dataset whose columns are the fields
            of a question file.
        split: which split; ignored for a single file.
        config: configuration of a hub dataset, or a dataset of a folder that holds several.
        limit: the first so many.
        columns: names of columns by the fields that they are, where they have other names: `dataset_columns`.
        key: the recipe key that errors name.

    Raises:
        InputError: see `dro_rl.records.read_questions`; or a file is not the one that its manifest describes.
    """
    if name == "toy":
        if split not in ("train", "dev", "test"):
            raise InputError(f"{key}: toy", split, f"its splits are {', '.join(TOY_SIZES)}", "Use one of them.")
        return make_world(cast(Any, split), limit or TOY_SIZES[split])
    path = Path(name).expanduser()
    if path.is_file() or path.is_dir():
        file = path if path.is_file() else file_of_split(path, split, config)
        read_manifest(file)  # a file that is not what its manifest describes is refused
        questions = read_questions(file, columns=columns)
    elif is_local(name):
        raise InputError(key, name, "a question file or folder exists", "Check the path.")
    else:
        questions = _from_hub(name, split, config, columns, key)
    return questions[:limit] if limit else questions


def dev_beside(train_file: str, train_split: str, dev_split: str) -> str | None:
    """The dev file beside a training file: `dev.jsonl` by `train.jsonl`, or `dev/x.jsonl` by `train/x.jsonl`."""
    path = Path(train_file).expanduser()
    beside = [path.with_name(path.name.replace(train_split, dev_split, 1))] if train_split in path.name else []
    if path.parent.name == train_split:
        beside.append(path.parent.parent / dev_split / path.name)
    return next((str(candidate) for candidate in beside if candidate != path and candidate.is_file()), None)


def file_of_split(folder: Path, split: str, config: str | None) -> Path:
    """The question file of a split in a folder. Raises `InputError` unless there is one."""
    stems = [split] if config is None else [f"{split}/{config}", f"{config}/{split}"]
    wanted = [folder / f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES]
    found = [path for path in wanted if path.is_file()]
    if len(found) != 1:
        raise InputError(
            str(folder),
            Phrase(f"{len(found)} files for split {split}"),
            f"a folder has one of {', '.join(str(path.relative_to(folder)) for path in wanted)}",
            "Name the file itself, or leave one.",
        )
    return found[0]


def _from_hub(name: str, split: str, config: str | None, columns: Mapping[str, str], key: str) -> list[Question]:
    return list(parse_questions(renamed(hub_rows(name, config, split, place=key, streaming=False), columns)))
