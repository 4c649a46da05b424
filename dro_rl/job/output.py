"""The output folder: claimed for one run, or gone on in."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers.trainer_utils import get_last_checkpoint

from dro_rl.errors import InputError
from dro_rl.flat_yaml import read_yaml
from dro_rl.keys.reference import KEYS
from dro_rl.recipe import Recipe


def claim_output_dir(recipe: Recipe) -> str | None:
    """Take the output folder for this run and write `recipe.yaml` into it.

    Returns:
        The checkpoint to resume from, or None to start.

    Raises:
        InputError: the folder holds another run, or this one and resuming was not asked for, or is not writable.
    """
    training = recipe.training
    folder = Path(str(training.output_dir))
    wanted = training.resume_from_checkpoint
    checkpoint: str | None = None
    if (folder / "recipe.yaml").exists() or any(folder.glob("checkpoint-*")):
        if not wanted:
            raise InputError(
                "output_dir",
                str(folder),
                "this folder holds a run",
                "Add --resume_from_checkpoint auto, or use another.",
            )
        _same_recipe(recipe, folder / "recipe.yaml")
        checkpoint = get_last_checkpoint(str(folder)) if wanted == "auto" else wanted
    elif folder.is_dir() and any(path for path in folder.iterdir() if not path.name.startswith(".")):
        raise InputError("output_dir", str(folder), "this folder is empty or holds this run", "Use another folder.")
    elif wanted and wanted != "auto":
        checkpoint = wanted
    if checkpoint is not None and not (Path(checkpoint) / "trainer_state.json").is_file():
        raise InputError(
            "resume_from_checkpoint", checkpoint, "this is auto, or a whole checkpoint of this run", "Use auto."
        )
    PartialState().wait_for_everyone()
    if PartialState().is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            recipe.save(folder / "recipe.yaml")
        except OSError as error:
            raise InputError(
                "output_dir", str(folder), f"a run can write there ({error.strerror})", "Use another."
            ) from None
    PartialState().wait_for_everyone()
    return checkpoint


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
