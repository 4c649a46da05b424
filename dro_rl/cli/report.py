"""`dro-rl report`: one HTML file about runs and studies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[
        list[Path] | None, typer.Argument(metavar="RUN", help="Runs, each an output_dir.", show_default=False)
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The file.", show_default=True)] = Path(
        "report.html"
    ),
    study: Annotated[
        list[str] | None,
        typer.Option(
            "--study", metavar="STUDY", help="A study's name or file, whose verdicts stand in it; repeatable."
        ),
    ] = None,
    questions: Annotated[
        int, typer.Option("--questions", min=0, help="Questions shown with their rollouts, of all runs together.")
    ] = 1200,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write a page about runs: what differs, curves, stages, rollouts with their documents, warnings.

    One file that fetches nothing: send it, keep it, open it anywhere.

    \b
    Examples:
      dro-rl report runs/quickstart -o quickstart.html
      dro-rl report runs/a runs/b --study joint -o both.html
    """
    from dro_rl.cli.output import console, print_json
    from dro_rl.errors import as_size
    from dro_rl.report.page import write_report

    size = write_report(runs or [], output, studies=study or [], questions=questions)
    if json:
        print_json({"report": output, "bytes": size})
        return
    console().print(f"{output} ({as_size(size)})", soft_wrap=True)
