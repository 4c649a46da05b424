"""The recipe: flat YAML, with the command line over it, checked loudly before anything slow begins.

One path for both: a command-line value is read as YAML and goes through the same checks. Keys are the fields of
`RunConfig` (data, models, warm-up) and of `TrainingKeys`. What can be said without torch is said before it is imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dro_rl.errors import InputError, Phrase, did_you_mean, first_line, shorten
from dro_rl.files import written_whole
from dro_rl.flat_yaml import parse_yaml
from dro_rl.keys.inherited import REFUSED, WITHOUT_EFFECT
from dro_rl.keys.reference import KEYS, RUN_KEYS, TRAINING_KEYS
from dro_rl.keys.run import RunConfig
from dro_rl.keys.training import TrainingKeys
from dro_rl.recipe.files import EXTENDS, read_recipe

if TYPE_CHECKING:
    from dro_rl.config import DROConfig


@dataclass(frozen=True)
class Recipe:
    """A checked recipe.

    Args:
        run: data, models, warm-up.
        training: the trainer's settings.
        values: every key with its value, given or default: what `recipe.yaml` holds.
    """

    run: RunConfig
    training: DROConfig
    values: Mapping[str, Any]

    def save(self, path: Path) -> None:
        """Write the resolved recipe, whole. It loads again as a recipe."""
        with written_whole(path) as beside:
            beside.write_text(yaml.safe_dump(dict(self.values), sort_keys=False, allow_unicode=True))


def load_recipe(path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe file, put `overrides` over it, and check everything that can be checked without data or models.

    Args:
        path: the file, a run's folder, or the name of a shipped recipe; None where `overrides` are all there is.
        overrides: what the command line says.

    Raises:
        InputError: naming the key, its value, the rule and the fix.
    """
    run, keys = read_keys(path, overrides)
    from dro_rl.config import DROConfig  # torch: seconds that a wrong recipe is not worth

    try:
        training = DROConfig(**vars(keys))
    except InputError:
        raise
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise InputError(
            "recipe", Phrase(first_line(error)), "transformers accepts the settings", "Correct it."
        ) from None
    return Recipe(run, training, {**vars(run), **vars(keys)})


def read_keys(path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> tuple[RunConfig, TrainingKeys]:
    """The part of `load_recipe` that needs no torch: names, types and rules of keys."""
    given = {**(read_recipe(path) if path is not None else {}), **(overrides or {})}
    for key in given:
        _check_name(key, given[key])
    run = RunConfig(**{key: value for key, value in given.items() if key in RUN_KEYS})
    run.check()
    keys = TrainingKeys(**{key: value for key, value in given.items() if key in TRAINING_KEYS})
    keys.check()
    if not keys.output_dir:
        raise InputError(
            "output_dir", Phrase("missing"), "a run has a folder of its own", "Set output_dir: runs/<name>."
        )
    if run.num_documents is not None and keys.spec.most > run.num_documents:
        raise InputError(
            "num_selected",
            keys.num_selected,
            f"num_documents: {run.num_documents} are there to select from",
            "Lower num_selected, or raise num_documents.",
        )
    if keys.generator_endpoint is not None:
        frozen, fix = "a generator behind generator_endpoint is frozen, and not loaded", "Leave it out."
        if run.of("generator").warms:
            raise InputError("warmup", run.warmup, frozen, "Use none or selector.")
        if run.generator_lora_r:
            raise InputError("generator_lora_r", run.generator_lora_r, frozen, fix)
    return run, keys


def _check_name(key: str, value: object) -> None:
    if key.endswith("_token"):
        value = Phrase("given")  # which is nobody's to read
    if key == EXTENDS:
        raise InputError(key, value, "a recipe's file says what it extends", "Write it there, or name that recipe.")
    if key in WITHOUT_EFFECT:
        raise InputError(key, value, "this key has no effect in dro_rl", f"Use {WITHOUT_EFFECT[key]}.")
    if key in REFUSED:
        raise InputError(key, value, *REFUSED[key])
    if key not in KEYS:
        hint = did_you_mean(key, KEYS, "`dro-rl recipe keys` lists them.")
        raise InputError(key, value, "there is no such key", hint)


def parse_command_line(arguments: Sequence[str]) -> tuple[str | None, dict[str, Any]]:
    """Split `RECIPE [--key value …]` into the recipe's path and its overrides.

    The recipe is the first positional argument or `--config`. Values are YAML: `--target_ess null`, `--bf16 true`,
    `--lora_target_modules [q_proj, v_proj]`; text is text, though YAML would read `--dataset_config 12` as a number. A
    key without a value is true.
    """
    path: str | None = None
    values: dict[str, list[str]] = {}
    key: str | None = None
    for argument in arguments:
        if argument.startswith("--"):
            name, _, value = argument[2:].partition("=")
            key = name.replace("-", "_")
            if key in values:
                raise InputError("command line", argument, "a key is given once", "Remove one of the two.")
            values[key] = [value] if value else []
        elif key is None or (key == "config" and values["config"]):
            if path is not None:
                raise InputError(
                    "command line", argument, "one recipe or study, then --key value", "Remove it, or name its key."
                )
            path = argument
        else:
            values[key].append(argument)
    if "config" in values:
        if path is not None or len(values["config"]) != 1:
            raise InputError("--config", " ".join(values["config"]), "one recipe is named once", "Name it once.")
        path = values.pop("config")[0]
    return path, {key: _command_line_value(key, items) for key, items in values.items()}


def _command_line_value(key: str, items: list[str]) -> Any:
    try:
        parsed = [parse_yaml(item, f"--{key}") for item in items]
    except InputError as error:
        raise InputError(
            f"--{key}", " ".join(items), f"a value is YAML ({shorten(error.value)})", "Put quotes around it."
        ) from None
    if len(parsed) == 1 and key in KEYS and KEYS[key].is_text(parsed[0]):
        return items[0]
    return parsed[0] if len(parsed) == 1 else parsed or True
