"""The output folder: claimed for one run, or gone on in, by one job at a time."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dro_rl.em.checkpoints import find_checkpoint
from dro_rl.errors import InputError, Phrase
from dro_rl.files import written_whole
from dro_rl.flat_yaml import read_yaml
from dro_rl.job.identity import Inputs, this_session
from dro_rl.keys.reference import KEYS
from dro_rl.locks import LOCK, owned, refuse_foreign
from dro_rl.processes import told_by_main
from dro_rl.recipe import Recipe
from dro_rl.rows.small import read_object
from dro_rl.runs import RECIPE, RECORD, Ending, checkpoints_of, differences

logger = logging.getLogger(__name__)


@contextmanager
def claimed_output_dir(recipe: Recipe, inputs: Callable[[], Inputs]) -> Iterator[str | None]:
    """Own the output folder while this job runs, with `recipe.yaml` and `run.json` in it.

    Args:
        recipe: the run's.
        inputs: hashes of what it reads. The main process alone asks for them.

    Yields:
        The checkpoint to resume from, or None to start.

    Raises:
        InputError: the folder holds another run, or this one and resuming was not asked for, or what the run reads has
            changed, or another job is at work there, or it is not writable.
    """
    with ExitStack() as stack:

        def claim() -> str | None:
            folder = Path(str(recipe.training.output_dir))
            stack.enter_context(owned(folder / LOCK, "output_dir"))
            return _begin_or_go_on(recipe, folder, inputs())

        yield told_by_main(claim)


def _begin_or_go_on(recipe: Recipe, folder: Path, inputs: Inputs) -> str | None:
    _refuse_links(folder)
    wanted = recipe.training.resume_from_checkpoint
    sessions = []
    if (folder / RECIPE).exists() or checkpoints_of(folder):
        if not wanted:
            raise InputError(
                "output_dir",
                str(folder),
                "this folder holds a run",
                "Add --resume_from_checkpoint auto, or use another.",
            )
        _same_recipe(recipe, folder / RECIPE)
        if (folder / RECORD).is_file():
            sessions = _same_inputs(recipe, folder / RECORD, inputs)
    else:
        refuse_foreign(folder, "output_dir", "this run")
    checkpoint = find_checkpoint(folder, wanted) if wanted else None
    recipe.save(folder / RECIPE)
    _write_record(folder, {"inputs": inputs, "sessions": [*sessions, this_session()]})
    return None if checkpoint is None else str(checkpoint)


def note_ending(folder: Path, ending: Ending) -> None:
    """Add to `run.json` what this start of the run came to."""
    run = read_object(folder / RECORD, "the record of a run", "Put it back.")
    run["sessions"][-1]["ended"] = asdict(ending)
    _write_record(folder, run)


def _write_record(folder: Path, run: dict[str, Any]) -> None:
    with written_whole(folder / RECORD) as beside:
        beside.write_text(json.dumps(run, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _refuse_links(folder: Path) -> None:
    """Refuse a run's folder with links in it: writing a file there would write over what the link leads to."""
    for path in folder.rglob("*"):
        if path.is_symlink():
            raise InputError(
                "output_dir", str(path), "a run's files lie in its own folder, and this is a link", "Remove it."
            )


def _same_recipe(recipe: Recipe, path: Path) -> None:
    """Refuse to resume with settings under which the run would not have come to where it is."""
    if not path.is_file():
        return
    before: dict[str, Any] = read_yaml(path)
    for name, key in sorted(KEYS.items()):
        was = before.get(name, key.default)
        if not key.resumes and json.dumps(was) != json.dumps(recipe.values[name]):
            raise InputError(
                name,
                recipe.values[name],
                f"the run in {path.parent}{os.sep} has {was!r}, and a resumed run computes what it began",
                "Give it the same value, or use another output_dir.",
            )


def _same_inputs(recipe: Recipe, path: Path, inputs: Inputs) -> list[dict[str, Any]]:
    """Refuse to resume on other questions, prompts or models; say where other versions go on. Returns the sessions."""
    before = read_object(path, "the record of a run", "Delete it, if all that the run reads is as it was.")
    versions = this_session()["versions"]
    try:
        sessions = [*before["sessions"]]
        was = sessions[-1]["versions"]
        changed = {key: differences(before["inputs"][key], inputs[key]) for key in inputs}
        moved = [f"{name} {was.get(name)} → {versions.get(name)}" for name in differences(was, versions)]
    except (KeyError, TypeError, AttributeError, IndexError):
        raise InputError(
            str(path), Phrase("other fields"), "this is as a run wrote it", "Delete it, if nothing has changed."
        ) from None
    if any(changed.values()):
        key = next(key for key in inputs if changed[key])
        raise InputError(
            key,
            Phrase(
                "; ".join(
                    f"{recipe.values.get(key)}: other {', '.join(changed[key])}" for key in inputs if changed[key]
                )
            ),
            f"a resumed run computes what it began, and this has changed since the run in {path.parent} began",
            "Put it back, or begin another run in another output_dir.",
        )
    if moved:
        logger.warning(f"the run goes on under other versions than it had: {', '.join(moved)}")
    return sessions
