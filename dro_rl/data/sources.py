"""Where the rows of a split are: a file, or a folder in one of the layouts that people keep.

A folder is one of: a file a split (`train.jsonl`), of several datasets by their configurations (`train/nq.jsonl`,
`nq/train.jsonl`); a hub's layout (`data/train-00000-of-00002.parquet`, `train/0000.parquet`); what `save_to_disk` of
datasets leaves.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path

from dro_rl.data.hub import saved_rows
from dro_rl.data.manifest import SPLITS, read_manifest
from dro_rl.errors import InputError, Phrase, some
from dro_rl.records import AS_NAMED, is_field, question_rows, renamed
from dro_rl.rows import SUFFIXES, Bad, Rows, Wanted, Watch, is_readable, refuse, stem

logger = logging.getLogger(__name__)

SAVED = "dataset_info.json"
SAVED_SPLITS = "dataset_dict.json"
"""What `save_to_disk` writes into the folder of a dataset, and into that of its splits."""


NUMBERED = re.compile(r"(part-)?[0-9]{4,}")
"""Files that are named by their numbers in the folder of a split, as hubs convert datasets and Spark writes them."""


def split_rows(
    name: str,
    split: str,
    *,
    config: str | None = None,
    columns: Mapping[str, str] = AS_NAMED,
    key: str = "dataset_name",
    bad: Bad = refuse,
    watch: Watch | None = None,
) -> Rows:
    """The rows of a split under the names of fields: what training, evaluation and `dro-rl data check` read.

    Args:
        name: a question file, or a folder.
        split: which split; ignored for a single file and for a single saved dataset. `dev`, `valid` and `validation`
            are one.
        config: a dataset of a folder that holds several.
        columns: names of columns by the fields that they are.
        key: the recipe key that errors name.
        bad: what is done with a row that cannot be read.
        watch: wraps each raw file, to draw a progress bar.

    Raises:
        InputError: there is no such split, or a file is not the one that its manifest describes.
    """
    path = Path(name).expanduser()

    def read(file: Path) -> Rows:
        read_manifest(file)  # a file that is not what its manifest describes is refused
        return question_rows(file, columns, bad=bad, watch=watch)

    if path.is_file():
        return read(path)
    if path.is_dir():
        return folder_rows(path, split, config, columns, read, lambda column: is_field(column, columns))
    raise InputError(key, name, "a question file or folder exists", "Check the path.")


def folder_rows(
    folder: Path,
    split: str,
    config: str | None,
    columns: Mapping[str, str],
    read: Callable[[Path], Rows],
    wanted: Wanted,
) -> Rows:
    """The rows of a split in a folder; those of several shards with their numbers in the split.

    Args:
        folder, split, config, columns: see `split_rows`.
        read: the rows of a file.
        wanted: the columns to read of a saved dataset.
    """
    if (saved := saved_folder(folder, split)) is not None:
        return renamed(saved_rows(saved, wanted), columns)
    found = [read(file) for file in files_of_split(folder, split, config)]
    if len(found) == 1:
        return found[0]
    rows = chain.from_iterable(found)
    return ((f"{place}, of the split row {number}", row) for number, (place, row) in enumerate(rows, start=1))


def same_split(split: str) -> list[str]:
    """The names under which a split may stand, its own first: `dev`, `valid` and `validation` are one."""
    return list(dict.fromkeys([split, *(word for word, name in SPLITS.items() if name == SPLITS.get(split))]))


def saved_folder(folder: Path, split: str) -> Path | None:
    """The folder that holds a split, where `save_to_disk` wrote it; None where it did not."""
    if (folder / SAVED).is_file() and (folder / "state.json").is_file():
        return folder
    if not (folder / SAVED_SPLITS).is_file():
        return None
    for word in same_split(split):
        if (folder / word / SAVED).is_file():
            _say(word, split)
            return folder / word
    there = ", ".join(sorted(inner.parent.name for inner in folder.glob(f"*/{SAVED}"))) or "none"
    raise InputError(
        str(folder), Phrase(f"no split {split}"), f"the saved splits are {there}", "Name one of them in the recipe."
    )


def files_of_split(folder: Path, split: str, config: str | None = None) -> list[Path]:
    """The question files of a split in a folder: one, or all its shards. Raises `InputError` unless there are any."""
    for word in same_split(split):
        stems = [word, f"data/{word}"] if config is None else [f"{word}/{config}", f"{config}/{word}"]
        found = [file for place in stems for file in _named(folder / place)]
        whole = [file for file in found if not (_shard(file) or NUMBERED.match(file.name))]
        if (len(whole) == 1 and len(found) == 1) or (found and not whole):
            _check_shards(found)
            _say(word, split)
            return found
        if found:
            break
    else:
        word, found = split, []
    wanted = [word] if config is None else [f"{word}/{config}", f"{config}/{word}"]
    names = ", ".join(f"{place}{end}" for place in wanted for end in (".jsonl", ".jsonl.gz", ".parquet"))
    raise InputError(
        str(folder),
        Phrase(f"{len(found)} files for split {split}"),
        f"a folder has one of {names} (also .json, .csv, .tsv), or data/{word}-00000-of-00001.parquet and its like",
        f"Name the file itself, or leave one. There are {_there(folder)}.",
    )


def dev_beside(train_file: str, train_split: str, dev_split: str) -> str | None:
    """The dev file beside a training file: `dev.jsonl` by `train.jsonl`, or `dev/x.jsonl` by `train/x.jsonl`."""
    path = Path(train_file).expanduser()
    for word in same_split(dev_split):
        beside = [path.with_name(path.name.replace(train_split, word, 1))] if train_split in path.name else []
        if path.parent.name == train_split:
            beside.append(path.parent.parent / word / path.name)
        for candidate in beside:
            if candidate != path and candidate.is_file():
                _say(word, dev_split)
                return str(candidate)
    return None


def _named(place: Path) -> list[Path]:
    """The readable files of a stem: `train.jsonl`, `train-00000-of-00002.parquet`, `train/0000.parquet`."""
    beside = [file for file in _files(place.parent) if (_shard(file) or (stem(file),))[0] == place.name]
    within = [file for file in _files(place) if NUMBERED.match(file.name)]
    return sorted(beside) + sorted(within)


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if file.is_file() and is_readable(file)] if folder.is_dir() else []


def _shard(file: Path) -> tuple[str, int] | None:
    """The split and the number of shards that a shard's name tells."""
    found = re.fullmatch(r"(.+)-[0-9]{5}-of-([0-9]{5})(-[0-9a-f]+)?", stem(file))
    return (found[1], int(found[2])) if found else None


def _check_shards(files: list[Path]) -> None:
    shard = _shard(files[0])
    if shard is not None and len(files) != shard[1]:
        raise InputError(
            str(files[0].parent),
            Phrase(f"{len(files)} of {shard[1]} shards of {shard[0]}"),
            "a split is whole, and in one kind of file",
            "Fetch the missing ones, or take away those of another kind.",
        )


def _there(folder: Path) -> str:
    names = sorted(
        str(file.relative_to(folder)) for pattern in ("*", "*/*") for file in folder.glob(pattern) if is_readable(file)
    )
    if not names:
        return f"no files in .{', .'.join(SUFFIXES)}"
    return some(names)


def _say(word: str, split: str) -> None:
    if word != split:
        logger.info(f"split {split}: {word} is read")
