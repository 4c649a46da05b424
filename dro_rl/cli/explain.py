"""`dro-rl explain`: which document moved the answer of a trained pair, and by how many nats."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from dro_rl.evaluation.explain import Explanation
    from dro_rl.records import Question, Selection


def explain(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's output_dir.", show_default=False)],
    question_id: Annotated[str, typer.Argument(metavar="QUESTION_ID", help="A question's id.", show_default=False)],
    question_file: Annotated[
        Path | None,
        typer.Option("--question-file", help="Where the question is. Without it, dev or train of the run's recipe."),
    ] = None,
    selection: Annotated[
        str | None,
        typer.Option("--selection", metavar="'[3] > [1]'", help="What is explained. Without it, what it selects."),
    ] = None,
    answer: Annotated[
        str | None, typer.Option("--answer", help="Whose likelihood it is. Without it, the accepted answer's.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Say which selected document moved the answer: left out, moved, alone, exchanged for a supporting one.

    The trained pair scores the answer from each list of documents, in nats: the sum over its tokens, and their mean.
    Changes within 0.05 nats are ties.

    \b
    Examples:
      dro-rl explain runs/musique 2hop__482757_12019
      dro-rl explain runs/quickstart train-7 --selection "[2] > [5]" --json
      dro-rl explain runs/musique q1 --question-file mine.jsonl --answer "Béla Bartók"
    """
    from dataclasses import replace

    from transformers.utils.logging import disable_progress_bar

    from dro_rl.cli.output import console, print_json
    from dro_rl.evaluation.explain import explain as explained
    from dro_rl.keys.reference import KEYS
    from dro_rl.pipeline import RAGPipeline
    from dro_rl.runs import is_run, read_run

    alone = question_file is not None and not is_run(run)  # a pair that was taken out of its run
    recipe = {name: key.default for name, key in KEYS.items()} if alone else read_run(run).recipe
    question = _question(run, question_id, question_file)
    if answer is not None:
        question = replace(question, answers=(answer,))
    given = None if selection is None else _selection(selection, len(question.documents))
    disable_progress_bar()
    pipeline = RAGPipeline.from_pretrained(run)
    pipeline.leave_room([question], recipe["answer_aliases"])
    found = explained(
        pipeline, question, given, likelihood=recipe["answer_likelihood"], aliases=recipe["answer_aliases"]
    )
    if json:
        print_json({"run": run, **_document(found)})
    else:
        _print(console(), found)


def _question(run: Path, question_id: str, file: Path | None) -> Question:
    """The question of an id, with its candidates as training shapes them. Raises `InputError` with the nearest ids."""
    from dro_rl.errors import InputError, closest
    from dro_rl.job.preflight import read_splits
    from dro_rl.recipe import load_recipe
    from dro_rl.records import read_questions

    if file is not None:
        questions = read_questions(file)
    else:
        train, dev = read_splits(load_recipe(run / "recipe.yaml"))
        questions = [*dev, *train]
    known = {each.id: each for each in reversed(questions)}
    if question_id not in known:
        where = file or f"{run}: its data"
        raise InputError(
            str(where), question_id, "there is no question of this id", f"There are {closest(question_id, known)}."
        )
    return known[question_id]


def _selection(text: str, documents: int) -> Selection:
    from dro_rl.errors import InputError
    from dro_rl.selection import parse_selection

    found = parse_selection(text, documents, documents)
    if not found.valid or set(found.problems) - {"too_few"}:
        raise InputError(
            "--selection", text, f"these are distinct numbers from 1 to {documents}, as [3] > [1]", "Correct it."
        )
    return found


def _document(found: Explanation) -> dict[str, Any]:
    from dataclasses import asdict

    document = asdict(found)
    titles = document.pop("titles")
    documents = [{"number": n, "title": title, "supporting": gold} for n, (title, gold) in titles.items()]
    return {**document, "documents": documents}


def _print(out: Console, found: Explanation) -> None:
    from dro_rl.cli.output import bar, plain, print_rows
    from dro_rl.selection import format_selection

    out.print(f"{plain(found.question_id)}: {plain(found.question)}", style="bold")
    out.print(f"answer: {' | '.join(map(plain, found.answers))}")
    if not found.selected:
        out.print("The selector named no document, so the generator reads the first ones.")
    widest = max(abs(trial.change) for trial in found.trials) or 1.0
    rows = []
    for trial in found.trials:
        what = trial.kind if trial.number is None else f"[{trial.number}] {trial.kind}"
        change = "" if trial.kind == "as selected" else "tie" if trial.tie else f"{trial.change:+.2f}"
        drawn = "" if trial.tie else bar(abs(trial.change) / widest)
        reads = format_selection(trial.numbers) or "nothing"
        rows.append((what, reads, f"{trial.sum:.2f}", f"{trial.mean:.2f}", change, drawn))
    print_rows(out, ("", "reads", "sum", "mean", "change", ""), rows)
    for number, (title, gold) in found.titles.items():
        out.print(f"{f'[{number}]':>5}{'*' if gold else ' '} {plain(title)}", no_wrap=True)
    out.print(plain(found.why), style="bold")
    out.print(
        f"sum, mean: log p(answer | what is read), over its tokens, nats. change: of the {found.likelihood}. "
        "* supports the answer.",
        style="dim",
    )
