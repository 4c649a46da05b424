"""`dro-rl rollouts`: what `dro_rl.rollouts` finds in a run's rollout log."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dro_rl.rollouts.diagnostics import Summary
    from dro_rl.rollouts.signals import Iteration

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def group() -> None:
    """Look into the rollouts of a run.

    \b
    Examples:
      dro-rl rollouts ls runs/musique
      dro-rl rollouts show runs/musique --sort evidence --limit 3
      dro-rl rollouts top runs/musique --only missed
    """


Run = Annotated[Path, typer.Argument(metavar="RUN", help="The run's output_dir.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Last = Annotated[int | None, typer.Option("--last", min=1, help="The last so many iterations only.")]
InIteration = Annotated[
    str | None,
    typer.Option(
        "--iteration", metavar="N|N-M|all", help="1-based, one or several. Without it, the last one there is."
    ),
]
Sort = Annotated[
    Literal["weight", "evidence", "ess", "uncertain", "worse", "improved"],
    typer.Option(
        "--sort",
        help="First come: weight, the most decided; evidence, the hardest; ess, the least spread; uncertain, those of "
        "the highest entropy; worse and improved, those whose answer is explained less well, or better, than it was.",
    ),
]
Kind = Annotated[
    Literal["missed", "unselected", "tie", "collapsed", "invalid", "worse", "improved"] | None,
    typer.Option(
        "--only",
        help="missed: gold is among the candidates, and no rollout selects any; unselected: the heaviest does not; "
        "tie: all explain the answer alike; collapsed: all select the same; invalid: one names no document; worse, "
        "improved: by more than a tie, see --since.",
    ),
]
Since = Annotated[
    int | None,
    typer.Option(
        "--since",
        min=1,
        help="For worse and improved: the last time of a question after this iteration, against its last one by then. "
        "Without it, its last time against its first.",
    ),
]
Question = Annotated[str | None, typer.Option("--question", metavar="ID", help="The question of this id.")]
MinWeight = Annotated[
    float | None, typer.Option("--min-weight", min=0, max=1, help="Questions whose largest weight is at least this.")
]
MaxWeight = Annotated[
    float | None, typer.Option("--max-weight", min=0, max=1, help="Questions whose largest weight is at most this.")
]
Split = Annotated[str | None, typer.Option("--split", help="The split that the rollouts are of: the training split.")]
Problem = Annotated[
    Literal["format", "out_of_range", "repeated", "too_few", "too_many"] | None,
    typer.Option("--problem", help="Questions with a rollout that has this problem."),
]
Text = Annotated[str | None, typer.Option("--text", help="Questions that say this: in text, id, or what was written.")]

LEGEND = (
    "valid: rollouts that name a document. clean: exactly as asked. dup: rollouts after a question's first that repeat "
    "a selection. tie: questions whose rollouts explain the answer equally well. ESS/m: effective share of the "
    "rollouts. bound: log((1/m) Σ p/q p(answer)), nats. R: supporting documents among the first 1/3/5 selected, under "
    "the selector and by weight. first: the number that is named first most often, and by how many. Shares in percent."
)
SHOW_LEGEND = (
    "ℓ: log p(answer | selected documents), and the same as mean, or sum, over its tokens. log p, log q: of the "
    "selection, under the selector and what it was sampled from. Nats."
)
TOP_LEGEND = (
    "bound: log((1/m) Σ p/q p(answer)), nats. entropy: of the selector, nats. R@5: supporting documents selected, in "
    "percent. sel: different selections among the rollouts."
)


def iterations_of(run: Path, given: str | None, option: str = "--iteration") -> list[int] | None:
    """What an option says of iterations: `7`, `3-9` or `all`."""
    from dro_rl.errors import InputError
    from dro_rl.rollouts.read import iterations

    if given is None:
        return None
    if given == "all":
        return iterations(run)
    first, _, last = given.partition("-")
    if not (
        first.isdecimal() and (last or first).isdecimal() and int(first) <= int(last or first) <= int(first) + 10**6
    ):
        raise InputError(option, given, "this is a number, several as 3-9, or all", "Correct it.")
    return list(range(int(first), int(last or first) + 1))


def _latest(found: Sequence[Iteration]) -> tuple[Summary, str]:
    """The latest window as one, and which that is."""
    from dro_rl.rollouts.diagnostics import pooled
    from dro_rl.rollouts.signals import span, windows

    window = windows(found, 1)[-1]
    latest = pooled([iteration.rollouts for iteration in window])
    return latest, f"{span(window[0].number, window[-1].number)} ({latest.questions} questions)"


@app.command("ls")
def list_iterations(run: Run, last: Last = None, json: Json = False) -> None:
    """List the iterations of a run, in the order of time, with their diagnostics.

    \b
    Examples:
      dro-rl rollouts ls runs/musique
      dro-rl rollouts ls runs/musique --last 10 --json
    """
    from dro_rl.cli.output import console, print_json
    from dro_rl.cli.rollout_tables import iteration_document, print_iterations, print_places
    from dro_rl.rollouts.read import history

    found = history(run, last)
    if json:
        print_json({"run": run, "iterations": list(map(iteration_document, found))})
        return
    out = console()
    print_iterations(out, found)
    print_places(out, *_latest(found))
    out.print(LEGEND, style="dim")


@app.command("show")
def show(
    run: Run,
    question_id: Annotated[
        str | None,
        typer.Argument(metavar="QUESTION_ID", help="One question. Without it, those first by --sort."),
    ] = None,
    iteration: InIteration = None,
    sort: Sort = "weight",
    only: Kind = None,
    since: Since = None,
    problem: Problem = None,
    text: Text = None,
    min_weight: MinWeight = None,
    max_weight: MaxWeight = None,
    split: Split = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Questions at most.")] = 3,
    json: Json = False,
) -> None:
    """Show questions with their rollouts in the order of weight, and why the first one won.

    \b
    Examples:
      dro-rl rollouts show runs/musique 2hop__482757_12019
      dro-rl rollouts show runs/musique --only missed --sort uncertain --limit 1
      dro-rl rollouts show runs/musique --iteration 3-9 --text "who wrote"
      dro-rl rollouts show runs/musique --sort worse --since 5
    """
    from dro_rl.cli.output import console, print_json
    from dro_rl.cli.rollout_tables import print_group
    from dro_rl.rollouts.find import Wanted, find, find_groups

    wanted = Wanted(only, problem, text, min_weight, max_weight, since, split)
    found = find(run, question_id, iteration=iterations_of(run, iteration), sort=sort, wanted=wanted)
    groups = find_groups(found, limit)
    if json:
        print_json({"run": run, "questions": groups})
        return
    out = console()
    for place, group in enumerate(groups):
        if place:
            out.print()
        print_group(out, group)
    out.print(SHOW_LEGEND if groups else f"no such question in {found.where}", style="dim")


@app.command("top")
def top(
    run: Run,
    iteration: InIteration = None,
    sort: Sort = "evidence",
    only: Kind = None,
    since: Since = None,
    question: Question = None,
    problem: Problem = None,
    text: Text = None,
    min_weight: MinWeight = None,
    max_weight: MaxWeight = None,
    split: Split = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Questions at most.")] = 20,
    json: Json = False,
) -> None:
    """List questions of an iteration, a line each: the hardest first, or by --sort.

    \b
    Examples:
      dro-rl rollouts top runs/musique --only missed
      dro-rl rollouts top runs/musique --iteration all --only collapsed --min-weight 0.9
      dro-rl rollouts top runs/musique --sort improved --since 3
      dro-rl rollouts top runs/musique --problem too_many --text tokyo --json
    """
    from dro_rl.cli.output import console, print_json
    from dro_rl.cli.rollout_tables import print_briefs
    from dro_rl.rollouts.find import Wanted, briefly, find

    wanted = Wanted(only, problem, text, min_weight, max_weight, since, split)
    found = find(run, question, iteration=iterations_of(run, iteration), sort=sort, wanted=wanted)
    briefs = briefly(found, limit)
    if json:
        print_json({"run": run, "iterations": found.iterations, "found": len(found.places), "questions": briefs})
        return
    out = console()
    print_briefs(out, briefs)
    out.print(f"{len(briefs)} of {len(found.places)} questions, {found.where}. {TOP_LEGEND}", style="dim")


@app.command("diff")
def diff(
    run: Run,
    other: Annotated[
        Path | None, typer.Argument(metavar="OTHER", help="Another run, against this one.", show_default=False)
    ] = None,
    first: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="N|N-M",
            help="Iterations of RUN. Without it, the first time of each question, or with OTHER the last.",
        ),
    ] = None,
    last: Annotated[
        str | None,
        typer.Option(
            "--to", metavar="N|N-M", help="Iterations to compare with them. Without it, the last time of each question."
        ),
    ] = None,
    sort: Annotated[
        Literal["worse", "improved"], typer.Option("--sort", help="What comes first: worse, or improved.")
    ] = "worse",
    limit: Annotated[int, typer.Option("--limit", min=1, help="Questions at most.")] = 20,
    json: Json = False,
) -> None:
    """Compare questions that were sampled twice: which answers are explained worse, or better, than they were.

    \b
    Examples:
      dro-rl rollouts diff runs/musique --sort improved
      dro-rl rollouts diff runs/musique --from 1 --to 5
      dro-rl rollouts diff runs/seed-0 runs/seed-1
      dro-rl rollouts diff runs/frozen runs/joint --from 11-20 --to 11-20
    """
    from dataclasses import asdict

    from dro_rl.cli.output import console, print_json
    from dro_rl.cli.rollout_tables import print_changes
    from dro_rl.rollouts.changes import compare

    early, late = iterations_of(run, first, "--from"), iterations_of(other or run, last, "--to")
    found = compare(run, other, first=early, last=late, improved_first=sort == "improved", limit=limit)
    if json:
        counts = {"compared": found.compared, "improved": found.improved, "worse": found.worse}
        moved = None if found.mean is None else asdict(found.mean)
        items = [
            {"evidence_change": change.evidence, "before": change.before, "after": change.after}
            for change in found.shown
        ]
        print_json({"run": run, "other": other, **counts, "mean": moved, "questions": items})
        return
    out = console()
    print_changes(out, found.shown)
    if (mean := found.mean) is not None:
        known = "" if mean.low is None else f" ({mean.low:+.2f} … {mean.high:+.2f}), p {mean.p_value:.2g}"
        out.print(f"{mean.before:.2f} → {mean.after:.2f}, {mean.change:+.2f} nats a question{known}", soft_wrap=True)
    twice = "that were sampled twice" if other is None else "that both have"
    out.print(
        f"{len(found.shown)} of {found.compared} questions {twice}: {found.improved} explained better, "
        f"{found.worse} worse. bound: evidence bound in nats, before and after; in brackets the 95 % interval of its "
        "mean change, Student's t over questions; the selections are the heaviest.",
        style="dim",
    )


@app.command("stats")
def stats(run: Run, last: Last = None, json: Json = False) -> None:
    """Print diagnostics over time, problems and places of the selections, and signals that something needs a change.

    \b
    Examples:
      dro-rl rollouts stats runs/musique
      dro-rl rollouts stats runs/musique --last 5
    """
    from dro_rl.cli.output import console, print_json
    from dro_rl.cli.rollout_tables import (
        iteration_document,
        print_iterations,
        print_places,
        print_signals,
        signal_document,
    )
    from dro_rl.rollouts.diagnostics import pooled
    from dro_rl.rollouts.read import history
    from dro_rl.rollouts.signals import of_iteration

    found = history(run)
    shown = found[-last:] if last else found
    whole, signals = pooled([iteration.rollouts for iteration in shown]), of_iteration(found)
    if json:
        print_json(
            {
                "run": run,
                "iterations": list(map(iteration_document, shown)),
                "problems": whole.problems,
                "signals": list(map(signal_document, signals)),
            }
        )
        return
    out = console()
    print_iterations(out, shown)
    out.print(LEGEND, style="dim")
    out.print()
    out.print(f"Problems of {whole.rollouts} rollouts", style="bold")
    for name, count in whole.problems.items():
        out.print(f"  {name:<14}{count:>8}  {100 * count / whole.rollouts:.1f} %")
    if not whole.problems:
        out.print("  none")
    out.print()
    latest, over = _latest(found)
    print_places(out, latest, over)
    print_signals(out, signals, over)


@app.command("export")
def export(
    run: Run,
    output: Annotated[Path, typer.Option("--output", "-o", help="A .jsonl, .jsonl.gz or .parquet file.")],
    to: Annotated[
        Literal["flashrag", "search-r1", "rank-llm"] | None,
        typer.Option(
            "--to",
            help="Not rollouts but their questions, as a peer reads them: the candidates that the heaviest rollout of "
            "the last time selected, then the rest. The run's data is read for their texts.",
        ),
    ] = None,
    iteration: Annotated[
        str | None, typer.Option("--iteration", metavar="N|N-M", help="1-based, one or several. Without it, all.")
    ] = None,
    only: Kind = None,
    since: Since = None,
    question: Question = None,
    problem: Problem = None,
    text: Text = None,
    min_weight: MinWeight = None,
    max_weight: MaxWeight = None,
    split: Split = None,
    json: Json = False,
) -> None:
    """Write the rollouts of the questions that are asked for, with all columns of the log.

    \b
    Examples:
      dro-rl rollouts export runs/musique --output rollouts.jsonl.gz
      dro-rl rollouts export runs/musique --output ties.parquet --only tie --iteration 3-5
      dro-rl rollouts export runs/musique --output selected.jsonl --to rank-llm
    """
    from dro_rl.cli.output import console, print_json
    from dro_rl.rollouts.find import Wanted, rows_of
    from dro_rl.rollouts.log import export_rows

    wanted = Wanted(only, problem, text, min_weight, max_weight, since, split)
    rows = rows_of(run, iterations_of(run, iteration), wanted, question)
    if to is None:
        what, count = "rollouts", export_rows(rows, output)
    else:
        from dro_rl.data.export import export_questions, selected_first
        from dro_rl.runs import questions_of, read_run

        said = read_run(run)
        asked = said.recipe
        named = {"dataset": Path(str(asked["dataset_name"])).name, "split": str(asked["dataset_train_split"])}
        questions = selected_first(questions_of(said), rows)
        what, count = "questions", export_questions(questions, to, output, **named)
    if json:
        print_json({"run": run, "output": output, what: count})
    else:
        console().print(f"{count} {what} in {output}", soft_wrap=True)


@app.command("sql")
def sql(
    run: Run,
    statement: Annotated[str, typer.Argument(metavar="STATEMENT", help="SQL over the table rollouts.")],
    limit: Annotated[int, typer.Option("--limit", min=1, help="Rows at most.")] = 100,
    json: Json = False,
) -> None:
    """Ask the log in SQL, by DuckDB. The table is rollouts, its columns are those of the log.

    \b
    Examples:
      dro-rl rollouts sql runs/musique "select iteration, avg(weight) from rollouts where valid group by 1 order by 1"
      dro-rl rollouts sql runs/musique "select problems, count(*) from rollouts group by 1" --json
    """
    from dro_rl.cli.output import console, print_json, print_rows
    from dro_rl.rollouts.query import query

    answer = query(run, statement, limit)
    if json:
        rows = [dict(zip(answer.columns, row, strict=True)) for row in answer.rows]
        print_json({"run": run, "columns": answer.columns, "rows": rows})
        return
    print_rows(console(), answer.columns, answer.rows)


@app.command("watch")
def watch(
    run: Run,
    every: Annotated[float, typer.Option("--every", min=0.1, help="Seconds between two looks.")] = 5.0,
    until: Annotated[int | None, typer.Option("--until", min=1, help="Leave after this iteration.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print a JSON document a line, for each iteration.")] = False,
) -> None:
    """Follow a run: each iteration when it has been sampled, and its signals. Leave with Ctrl-C.

    \b
    Examples:
      dro-rl rollouts watch runs/musique
      dro-rl rollouts watch runs/musique --every 60 --until 5
    """
    import time

    from dro_rl.cli.output import console, print_json
    from dro_rl.cli.rollout_tables import iteration_document, print_iterations, signal_document
    from dro_rl.rollouts.read import follow
    from dro_rl.rollouts.signals import of_iteration, reading

    out, history, standing = console(), [], set[str]()
    try:
        for iteration in follow(run, lambda: time.sleep(every)):
            history.append(iteration)
            fired = {signal.rule.name: signal for signal in of_iteration(history) if signal.fired}
            if json:
                print_json(
                    {**iteration_document(iteration), "signals": list(map(signal_document, fired.values()))}, line=True
                )
            else:
                print_iterations(out, [iteration], headings=len(history) == 1)
                for name in fired.keys() - standing:
                    out.print(f"! {reading(fired[name])}: {fired[name].rule.meaning}", style="yellow")
            standing = set(fired)
            if until is not None and iteration.number >= until:
                return
    except KeyboardInterrupt:
        return
