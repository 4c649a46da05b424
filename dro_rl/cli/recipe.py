"""`dro-rl recipe`: the recipes that are shipped, and checks of recipe files without training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dro_rl.cli.validate import validate

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def group() -> None:
    """List, show, copy, compare, resolve and check recipes.

    \b
    Examples:
      dro-rl recipe cp musique mine.yaml
      dro-rl recipe keys learning_rate
      dro-rl recipe validate mine.yaml
    """


@app.command("ls")
def ls(json: Json = False) -> None:
    """List the recipes that are shipped. Their names are good wherever a recipe's file is.

    \b
    Examples:
      dro-rl recipe ls
      dro-rl recipe ls --json
    """
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
def show(
    name: Annotated[str, typer.Argument(metavar="RECIPE", help="A name or a file.", show_default=False)],
    json: Json = False,
) -> None:
    """Print a recipe's file as it is; as JSON, the keys that it gives, with those of what it extends.

    \b
    Examples:
      dro-rl recipe show musique
      dro-rl recipe show mine.yaml --json
    """
    from dro_rl.cli.output import console, print_json
    from dro_rl.recipe.files import files_of, read_recipe, recipe_file

    if json:
        print_json({"files": files_of(name), "keys": read_recipe(name)})
        return
    for line in recipe_file(name).read_text(encoding="utf-8", errors="replace").splitlines():
        console().print(line, soft_wrap=True)


@app.command("cp")
def cp(
    name: Annotated[str, typer.Argument(metavar="RECIPE", help="A name or a file.", show_default=False)],
    destination: Annotated[
        Path, typer.Argument(metavar="FILE", help="Where to: a file, or a folder.", show_default=False)
    ] = Path(),
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    json: Json = False,
) -> None:
    """Copy a recipe, to change it. Without FILE it keeps its name, here. What it extends stays where it is.

    \b
    Examples:
      dro-rl recipe cp musique mine.yaml
      dro-rl recipe cp shared/base.yaml experiments/
    """
    from dro_rl.cli.output import console, print_json
    from dro_rl.errors import InputError, Phrase
    from dro_rl.files import written_whole
    from dro_rl.recipe.files import moved, recipe_file

    source = recipe_file(name)
    target = destination / source.name if destination.is_dir() else destination
    if target.exists() and not force:
        raise InputError(
            str(target), Phrase("it is there"), "a copy takes no file's place", "Name another, or add --force."
        )
    with written_whole(target) as beside:
        beside.write_bytes(moved(source, target))
    if json:
        print_json({"file": target})
        return
    console().print(str(target), soft_wrap=True)


@app.command("keys")
def keys(
    word: Annotated[
        str, typer.Argument(metavar="WORD", help="Only keys that have this word.", show_default=False)
    ] = "",
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the reference page, docs/keys.md.")] = False,
    json: Json = False,
) -> None:
    """Print the keys of a recipe: what each may be, its default, what it is.

    \b
    Examples:
      dro-rl recipe keys
      dro-rl recipe keys warmup
      dro-rl recipe keys learning_rate --json
    """
    from dro_rl.cli.output import print_json
    from dro_rl.keys.reference import keys_page, keys_text, matching

    if json:
        fields = ("name", "allowed", "default", "resumes", "group", "help")
        print_json({"keys": [{name: getattr(key, name) for name in fields} for key in matching(word)]})
        return
    typer.echo(keys_page() if markdown else keys_text(word), nl=False)


@app.command("diff")
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A recipe's name or file, or a run.", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="The same.", show_default=False)],
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit with 1 where they differ.")] = False,
    json: Json = False,
) -> None:
    """Say in which keys two recipes differ, whatever their files look like: changed, or left to its default in one.

    \b
    Examples:
      dro-rl recipe diff musique mine.yaml
      dro-rl recipe diff runs/seed-0 runs/seed-1 --exit-code
    """
    from dro_rl.cli.output import console, print_json, print_rows
    from dro_rl.keys.reference import as_yaml
    from dro_rl.recipe import read_keys
    from dro_rl.recipe.difference import differences

    values = [{**vars(run), **vars(training)} for run, training in (read_keys(a), read_keys(b))]
    found = differences(*values)
    if json:
        items = [
            {"key": each.key.name, "a": each.a, "b": each.b, "kind": each.kind, "resumes": each.key.resumes}
            for each in found
        ]
        print_json({"a": a, "b": b, "differences": items})
    else:
        out, rows = console(), []
        for each in found:
            in_a = f"{as_yaml(each.a)}{' (default)' if each.kind == 'a_default' else ''}"
            in_b = f"{as_yaml(each.b)}{' (default)' if each.kind == 'b_default' else ''}"
            rows.append((each.key.name, in_a, in_b, "" if each.key.resumes else "another run"))
        if rows:
            print_rows(out, ("key", a, b, ""), rows)
        fixed = sum(not each.key.resumes for each in found)
        said = f"{len(found)} keys differ; {fixed} of them a resumed run may not change" if found else "no key differs"
        out.print(said, style="dim")
    if exit_code and found:
        raise typer.Exit(1)


@app.command("resolve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def resolve(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE", help="A recipe; --key value after it goes over it. Or a run.", show_default=False
        ),
    ],
    keys_only: Annotated[
        bool, typer.Option("--keys-only", help="Leave out the hashes, where data and models are elsewhere.")
    ] = False,
    against: Annotated[
        Path | None, typer.Option("--against", metavar="RUN", help="Say in what it would not reproduce this run.")
    ] = None,
    json: Json = False,
) -> None:
    """Print all that reproduces a run: every key, versions, and hashes of questions, prompts and models.

    It is a recipe again, the rest in comments. Of a run's folder it is what the run had. With --against the exit status
    is 1 where something differs.

    \b
    Examples:
      dro-rl recipe resolve mine.yaml --seed 1 > resolved.yaml
      dro-rl recipe resolve runs/musique
      dro-rl recipe resolve resolved.yaml --against runs/musique
    """
    from dro_rl.cli.output import console, print_json
    from dro_rl.job.resolve import departures, resolve, resolved_run
    from dro_rl.recipe import parse_command_line
    from dro_rl.runs import is_run

    path, overrides = parse_command_line(arguments)
    of_run = path is not None and not overrides and is_run(Path(path))
    resolved = resolved_run(Path(str(path))) if of_run else resolve(path, overrides, keys_only=keys_only)
    found = [] if against is None else departures(resolved, resolved_run(against))
    if json:
        print_json({"recipe": resolved, "departures": None if against is None else found})
    elif against is None:
        for line in resolved.lines():
            console().print(line, soft_wrap=True)
    else:
        for line in found or [f"it reproduces {against}, as far as keys, hashes and versions say"]:
            console().print(line, soft_wrap=True)
    if found:
        raise typer.Exit(1)


app.command("validate", context_settings={"ignore_unknown_options": True})(validate)
