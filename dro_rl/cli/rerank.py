"""`dro-rl rerank`: a trained selector over a file of rankings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from dro_rl.cli.options import WindowSize, WindowStride


def rerank(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's output_dir.", show_default=False)],
    source: Annotated[
        Path, typer.Option("--input", "-i", help="A TREC run, or rank_llm's JSON lines.", show_default=False)
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="What to write: .jsonl as rank_llm, else TREC.", show_default=False)
    ],
    queries: Annotated[
        Path | None, typer.Option("--queries", help="Of a TREC run: .tsv of id and text, or .jsonl.")
    ] = None,
    corpus: Annotated[
        Path | None, typer.Option("--corpus", help="Of a TREC run: an index, or a corpus file or folder.")
    ] = None,
    format: Annotated[
        Literal["trec", "rank_llm"] | None, typer.Option("--format", help="Of the input. Without it, by its name.")
    ] = None,
    depth: Annotated[
        int | None, typer.Option("--depth", min=1, help="Candidates to rank; the others follow. Without it, all.")
    ] = None,
    k: Annotated[int | None, typer.Option("--k", min=1, help="Documents to select. Without it, as trained.")] = None,
    window_size: WindowSize = None,
    window_stride: WindowStride = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Queries ranked together.")] = 8,
    tag: Annotated[str, typer.Option("--tag", help="The run's name, in the last column of TREC.")] = "dro_rl",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that is there.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Re-rank the candidates of a TREC run, or of rank_llm's JSON lines, with the selector of a finished run.

    Documents that the selector names come first, in its order; the others follow as they were. The score is one over
    the place. All lines are checked before the model loads; the output is written whole.

    \b
    Examples:
      dro-rl rerank out/nq --input bm25.trec --queries queries.tsv --corpus indexes/wiki-bm25 --output selected.trec
      dro-rl rerank out/nq --input requests.jsonl --output selected.jsonl
      dro-rl rerank out/nq --input bm25.trec --queries q.tsv --corpus corpus.jsonl --depth 20 --output selected.jsonl
    """
    import dataclasses

    from transformers.utils.logging import disable_progress_bar

    from dro_rl.cli.output import console, print_json
    from dro_rl.errors import InputError, Phrase
    from dro_rl.pipeline import RAGPipeline, read_settings
    from dro_rl.progress import Progress
    from dro_rl.serve.ranked_files import RankedFile, rerank_file

    if not tag or any(map(str.isspace, tag)):
        raise InputError("--tag", tag, "a run's name is a word", "Leave spaces out.")
    if output.exists() and not overwrite:
        raise InputError("--output", Phrase(f"{output} is there"), "nothing is replaced unasked", "Give --overwrite.")
    settings = read_settings(run)
    if k is not None:
        settings = dataclasses.replace(settings, num_selected=k)
    settings = settings.slid(window_size, window_stride)
    rankings = RankedFile(source, format, queries, corpus)
    disable_progress_bar()
    pipeline = RAGPipeline.from_pretrained(run, settings=settings, roles=("selector",), batch_size=batch_size)
    with Progress(rankings.queries, "rerank", "queries", quiet=json) as progress:
        done = rerank_file(
            rankings,
            pipeline.select_all,
            output,
            depth=depth,
            tag=tag,
            batch_size=batch_size,
            watch=progress.update,
        )
    if json:
        print_json(done)
        return
    out = console()
    out.print(f"{output}: {done.queries:,} queries, {done.candidates:,} candidates", soft_wrap=True)
    if done.unnamed:
        out.print(f"{done.unnamed:,} of them as they were: the selector named no document", soft_wrap=True)
