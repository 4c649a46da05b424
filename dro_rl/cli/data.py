"""`dro-rl data`: released files into question files; what is wrong with a file; what is in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dro_rl.cli.export import export
from dro_rl.cli.fetch import fetch

if TYPE_CHECKING:
    from rich.console import Console

    from dro_rl.errors import InputError
    from dro_rl.records import Question
    from dro_rl.rows import Watch

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

FORMAT = "questions, dpr, dpr-csv, nq-open, retrieved, hotpotqa, 2wikimultihopqa, musique, wow, kilt, flashrag, search-r1, rank-llm, dro"  # fmt: skip # noqa: E501


Column = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        metavar="FIELD=COLUMN",
        help="A column of yours that is a field of question files: question=query. As often as needed.",
    ),
]


@app.callback()
def group() -> None:
    """Prepare, check, show and export question files.

    \b
    Examples:
      dro-rl data prepare hotpotqa --input hotpot_dev_distractor_v1.json --output dev.jsonl.gz
      dro-rl data check dev.jsonl.gz
    """


@app.command("prepare")
def prepare(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="The dataset: nq, hotpotqa, musique, 2wikimultihopqa, wow, or a name of yours.",
            show_default=False,
        ),
    ],
    source: Annotated[
        str, typer.Option("--input", metavar="FILE|HUB", help="A released file or a hub dataset.", show_default=False)
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="The question file: .jsonl or .jsonl.gz.", show_default=False),
    ],
    format: Annotated[
        str | None, typer.Option("--format", help=f"The input's format, told by its fields if not given: {FORMAT}.")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option("--split", help="Name of the split. Told by the name of the file or its folder if not given."),
    ] = None,
    config: Annotated[str | None, typer.Option("--config", help="Configuration of a hub dataset.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first so many questions.")] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave bad rows out and count them. Without it one ends the work.")
    ] = False,
    licence: Annotated[
        str | None, typer.Option("--licence", help="Licence of the data. Known for the five datasets.")
    ] = None,
    aliases: Annotated[
        Path | None, typer.Option("--aliases", help="id_aliases.json of 2WikiMultihopQA: further accepted answers.")
    ] = None,
    answers: Annotated[
        Path | None, typer.Option("--answers", help="JSON lines of {id, answers}, for requests of rank_llm.")
    ] = None,
    corpus: Annotated[
        Path | None, typer.Option("--corpus", help="Also write all candidates, each once, as a corpus: .jsonl(.gz).")
    ] = None,
    documents: Annotated[
        bool, typer.Option("--documents/--no-documents", help="Keep the candidates that the release has.")
    ] = True,
    column: Column = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write a question file, and its manifest beside it, from a released file or a hub dataset.

    \b
    Examples:
      dro-rl data prepare hotpotqa --input hotpot_dev_distractor_v1.json --output data/dev/hotpotqa.jsonl.gz
      dro-rl data prepare 2wikimultihopqa --input dev.json --aliases id_aliases.json --output data/dev/2wiki.jsonl.gz
      dro-rl data prepare nq --input nq-dev.json --no-documents --output questions/nq-dev.jsonl
      dro-rl data prepare wow --input valid_random_split.json --split dev --output data/dev/wow.jsonl.gz --skip-bad
    """
    from dro_rl.cli.output import console, plain, print_json
    from dro_rl.data.hub import is_local
    from dro_rl.data.manifest import manifest_path
    from dro_rl.data.prepare import Preparation
    from dro_rl.data.prepare import prepare as run

    job = Preparation(
        name, source, output, format, split, config, limit, skip_bad, licence, aliases, answers, corpus, documents,
        columns_of(column),
    )  # fmt: skip
    with _bars(hub="" if is_local(source) else source) as watch:
        manifest, skips = run(job, watch=watch)
    if json:
        print_json({"output": output, "manifest": manifest, "skipped": skips.counts})
        return
    out = console()
    out.print(f"{output}: {manifest.num_questions:,} questions of {manifest.dataset}, {manifest.split}", soft_wrap=True)
    about = f"{manifest.licence or 'no licence named'}, hash {manifest.questions_hash[:16]}"
    out.print(f"{manifest_path(output)}: {about}", soft_wrap=True)
    if corpus is not None:
        out.print(f"{corpus}: their candidates, each once", soft_wrap=True)
    for why, count in manifest.skipped.items():
        if why in skips.first:
            out.print(f"left out: {count:,} by the rule {plain(why)!r}", soft_wrap=True)
            out.print(f"  first: {plain(str(skips.first[why]))}", soft_wrap=True)
        else:
            out.print(f"left out: {count:,} {why}")


@app.command("check")
def check(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="Files to check.", show_default=False)],
    format: Annotated[
        str | None, typer.Option("--format", help=f"Their format, told by their fields if not given: {FORMAT}, corpus.")
    ] = None,
    answers: Annotated[
        Path | None, typer.Option("--answers", help="JSON lines of {id, answers}, for requests of rank_llm.")
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="The split of a folder, found and read as training would.")
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit", min=0, help="Errors to print of each kind; 0 prints all. All are counted.")
    ] = 20,
    column: Column = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Report everything that is wrong with question files, released files and corpora, and what they hold.

    Goes on after an error, unless the file breaks off there. Exit status 2 if anything is wrong.

    \b
    Examples:
      dro-rl data check data/dev/*.jsonl.gz
      dro-rl data check hotpot_train_v1.1.json --limit 0
      dro-rl data check psgs_w100.tsv.gz --format corpus
      dro-rl data check data/mine --split train --column question=query
    """
    from dro_rl.cli.output import console, plain, print_json
    from dro_rl.data.check import check as run
    from dro_rl.rows import kind

    out, reports, errors, columns = console(), [], [], columns_of(column)
    for file in files:
        shown: Counter[str] = Counter()

        def on_error(error: InputError, shown: Counter[str] = shown) -> None:
            shown[kind(error)] += 1
            if limit and shown[kind(error)] > limit:
                return
            errors.append(error)
            if not json:
                out.print(plain(str(error)), soft_wrap=True)

        with _bars() as watch:
            report = run(file, format, answers=answers, split=split, columns=columns, on_error=on_error, watch=watch)
        reports.append(report)
        if json:
            continue
        holds = ", ".join(f"{count:,} {what}" for what, count in report.counts.items())
        out.print(f"{file} ({report.format or 'unknown format'}): {holds or 'nothing usable'}", soft_wrap=True)
        if report.manifest is not None:
            about = report.manifest
            out.print(f"  as its manifest says: {about.dataset}, {about.split}, {about.licence or 'no licence named'}")
        if report.format == "questions" and (lacking := report.without_candidates):
            out.print(f"  {lacking:,} without candidates: dro-rl retrieve finds some, and training needs them")
        for what, count in report.wrong.most_common():
            hidden = max(0, count - limit) if limit else 0
            rest = f" ({hidden:,} not shown)" if hidden else ""
            out.print(f"  wrong: {count:,} by the rule {plain(what)!r}{rest}", soft_wrap=True)
        if not report.wrong:
            out.print(f"  nothing wrong, hash {report.hash[:16]}")
    if json:
        print_json({"files": reports, "errors": list(map(str, errors))})
    if any(report.wrong for report in reports):
        raise typer.Exit(2)


@app.command("show")
def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A question or released file.", show_default=False)],
    identifier: Annotated[str | None, typer.Option("--id", help="The question with this id.")] = None,
    number: Annotated[int, typer.Option("--number", "-n", min=1, help="Questions to draw.")] = 3,
    seed: Annotated[int, typer.Option("--seed", help="Of the draw. Equal seeds draw equal questions.")] = 0,
    format: Annotated[
        str | None, typer.Option("--format", help=f"The format, told by the fields if not given: {FORMAT}.")
    ] = None,
    answers: Annotated[
        Path | None, typer.Option("--answers", help="JSON lines of {id, answers}, for requests of rank_llm.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Print whole passages.")] = False,
    column: Column = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Draw questions at random and print them with their answers and candidates, supporting ones marked.

    \b
    Examples:
      dro-rl data show data/dev/musique.jsonl.gz
      dro-rl data show data/dev/musique.jsonl.gz --id 2hop__482757_12019 --full
      dro-rl data show hotpot_dev_distractor_v1.json -n 1 --seed 7
    """
    from dro_rl.cli.output import console, print_json
    from dro_rl.data.check import draw

    with _bars() as watch:
        questions = draw(file, number, seed, identifier=identifier, format=format, answers=answers,
                         columns=columns_of(column), watch=watch)  # fmt: skip
    if json:
        print_json({"questions": questions})
        return
    out = console()
    for question in questions:
        _print_question(out, question, full)


def _print_question(out: Console, question: Question, full: bool) -> None:
    from rich.panel import Panel
    from rich.text import Text

    from dro_rl.cli.output import plain

    lines = Text()
    for utterance in question.question.split("\n"):
        lines.append(plain(utterance) + "\n", style="bold")
    lines.append(f"answers: {' | '.join(map(plain, question.answers))}", style="green")
    for n, document in enumerate(question.documents, start=1):
        mark = "*" if document.id in question.supporting else " "
        text = plain(document.text)
        lines.append(f"\n{f'[{n}]':>5}{mark} ", style="bold" if mark == "*" else "")
        lines.append(plain(document.title) + "  ", style="cyan")
        lines.append(text if full or len(text) <= 160 else text[:159] + "…", style="" if mark == "*" else "dim")
    if not question.documents:
        lines.append("\nno candidates yet: dro-rl retrieve finds some", style="dim")
    about = ", ".join(part for part in (question.dataset, question.type) if part)
    out.print(Panel(lines, title=Text(plain(question.id)), subtitle=Text(plain(about)), title_align="left"))


def columns_of(options: list[str] | None) -> dict[str, str]:
    """The columns that `--column` names."""
    from dro_rl.errors import InputError

    columns = {}
    for option in options or []:
        field, equals, column = option.partition("=")
        if not equals or field in columns:
            raise InputError("--column", option, "this is NAME=COLUMN, each field once", "Write question=query.")
        columns[field] = column
    return columns


@contextmanager
def _bars(hub: str = "") -> Iterator[Watch]:
    """Draws a progress bar on stderr, where that is a terminal, for each file that it is given, and for a hub dataset
    one without an end.
    """
    import os
    import sys
    from typing import BinaryIO

    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from dro_rl.cli.output import console, visible

    columns = (
        TextColumn("reading {task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns,
        console=console(stderr=True),
        transient=True,
        # What is printed meanwhile goes above the bar, but into a pipe where stdout is one.
        redirect_stdout=sys.stdout.isatty(),
        disable=not sys.stderr.isatty(),
    ) as progress:
        if hub:
            progress.add_task(visible(hub), total=None)

        def watch(file: BinaryIO) -> BinaryIO:
            size = os.fstat(file.fileno()).st_size
            return progress.wrap_file(file, total=size, description=visible(Path(file.name).name))

        yield watch


app.command("export")(export)
app.command("fetch")(fetch)
