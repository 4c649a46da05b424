"""The shapes that travel between rooms, and the one way to read a question file.

Nothing here knows of models, trainers, engines or the command line.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dro_rl.errors import InputError, Phrase
from dro_rl.files import written_whole


@dataclass(frozen=True, slots=True)
class Document:
    """A retrieved passage. `title` may be empty, `text` may not."""

    id: str
    title: str
    text: str


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its accepted answers and its N candidates, in the retriever's order.

    Args:
        id: unique within a file.
        question: the text; for dialogue, the history, one utterance a line.
        answers: every accepted answer; the first is the one that `answer_aliases: first` trains on.
        documents: the candidates; document number n (1-based) is `documents[n - 1]`.
        supporting: ids of the documents known to hold the evidence, where labels exist.
        dataset: the name of the dataset, free text.
        type: hops or question type, where known; evaluation reports by it.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    documents: tuple[Document, ...]
    supporting: tuple[str, ...] = ()
    dataset: str = ""
    type: str = ""

    @property
    def supporting_numbers(self) -> tuple[int, ...]:
        """1-based numbers of the supporting documents among the candidates."""
        wanted = set(self.supporting)
        return tuple(n for n, document in enumerate(self.documents, start=1) if document.id in wanted)


@dataclass(frozen=True, slots=True)
class Selection:
    """What a selector's text says.

    Args:
        numbers: distinct 1-based document numbers in the order given, at most K.
        valid: whether at least one valid document is named. Without one the generator has nothing to read.
        problems: codes of what is not as asked, empty for a perfect list: `format`, `out_of_range`, `repeated`,
            `too_few`, `too_many`.
    """

    numbers: tuple[int, ...]
    valid: bool
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled selection of one question: a row of the rollout log. What is not known yet is NaN.

    Args:
        question: index of the question in the training set.
        sample: 0..m-1 within the question's group.
        token_ids: the sampled tokens, end-of-sequence included when it was reached.
        proposal_logps: log q of each token under the distribution it was drawn from, nats.
        text: the decoded tokens.
        selection: what the text says.
        selection_logp: log p(z|x) under the selector at temperature 1, nats.
        reference_logp: log p(z|x) under the initial selector, nats; NaN without `beta`.
        answer_logp: log p(y|x, d_z), nats; NaN for an invalid selection, which is never scored.
        weight: importance weight; sums to 1 over the group unless every rollout is invalid.
        selector_coefficient: what multiplies ∇ log p(z|x): the weight, less its control variate and regularisers.
        ess: effective sample size of the group's weights.
        weight_temperature: the temperature its weights were computed at.
        prompt_cut: whether the selector read documents cut to fit `max_prompt_length`.
        temperature: what it was sampled at.
    """

    question: int
    sample: int
    token_ids: tuple[int, ...]
    proposal_logps: tuple[float, ...]
    text: str
    selection: Selection
    selection_logp: float = math.nan
    reference_logp: float = math.nan
    answer_logp: float = math.nan
    weight: float = math.nan
    selector_coefficient: float = math.nan
    ess: float = math.nan
    weight_temperature: float = math.nan
    prompt_cut: bool = False
    temperature: float = 1.0

    @property
    def proposal_logp(self) -> float:
        """log q(z|x), nats."""
        return float(sum(self.proposal_logps))


REQUIRED_FIELDS = ("id", "question", "answers", "documents")
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")


def read_questions(path: str | Path) -> list[Question]:
    """Read a question file: one JSON object a line (`.jsonl`, `.jsonl.gz`), or the same columns as `.parquet`.

    Returns:
        The questions in file order.

    Raises:
        InputError: naming the file, the line (the row, in Parquet), the field, what is wrong and what to do. A file
            with one bad line is refused whole: a training set that silently shrank is worse than none.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(str(path), Phrase("no such file"), "a question file must exist", "Check the path.")
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        raise InputError(
            str(path), path.suffix, f"a question file ends in {', '.join(SUFFIXES)}", "Rename or convert the file."
        )
    rows = _parquet_rows(path) if name.endswith(".parquet") else _json_rows(path)
    questions: list[Question] = []
    first_seen: dict[str, str] = {}
    for place, row in rows:
        question = parse_question(row, place)
        if question.id in first_seen:
            raise InputError(
                f"{place}: id",
                question.id,
                f"ids are unique, and {first_seen[question.id]} has it too",
                "Remove or rename one of the two.",
            )
        first_seen[question.id] = place.removeprefix(f"{path}: ")
        questions.append(question)
    if not questions:
        raise InputError(str(path), Phrase("no questions"), "a question file has at least one line", "Check the file.")
    return questions


def write_questions(path: str | Path, questions: Iterable[Question]) -> int:
    """Write a question file (`.jsonl` or `.jsonl.gz`), whole, from a stream. Equal questions give equal bytes.

    Returns:
        How many were written.
    """
    path, count = Path(path), 0
    with written_whole(path) as beside, beside.open("wb") as raw, ExitStack() as stack:
        lines: Any = raw
        if path.name.lower().endswith(".gz"):
            lines = stack.enter_context(gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0))
        for question in questions:
            row = {name: value for name, value in asdict(question).items() if value or name in REQUIRED_FIELDS}
            lines.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            count += 1
    return count


def parse_question(row: Any, place: str) -> Question:
    """Turn one decoded row into a `Question`, checking every field. `place` names the row in errors."""
    if not isinstance(row, dict):
        raise InputError(place, row, "each line is a JSON object", "Write one object a line.")
    for field in REQUIRED_FIELDS:
        if row.get(field) is None:
            raise InputError(
                f"{place}: {field}", Phrase("missing"), f"a question has {', '.join(REQUIRED_FIELDS)}", "Add the field."
            )
    identifier = _text(row["id"], f"{place}: id")
    place = f"{place} (id {identifier})"
    documents = _documents(row["documents"], place)
    answers = _texts(row["answers"], f"{place}: answers")
    if not answers:
        raise InputError(
            f"{place}: answers",
            Phrase("empty list"),
            "a question has at least one answer",
            "Add one, or drop the line.",
        )
    supporting = row.get("supporting")
    supporting = () if supporting is None else _texts(supporting, f"{place}: supporting")
    known = {document.id for document in documents}
    for support in supporting:
        if support not in known:
            raise InputError(
                f"{place}: supporting",
                support,
                "supporting ids are ids of this question's documents",
                "Add the document to the candidates, or drop the id.",
            )
    return Question(
        id=identifier,
        question=_text(row["question"], f"{place}: question"),
        answers=answers,
        documents=documents,
        supporting=supporting,
        dataset=str(row.get("dataset") or ""),
        type=str(row.get("type") or ""),
    )


def _documents(value: Any, place: str) -> tuple[Document, ...]:
    if not isinstance(value, list | tuple):
        raise InputError(f"{place}: documents", value, "documents is a list of {id, title, text}", "Write a list.")
    if not value:
        raise InputError(
            f"{place}: documents",
            Phrase("empty list"),
            "a question has candidates to select from",
            "Retrieve some first.",
        )
    documents: list[Document] = []
    seen: set[str] = set()
    for number, item in enumerate(value, start=1):
        where = f"{place}: documents[{number}]"
        if not isinstance(item, dict):
            raise InputError(where, item, "a document is an object with id, title and text", "Write an object.")
        for field in ("id", "text"):
            if item.get(field) is None:
                raise InputError(f"{where}.{field}", Phrase("missing"), "a document has id and text", "Add the field.")
        title = item.get("title")
        if title is not None and not isinstance(title, str):
            raise InputError(f"{where}.title", title, "a title is text, empty when there is none", "Write a string.")
        _check_unicode(title or "", f"{where}.title")
        document = Document(_text(item["id"], f"{where}.id"), title or "", _text(item["text"], f"{where}.text"))
        if document.id in seen:
            raise InputError(
                f"{where}.id", document.id, "a document stands once among the candidates", "Drop the second one."
            )
        seen.add(document.id)
        documents.append(document)
    return tuple(documents)


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise InputError(place, value, "this is text", "Write a JSON string.")
    if not value.strip():
        raise InputError(place, value, "this is not empty", "Fill it in, or drop the line.")
    _check_unicode(value, place)
    return value


def _check_unicode(value: str, place: str) -> None:
    """Half of a surrogate pair, which JSON can spell, can be neither tokenized nor logged."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            place, value, f"this is Unicode text, and character {error.start + 1} is not", "Remove the character."
        ) from None


def _texts(value: Any, place: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise InputError(place, value, "this is a list of strings", "Write a JSON list, also for a single one.")
    return tuple(_text(item, f"{place}[{n}]") for n, item in enumerate(value, start=1))


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    number = 0
    try:
        with opener(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                place = f"{path}: line {number}"
                try:
                    text = line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise InputError(
                        place,
                        Phrase(f"byte {error.start} is not UTF-8"),
                        "question files are UTF-8",
                        "Convert the file.",
                    ) from None
                if number == 1:
                    text = text.removeprefix("\ufeff")
                if not text.strip():
                    continue
                try:
                    yield place, json.loads(text.rstrip())
                except (ValueError, RecursionError) as error:
                    why = str(error)
                    if isinstance(error, json.JSONDecodeError):
                        why = f"column {error.colno}: {error.msg}"
                    raise InputError(
                        place,
                        text.strip()[:60],
                        f"each line is one JSON object, and this is not ({why})",
                        "Write one object a line, not an array over many lines.",
                    ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(
            f"{path}: after line {number}", Phrase(str(error)), "the gzip file is whole", "Copy or compress it again."
        ) from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row
    except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: after row {number}",
            Phrase(str(error).splitlines()[0]),
            "this is a whole Parquet file, its text UTF-8",
            "Write it again.",
        ) from None
