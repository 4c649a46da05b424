"""`dro-rl recipe`: check recipe files without training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dro_rl.recipe import Recipe

app = typer.Typer(help="Check recipes.", no_args_is_help=True, rich_markup_mode=None)

FACTS = (
    "selector_model_name_or_path",
    "generator_model_name_or_path",
    "dataset_name",
    "num_generations",
    "num_selected",
)
"""The keys that tell one recipe from another, in the order they are printed."""


@app.callback()
def group() -> None:
    """Check recipes."""


@app.command("validate")
def validate(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="Recipe files.", show_default=False)],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Read recipes as a training would, and print what they would train. Stops at the first wrong one."""
    from dro_rl.cli.output import print_json

    checked = []
    for file in files:
        recipe = _load(file)
        facts = {key: recipe.values[key] for key in FACTS}
        checked.append({"file": file, "ok": True, **facts})
        if not json:
            typer.echo(f"ok {file}: {', '.join(f'{key} {value}' for key, value in facts.items())}")
    if json:
        print_json({"recipes": checked})


def _load(file: Path) -> Recipe:
    """Load a recipe. Its errors name keys; among several recipes they need the file too."""
    from dro_rl.errors import InputError
    from dro_rl.recipe import load_recipe

    try:
        return load_recipe(file)
    except InputError as error:
        if str(file) in error.place:
            raise
        raise InputError(f"{file}: {error.place}", error.value, error.rule, error.fix) from None
