"""`dro-rl runs`: the runs of a folder, a line each, and what a run said at its end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from dro_rl.runs import Run

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

LEGEND = (
    "iter: the last one sampled, of how many. stage: the last one evaluated, whose EM and F1 stand here, in percent. "
    "kept: the stage whose weights are exported, or would be now. warnings: signals that stand."
)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@app.callback()
def group() -> None:
    """List runs, and print what one said at its end.

    \b
    Examples:
      dro-rl runs ls
      dro-rl runs show runs/quickstart
    """


@app.command("ls")
def ls(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Runs at and below it.")] = Path("runs"),
    json: Json = False,
) -> None:
    """List the runs at and below a folder: where each stands, what it has measured, what it keeps, what it takes.

    \b
    Examples:
      dro-rl runs ls
      dro-rl runs ls runs/studies/joint --json
    """
    from dro_rl.cli.output import console, print_json, print_rows
    from dro_rl.errors import InputError, as_size
    from dro_rl.runs import disk_of, read_run, runs_in

    rows: list[tuple[object, ...]] = []
    documents: list[dict[str, Any]] = []
    for path in runs_in(folder):
        name, size = str(path.relative_to(folder)), disk_of(path)
        try:
            found = read_run(path)
        except InputError as error:  # of one run, which hides no other
            documents.append({"path": path, "state": "damaged", "error": str(error), "disk_bytes": size})
            rows.append((name, "damaged", "", "", "", "", "", as_size(size), str(error)))
            continue
        documents.append({**_document(found), "disk_bytes": size})
        rows.append((name, *_cells(found), as_size(size), " ".join(found.standing)))
    if json:
        print_json({"folder": folder, "runs": documents})
        return
    out = console()
    if rows:
        print_rows(out, ("run", "state", "iter", "stage", "EM", "F1", "kept", "disk", "warnings"), rows)
    out.print(f"{len(rows)} runs in {folder}. {LEGEND}" if rows else f"no runs in {folder}", style="dim")


@app.command("show")
def show(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's output_dir.", show_default=False)],
    json: Json = False,
) -> None:
    """Print what a run said at its end: time, signals, stages, what was kept. Of one that goes on, what there is.

    \b
    Examples:
      dro-rl runs show runs/quickstart
      dro-rl runs show runs/quickstart --json
    """
    from dro_rl.cli.output import print_json
    from dro_rl.job.console import print_run
    from dro_rl.runs import disk_of, read_run

    found = read_run(run)
    if json:
        print_json({**_document(found), "disk_bytes": disk_of(run), "stages": found.stages, "ending": found.ending})
        return
    print_run(found)


def _document(run: Run) -> dict[str, Any]:
    from dro_rl.evaluation.stages import SHOWN

    return {
        "path": run.path,
        "state": run.state,
        "owner": run.owner,
        "iteration": run.iteration,
        "iterations": run.iterations,
        "stage": run.stages[-1]["stage"] if run.stages else None,
        "metrics": {name: value for name, value in (run.stages[-1] if run.stages else {}).items() if name in SHOWN},
        "kept": run.kept,
        "warnings": run.standing,
    }


def _cells(run: Run) -> tuple[object, ...]:
    stage = run.stages[-1] if run.stages else {}
    figures = (f"{stage[name]:.1f}" if stage.get(name) is not None else None for name in ("em", "f1"))
    latest, kept = (name and name.removeprefix("iteration-") for name in (stage.get("stage"), run.kept))
    return run.state, f"{run.iteration}/{run.iterations}", latest, *figures, kept
