"""`dro-rl rollouts`: tables of what `dro_rl.rollouts.analysis` finds in a run's rollout log."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from dro_rl.rollouts.analysis import Group, IterationSummary, Signal

app = typer.Typer(help="Look into the rollouts of a run.", no_args_is_help=True, rich_markup_mode=None)

Run = Annotated[Path, typer.Argument(metavar="RUN", help="The run's output_dir.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Last = Annotated[int | None, typer.Option("--last", min=1, help="The last so many iterations only.")]

FIXED = ("weight", "", "ℓ", "log p", "log q", "coef")
TABLE_WIDTH = 76
"""Below this many columns, a list reads better than a table."""

LEGEND = (
    "valid: rollouts that name a document. dup: rollouts after a question's first that repeat a selection. "
    "tie: questions whose rollouts explain the answer equally well. ESS/m: effective share of the rollouts. "
    "bound: log((1/m) Σ p(answer)), ℓ: log p(answer), both in nats. R: supporting documents among the first "
    "1/3/5 selected, over all rollouts and by weight. Shares in percent."
)
SHOW_LEGEND = (
    "ℓ: log p(answer | selected documents). log p, log q: of the selection, under the selector and what "
    "it was sampled from. coef: what multiplies ∇ log p. Nats."
)


@app.command("ls")
def list_iterations(run: Run, last: Last = None, json: Json = False) -> None:
    """List the iterations of a run, in the order of time, with their diagnostics."""
    from dro_rl.cli.output import console, print_json
    from dro_rl.rollouts.analysis import summarize_run

    summaries = summarize_run(run, last)
    if json:
        print_json({"run": run, "iterations": summaries})
        return
    out = console()
    _print_iterations(out, summaries)
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
    from dro_rl.rollouts.analysis import find_groups

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
    """Diagnostics over time, problems of the selections, and signals that something needs a change."""
    from dro_rl.cli.output import console, print_json
    from dro_rl.rollouts.analysis import count_problems, signals, summarize_run

    summaries = summarize_run(run, last)
    problems, found = count_problems(summaries), signals(summaries)
    if json:
        print_json({"run": run, "iterations": summaries, "problems": problems, "signals": found})
        return
    out = console()
    _print_iterations(out, summaries)
    out.print(LEGEND, style="dim")
    out.print()
    rollouts = sum(summary.rollouts for summary in summaries)
    out.print(f"Problems of {rollouts} rollouts", style="bold")
    for name, count in problems.items():
        out.print(f"  {name:<14}{count:>8}  {100 * count / rollouts:.1f} %")
    if not problems:
        out.print("  none")
    out.print()
    _print_signals(out, found)


def _print_iterations(out: Console, summaries: list[IterationSummary]) -> None:
    from rich.table import Table

    headings = (
        "iter",
        "step",
        "q",
        "rollouts",
        "valid",
        "dup",
        "tie",
        "ESS/m",
        "bound",
        "ℓ",
        "R 1/3/5",
        "by weight",
    )
    rows = [_cells(summary) for summary in summaries]
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


def _cells(summary: IterationSummary) -> tuple[str, ...]:
    from dro_rl.cli.output import number, percent

    return (
        str(summary.iteration),
        str(summary.first_step),
        str(summary.questions),
        str(summary.rollouts),
        percent(summary.valid),
        percent(summary.duplicate),
        percent(summary.all_tie),
        percent(summary.ess),
        number(summary.evidence_bound),
        number(summary.answer_logp),
        "/".join(map(percent, summary.recall.values())),
        "/".join(map(percent, summary.weighted_recall.values())),
    )


def _print_signals(out: Console, found: list[Signal]) -> None:
    from rich.padding import Padding

    from dro_rl.cli.output import percent

    if not found:
        return
    first, last = found[0].first_iteration, found[0].last_iteration
    span = f"iteration {last}" if first == last else f"iterations {first}-{last}"
    out.print(f"Signals, over {span} ({found[0].questions} questions)", style="bold")
    for signal in found:
        rule = signal.threshold
        limit = f"{'above' if rule.above else 'below'} {percent(rule.limit)} %"
        mark, style = ("!", "yellow") if signal.fired else (" ", "")
        out.print(f"{mark} {rule.name:<10}{percent(signal.value):>4} %  signals {limit}", style=style)
        if signal.fired:
            out.print(Padding(f"{rule.recipe_key}: {rule.advice}", (0, 0, 0, 2)))


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
    headings = ("weight", "", "selection", "ℓ", "log p", "log q", "coef", "problems")
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
                number(rollout.selector_coefficient),
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
