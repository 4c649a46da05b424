"""Rows by one rule, whatever the file: JSON in lines and arrays, columns of Parquet, lists within texts."""

from __future__ import annotations

import datetime
import gzip
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dro_rl.errors import InputError, shorten
from dro_rl.records import Document, Question, read_questions
from dro_rl.rows import Skips, rows
from dro_rl.rows.small import read_object
from dro_rl.rows.spelled import spelled
from dro_rl.rows.strict_json import DEEPEST

ROW = {"id": "q", "question": "Who?", "answers": ["Ann"], "documents": [{"id": "d", "title": "", "text": "Ann did."}]}
QUESTION = Question("q", "Who?", ("Ann",), (Document("d", "", "Ann did."),))
TEXT = json.dumps(ROW)


def extra(value: str) -> str:
    """The row with a further field."""
    return f'{TEXT[:-1]}, "extra": {value}}}'


def in_file(folder: Path, name: str, *items: str) -> Path:
    """JSON texts as lines, or as an array."""
    path = folder / name
    text = "[" + ",\n".join(items) + "]" if path.suffix == ".json" else "\n".join(items)
    path.write_text(text)
    return path


# One rule -----------------------------------------------------------------------------------------------------

BROKEN = {
    "NaN": (extra("NaN"), ("NaN", "JSON has no NaN", "Write null")),
    "an infinity": (extra("-Infinity"), ("-Infinity", "no infinity", "Write null")),
    "an infinity in digits": (extra("1e999"), ("1e999", "1.8e308", "text")),
    "5,000 digits": (extra("1" * 5000), ("5,000 digits", "at most 4,300", "text")),
    "a field that stands twice": (TEXT[:-1] + ', "answers": ["Bob"]}', ("'answers' twice", "stands once", "Remove")),
    "a field within that stands twice": (extra('{"a": 1, "a": 1}'), ("'a' twice", "stands once", "Remove")),
    "80 levels": (extra("[" * 80 + "]" * 80), ("recursion", f"at most {DEEPEST} others", "Correct")),
    "80 levels of objects": (extra('{"a":' * 80 + "1" + "}" * 80), ("recursion", f"at most {DEEPEST}", "Correct")),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize(("file", "place"), [("q.jsonl", "line 2"), ("q.json", "item 2")])
def test_lines_and_arrays_have_one_rule(tmp_path: Path, name: str, file: str, place: str) -> None:
    """The row is named, and can be left out: the ones around it are read."""
    text, said = BROKEN[name]
    path = in_file(tmp_path, file, TEXT, text, TEXT.replace('"q"', '"r"'))
    with pytest.raises(InputError) as caught:
        read_questions(path)
    for part in (f"{path}: {place}", *said):
        assert part in str(caught.value)
    skips = Skips()
    assert [row["id"] for _, row in rows(path, bad=skips)] == ["q", "r"]
    assert skips.total == 1


@pytest.mark.parametrize("file", ["q.jsonl", "q.json"])
@pytest.mark.parametrize(
    "value", ["1" * 30, "-12345678901234567890", "1.5e300", "[" * 60 + "]" * 60, "[" + "[]," * 200 + "[]]", "null"]
)
def test_what_is_json_is_read_alike(tmp_path: Path, file: str, value: str) -> None:
    path = in_file(tmp_path, file, extra(value))
    assert [row["extra"] for _, row in rows(path)] == [json.loads(value)]
    assert read_questions(path) == [QUESTION]


@pytest.mark.parametrize("file", ["q.jsonl", "q.json"])
@pytest.mark.parametrize("depth", [1_000, 100_000, 3_000_000])
def test_brackets_without_end_are_refused_in_little_memory(tmp_path: Path, file: str, depth: int) -> None:
    """Defect: an array of nothing but brackets took all memory, or ended in a RecursionError."""
    path = tmp_path / file
    path.write_bytes(b"[" * depth)
    with pytest.raises(InputError, match=str(path)):
        list(rows(path))
    path.write_bytes(b"[" * depth + b"]" * depth)
    with pytest.raises(InputError, match=str(path)):
        read_questions(path)


BOMBS = {
    "a line": ("q.jsonl.gz", b'{"id": "' + b"x" * 100_000_000),
    "an item": ("q.json.gz", b'[{"id": "' + b"x" * 100_000_000),
    "a field": ("q.csv.gz", b'id,question\n1,"' + b"x" * 100_000_000),
    "blanks": ("q.json.gz", b"[" + b" " * 100_000_000),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_row_without_end_is_refused_before_it_is_in_memory(tmp_path: Path, name: str) -> None:
    """A packed file of a megabyte that would unpack into a hundred or more, under a limit of 600 MB."""
    file, content = BOMBS[name]
    path = tmp_path / file
    path.write_bytes(gzip.compress(content, compresslevel=1))
    script = f"from dro_rl.records import read_questions\nread_questions({str(path)!r})"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (600_000_000, 600_000_000)),
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"dro_rl.errors.InputError: {path}"), done.stderr[-2000:]


def test_the_items_of_an_array_may_be_larger_than_what_is_read_at_once(tmp_path: Path) -> None:
    made = [{"id": str(n), "text": 'é\n\\"' * (n * 40_000)} for n in range(1, 8)]
    path = tmp_path / "c.json"
    for indent in (None, 2):
        path.write_text(json.dumps(made, indent=indent, ensure_ascii=False))
        assert [row for _, row in rows(path)] == made


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"id": 1},\n {"id": 2,}]', "after item 1: line 2"),
        ('[{"id": 1} {"id": 2}]', "after item 1: line 1: no comma follows"),
        ('[{"id": 1},', "after item 1: line 1: the array does not end"),
        ('[{"id": 1}', "after item 1: line 1: the array does not end"),
        ('[{"id": 1},]', "after item 1: line 1: Expecting value"),
        ("[{'id': 1}]", "after item 0: line 1: Expecting property name"),
        ('[{"id": 1}] [{"id": 2}]', "after item 1: '[' after its end"),
        ('{"data": []}', "begins with '{'"),
        ("", "nothing"),
    ],
)
def test_an_array_that_is_none_is_said_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "q.json"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        list(rows(path))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "null", '{"a": 1, "a": 2}', '{"a": NaN}', '{"a": "\\ud800"}', "\udc80", "[" * 9999]
)
def test_a_small_file_is_one_json_object_or_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "about.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=rf"^{path}: .*a manifest is one JSON object\. Write it again\."):
        read_object(path, "a manifest", "Write it again.")
    path.write_text('\ufeff{"a": 1}')
    assert read_object(path, "a manifest", "Write it again.") == {"a": 1}


def test_errors_shorten_a_value_of_any_depth_or_size() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    twice: Any = ["x"] * 10
    for _ in range(30):
        twice = [twice] * 10
    for value in (deep, twice, {"a": deep}, "x" * 10**7, 10**5000, {n: n for n in range(10**6)}):
        assert len(shorten(value)) <= 120
    assert shorten({"b": [1, "x"]}) == "{'b': [1, 'x']}"


# Columns ------------------------------------------------------------------------------------------------------


def times(*values: int) -> pa.Array:
    return pa.array(values, pa.int64()).cast(pa.timestamp("s"))


FAR = 400_000_000_000
"""Seconds from 1970 to the year 14645."""


@pytest.mark.parametrize(
    "column",
    [
        times(FAR),
        pa.array([b"\xff"]),
        pa.array([10**20], pa.decimal128(38, 0)),
        pa.array([datetime.timedelta(days=1)]),
        pa.StructArray.from_arrays([times(FAR)], ["at"]),
        pa.array([[{"vector": [0.5] * 9}]]),
    ],
    ids=["a time past 9999", "bytes", "a decimal", "a duration", "a time within", "vectors"],
)
def test_columns_that_nobody_knows_may_hold_anything(tmp_path: Path, column: pa.Array) -> None:
    table = pa.Table.from_pylist([ROW]).append_column("extra", column)
    pq.write_table(table, tmp_path / "q.parquet")
    assert read_questions(tmp_path / "q.parquet") == [QUESTION]


def test_times_within_a_column_that_is_known_are_left_out(tmp_path: Path) -> None:
    document = pa.StructArray.from_arrays(
        [pa.array(["d"]), pa.array(["Ann did."]), times(FAR)], ["id", "text", "fetched"]
    )
    table = pa.Table.from_pylist([{**ROW, "documents": None}]).drop_columns(["documents"])
    table = table.append_column("documents", pa.ListArray.from_arrays([0, 1], document))
    pq.write_table(table, tmp_path / "q.parquet")
    assert read_questions(tmp_path / "q.parquet") == [QUESTION]


def test_a_known_column_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([ROW]).drop_columns(["id"]).append_column("id", times(FAR))
    pq.write_table(table, tmp_path / "q.parquet")
    with pytest.raises(InputError, match=r"after row 0: column id: "):
        read_questions(tmp_path / "q.parquet")


# Ids ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["q.jsonl", "q.json", "q.parquet", "q.csv"])
def test_whole_numbers_are_ids_everywhere(tmp_path: Path, file: str) -> None:
    """As FlashRAG and KILT have them: of questions, candidates, labels and what was missed."""
    row = {**ROW, "id": 7, "documents": [{"id": 3, "text": "x"}, {"id": 12, "text": "y"}], "supporting": [12]}
    row["missed"] = [0]
    path = tmp_path / file
    if file.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist([row]), path)
    elif file.endswith(".csv"):
        cells = {key: json.dumps(value) if isinstance(value, list) else str(value) for key, value in row.items()}
        quoted = ('"' + cell.replace('"', '""') + '"' for cell in cells.values())
        path.write_text(",".join(cells) + "\n" + ",".join(quoted) + "\n")
    else:
        in_file(tmp_path, file, json.dumps(row))
    assert read_questions(path) == [
        Question("7", "Who?", ("Ann",), (Document("3", "", "x"), Document("12", "", "y")), ("12",), missed=("0",))
    ]


# Misspelt -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("SUPPORTING", "supporting"),
        ("suporting", "supporting"),
        ("supporting_ids", "supporting"),
        ("Type", "type"),
        ("data_set", "dataset"),
    ],
)
@pytest.mark.parametrize("parquet", [False, True])
def test_a_misspelt_field_is_not_lost_without_a_word(tmp_path: Path, name: str, field: str, parquet: bool) -> None:
    row = {**ROW, name: ["d"] if field == "supporting" else "x"}
    path = tmp_path / ("q.parquet" if parquet else "q.jsonl")
    if parquet:
        pq.write_table(pa.Table.from_pylist([row]), path)
    else:
        path.write_text(json.dumps(row))
    with pytest.raises(InputError, match=rf"{path}: \w+ 1: {name}: .*Name it {field}"):
        read_questions(path)


def test_a_misspelt_title_is_named_and_other_fields_may_be_there(tmp_path: Path) -> None:
    path = in_file(tmp_path, "q.jsonl", json.dumps({**ROW, "level": "hard", "metadata": {}, "split": "train"}))
    assert read_questions(path) == [QUESTION]
    in_file(tmp_path, "q.jsonl", json.dumps({**ROW, "documents": [{"id": "d", "Title": "T", "text": "x"}]}))
    with pytest.raises(InputError, match=r"documents\[1\]: Title: 'T'.*Name it title"):
        read_questions(path)


@pytest.mark.parametrize(("field", "value"), [("type", ["a"]), ("dataset", {"a": 1}), ("type", False), ("type", 1.5)])
def test_labels_are_text(tmp_path: Path, field: str, value: Any) -> None:
    """Defect: a list, written as Python prints it, became the name of a type."""
    path = in_file(tmp_path, "q.jsonl", json.dumps({**ROW, field: value}))
    with pytest.raises(InputError, match=rf"{field}: .*this is text"):
        read_questions(path)
    in_file(tmp_path, "q.jsonl", json.dumps({**ROW, "type": 3}))
    assert read_questions(path)[0].type == "3"


# Within texts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('["a", "b"]', ["a", "b"]),
        ("['a', \"b's\"]", ["a", "b's"]),
        (' {"a": [1]} ', {"a": [1]}),
        ("[]", []),
        ("['a' 'b']", None),
        ("['a'\n 'b']", None),
        ("[citation needed] so it is", None),
        ("[__import__('os')]", None),
        ("(1, 2)", None),
        ("plain", None),
        ("[" * 80 + "]" * 80, None),
        ('{"a": 1, "a": 2}', None),
    ],
)
def test_lists_and_objects_are_known_within_texts(text: str, value: Any) -> None:
    assert spelled(text) == value
