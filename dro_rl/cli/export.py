"""`dro-rl data export`: a question file as a peer reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def export(
    questions: Annotated[Path, typer.Argument(metavar="FILE", help="A question file.", show_default=False)],
    to: Annotated[
        Literal["flashrag", "search-r1", "rank-llm"],
        typer.Option(
            "--to", help="FlashRAG's JSONL, Search-R1's Parquet, or requests of rank_llm.", show_default=False
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help=".jsonl(.gz); for search-r1 .parquet.")],
    dataset: Annotated[
        str, typer.Option("--dataset", help="What search-r1 calls questions that name no dataset.")
    ] = "questions",
    split: Annotated[str, typer.Option("--split", help="What search-r1 calls their split.")] = "train",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write a question file in a peer's format. `dro-rl data prepare` reads each of them back.

    FlashRAG gets candidates as HotpotQA's context, without their ids; Search-R1 gets none; rank_llm gets no answers.

    \b
    Examples:
      dro-rl data export data/dev.jsonl --to flashrag --output flashrag/dev.jsonl
      dro-rl data export data/train.jsonl.gz --to search-r1 --dataset musique --output search-r1/train.parquet
      dro-rl data export data/dev.jsonl --to rank-llm --output requests.jsonl
    """
    from dro_rl.cli.output import console, print_json
    from dro_rl.data.export import export_questions
    from dro_rl.records import iter_questions

    count = export_questions(iter_questions(questions), to, output, dataset=dataset, split=split)
    if json:
        print_json({"output": output, "questions": count})
        return
    console().print(f"{count} questions in {output}", soft_wrap=True)
