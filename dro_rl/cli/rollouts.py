"""`dro-rl rollouts`: tables of what `dro_rl.rollouts` finds in a run's rollout log."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from dro_rl.rollouts.diagnostics import Summary
    from dro_rl.rollouts.explain import Group
    from dro_rl.rollouts.signals import Iteration, Signal

app = typer.Typer(help="Look into the rollouts of a run.", no_args_is_help=True, rich_markup_mode=None)

Run = Annotated[Path, typer.Argument(metavar="RUN", help="The run's output_dir.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Last = Annotated[int | None, typer.Option("--last", min=1, help="The last so many iterations only.")]

FIXED = ("weight", "", "ℓ", "log p", "log q")
TABLE_WIDTH = 78
"""Below this many columns, a list reads better than a table."""

PLACES = 20
"""Document numbers whose share is printed: all of them, or the most frequent."""

LEGEND = (
    "valid: rollouts that name a document. clean: exactly as asked. dup: rollouts after a question's first that repeat "
    "a selection. tie: questions whose rollouts explain the answer equally well. ESS/m: effective share of the "
    "rollouts. bound: log((1/m) Σ p/q p(answer)), nats. R: supporting documents among the first 1/3/5 selected, under "
    "the selector and by weight. first: the number that is named first most often, and by how many. Shares in percent."
)
SHOW_LEGEND = (
    "ℓ: log p(answer | selected documents). log p, log q: of the selection, under the selector and what "
    "it was sampled from. Nats."
)


@app.command("ls")
def list_iterations(run: Run, last: Last = None, json: Json = False) -> None:
    """List the iterations of a run, in the order of time, with their diagnostics."""
    from dro_rl.cli.output import console, print_json
    from dro_rl.rollouts.read import history

    found = history(run, last)
    if json:
        print_json({"run": run, "iterations": list(map(_iteration, found))})
        return
    out = console()
    _print_iterations(out, found)
    out.print(LEGEND, style="dim")


@app.command("show")
def show(
    run: Run,
    question_id: Annotated[
        str | None,
        typer.Argument(metavar="QUESTION_ID", help="One question. Without it, those first by --sort."),
    ] = None,
    iteration: Annotated[
        int | None, typer.Option("--iteration", help="1-based. Without it, the last one there is.")
    ] = None,
    sort: Annotated[
        Literal["weight", "evidence", "ess"],
        typer.Option(
            "--sort",
            help="First come: weight, the most decided; evidence, the hardest; ess, the least spread.",
        ),
    ] = "weight",
    limit: Annotated[int, typer.Option("--limit", min=1, help="Questions at most.")] = 3,
    json: Json = False,
) -> None:
    """Show questions with their rollouts in the order of weight, and why the first one won."""
    from dro_rl.cli.output import console, print_json
    from dro_rl.rollouts.read import find_groups

    groups = find_groups(run, question_id, iteration=iteration, sort=sort, limit=limit)
    if json:
        print_json({"run": run, "questions": groups})
        return
    out = console()
    for place, group in enumerate(groups):
        if place:
            out.print()
        _print_group(out, group)
    out.print(SHOW_LEGEND, style="dim")


@app.command("stats")
def stats(run: Run, last: Last = None, json: Json = False) -> None:
    """Diagnostics over time, problems and places of the selections, and signals that something needs a change."""
    from dro_rl.cli.output import console, print_json
    from dro_rl.rollouts.diagnostics import pooled
    from dro_rl.rollouts.read import history
    from dro_rl.rollouts.signals import of_iteration, span, windows

    found = history(run)
    shown = found[-last:] if last else found
    whole, signals = pooled([iteration.rollouts for iteration in shown]), of_iteration(found)
    if json:
        print_json(
            {
                "run": run,
                "iterations": list(map(_iteration, shown)),
                "problems": whole.problems,
                "signals": list(map(_signal, signals)),
            }
        )
        return
    out = console()
    _print_iterations(out, shown)
    out.print(LEGEND, style="dim")
    out.print()
    out.print(f"Problems of {whole.rollouts} rollouts", style="bold")
    for name, count in whole.problems.items():
        out.print(f"  {name:<14}{count:>8}  {100 * count / whole.rollouts:.1f} %")
    if not whole.problems:
        out.print("  none")
    out.print()
    latest = windows(found, 1)[-1]
    over = f"{span(latest[0].number, latest[-1].number)} ({signals[0].questions} questions)"
    _print_places(out, pooled([iteration.rollouts for iteration in latest]), over)
    _print_signals(out, signals, over)


def _iteration(iteration: Iteration) -> dict[str, Any]:
    """An iteration as the JSON documents have it."""
    steps = {"iteration": iteration.number, "first_step": iteration.first_step, "last_step": iteration.last_step}
    return {**steps, **asdict(iteration.rollouts)}


def _signal(signal: Signal) -> dict[str, Any]:
    """A signal as the JSON documents have it."""
    rule, measured = signal.rule, signal.measured
    return {
        "name": rule.name,
        "fired": signal.fired,
        "value": measured.value,
        "limit": measured.limit,
        "above": measured.above,
        "unit": rule.unit,
        "meaning": rule.meaning,
        "keys": rule.keys,
        "advice": rule.advice,
        "first_iteration": signal.first_iteration,
        "last_iteration": signal.last_iteration,
        "questions": signal.questions,
    }


def _print_iterations(out: Console, found: list[Iteration]) -> None:
    from rich.table import Table

    headings = ("iter", "step", "q", "valid", "clean", "dup", "tie", "ESS/m", "bound", "R 1/3/5", "by weight", "first")
    rows = [_cells(iteration) for iteration in found]
    if out.width < TABLE_WIDTH:
        for row in rows:
            out.print(f"iteration {row[0]}", style="bold")
            for heading, cell in zip(headings[1:], row[1:], strict=True):
                out.print(f"  {heading:<10}{cell}")
        return
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    out.print(table)


def _cells(iteration: Iteration) -> tuple[str, ...]:
    from dro_rl.cli.output import number, percent

    figures = iteration.rollouts
    often = max(range(len(figures.first)), key=figures.first.__getitem__, default=None)
    return (
        str(iteration.number),
        str(iteration.first_step),
        str(figures.questions),
        percent(figures.valid),
        percent(figures.clean),
        percent(figures.duplicate),
        percent(figures.all_tie),
        percent(figures.ess_share),
        number(figures.evidence_bound),
        "/".join(map(percent, figures.recall.values())),
        "/".join(map(percent, figures.weighted_recall.values())),
        "-" if often is None else f"[{often + 1}]{percent(figures.first[often])}",
    )


def _print_places(out: Console, figures: Summary, over: str) -> None:
    """The histogram of the numbers that are selected: a policy that always names [10] leaps to the eye."""
    from dro_rl.cli.output import bar, percent

    if not figures.first:
        return
    out.print(f"Places, over {over}: first, and at all, in percent", style="bold")
    often = sorted(range(len(figures.first)), key=lambda place: -max(figures.first[place], figures.selected[place]))
    for place in sorted(often[:PLACES]):
        first, selected = figures.first[place], figures.selected[place]
        out.print(
            f"{f'[{place + 1}]':>6} {percent(first):>3} {bar(first, 16):<16} {percent(selected):>3} {bar(selected, 16)}"
        )
    if len(often) > PLACES:
        out.print(f"  and {len(often) - PLACES} more")
    out.print(f"  a number drawn at random would be first in {percent(figures.first_chance)}")
    out.print()


def _print_signals(out: Console, signals: list[Signal], over: str) -> None:
    from rich.padding import Padding

    from dro_rl.rollouts.signals import reading

    out.print(f"Signals, over {over}", style="bold")
    for signal in signals:
        if math.isnan(signal.measured.value):
            continue
        mark, style = ("!", "yellow") if signal.fired else (" ", "")
        out.print(f"{mark} {reading(signal)}", style=style)
        if signal.fired:
            out.print(Padding(f"{signal.rule.meaning} {signal.rule.advice}", (0, 0, 0, 2)))


def _print_group(out: Console, group: Group) -> None:
    from rich.padding import Padding
    from rich.table import Table

    from dro_rl.cli.output import bar, number, plain
    from dro_rl.selection import format_selection

    m = len(group.rollouts)
    out.print(f"{plain(group.question_id)}: {plain(group.question)}", style="bold")
    out.print(f"answers: {' | '.join(map(plain, group.answers))}")
    out.print(
        f"iteration {group.iteration}, step {group.step}: ESS {number(group.ess)} of {m}, "
        f"evidence bound {number(group.evidence_bound)} nats, "
        f"weight temperature {group.weight_temperature:.3g}"
    )
    headings = ("weight", "", "selection", "ℓ", "log p", "log q", "problems")
    rows = []
    for rollout in group.rollouts:
        marks = {d.number: "*" if d.supporting else "" for d in rollout.documents}
        named = format_selection(rollout.numbers)
        for n, mark in marks.items():
            named = named.replace(f"[{n}]", f"[{n}]{mark}")
        rows.append(
            (
                number(rollout.weight),
                bar(rollout.weight),
                named or f"wrote: {plain(rollout.text)[:40]}",
                number(rollout.answer_logp),
                number(rollout.selection_logp),
                number(rollout.proposal_logp),
                ", ".join(rollout.problems),
            )
        )
    if out.width < TABLE_WIDTH:
        for row in rows:
            out.print(" ".join(filter(None, row[:3])))
            details = (f"{heading} {cell}" for heading, cell in zip(headings[3:], row[3:], strict=True) if cell)
            out.print(Padding(", ".join(details), (0, 0, 0, 2)))
    else:
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
        for heading in headings:
            left = heading in ("", "selection", "problems")
            table.add_column(heading, justify="left" if left else "right", no_wrap=heading in FIXED)
        for row in rows:
            table.add_row(*row)
        out.print(table)
    documents = {d.number: d for rollout in group.rollouts for d in rollout.documents}
    for n, document in sorted(documents.items()):
        out.print(f"{f'[{n}]':>5}{'*' if document.supporting else ' '} {plain(document.title)}", no_wrap=True)
    missing = group.num_supporting - sum(d.supporting for d in documents.values())
    if group.num_supporting:
        out.print(f"* supports the answer; {missing} of {group.num_supporting} supporting were not selected")
    out.print(plain(group.why), style="bold")
