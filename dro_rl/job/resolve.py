"""What reproduces a run: every key, hashes of all that is read, and what computes it; asked before one, or of one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dro_rl.keys.reference import KEYS, as_yaml
from dro_rl.runs import differences, recipe_of, record_of


@dataclass(frozen=True)
class Resolved:
    """A recipe with all that its training depends on.

    Args:
        keys: every key with its value.
        versions: of dro_rl, the state of its code, Python, and the packages that compute.
        inputs: by key, hashes of the parts of what it names; empty where they were not asked for.
    """

    keys: Mapping[str, Any]
    versions: Mapping[str, str]
    inputs: Mapping[str, Mapping[str, str]]

    def lines(self) -> Iterator[str]:
        """A recipe, with versions and hashes in comments."""
        for name, version in self.versions.items():
            yield f"# {name} {version}"
        for key, parts in self.inputs.items():
            for part, digest in parts.items():
                yield f"# {key}, {part}: {digest}"
        for key, value in self.keys.items():
            yield f"{key}: {as_yaml(value)}"


def resolve(path: str | None, overrides: Mapping[str, Any], *, keys_only: bool = False) -> Resolved:
    """What a recipe would train here and now.

    Args:
        path: its file or name.
        overrides: what the command line says.
        keys_only: leave out the hashes, where data and models are elsewhere.

    Raises:
        InputError: the recipe is wrong, or what it reads.
    """
    from dro_rl.recipe import load_recipe

    recipe = load_recipe(path, overrides)  # which says what can be said before torch is imported

    from dro_rl.job.assembly import build_prompters
    from dro_rl.job.identity import inputs_of, this_session
    from dro_rl.job.preflight import read_splits

    inputs = {} if keys_only else inputs_of(recipe, *read_splits(recipe), build_prompters(recipe))
    return Resolved(recipe.values, this_session()["versions"], inputs)


def resolved_run(folder: Path) -> Resolved:
    """What a run was, by its own record; of several starts the versions of the last."""
    inputs, versions = record_of(folder)
    return Resolved(recipe_of(folder), versions, inputs)


def departures(here: Resolved, run: Resolved) -> list[str]:
    """In what training here would not compute what the run did, a line each: keys, what is read, versions."""
    lines = []
    for name, key in KEYS.items():
        if not key.resumes and name != "output_dir" and here.keys[name] != run.keys[name]:
            lines.append(f"{name}: {here.keys[name]!r}, and the run has {run.keys[name]!r}")
    for place, parts in run.inputs.items() if here.inputs else ():
        if other := differences(here.inputs.get(place, {}), parts):
            lines.append(f"{place}: other {', '.join(other)}")
    for name in differences(here.versions, run.versions):
        lines.append(f"{name}: {here.versions.get(name)}, and the run had {run.versions.get(name)}")
    return lines
