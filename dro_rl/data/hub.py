"""Rows of datasets as the library of that name has them, of a hub or saved by it, and which names mean one of a hub."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dro_rl.errors import InputError, Phrase, first_line
from dro_rl.hub import look_up
from dro_rl.rows import Rows, Wanted, is_readable


def is_local(name: str | Path) -> bool:
    """Whether a name means a file or a folder, which need not be there, and not a hub dataset (`owner/name`)."""
    path = Path(name).expanduser()
    spelled = path.is_absolute() or str(name).startswith(".") or len(path.parts) > 2
    return spelled or path.exists() or is_readable(path)


def hub_rows(
    name: str,
    config: str | None,
    splits: Sequence[str],
    *,
    place: str,
    streaming: bool = True,
    wanted: Wanted = lambda column: True,
) -> Rows:
    """The rows of a hub dataset's split. No code of the dataset's is run.

    Args:
        name: the dataset.
        config: its configuration, where it has several.
        splits: the names that the split may have: the first of them that there is.
        place: the recipe key or option that errors name.
        streaming: read over the network as the rows are asked for, in place of a download before the first.
        wanted: the columns to read.

    Raises:
        InputError: there is no such data within reach.
    """
    from datasets import load_dataset

    look_up("dataset", name)
    options = {"streaming": True} if streaming else {}
    first: Exception | None = None
    for split in splits:
        try:
            return _rows(load_dataset(name, config, split=split, **options), f"{name} ({split})", wanted)
        except Exception as error:
            # Many libraries stand between us and a hub, each with errors of its own; all mean that there is no such
            # data. Only the split may have another name.
            first = first or error
            if not (isinstance(error, ValueError) and "split" in str(error)):
                break
    raise InputError(
        place,
        name,
        f"this is a file, a folder, or a hub dataset with split {splits[0]} ({first_line(first or ValueError())})",
        "Check the name, the split and the network.",
    )


def saved_rows(folder: Path, wanted: Wanted) -> Rows:
    """The rows of a dataset that was saved with `save_to_disk`. Raises `InputError` where it is not whole."""
    from datasets import Dataset

    try:
        return _rows(Dataset.load_from_disk(str(folder)).with_format(None), str(folder), wanted)
    except Exception as error:
        raise InputError(
            str(folder), Phrase(first_line(error)), "this is a dataset as save_to_disk writes it", "Save it again."
        ) from None


def _rows(found: Iterable[Any], name: str, wanted: Wanted) -> Rows:
    columns = getattr(found, "column_names", None)  # a stream need not know them
    if names := [column for column in columns or () if wanted(column)]:
        found = found.select_columns(names)  # type: ignore[attr-defined]
    return _numbered(found, name)


def _numbered(found: Iterable[Any], name: str) -> Rows:
    number = 0
    try:
        for number, row in enumerate(found, start=1):
            yield f"{name}: row {number}", row
    except (ValueError, OverflowError, OSError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{name}: after row {number}", Phrase(first_line(error)), "its rows can be read", "Fetch or save it again."
        ) from None
