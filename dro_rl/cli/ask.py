"""`dro-rl ask`: put one question to a trained pair."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dro_rl.cli.options import WindowSize, WindowStride

if TYPE_CHECKING:
    from dro_rl.records import Question


def ask(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's output_dir.", show_default=False)],
    question: Annotated[str | None, typer.Argument(metavar="QUESTION", help="The question, with --documents.")] = None,
    documents: Annotated[
        Path | None, typer.Option("--documents", help="JSON lines of {text, title?, id?} to select from.")
    ] = None,
    question_file: Annotated[
        Path | None, typer.Option("--question-file", help="A question file to take the question from.")
    ] = None,
    question_id: Annotated[str | None, typer.Option("--id", help="The question's id in --question-file.")] = None,
    k: Annotated[int | None, typer.Option("--k", "-k", min=1, help="Documents to select, or as trained.")] = None,
    window_size: WindowSize = None,
    window_stride: WindowStride = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Answer a question from documents with the selector and generator of a finished run.

    \b
    Examples:
      dro-rl ask runs/musique "Who wrote it?" --documents documents.jsonl
      dro-rl ask runs/musique --question-file dev.jsonl.gz --id 2hop__482757_12019
    """
    asked = _asked(question, documents, question_file, question_id)

    from transformers.utils.logging import disable_progress_bar

    from dro_rl.cli.output import console, plain, print_json
    from dro_rl.pipeline import RAGPipeline, read, read_settings

    disable_progress_bar()
    settings = read_settings(run)
    if k is not None:
        settings = dataclasses.replace(settings, num_selected=k)
    pipeline = RAGPipeline.from_pretrained(run, settings=settings.slid(window_size, window_stride))
    answer = pipeline.answer(asked.question, asked.documents)
    numbers = read(answer.selection, asked, pipeline.settings.spec.most)
    if json:
        print_json(
            {
                "question": asked.question,
                "answer": answer.text,
                "logp": answer.logp,
                "valid": answer.selection.valid,
                "problems": answer.selection.problems,
                "documents": [
                    {"number": n, "id": asked.documents[n - 1].id, "title": asked.documents[n - 1].title}
                    for n in numbers
                ],
                "accepted": asked.answers if question_file else None,
                "supporting_numbers": asked.supporting_numbers if question_file else None,
            }
        )
        return
    out = console()
    out.print(plain(answer.text), style="bold")
    out.print(f"log-probability {answer.logp:.2f} nats")
    if question_file is not None:
        out.print(f"accepted: {' | '.join(map(plain, asked.answers))}")
    if answer.selection.valid:
        out.print("It read, best first:")
    else:
        out.print("The selector named no document, so it read the first ones:")
    for n in numbers:
        document = asked.documents[n - 1]
        mark = "*" if n in asked.supporting_numbers else " "
        out.print(f"{f'[{n}]':>5}{mark} {plain(document.title or document.text)[:200]}", no_wrap=True)


def _asked(
    question: str | None, documents: Path | None, question_file: Path | None, question_id: str | None
) -> Question:
    """The question with its documents, from the one of the two sources that was named."""
    from dro_rl.errors import InputError, Phrase
    from dro_rl.records import read_questions

    if question is not None and documents is not None and question_file is None and question_id is None:
        return _with_documents(question, documents)
    if question_file is None or question_id is None or question is not None or documents is not None:
        raise InputError(
            "ask",
            Phrase("not one question"),
            "a question comes with its documents, or out of a question file",
            'Give "QUESTION" and --documents FILE, or --question-file FILE and --id ID.',
        )
    questions = {found.id: found for found in read_questions(question_file)}
    if question_id not in questions:
        raise InputError(
            f"{question_file}: id",
            question_id,
            "the file has no such id",
            f"Its first id is {next(iter(questions))!r}.",
        )
    return questions[question_id]


def _with_documents(question: str, path: Path) -> Question:
    """Read a document file. Documents are checked by the rules of the question files they could stand in."""
    from dro_rl.errors import InputError, Phrase
    from dro_rl.records import parse_question
    from dro_rl.rows.strict_json import json_lines

    if not path.exists() or path.is_dir():
        raise InputError(str(path), Phrase("no such file"), "a document file must exist", "Check the path.")
    documents: list[Any] = []
    for place, row in json_lines(path):
        if isinstance(row, dict) and row.get("id") is None:
            row["id"] = place.rpartition(" ")[2]
        documents.append(row)
    return parse_question({"id": "asked", "question": question, "answers": ["?"], "documents": documents}, str(path))
