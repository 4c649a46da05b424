"""`dro-rl evaluate` and `dro-rl compare`: how good a pair is, how sure that is, and whether another is better."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dro_rl.cli.data import Column, columns_of

if TYPE_CHECKING:
    from rich.console import Console

    from dro_rl.evaluation.comparison import Change, Comparison
    from dro_rl.evaluation.report import Report

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Control = Literal["none", "retriever-order", "random", "gold"]


def evaluate(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="A run's output_dir, or a folder with selector/ and generator/.", show_default=False
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            "--data", help="Questions: a file, a folder with a file a split, a hub name, or toy.", show_default=False
        ),
    ],
    config: Annotated[
        str | None,
        typer.Option("--config", help="A dataset of a folder that holds several, or a hub dataset's configuration."),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            "--split",
            help="Split of a folder, a hub name or toy (without it, test); of a single file, the report's name for it.",
        ),
    ] = None,
    control: Annotated[
        Control, typer.Option("--control", help="Let this choose the documents in place of the selector.")
    ] = "none",
    seed: Annotated[int, typer.Option("--seed", help="Of --control random.")] = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the results. Without it, RUN/evaluation/<split>.")
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", help="Says K, lengths, prompts and candidates of a RUN without pipeline.json."),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="The first so many questions.")] = None,
    num_documents: Annotated[
        int | None,
        typer.Option(
            "--num-documents",
            min=1,
            help="The first so many candidates of each question. Without it, as many as the run's recipe says.",
        ),
    ] = None,
    shuffle_documents: Annotated[
        bool | None,
        typer.Option(
            "--shuffle-documents/--in-order",
            help="Shuffle candidates by the recipe's seed, or not. Without it, as the run's recipe says; "
            "--control retriever-order takes them as they stand.",
        ),
    ] = None,
    window_size: Annotated[
        int | None,
        typer.Option(
            "--window-size",
            min=2,
            help="Candidates shown at a time: a window slides from the end of a longer list to its front. "
            "Without it, as trained.",
        ),
    ] = None,
    window_stride: Annotated[
        int | None,
        typer.Option(
            "--window-stride", min=1, help="New candidates of each further window. Without it, --window-size less K."
        ),
    ] = None,
    column: Column = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Questions answered at once.")] = 8,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu, cuda, cuda:1, … Without it, CUDA or CPU.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option("--dtype", help="Type of the weights. Without it, as saved."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew where other results stand.")] = False,
    json: Json = False,
) -> None:
    """Evaluate a pair on a split, greedily: means with 95 % intervals, and a row a question.

    A killed evaluation goes on where it was when the same command is given again.

    \b
    Examples:
      dro-rl evaluate runs/quickstart --data toy --split test
      dro-rl evaluate runs/musique --data data/musique/test.jsonl --dtype bfloat16 --batch-size 32
      dro-rl evaluate runs/musique --data data/musique/test.jsonl --control retriever-order
      dro-rl evaluate runs/musique --data data/musique/test-100.jsonl --num-documents 100 --window-size 20
      dro-rl evaluate runs/musique/checkpoint-155 --recipe runs/musique/recipe.yaml --data data/musique/dev.jsonl
    """
    from transformers.utils.logging import disable_progress_bar

    from dro_rl.cli.output import console, print_json
    from dro_rl.evaluation.job import EvaluationJob, run_evaluation

    disable_progress_bar()
    job = EvaluationJob(
        run=run,
        data=data,
        config=config,
        split=split,
        control=control,
        seed=seed,
        output=output,
        recipe=recipe,
        limit=limit,
        num_documents=num_documents,
        shuffle_documents=shuffle_documents,
        window_size=window_size,
        window_stride=window_stride,
        columns=columns_of(column),
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        overwrite=overwrite,
    )
    report, folder = run_evaluation(job)
    if json:
        print_json(report)
        return
    _print_report(console(), report, folder)


def _print_report(out: Console, report: Report, folder: Path) -> None:
    from rich.table import Table

    from dro_rl.evaluation.report import TYPE_METRICS, headline, metric_rows, type_rows

    for name, value in headline(report):
        out.print(f"{name:<15}{value}", soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for i, title in enumerate(("metric", "mean", f"{report.confidence:.0%} interval", "questions")):
        table.add_column(title, justify="right" if i else "left", no_wrap=True)
    for cells in metric_rows(report.metrics):
        table.add_row(*cells)
    out.print(table)
    if report.by_type:
        table = Table(box=None, pad_edge=False)
        for i, title in enumerate(("type", "questions", *TYPE_METRICS)):
            table.add_column(title, justify="right" if i else "left", no_wrap=True)
        for row in type_rows(report, intervals=False):
            table.add_row(*row)
        out.print("")
        out.print(table)
    out.print("Percent, but for what names its unit. Intervals: percentile bootstrap over questions.", style="dim")
    out.print(f"{'report':<15}{folder / 'report.md'}, report.json", soft_wrap=True)
    out.print(f"{'a row each':<15}{folder / 'questions.parquet'}", soft_wrap=True)
    out.print(f"{'compare':<15}dro-rl compare OTHER {folder}", soft_wrap=True)


def compare(
    run_a: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_A",
            help="An evaluated run, an evaluation's folder, or a stage's .parquet: what B is compared with.",
            show_default=False,
        ),
    ],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="The same, of B.", show_default=False)],
    name: Annotated[
        str | None, typer.Option("--name", help="Which evaluation of the runs, where they have several.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=0, help="Questions won and lost that are shown, at most.")] = 5,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write it to this JSON file too.")] = None,
    json: Json = False,
) -> None:
    """Compare two evaluations of the same questions: paired tests, intervals, and what was won and lost.

    Evaluations of other questions are refused: their hashes differ.

    \b
    Examples:
      dro-rl compare runs/sft runs/musique --name musique-test
      dro-rl compare runs/musique/evaluation/musique-test-random-0 runs/musique/evaluation/musique-test
      dro-rl compare runs/musique/evaluation/warmup.parquet runs/musique/evaluation/final.parquet
    """
    from dro_rl.cli.output import console, print_json
    from dro_rl.evaluation.comparison import compare_runs, write_comparison

    comparison = compare_runs(run_a, run_b, name=name, limit=limit)
    if output is not None:
        write_comparison(output, comparison)
    if json:
        print_json(comparison)
        return
    _print_comparison(console(), comparison)


def _print_comparison(out: Console, comparison: Comparison) -> None:
    from rich.table import Table

    from dro_rl.evaluation.report import interval, label, number

    for letter, side in (("A", comparison.a), ("B", comparison.b)):
        out.print(f"{letter}  {side.path}", soft_wrap=True)
    conditions = comparison.a.conditions
    out.print(f"{conditions.split}: {comparison.n} questions, hash {conditions.questions_hash[:12]}", soft_wrap=True)
    for note in comparison.notes:
        out.print(f"note: {note}", soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for i, title in enumerate(("metric", "A", "B", "B − A", f"{comparison.confidence:.0%} interval", "p", "won:lost")):
        table.add_column(title, justify="right" if i else "left", no_wrap=True)
    for metric, found in comparison.metrics.items():
        table.add_row(
            label(metric),
            number(found.a),
            number(found.b),
            f"{found.difference:+.2f}",
            interval(found.low, found.high),
            _p(found.p_value),
            f"{found.wins}:{found.losses}",
        )
    out.print(table)
    out.print(
        "Percent, but for what names its unit. p: two-sided; exact McNemar for metrics of two values, else a paired "
        "permutation test. Not corrected for looking at many metrics.",
        style="dim",
    )
    for title, changes in (("won", comparison.won), ("lost", comparison.lost)):
        for change in changes:
            _print_change(out, title, change)


def _print_change(out: Console, title: str, change: Change) -> None:
    from dro_rl.cli.output import plain

    out.print(f"{title}  {plain(change.id)}: {plain(change.question)[-200:]}", style="bold", soft_wrap=True)
    out.print(f"      accepted {plain(' | '.join(change.answers))[:200]}", soft_wrap=True)
    for letter, prediction, score, selection in (
        ("A", change.prediction_a, change.f1_a, change.selection_a),
        ("B", change.prediction_b, change.f1_b, change.selection_b),
    ):
        read = " > ".join(f"[{n}]" for n in selection) or "no document"
        out.print(f"      {letter}  F1 {score:.0f}  {plain(prediction)[:200]}  ({read})", soft_wrap=True)


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"
