"""Rows of hub datasets, and which names mean one."""

from __future__ import annotations

from pathlib import Path

from dro_rl.errors import InputError, first_line
from dro_rl.rows import Rows, is_readable


def is_local(name: str | Path) -> bool:
    """Whether a name means a file or a folder, which need not be there, and not a hub dataset (`owner/name`)."""
    path = Path(name).expanduser()
    spelled = path.is_absolute() or str(name).startswith(".") or len(path.parts) > 2
    return spelled or path.exists() or is_readable(path)


def hub_rows(name: str, config: str | None, split: str, *, place: str, streaming: bool = True) -> Rows:
    """The rows of a hub dataset's split. No code of the dataset's is run.

    Args:
        name: the dataset.
        config: its configuration, where it has several.
        split: the split.
        place: the recipe key or option that errors name.
        streaming: read over the network as the rows are asked for, in place of a download before the first.

    Raises:
        InputError: there is no such data within reach.
    """
    from datasets import load_dataset

    options = {"streaming": True} if streaming else {}
    try:
        rows = load_dataset(name, config, split=split, **options)
    except Exception as error:
        # Many libraries stand between us and a hub, each with errors of its own; all mean that there is no such data.
        message = first_line(error)
        raise InputError(
            place,
            name,
            f"this is a file, a folder, or a hub dataset with split {split} ({message})",
            "Check the name, the split and the network.",
        ) from None
    return ((f"{name} ({split}): row {number}", row) for number, row in enumerate(rows, start=1))
