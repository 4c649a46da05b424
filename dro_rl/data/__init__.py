"""Where questions come from: files, folders, hub datasets, and the toy world."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from dro_rl.data.hub import hub_rows, is_local
from dro_rl.data.readers import FORMATS, released_format
from dro_rl.data.sources import dev_beside, files_of_split, same_split, split_rows
from dro_rl.errors import InputError, Phrase
from dro_rl.records import AS_NAMED, Question, is_field, parse_questions, renamed, shared_documents, some_questions
from dro_rl.rows import Rows
from dro_rl.toy.world import MAX_DOCUMENTS, MIN_DOCUMENTS, make_world

__all__ = ["TOY_SIZES", "dev_beside", "files_of_split", "load_questions"]

TOY_SIZES = {"train": 2048, "dev": 256, "test": 512}
"""Questions of the toy world's splits, unless the recipe says how many."""


def load_questions(
    name: str,
    split: str,
    *,
    config: str | None = None,
    limit: int | None = None,
    columns: Mapping[str, str] = AS_NAMED,
    key: str = "dataset_name",
) -> list[Question]:
    """The questions of a split.

    Args:
        name: a question file; a folder in one of the layouts of `dro_rl.data.sources`; `toy`; or a hub dataset whose
            columns are the fields of a question file.
        split: which split; ignored for a single file.
        config: configuration of a hub dataset, or a dataset of a folder that holds several, or for `toy` how many
            candidates a question has.
        limit: the first so many.
        columns: names of columns by the fields that they are, where they have other names: `dataset_columns`.
        key: the recipe key that errors name.

    Raises:
        InputError: see `dro_rl.records.read_questions`; or a file is not the one that its manifest describes.
    """
    if name == "toy":
        if split not in ("train", "dev", "test"):
            raise InputError(f"{key}: toy", split, f"its splits are {', '.join(TOY_SIZES)}", "Use one of them.")
        return make_world(cast(Any, split), limit or TOY_SIZES[split], **_depth(config))
    if is_local(name):
        found = split_rows(name, split, config=config, columns=columns, key=key)
    else:
        found = _from_hub(name, split, config, columns, key)
    questions = shared_documents(some_questions(parse_questions(_own(found, name, split)), name))
    return questions[:limit] if limit else questions


def _depth(config: str | None) -> dict[str, int]:
    """How many candidates a question of the toy world has, where the recipe says so."""
    if config is None:
        return {}
    if not config.isdecimal() or not MIN_DOCUMENTS <= int(config) <= MAX_DOCUMENTS:
        rule = f"for toy this is how many candidates a question has, {MIN_DOCUMENTS} to {MAX_DOCUMENTS}"
        raise InputError("dataset_config", config, rule, f'Use "{MAX_DOCUMENTS}".')
    return {"num_documents": int(config)}


def _from_hub(name: str, split: str, config: str | None, columns: Mapping[str, str], key: str) -> Rows:
    splits = same_split(split)
    found = hub_rows(name, config, splits, place=key, streaming=False, wanted=lambda column: is_field(column, columns))
    return renamed(found, columns)


def _own(rows: Rows, name: str, split: str) -> Rows:
    """The rows; an `InputError` with the way to a question file where the first is of a released format."""
    for place, row in rows:
        format = released_format(row, place)
        if format is not None:
            dataset = FORMATS[format].dataset or "NAME"
            raise InputError(
                place,
                Phrase(f"a row of the format {format}"),
                "training and evaluation read question files",
                f"Make one: dro-rl data prepare {dataset} --input {name} --split {split} --output FILE.jsonl.",
            )
        yield place, row
        break
    yield from rows
