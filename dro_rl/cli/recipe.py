"""`dro-rl recipe`: the recipes that are shipped, and checks of recipe files without training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dro_rl.cli.validate import validate

app = typer.Typer(help="List, show, copy and check recipes.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def group() -> None:
    """List, show, copy and check recipes."""


@app.command("ls")
def ls(json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False) -> None:
    """List the recipes that are shipped. Their names are good wherever a recipe's file is."""
    from dro_rl.cli.output import console, print_json
    from dro_rl.shipped import RECIPES, headline, names

    listed = {name: headline(RECIPES / f"{name}.yaml") for name in names()}
    if json:
        print_json({"recipes": [{"name": name, "about": about} for name, about in listed.items()]})
        return
    width = max(map(len, listed))
    for name, about in listed.items():
        console().print(f"{name:{width}}  {about}", soft_wrap=True)


@app.command("show")
def show(name: Annotated[str, typer.Argument(metavar="RECIPE", help="A name or a file.", show_default=False)]) -> None:
    """Print a recipe's file as it is."""
    from dro_rl.cli.output import console
    from dro_rl.shipped import find

    for line in find(name).read_text(encoding="utf-8", errors="replace").splitlines():
        console().print(line, soft_wrap=True)


@app.command("cp")
def cp(
    name: Annotated[str, typer.Argument(metavar="RECIPE", help="A name or a file.", show_default=False)],
    destination: Annotated[
        Path, typer.Argument(metavar="[FILE]", help="Where to: a file, or a folder.", show_default=False)
    ] = Path(),
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Copy a recipe, to change it. Without FILE it keeps its name, here."""
    from dro_rl.cli.output import console
    from dro_rl.errors import InputError, Phrase
    from dro_rl.files import written_whole
    from dro_rl.shipped import find

    source = find(name)
    target = destination / source.name if destination.is_dir() else destination
    if target.exists() and not force:
        raise InputError(
            str(target), Phrase("it is there"), "a copy takes no file's place", "Name another, or add --force."
        )
    with written_whole(target) as beside:
        beside.write_bytes(source.read_bytes())
    console().print(str(target), soft_wrap=True)


@app.command("keys")
def keys(
    word: Annotated[
        str, typer.Argument(metavar="[WORD]", help="Only keys that have this word.", show_default=False)
    ] = "",
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the reference page, docs/keys.md.")] = False,
) -> None:
    """Print the keys of a recipe: what each may be, its default, what it is."""
    from dro_rl.keys.reference import keys_page, keys_text

    typer.echo(keys_page() if markdown else keys_text(word), nl=False)


app.command("validate", context_settings={"ignore_unknown_options": True})(validate)
