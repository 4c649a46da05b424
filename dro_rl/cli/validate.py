"""`dro-rl recipe validate`: all that training checks before it loads a model, for one recipe or several."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import typer

KEYS = (
    "selector_model_name_or_path",
    "generator_model_name_or_path",
    "dataset_name",
    "num_generations",
    "num_selected",
)
"""What tells one recipe from another, in the order it is printed."""


def validate(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE", help="Names or files; --key value after them goes over each.", show_default=False
        ),
    ],
    keys_only: Annotated[
        bool, typer.Option("--keys-only", help="Check keys alone, where data and models are elsewhere.")
    ] = False,
    processes: Annotated[int, typer.Option("--processes", min=1, help="Processes that the run will have.")] = 1,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Check recipes as training does before it loads a model, and print what they would train.

    Every file is checked, whatever is wrong with another; the exit status is 2 when one was wrong.

    \b
    Examples:
      dro-rl recipe validate recipes/*.yaml --keys-only
      dro-rl recipe validate mine.yaml --num_generations 4 --processes 8
    """
    from dro_rl.cli.output import console, print_json
    from dro_rl.errors import InputError, Phrase
    from dro_rl.recipe import parse_command_line

    files = list(takewhile(lambda argument: not argument.startswith("-"), arguments))
    if not files:
        raise InputError("command line", Phrase("no recipe"), "recipe files come first", "Name one.")
    _, overrides = parse_command_line(arguments[len(files) :])
    results = []
    for file in files:
        try:
            facts = _checked(Path(file), overrides, keys_only, processes)
        except InputError as error:
            where = "" if file in error.place else f"{file}: "
            results.append({"file": file, "ok": False, "error": f"{where}{error}"})
            if not json:
                typer.echo(f"error: {where}{error}", err=True)
        else:
            results.append({"file": file, "ok": True, **facts})
            if not json:
                said = ", ".join(f"{key} {value}" for key, value in facts.items())
                console().print(f"ok {file}: {said}", soft_wrap=True)
    if json:
        print_json({"recipes": results})
    if not all(result["ok"] for result in results):
        raise typer.Exit(2)


def _checked(file: Path, overrides: dict[str, Any], keys_only: bool, processes: int) -> dict[str, Any]:
    from dro_rl.recipe import load_recipe

    recipe = load_recipe(file, overrides)
    facts = {key: recipe.values[key] for key in KEYS}
    if keys_only:
        return facts
    from dro_rl.job.preflight import prepare

    prepared = prepare(recipe, processes)
    schedule = prepared.schedule
    steps = schedule.steps(recipe.training.max_steps)
    asked = schedule.iterations(steps) * schedule.questions_per_iteration
    return facts | {
        "questions": schedule.num_questions,
        "questions_per_step": schedule.questions_per_step,
        "steps": steps,
        "rollouts": asked * schedule.num_generations,
        "disk_gib": round(prepared.disk / 2**30, 2),
    }
