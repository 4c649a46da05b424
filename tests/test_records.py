"""Claims about question files: three spellings, one meaning; a wrong line is named and stops the file."""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dro_rl.errors import InputError
from dro_rl.records import Document, Question, iter_questions, read_questions, write_questions
from dro_rl.rows import Skips

FIRST = {
    "id": "2hop__1",
    "dataset": "musique",
    "question": "Où est né Béla Bartók?\nEt 東京?",
    "answers": ["Nagyszentmiklós", "Sânnicolau Mare"],
    "documents": [
        {"id": "d1", "title": "Béla Bartók", "text": "Born in\u2028Nagyszentmiklós."},
        {"id": "d2", "title": "", "text": "Another one."},
        {"id": "d3", "title": None, "text": "A third."},
    ],
    "supporting": ["d3", "d1"],
}
SECOND = {
    "id": "2hop__2",
    "dataset": "musique",
    "question": "Who?",
    "answers": ["Ann"],
    "documents": [{"id": "d1", "title": "Ann", "text": "Ann did."}],
    "supporting": [],
}


def write(path: Path, rows: list[Any]) -> Path:
    """Write rows as the suffix of `path` says."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


def refusal(path: Path) -> str:
    """The text of the error that reading `path` ends in."""
    with pytest.raises(InputError) as caught:
        read_questions(path)
    return str(caught.value)


# What is read -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["q.jsonl", "q.jsonl.gz", "q.parquet", "Q.JSONL"])
def test_every_spelling_gives_the_same_records(tmp_path: Path, name: str) -> None:
    """Guards that no reader adds a default of its own, drops a field or damages text."""
    assert read_questions(write(tmp_path / name, [FIRST, SECOND])) == [
        Question(
            id="2hop__1",
            question="Où est né Béla Bartók?\nEt 東京?",
            answers=("Nagyszentmiklós", "Sânnicolau Mare"),
            documents=(
                Document("d1", "Béla Bartók", "Born in\u2028Nagyszentmiklós."),
                Document("d2", "", "Another one."),
                Document("d3", "", "A third."),
            ),
            supporting=("d3", "d1"),
            dataset="musique",
        ),
        Question("2hop__2", "Who?", ("Ann",), (Document("d1", "Ann", "Ann did."),), (), "musique"),
    ]


def test_supporting_numbers_are_one_based_places_among_the_candidates(tmp_path: Path) -> None:
    """Defect: counting from 0, or following the order of the labels."""
    questions = read_questions(write(tmp_path / "q.jsonl", [FIRST, SECOND]))
    assert questions[0].supporting_numbers == (1, 3)
    assert questions[1].supporting_numbers == ()


@pytest.mark.parametrize("supporting", ["absent", None, []])
def test_labels_are_optional(tmp_path: Path, supporting: Any) -> None:
    """No labels is the common case of the method."""
    row: dict[str, Any] = dict(SECOND)
    del row["supporting"]
    if supporting != "absent":
        row["supporting"] = supporting
    assert read_questions(write(tmp_path / "q.jsonl", [row]))[0].supporting == ()


def test_blank_lines_a_byte_order_mark_and_windows_line_ends_are_harmless(tmp_path: Path) -> None:
    """What editors add is not an error."""
    path = tmp_path / "q.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(FIRST).encode() + b"\r\n\r\n" + json.dumps(SECOND).encode())
    assert [question.id for question in read_questions(path)] == ["2hop__1", "2hop__2"]


def test_records_cannot_be_changed(tmp_path: Path) -> None:
    """A training set that a metric or a logger edits by accident is a defect nobody finds."""
    question = read_questions(write(tmp_path / "q.jsonl", [FIRST]))[0]
    with pytest.raises(AttributeError):
        question.answers = ()  # type: ignore[misc]
    assert hash(question) == hash(copy.deepcopy(question))


# A wrong row ------------------------------------------------------------------------------------------


def changed(**fields: Any) -> dict[str, Any]:
    """`SECOND` with other values; `...` removes a field."""
    return {key: value for key, value in (SECOND | fields).items() if value is not ...}


DOCUMENT = {"id": "d1", "title": "", "text": "Ann did."}
BAD_ROWS: dict[str, tuple[Any, list[str]]] = {
    "no id": (changed(id=...), ["line 2: id", "missing", "Add the field"]),
    "null id": (changed(id=None), ["line 2: id", "missing"]),
    "an id that is a fraction": (changed(id=7.5), ["line 2: id", "7.5", "text", "Write a JSON string"]),
    "an id that is true": (changed(id=True), ["line 2: id", "True", "text", "Write a JSON string"]),
    "blank id": (changed(id=" "), ["line 2: id", "not empty"]),
    "no question": (changed(question=...), ["line 2: question", "missing"]),
    "blank question": (changed(question="\n"), ["line 2", "2hop__2", "question", "not empty", "Fill it in"]),
    "question is a list": (changed(question=["Who?"]), ["question", "['Who?']", "Write a JSON string"]),
    "half a surrogate": (changed(question="Who\ud800?"), ["question", "character 4", "Remove"]),
    "no answers field": (changed(answers=...), ["line 2: answers", "missing"]),
    "no answers": (changed(answers=[]), ["2hop__2", "answers", "at least one answer", "drop the line"]),
    "answer is text": (changed(answers="Ann"), ["answers", "'Ann'", "Write a JSON list"]),
    "empty answer": (changed(answers=["Ann", ""]), ["answers[2]", "not empty"]),
    "numeric answer": (changed(answers=[1912]), ["answers[1]", "1912", "Write a JSON string"]),
    "no documents field": (changed(documents=...), ["line 2: documents", "missing"]),
    "no documents": (changed(documents=[]), ["2hop__2", "documents", "empty list", "Retrieve"]),
    "documents is an object": (changed(documents=DOCUMENT), ["documents", "Write a list"]),
    "document is text": (changed(documents=["Ann did."]), ["documents[1]", "'Ann did.'", "Write an object"]),
    "document without id": (
        changed(documents=[DOCUMENT, {"text": "x"}]),
        ["documents[2].id", "missing", "Add the field"],
    ),
    "document without text": (changed(documents=[{"id": "d1"}]), ["documents[1].text", "missing"]),
    "empty text": (changed(documents=[DOCUMENT | {"text": ""}]), ["documents[1].text", "not empty"]),
    "numeric title": (changed(documents=[DOCUMENT | {"title": 3}]), ["documents[1].title", "3", "string"]),
    "title with half a surrogate": (
        changed(documents=[DOCUMENT | {"title": "\udc00"}]),
        ["documents[1].title", "character 1"],
    ),
    "repeated document id": (changed(documents=[DOCUMENT, DOCUMENT]), ["documents[2].id", "'d1'", "Drop"]),
    "unknown supporting id": (changed(supporting=["d9"]), ["2hop__2", "supporting", "'d9'", "drop the id"]),
    "supporting is text": (changed(supporting="d1"), ["supporting", "'d1'", "Write a JSON list"]),
    "supporting is empty text": (changed(supporting=""), ["supporting", "''", "Write a JSON list"]),
    "supporting is false": (changed(supporting=False), ["supporting", "False", "Write a JSON list"]),
    "repeated id": (changed(id="2hop__1"), ["line 2: id", "'2hop__1'", "line 1", "rename"]),
    "a list": ([SECOND], ["line 2", "JSON object", "Write one object a line"]),
    "a text": ("Who?", ["line 2", "'Who?'", "JSON object"]),
    "null": (None, ["line 2", "None", "JSON object"]),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_wrong_row_is_named_and_explained(tmp_path: Path, name: str) -> None:
    """Each error has the file, the line, the field, what stands there and what to do."""
    row, said = BAD_ROWS[name]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in (FIRST, row)))
    message = refusal(path)
    for part in [str(path), "line 2", *said]:
        assert part in message


def test_parquet_errors_name_the_row_and_the_field(tmp_path: Path) -> None:
    """The same checks in the other spelling, counted in rows."""
    message = refusal(write(tmp_path / "q.parquet", [FIRST, changed(answers=["Ann", " "])]))
    assert "row 2 (id 2hop__2): answers[2]" in message
    message = refusal(write(tmp_path / "q.parquet", [FIRST, changed(id="2hop__1")]))
    assert "row 2: id" in message
    assert "or that of row 1." in message


def test_a_parquet_column_that_is_missing_is_named(tmp_path: Path) -> None:
    """Defect: a reader that selects columns fails with a message about schemas."""
    path = tmp_path / "q.parquet"
    pq.write_table(pa.Table.from_pylist([SECOND]).drop_columns(["answers"]), path)
    assert "row 1: answers: missing" in refusal(path)


def test_one_bad_line_refuses_the_file(tmp_path: Path) -> None:
    """Defect: skipping bad lines, so that the training set shrinks and nobody knows."""
    refusal(write(tmp_path / "q.jsonl", [FIRST, changed(answers=[]), changed(id="x")]))


# A wrong file -----------------------------------------------------------------------------------------


def corrupt(raw: bytes) -> bytes:
    """The same file with its middle overwritten."""
    middle = len(raw) // 2
    return raw[:middle] + b"\xff" * 200 + raw[middle + 200 :]


def lines(*rows: Any) -> bytes:
    """JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


MANY = [changed(id=f"q{n}", question=f"Who is number {n}?" * 20) for n in range(2000)]
BAD_FILES: dict[str, tuple[str, Callable[[bytes], bytes], list[str]]] = {
    "a broken line": (
        "q.jsonl",
        lambda raw: raw + b'{"id": "x", \n',
        ["line 2001", "column 12", "one JSON object"],
    ),
    "an array instead of lines": (
        "q.jsonl",
        lambda raw: json.dumps([FIRST, SECOND], indent=1).encode(),
        ["line 1", "not an array over many lines"],
    ),
    "an array on one line": (
        "q.jsonl",
        lambda raw: json.dumps([FIRST, SECOND]).encode(),
        ["line 1", "each line is a JSON object"],
    ),
    "two objects on a line": ("q.jsonl", lambda raw: b"{} {}\n", ["line 1", "Extra data"]),
    "a number of 5000 digits": ("q.jsonl", lambda raw: b'{"id": ' + b"1" * 5000 + b"}", ["line 1", "digits"]),
    "100000 open brackets": ("q.jsonl", lambda raw: b"[" * 100_000, ["line 1", "recursion"]),
    "Latin-1": (
        "q.jsonl",
        lambda raw: lines(FIRST) + '{"id": "é"}'.encode("latin-1"),
        ["line 2", "byte 8", "UTF-8", "Convert"],
    ),
    "UTF-16": ("q.jsonl", lambda raw: lines(FIRST).decode().encode("utf-16"), ["line 1", "UTF-8"]),
    "nothing": ("q.jsonl", lambda raw: b"", ["no questions", "at least one line"]),
    "blank lines only": ("q.jsonl", lambda raw: b"\n \n", ["no questions"]),
    "gzip of nothing": ("q.jsonl.gz", lambda raw: gzip.compress(b""), ["no questions"]),
    "truncated gzip": ("q.jsonl.gz", lambda raw: raw[: len(raw) // 2], ["after line", "whole", "Copy"]),
    "corrupt gzip": ("q.jsonl.gz", lambda raw: raw[:-8] + b"\xff" * 8, ["after line", "whole", "Copy"]),
    "gzip that is none": ("q.jsonl.gz", lambda raw: lines(FIRST), ["gzip", "Copy or compress it again"]),
    "truncated Parquet": ("q.parquet", lambda raw: raw[: len(raw) // 2], ["Parquet", "Write it again"]),
    "corrupt Parquet": ("q.parquet", corrupt, ["after row", "Parquet", "Write it again"]),
    "empty Parquet": ("q.parquet", lambda raw: b"", ["Parquet", "Write it again"]),
    "Parquet that is none": ("q.parquet", lambda raw: lines(FIRST), ["Parquet", "Write it again"]),
    "unknown suffix": ("q.txt", lambda raw: raw, [".txt", ".jsonl, ", "convert"]),
    "lines in a table": ("q.csv", lambda raw: raw, [".csv", ".jsonl, .jsonl.gz, .parquet", "convert"]),
    "lines in an array": ("q.json", lambda raw: raw, [".json", "Rename or convert"]),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_wrong_file_is_named_and_explained(tmp_path: Path, name: str) -> None:
    """Defect: a traceback of json, gzip or pyarrow, which says neither the file nor what to do."""
    file_name, damage, said = BAD_FILES[name]
    path = tmp_path / file_name
    path.write_bytes(damage(write(path, MANY).read_bytes()))
    message = refusal(path)
    for part in [str(path), *said]:
        assert part in message


def test_a_parquet_without_rows_is_refused(tmp_path: Path) -> None:
    """A filter that kept nothing upstream."""
    path = tmp_path / "q.parquet"
    pq.write_table(pa.Table.from_pylist([SECOND]).slice(0, 0), path)
    assert "no questions" in refusal(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    """The commonest mistake has the shortest answer."""
    assert "no such file" in refusal(tmp_path / "q.jsonl")
    assert "no such file" in refusal(tmp_path)


def test_an_error_stays_short(tmp_path: Path) -> None:
    """Defect: an error that prints a passage of a thousand words hides what it says."""
    assert len(refusal(write(tmp_path / "q.jsonl", [changed(answers="Ann " * 10_000)]))) < 400 + len(str(tmp_path))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_written_questions_read_back_equal(tmp_path, suffix):
    questions = [
        Question("a", "où?", ("x", "y"), (Document("d", "", "t\n"),), ("d",), "nq", "2 hops"),
        Question("b", "q", ("z",), (Document("d", "T", "t"), Document("e", "", "u"))),
    ]
    path = tmp_path / "made" / f"questions{suffix}"
    assert write_questions(path, iter(questions)) == 2
    assert read_questions(path) == questions
    before = path.read_bytes()
    write_questions(path, questions)
    assert path.read_bytes() == before


def test_an_interrupted_write_leaves_the_file_before(tmp_path):
    path = tmp_path / "questions.jsonl"
    question = Question("a", "q", ("x",), (Document("d", "", "t"),))
    write_questions(path, [question])

    def broken():
        yield question
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_questions(path, broken())
    assert read_questions(path) == [question]
    assert list(tmp_path.iterdir()) == [path]


def test_questions_without_candidates_are_read_where_they_are_optional(tmp_path: Path) -> None:
    """Retrieval finds the candidates; their labels then name documents of its corpus. Training refuses them."""
    rows = [FIRST, changed(documents=[], supporting=["corpus-7"]), changed(id="3", documents=...)]
    path = write(tmp_path / "q.jsonl", rows)
    first, second, third = read_questions(path, candidates="optional")
    assert first == read_questions(write(tmp_path / "first.jsonl", [FIRST]))[0]
    assert (second.documents, second.supporting, third.documents) == ((), ("corpus-7",), ())
    assert "line 2 (id 2hop__2): documents: empty list" in refusal(path)
    write_questions(tmp_path / "again.jsonl", [second])
    assert read_questions(tmp_path / "again.jsonl", candidates="optional") == [second]


def test_optional_candidates_are_checked_where_there_are_any(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", [changed(supporting=["d9"])])
    with pytest.raises(InputError, match="supporting"):
        read_questions(path, candidates="optional")
    with pytest.raises(InputError, match="documents is a list"):
        read_questions(write(path, [changed(documents="Ann did.")]), candidates="optional")


def test_a_stream_of_questions_yields_before_the_end(tmp_path: Path) -> None:
    """Defect: a stream that reads the file first, so that its memory grows with it."""
    stream = iter_questions(write(tmp_path / "q.jsonl", [FIRST, "broken"]))
    assert next(stream).id == "2hop__1"
    with pytest.raises(InputError, match="line 2"):
        next(stream)


def test_bad_lines_are_left_out_and_counted_only_when_asked(tmp_path: Path) -> None:
    skips = Skips()
    rows = [FIRST, changed(answers=[]), changed(answers=["", "x"]), changed(id="2hop__1"), changed(answers=["x", ""])]
    path = write(tmp_path / "q.jsonl", rows)
    assert [question.id for question in iter_questions(path, bad=skips)] == ["2hop__1"]
    assert skips.counts == {
        "answers: a question has at least one answer": 1,
        "answers[]: this is not empty": 2,
        "id: ids are unique": 1,
    }
    assert "line 2 (id 2hop__2)" in str(skips.first["answers: a question has at least one answer"])


def test_a_document_of_many_questions_stands_in_memory_once(tmp_path: Path) -> None:
    """Candidates of a data set overlap: 167,000 questions name far fewer passages than they have candidates."""
    other = changed(id="3", documents=[{"id": "d1", "title": "Ann", "text": "Another Ann."}])
    first, second, third = read_questions(write(tmp_path / "q.jsonl", [SECOND, changed(id="2"), other]))
    assert first.documents[0] is second.documents[0]
    assert third.documents[0].text == "Another Ann."
