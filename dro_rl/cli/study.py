"""`dro-rl study`: claims as files; what is missing of a study is run, and what it has found is shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from dro_rl.study.arms import Arm
    from dro_rl.study.plan import Study
    from dro_rl.study.run import Outcome

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

Arguments = Annotated[
    list[str],
    typer.Argument(
        metavar="STUDY",
        help="A study's file, or a shipped one's name; --key value after it goes over the keys of all its variants.",
        show_default=False,
    ),
]
KEYS_AFTER = {"allow_extra_args": True, "ignore_unknown_options": True}
Seeds = Annotated[
    str | None,
    typer.Option("--seeds", metavar="LIST", help="Seeds in place of the file's, commas between.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
LINE_SECONDS = 60.0
"""Between two lines of an arm that runs, where there is no terminal."""


@app.callback()
def group() -> None:
    """Run studies, and show what they found.

    \b
    Examples:
      dro-rl study run joint
      dro-rl study show joint
    """


@app.command("ls")
def ls(json: Json = False) -> None:
    """List the studies that are shipped.

    \b
    Examples:
      dro-rl study ls
      dro-rl study ls --json
    """
    from dro_rl.cli.output import print_json
    from dro_rl.shipped import STUDIES, headline, names

    listed = {name: headline(STUDIES / f"{name}.yaml") for name in names(STUDIES)}
    if json:
        print_json({"studies": [{"name": name, "about": about} for name, about in listed.items()]})
        return
    width = max(map(len, listed))
    for name, about in listed.items():
        typer.echo(f"{name:{width}}  {about}")


@app.command("run", context_settings=KEYS_AFTER)
def run(
    arguments: Arguments,
    seeds: Seeds = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Arms at once. Without it, one a GPU, or two without any.")
    ] = None,
    print_only: Annotated[
        bool, typer.Option("--print", help="Print the commands of what is missing, and run nothing.")
    ] = False,
) -> None:
    """Run what is missing of a study: every variant with every seed, several at once.

    Every variant is checked as its training would be before the first one starts. An arm that was stopped goes on where
    it was; one that fails stops those alone that start from it. Exit status 1 if any failed.

    \b
    Examples:
      dro-rl study run joint
      dro-rl study run joint --seeds 0,1,2,3,4
      dro-rl study run mine.yaml --jobs 4
      dro-rl study run real_nq --dataset_name questions --output_dir runs/studies/questions
      dro-rl study run mine.yaml --print > commands.sh
    """
    import shlex

    from dro_rl.study.arms import arms_of, check_unchanged

    study = _study(arguments, seeds)
    arms = arms_of(study)
    missing = [arm for arm in arms if not arm.done]
    if print_only:
        folders = {arm.folder: arm.name for arm in missing}
        check_unchanged(study, missing)
        for arm in missing:
            after = f"  # after {folders[arm.needs]}" if arm.needs in folders else ""
            typer.echo(f"{shlex.join(['dro-rl', *arm.command])}{after}")
        return
    typer.echo(f"{study.name}: {len(arms)} arms, {len(missing)} to run, in {study.output_dir}")
    if missing:
        _run(study, missing, jobs)
    typer.echo(f"results: dro-rl study show {study.called}")


def _study(arguments: list[str], seeds: str | None) -> Study:
    """The study that a command names, with what goes over it."""
    from dro_rl.errors import InputError
    from dro_rl.recipe import parse_command_line
    from dro_rl.study.plan import read_study

    file, over = parse_command_line(arguments)
    if file is None:
        raise InputError("command line", " ".join(arguments), "a study comes first", "Name it: `dro-rl study ls`.")
    return read_study(file, _numbers(seeds), over)


def _numbers(seeds: str | None) -> list[int] | None:
    """The seeds that were asked for; None for the file's."""
    from dro_rl.errors import InputError

    if seeds is None:
        return None
    if not all(part.isascii() and part.isdigit() for part in seeds.split(",")):
        raise InputError("--seeds", seeds, "these are whole numbers, commas between", "Use 0,1,2.")
    return [int(part) for part in seeds.split(",")]


def _run(study: Any, missing: list[Arm], jobs: int | None) -> None:
    from dro_rl.job.stopping import Stopped, stop_on_signals
    from dro_rl.study.check import check_arms
    from dro_rl.study.machines import note_machine
    from dro_rl.study.run import places_of, run_arms

    places = places_of(jobs)
    check_arms(study, missing, len(places[0].get("CUDA_VISIBLE_DEVICES", "0").split(",")))
    note_machine(study.output_dir)
    stop_on_signals()
    try:
        with _Lines(len(missing)) as watch:
            outcomes = run_arms(missing, places, watch)
    except Stopped as stopped:
        typer.echo("stopped. The same command goes on.", err=True)
        raise typer.Exit(stopped.status) from None
    if failed := [outcome for outcome in outcomes if outcome.wrong is not None]:
        typer.echo(f"{len(failed)} of {len(missing)} arms failed; the same command tries them again", err=True)
        raise typer.Exit(1)


class _Lines:
    """A bar for each arm that runs, on a terminal; lines elsewhere."""

    def __init__(self, arms: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        from dro_rl.progress import on_terminal
        from dro_rl.terminal import console

        self._arms, self._ended = arms, 0
        self._said: dict[str, float] = {}
        self._tasks: dict[str, Any] = {}
        self._bars = None
        if on_terminal():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bars = Progress(*columns, console=console(stderr=True))

    def __enter__(self) -> _Lines:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def started(self, arm: Arm) -> None:
        self._said[arm.name] = 0.0
        if self._bars is not None:
            self._tasks[arm.name] = self._bars.add_task(arm.name, total=None)
        else:
            typer.echo(f"{arm.name}: started, log {arm.log}")

    def running(self, arm: Arm, seconds: float) -> None:
        from dro_rl.study.run import how_far, tail

        if self._bars is not None:
            done, total = how_far(arm.log) or (0, None)
            self._bars.update(self._tasks[arm.name], completed=done, total=total)
        elif seconds - self._said[arm.name] >= LINE_SECONDS:
            self._said[arm.name] = seconds
            typer.echo(f"{arm.name}: {tail(arm.log)}")

    def ended(self, outcome: Outcome) -> None:
        from dro_rl.progress import duration

        self._ended += 1
        name = outcome.arm.name
        if self._bars is not None and name in self._tasks:
            self._bars.remove_task(self._tasks.pop(name))
        became = f"done in {duration(outcome.seconds)}" if outcome.wrong is None else f"failed: {outcome.wrong}"
        line = f"{name}: {became} ({self._ended} of {self._arms})"
        if self._bars is not None:
            self._bars.console.print(line, soft_wrap=True)
        else:
            typer.echo(line, err=outcome.wrong is not None)


@app.command("show", context_settings=KEYS_AFTER)
def show(
    arguments: Arguments,
    seeds: Seeds = None,
    page: Annotated[
        Path | None,
        typer.Option("--page", help="A Markdown page that gets the study's section, in place of its old one."),
    ] = None,
    json: Json = False,
) -> None:
    """Show what a study has found so far, and write it beside its arms: report.md, report.json, report.png.

    A claim is supported, refuted, or undecided with about how many seeds more it needs. One run decides nothing.

    \b
    Examples:
      dro-rl study show joint
      dro-rl study show joint --seeds 0,1,2,3,4
      dro-rl study show joint --page docs/evidence.md
      dro-rl study show real_nq --dataset_name questions --output_dir runs/studies/questions
    """
    from dro_rl.cli.output import print_json
    from dro_rl.study.plots import plot_study
    from dro_rl.study.report import make_report, write_report, write_section
    from dro_rl.study.results import Results

    study = _study(arguments, seeds)
    results = Results(study)
    report = make_report(study, results)
    write_report(study.output_dir, report)
    picture = plot_study(study, results)
    if page is not None:
        write_section(page, report)
    if json:
        print_json(report)
        return
    _print(report, study.output_dir / "report.md", picture)


def _print(report: Any, page: Path, picture: Path | None) -> None:
    from rich.table import Table

    from dro_rl.errors import some
    from dro_rl.study.report import NOTE, interval, mean_rows, number
    from dro_rl.terminal import console

    out = console()
    out.print(f"{report.study}: {report.about}", style="bold", soft_wrap=True)
    for judged in report.claims:
        contrast = judged.contrast
        out.print(f"{judged.words}: {judged.claim.says}", soft_wrap=True)
        p_value = "–" if judged.adjusted is None else f"{judged.adjusted:.3g}"
        sides = f"{number(judged.a)} against {number(judged.b)}, " if judged.a is not None else ""
        out.print(
            f"    {judged.claim.metric}: {sides}{number(contrast.difference)} "
            f"[{interval(contrast.low, contrast.high)}], p {p_value}, {contrast.seeds} seeds",
            soft_wrap=True,
        )
    for head, rows in _that_fit(*mean_rows(report), out.width):
        table = Table(box=None, pad_edge=False)
        for i, title in enumerate(head):
            table.add_column(title, justify="right" if i else "left")
        for row in rows:
            table.add_row(*row)
        out.print(table)
    out.print(NOTE, style="dim")
    if report.missing:
        out.print(f"not run to the end: {some(report.missing)}", soft_wrap=True)
    for arm, stages in report.ended_before.items():
        out.print(f"{arm} ended before {', '.join(stages)}", soft_wrap=True)
    out.print(f"report  {page}, .json{'' if picture is None else ', .png'}", soft_wrap=True)


def _that_fit(
    head: Sequence[str], rows: Sequence[Sequence[str]], width: int
) -> Iterator[tuple[list[str], list[list[str]]]]:
    """A table in parts no wider than `width`: variants and seeds in each, and the metrics that still have room.

    A part leaves out the variants that have none of its metrics.
    """
    from dro_rl.study.report import NONE

    widths = [max(len(row[i]) for row in (head, *rows)) + 2 for i in range(len(head))]
    parts: list[list[int]] = []
    for i in range(2, len(head)):
        if not parts or sum(widths[:2]) + sum(widths[j] for j in (*parts[-1], i)) > width:
            parts.append([])
        parts[-1].append(i)
    for part in parts or [[]]:
        shown = [row for row in rows if not part or any(row[i] != NONE for i in part)]
        yield [*head[:2], *(head[i] for i in part)], [[*row[:2], *(row[i] for i in part)] for row in shown]


@app.command("gradients", context_settings=KEYS_AFTER)
def gradients(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE", help="A recipe; --key value after it goes over it.", show_default=False),
    ],
    repeats: Annotated[int, typer.Option("--repeats", min=2, help="Estimates of each question.")] = 4,
    json: Json = False,
) -> None:
    """Measure how much the selector's gradient varies, where a recipe's training would start. Nothing is trained.

    The questions are those of the first iteration. Writes gradients.json into output_dir.

    \b
    Examples:
      dro-rl study gradients quickstart --num_generations 4 --output_dir runs/gradients-m4
    """
    from transformers.utils.logging import disable_progress_bar

    from dro_rl.cli.output import console, print_json, print_rows
    from dro_rl.recipe import load_recipe, parse_command_line
    from dro_rl.study.gradients import measure

    disable_progress_bar()
    found = measure(load_recipe(*parse_command_line(arguments)), repeats)
    if json:
        print_json(found)
    else:
        rows = [(name, f"{value:.5g}" if isinstance(value, float) else value) for name, value in found.items()]
        print_rows(console(), ("figure", ""), rows)
