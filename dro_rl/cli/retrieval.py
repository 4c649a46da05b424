"""`dro-rl index`, `dro-rl retrieve` and `dro-rl retrieval`: what `dro_rl.retrieval` does, on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dro_rl.retrieval.protocol import Retriever
    from dro_rl.retrieval.report import Report

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
index = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

Corpus = Annotated[
    str, typer.Argument(metavar="CORPUS", help="A file, a folder of files, or a hub dataset.", show_default=False)
]
Folder = Annotated[Path, typer.Argument(metavar="INDEX", help="The folder to fill.", show_default=False)]
Config = Annotated[str | None, typer.Option("--config", help="Configuration of a hub dataset.")]
Split = Annotated[str, typer.Option("--split", help="Split of a hub dataset.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Processes = Annotated[int, typer.Option("--processes", min=1, help="Processes that work side by side.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave bad rows out and count them; else the first ends it.")]


@app.callback()
def group() -> None:
    """Look into candidates.

    \b
    Examples:
      dro-rl retrieval report data/train.jsonl.gz --plot recall.png
    """


@index.callback()
def index_group() -> None:
    """Index a corpus. A command that was killed goes on when it is given again.

    \b
    Examples:
      dro-rl index bm25 corpus.jsonl.gz indexes/mine
    """


@index.command("bm25")
def index_bm25(
    corpus: Corpus,
    folder: Folder,
    k1: Annotated[float, typer.Option("--k1", help="How fast a word's count saturates.")] = 0.9,
    b: Annotated[float, typer.Option("--b", help="How much a passage's length counts, 0 to 1.")] = 0.4,
    language: Annotated[str, typer.Option("--language", help="Of stemmer and stop words; none: neither.")] = "english",
    config: Config = None,
    split: Split = "train",
    processes: Processes = 1,
    skip_bad: SkipBad = False,
    json: Json = False,
) -> None:
    """Index a corpus by its words.

    \b
    Examples:
      dro-rl index bm25 psgs_w100.tsv.gz indexes/wiki-bm25 --processes 8
      dro-rl index bm25 corpus.jsonl indexes/mine --k1 1.2 --b 0.75 --skip-bad
      dro-rl index bm25 someone/wiki indexes/wiki --config w100 --split train
    """
    from dro_rl.retrieval.bm25 import BM25

    _build(BM25(k1, b, language), corpus, folder, config, split, processes, skip_bad, json)


@index.command("colbert")
def index_colbert(
    corpus: Corpus,
    folder: Folder,
    checkpoint: Annotated[str, typer.Option("--checkpoint", help="A folder or a hub name.", show_default=False)],
    nbits: Annotated[int, typer.Option("--nbits", help="Bits of each dimension, 1, 2, 4 or 8.")] = 2,
    doc_maxlen: Annotated[int, typer.Option("--doc-maxlen", help="Tokens of a passage.")] = 180,
    query_maxlen: Annotated[int, typer.Option("--query-maxlen", help="Tokens of a question.")] = 32,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Passages encoded at once.")] = 64,
    config: Config = None,
    split: Split = "train",
    processes: Processes = 1,
    skip_bad: SkipBad = False,
    json: Json = False,
) -> None:
    """Index a corpus by the vectors of its tokens. Needs pip install 'dro_rl[colbert]'.

    \b
    Examples:
      dro-rl index colbert corpus.jsonl indexes/mine-colbert --checkpoint colbert-ir/colbertv2.0
    """
    from dro_rl.retrieval.colbert import ColBERT

    made = ColBERT(checkpoint, nbits, doc_maxlen, query_maxlen, batch_size)
    _build(made, corpus, folder, config, split, processes, skip_bad, json)


@index.command("dense")
def index_dense(
    corpus: Corpus,
    folder: Folder,
    checkpoint: Annotated[
        str, typer.Option("--checkpoint", help="An encoder of sentence-transformers.", show_default=False)
    ],
    revision: Annotated[str | None, typer.Option("--revision", help="Of a hub name; a commit is the surest.")] = None,
    query_prompt: Annotated[
        str | None, typer.Option("--query-prompt", help="What goes before a question; else the encoder's own.")
    ] = None,
    passage_prompt: Annotated[
        str | None, typer.Option("--passage-prompt", help="What goes before a passage; else the encoder's own.")
    ] = None,
    similarity: Annotated[
        str | None, typer.Option("--similarity", help="cosine or dot; else the encoder's own.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="Of the vectors: float32 or float16.")] = "float32",
    faiss_index: Annotated[str, typer.Option("--faiss-index", help="flat, exact; or ivf, inverted lists.")] = "flat",
    nlist: Annotated[int, typer.Option("--nlist", help="Lists of ivf; 0: by the number of passages.")] = 0,
    nprobe: Annotated[int, typer.Option("--nprobe", help="Lists of ivf that a search looks into.")] = 64,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Texts encoded at once.")] = 64,
    config: Config = None,
    split: Split = "train",
    processes: Processes = 1,
    skip_bad: SkipBad = False,
    json: Json = False,
) -> None:
    """Index a corpus by a vector a passage. Needs pip install 'dro_rl[dense]'.

    \b
    Examples:
      dro-rl index dense corpus.jsonl indexes/mine-dense --checkpoint sentence-transformers/all-MiniLM-L6-v2
      dro-rl index dense psgs_w100.tsv.gz indexes/wiki --checkpoint me/encoder --faiss-index ivf --dtype float16
    """
    from dro_rl.retrieval.dense import Dense

    made = Dense(checkpoint, revision, query_prompt, passage_prompt, similarity, dtype, faiss_index, nlist, nprobe,
                 batch_size)  # fmt: skip
    _build(made, corpus, folder, config, split, processes, skip_bad, json)


def _build(
    retriever: Retriever,
    corpus: str,
    folder: Path,
    config: str | None,
    split: str,
    processes: int,
    skip_bad: bool,
    json: bool,
) -> None:
    import logging

    from dro_rl.cli.output import console, print_json
    from dro_rl.errors import as_size
    from dro_rl.retrieval.index import build_index
    from dro_rl.runs import disk_of

    ours, handler = logging.getLogger("dro_rl"), logging.StreamHandler()
    ours.addHandler(handler)  # on the root logger, bm25s would print too
    ours.setLevel(logging.INFO)
    try:
        manifest = build_index(
            retriever, corpus, folder, config=config, split=split, processes=processes, skip_bad=skip_bad
        )
    finally:
        ours.removeHandler(handler)  # the stream may end before the process
    if json:
        print_json(manifest)
        return
    console().print(f"{folder}: {manifest.passages:,} passages, {as_size(disk_of(folder))}", soft_wrap=True)
    _print_skipped(manifest.skipped)
    console().print(f"search it: dro-rl retrieve {folder} QUESTIONS --k 20 --output FILE", soft_wrap=True)


def retrieve(
    folder: Annotated[Path, typer.Argument(metavar="INDEX", help="What dro-rl index filled.", show_default=False)],
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
        Index(folder), questions, output, search, processes=processes, skip_bad=skip_bad, overwrite=overwrite
    )
    if json:
        print_json(manifest)
        return
    out = console()
    out.print(f"{output}: {manifest.num_questions:,} questions, {k} candidates each", soft_wrap=True)
    fewer = (manifest.retrieval or {})["fewer_than_k"]
    if fewer:
        out.print(f"{fewer:,} of them have fewer: for these the retriever found no more", soft_wrap=True)
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
    """Print recall, MRR and nDCG of candidates, by gold ids and by answer string, for k from 1 to 100.

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
    from rich.text import Text

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
            table.add_column(Text(f"{name}\n{by}"), justify="right")
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
