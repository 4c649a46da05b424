"""`dro-rl index`, `dro-rl retrieve` and `dro-rl retrieval`: what `dro_rl.retrieval` does, on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from dro_rl.retrieval.report import Report

app = typer.Typer(help="Look into candidates.", no_args_is_help=True, rich_markup_mode=None)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Processes = Annotated[int, typer.Option("--processes", min=1, help="Processes that work side by side.")]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Leave bad rows out and count them; else the first one ends it.")
]


@app.callback()
def group() -> None:
    """Look into candidates."""


def index(
    retriever: Annotated[Literal["bm25", "colbert"], typer.Argument(metavar="RETRIEVER", help="bm25 or colbert.")],
    corpus: Annotated[str, typer.Argument(metavar="CORPUS", help="A file, a folder of files, or a hub dataset.")],
    output: Annotated[Path, typer.Argument(metavar="INDEX", help="The folder to fill.")],
    k1: Annotated[float, typer.Option("--k1", help="bm25: how fast a word's count saturates.")] = 0.9,
    b: Annotated[float, typer.Option("--b", help="bm25: how much a passage's length counts.")] = 0.4,
    language: Annotated[
        str, typer.Option("--language", help="bm25: of stemmer and stop words; none: neither.")
    ] = "english",
    checkpoint: Annotated[str, typer.Option("--checkpoint", help="colbert: a folder or a hub name.")] = "",
    nbits: Annotated[int, typer.Option("--nbits", help="colbert: bits of each dimension, 1, 2, 4 or 8.")] = 2,
    doc_maxlen: Annotated[int, typer.Option("--doc-maxlen", help="colbert: tokens of a passage.")] = 180,
    query_maxlen: Annotated[int, typer.Option("--query-maxlen", help="colbert: tokens of a question.")] = 32,
    batch_size: Annotated[int, typer.Option("--batch-size", help="colbert: passages encoded at once.")] = 64,
    processes: Processes = 1,
    skip_bad: SkipBad = False,
    json: Json = False,
) -> None:
    """Index a corpus. A command that was killed goes on when it is given again.

    \b
    Examples:
      dro-rl index bm25 psgs_w100.tsv.gz indexes/wiki-bm25 --processes 8
      dro-rl index bm25 corpus.jsonl indexes/mine --k1 1.2 --b 0.75 --skip-bad
      dro-rl index colbert corpus.jsonl indexes/mine-colbert --checkpoint colbert-ir/colbertv2.0
    """
    from dro_rl.cli.output import console, print_json
    from dro_rl.retrieval.bm25 import BM25
    from dro_rl.retrieval.colbert import ColBERT
    from dro_rl.retrieval.index import build_index
    from dro_rl.retrieval.protocol import Retriever

    made: Retriever
    if retriever == "bm25":
        made = BM25(k1, b, language)
    else:
        made = ColBERT(checkpoint, nbits, doc_maxlen, query_maxlen, batch_size)
    manifest = build_index(made, corpus, output, processes=processes, skip_bad=skip_bad)
    if json:
        print_json(manifest)
        return
    out = console()
    out.print(f"{output}: {manifest.passages:,} passages, {_size(output)}")
    _print_skipped(manifest.skipped)
    out.print(f"search it: dro-rl retrieve {output} QUESTIONS --k 20 --output FILE", soft_wrap=True)


def retrieve(
    index: Annotated[Path, typer.Argument(metavar="INDEX", help="What dro-rl index filled.")],
    questions: Annotated[
        Path, typer.Argument(metavar="QUESTIONS", help="A question file, with candidates or without.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The question file to write, .jsonl or .jsonl.gz.")],
    k: Annotated[int, typer.Option("--k", "-k", help="Candidates for each question.")] = 20,
    insert_gold: Annotated[
        bool, typer.Option("--insert-gold", help="Put supporting documents that were not found among the candidates.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of the places of inserted documents.")] = 0,
    drop_labels: Annotated[
        bool, typer.Option("--drop-labels", help="Leave `supporting` out: its ids are of another corpus.")
    ] = False,
    processes: Processes = 1,
    skip_bad: SkipBad = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that is another one.")] = False,
    json: Json = False,
) -> None:
    """Retrieve candidates for the questions of a file, once and for all: training then needs no index.

    The output is a question file with a manifest beside it: the index with its settings and versions, the
    questions, and hashes of both. A command that was killed goes on when it is given again.

    \b
    Examples:
      dro-rl retrieve indexes/wiki-bm25 nq/train.jsonl --k 20 --output data/nq/train.jsonl.gz --processes 8
      dro-rl retrieve indexes/mine train.jsonl --k 20 --insert-gold --output data/train.jsonl
    """
    from dro_rl.cli.output import console, print_json
    from dro_rl.retrieval.cache import Search
    from dro_rl.retrieval.cache import retrieve as write_cache
    from dro_rl.retrieval.index import Index

    search = Search(k=k, gold=insert_gold, seed=seed, labels=not drop_labels)
    manifest = write_cache(
        Index(index), questions, output, search, processes=processes, skip_bad=skip_bad, overwrite=overwrite
    )
    if json:
        print_json(manifest)
        return
    out = console()
    out.print(f"{output}: {manifest.num_questions:,} questions, {k} candidates each", soft_wrap=True)
    fewer = (manifest.retrieval or {})["fewer_than_k"]
    if fewer:
        out.print(f"{fewer:,} of them have fewer: nothing else in the corpus shares a word with the question")
    _print_skipped(manifest.skipped)
    out.print(f"how good they are: dro-rl retrieval report {output}", soft_wrap=True)


@app.command("report")
def report(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="Question files with candidates.")],
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the curves over k into this PNG.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write every figure into this JSON file.")
    ] = None,
    json: Json = False,
) -> None:
    """Recall, MRR and nDCG of candidates, by gold ids and by answer string, for k from 1 to 100.

    \b
    Examples:
      dro-rl retrieval report data/nq/dev.jsonl.gz --plot nq-dev.png
      dro-rl retrieval report bm25.jsonl colbert.jsonl --output both.json --plot both.png
    """
    from dro_rl.cli.output import console, print_json
    from dro_rl.retrieval.report import plot_reports, report_file, write_reports

    reports = [report_file(file) for file in files]
    if output is not None:
        write_reports(reports, output)
    if plot is not None:
        plot_reports(reports, plot)
    if json:
        print_json({"reports": reports})
        return
    out = console()
    for made in reports:
        _print_report(made)
    for place in (output, plot):
        if place is not None:
            out.print(str(place), soft_wrap=True)


def _print_report(report: Report) -> None:
    from rich.table import Table

    from dro_rl.cli.output import console

    out = console()
    out.print(
        f"{report.file}: {report.retriever}, {report.questions:,} questions, {report.depth} candidates",
        style="bold",
        soft_wrap=True,
    )
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("k", justify="right")
    for by, judged in report.judged.items():
        for name in judged.measures:
            table.add_column(f"{name}\n{by}", justify="right")
    for place, k in enumerate(report.ks):
        if k in report.shown:
            cells = [f"{100 * m[place]:.1f}" for judged in report.judged.values() for m in judged.measures.values()]
            table.add_row(str(k), *cells)
    out.print(table)
    for by, judged in report.judged.items():
        out.print(f"{by}: {judged.questions:,} questions; {judged.meaning}", style="dim")


def _print_skipped(skipped: dict[str, int]) -> None:
    from dro_rl.cli.output import console

    for reason, count in skipped.items():
        console().print(f"left out {count:,}: {reason}", soft_wrap=True)


def _size(folder: Path) -> str:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{size / 2**20:,.1f} MiB"
