"""Corpora: every spelling gives the same passages, in a stream, and what is wrong is named."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dro_rl.data import corpus
from dro_rl.data.corpus import CorpusHash, corpus_hash, read_corpus, split_contents
from dro_rl.errors import InputError
from dro_rl.records import Document
from dro_rl.rows import Skips

DATA = Path(os.environ.get("DRO_RL_DATA") or Path(__file__).parent.parent.parent / "shared" / "data")
PASSAGES = [
    Document("1", "Łódź", 'The "White Factory", of Łódź; stands by a pond.'),
    Document("2", "", "A passage\u2028without a title."),
    Document("30", "東京", "東京 is a city."),
]


def rows(passages: list[Document] = PASSAGES) -> list[dict[str, str]]:
    return [{"id": each.id, "title": each.title, "text": each.text} for each in passages]


def lines(items: list[Any]) -> bytes:
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items).encode()


def write_table(path: Path, header: bool = True, delimiter: str = "\t") -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter, lineterminator="\r\n")
        if header:
            writer.writerow(["id", "text", "title"])
        writer.writerows([each.id, each.text, each.title] for each in PASSAGES)
    return path


def spelled(folder: Path, name: str) -> Path:
    """`PASSAGES` as the name says."""
    path = folder / name
    if ".tsv" in name:
        write_table(path)
    elif ".csv" in name:
        write_table(path, delimiter=name[0] if name[0] in ",;" else ",")
    elif ".parquet" in name:
        pq.write_table(pa.Table.from_pylist(rows()), path)
    elif ".jsonl" in name.lower():
        path.write_bytes(lines(rows()))
    else:
        path.write_text(json.dumps(rows(), indent=1), encoding="utf-8-sig")
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        list(read_corpus(path))
    return str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "c.tsv",
        "c.tsv.gz",
        "c.jsonl",
        "c.jsonl.gz",
        "C.JSONL",
        "c.json",
        "c.json.gz",
        "c.parquet",
        "c.csv",
        ";.csv",
        "c.csv.gz",
    ],
)
def test_every_spelling_gives_the_same_passages(tmp_path: Path, name: str) -> None:
    """Quotes, other alphabets, Windows line ends, byte order marks."""
    assert list(read_corpus(spelled(tmp_path, name))) == PASSAGES


def test_a_folder_of_shards_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    for number, passage in enumerate(PASSAGES):
        (tmp_path / f"part-{number}.jsonl").write_bytes(lines(rows([passage])))
    (tmp_path / "README.md").write_text("notes")
    assert list(read_corpus(tmp_path)) == PASSAGES


def test_columns_of_a_tsv_go_by_their_header_and_without_one_by_dprs_order(tmp_path: Path) -> None:
    assert list(read_corpus(write_table(tmp_path / "c.tsv", header=False))) == PASSAGES
    path = tmp_path / "other.tsv"
    path.write_text("title\tid\ttext\nT\t7\tx\n")
    assert list(read_corpus(path)) == [Document("7", "T", "x")]
    path.write_text("0\tx\n1\ty\n")
    assert list(read_corpus(path)) == [Document("0", "", "x"), Document("1", "", "y")]


def test_peers_field_names_are_understood(tmp_path: Path) -> None:
    """BEIR's `_id`, numeric ids, and the `contents` of FlashRAG and Search-R1 with its quoted title."""
    path = tmp_path / "c.jsonl"
    path.write_bytes(
        lines(
            [
                {"_id": "a", "title": "T", "text": "x", "metadata": {}},
                {"id": 3, "contents": '"A ""B"" C"\nThe text.\nMore.'},
                {"docid": "d", "contents": "No title here."},
            ]
        )
    )
    assert list(read_corpus(path)) == [
        Document("a", "T", "x"),
        Document("3", 'A "B" C', "The text.\nMore."),
        Document("d", "", "No title here."),
    ]
    assert split_contents('"Only a quotation"') == ("", '"Only a quotation"')


def test_the_hash_depends_on_passages_and_not_on_their_file(tmp_path: Path) -> None:
    one = corpus_hash(read_corpus(spelled(tmp_path, "c.tsv")))
    assert one == corpus_hash(read_corpus(spelled(tmp_path, "c.parquet"))) == corpus_hash(PASSAGES)
    moved = [Document("1", "Łód", "ź" + PASSAGES[0].text), *PASSAGES[1:]]
    assert len({one, corpus_hash(moved), corpus_hash(PASSAGES[::-1]), corpus_hash(PASSAGES[:2])}) == 4
    beside = CorpusHash()
    for passage in PASSAGES:
        beside.add(passage)
    assert (beside.hexdigest(), beside.count) == (one, 3)


# What is wrong ----------------------------------------------------------------------------------------------


def bad_row(**fields: Any) -> bytes:
    row = {"id": "x", "title": "", "text": "t"} | fields
    return lines([*rows(), {key: value for key, value in row.items() if value is not ...}])


BAD: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "no id": ("c.jsonl", bad_row(id=...), ("line 4: id: missing", "_id", "Add the field")),
    "no text": ("c.jsonl", bad_row(text=...), ("line 4 (id x): text: missing", "contents", "Add")),
    "empty text": ("c.jsonl", bad_row(text=" \n"), ("line 4 (id x): text", "not empty", "drop the line")),
    "numeric text": ("c.jsonl", bad_row(text=3), ("line 4 (id x): text: 3", "text")),
    "title is a list": ("c.jsonl", bad_row(title=["T"]), ("line 4 (id x): title: ['T']", "Write a string")),
    "half a surrogate": ("c.jsonl", lines(rows()) + b'{"id": "x", "text": "\\ud800"}', ("text", "character 1")),
    "duplicate id": ("c.jsonl", bad_row(id="30"), ("line 4: id: '30'", "earlier passage", "unique", "rename")),
    "not JSON": ("c.jsonl", lines(rows()) + b"{'id': 'x'}\n", ("line 4", "column 2", "JSON object")),
    "an array where lines are expected": ("c.jsonl", json.dumps(rows(), indent=1).encode(), ("line 1", "not an array")),
    "an array on one line": ("c.jsonl", json.dumps(rows()).encode(), ("line 1", "an object")),
    "lines where an array is expected": ("c.json", lines(rows()), ("begins with '{'", "one JSON array", ".jsonl")),
    "a broken array": ("c.json", json.dumps(rows()).encode()[:-20], ("after item 2", "whole JSON array", "Copy")),
    "an array of text": ("c.json", b'["a"]', ("item 1: 'a'", "an object")),
    "Latin-1": ("c.jsonl", lines(rows()) + '{"id": "é"}'.encode("latin-1"), ("line 4", "byte 8", "UTF-8")),
    "Latin-1 in an array": ("c.json", '[{"id": "é"}]'.encode("latin-1"), ("after item 0", "UTF-8")),
    "UTF-16": ("c.tsv", "id\ttext\ttitle\n".encode("utf-16"), ("line 1", "UTF-8", "Convert")),
    "truncated gzip": ("c.jsonl.gz", gzip.compress(lines(rows()))[:-12], ("after line", "gzip file is whole", "Copy")),
    "truncated gzip of an array": ("c.json.gz", gzip.compress(json.dumps(rows()).encode())[:-12], ("after item", "gz")),
    "gzip without .gz": ("c.jsonl", gzip.compress(lines(rows())), ("line 1", "gzip file: name it .gz")),
    ".gz without gzip": ("c.jsonl.gz", lines(rows()), ("gzip file is whole",)),
    "not Parquet": ("c.parquet", lines(rows()), ("Parquet", "Write it again")),
    "a column too many": ("c.tsv", b"id\ttext\ttitle\n1\tx\ty\tz\n", ("line 2: 4 fields", "id, text, title", "quotes")),
    "a tab within quotes": ("c.tsv", b'id\ttext\n1\t"x\ty"\n', ("line 2: 3 fields", "no tabs", "JSON lines")),
    "a line break within quotes": ("c.tsv", b'id\ttext\n1\tx\n2\t"a\nb"\n', ("line 4: 1 fields", "line breaks")),
    "line ends of old": ("c.tsv", b"id\ttext\r1\tx\r2\ty\r", ("line 1", "carriage return", "Convert the line ends")),
    "a carriage return in a text": ("c.tsv", b"1\tx\n2\ta\rb\n", ("line 2", "carriage return", "space")),
    "an open quote in CSV": ("c.csv", b'id,text\n1,"x\n2,y\n', ("line 2", "quoted", "JSON lines")),
    "a quote that is not doubled": ("c.csv", b'id,text\n1,x\n2,"a" b\n', ("line 3", "doubled")),
    "a column that stands twice": ("c.csv", b"id,text,text\n1,x,y\n", ("line 1: 'text'", "a column stands once")),
    "a field that stands twice": ("c.json", b'[{"id": "1", "id": "2", "text": "x"}]', ("item 1: 'id' twice", "Remove")),
    "nothing": ("c.jsonl", b"", ("no passages", "at least one")),
    "an empty array": ("c.json", b"[]", ("no passages",)),
    "no array": ("c.json", b"", ("nothing", "JSON array")),
    "unknown ending": ("c.txt", b"x", ("c.txt", ".jsonl", "convert")),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_corpus_is_named_and_explained(tmp_path: Path, name: str) -> None:
    """Defect: an index of a corpus that broke off, or a traceback of json, csv, gzip, ijson or pyarrow."""
    file, content, said = BAD[name]
    path = tmp_path / file
    path.write_bytes(content)
    message = refusal(path)
    for part in (str(path), *said):
        assert part in message


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "c.jsonl")
    assert "no corpus files" in refusal(tmp_path)
    with pytest.raises(InputError, match="a file, a folder, or a hub dataset"):
        list(read_corpus("nobody/nothing"))


def test_bad_passages_are_left_out_and_counted_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    wrong = [{"id": "x", "text": ""}, {"id": "y"}, {"id": "1", "text": "again"}, "text", {"id": "z", "text": " "}]
    path.write_bytes(lines([*rows(), *wrong]) + b"{\n\xff\xfe\n")
    skips = Skips()
    assert list(read_corpus(path, bad=skips)) == PASSAGES
    assert skips.total == 7
    assert skips.counts["text: this is not empty"] == 2
    assert str(skips.first["id: ids of a corpus are unique"]).startswith(f"{path}: line 6: id: '1'")
    path.write_bytes(lines(wrong[:2]))
    with pytest.raises(InputError, match="no passages"):
        list(read_corpus(path, bad=Skips()))


def test_a_corpus_that_breaks_off_is_refused_even_when_bad_passages_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl.gz"
    path.write_bytes(gzip.compress(lines(rows()))[:-12])
    with pytest.raises(InputError, match="gzip file is whole"):
        list(read_corpus(path, bad=Skips()))


# A stream ---------------------------------------------------------------------------------------------------


def test_passages_come_before_the_file_is_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "BATCH", 2)
    path = tmp_path / "c.jsonl"
    path.write_bytes(lines(rows()) + b"broken\n")
    stream = read_corpus(path)
    assert [next(stream), next(stream)] == PASSAGES[:2]
    with pytest.raises(InputError, match="line 4"):
        next(stream)


def test_a_hub_corpus_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def endless(name: str, config: str | None, **others: Any) -> Iterator[dict[str, str]]:
        asked.update(name=name, config=config, **others)
        return ({"id": str(n), "text": "t"} for n in itertools.count())

    monkeypatch.setattr("datasets.load_dataset", endless)
    stream = read_corpus("someone/wiki", config="w100", split="all")
    assert next(stream) == Document("0", "", "t")
    assert asked == {"name": "someone/wiki", "config": "w100", "split": "all", "streaming": True}


def test_ids_are_told_apart_as_a_set_would() -> None:
    """The sorted runs against a Python set, on ids of which a third come again, within a batch and far apart."""
    rng = np.random.default_rng(0)
    hashes, plain = corpus.SeenHashes(), set()
    for _ in range(40):
        batch = [str(n) for n in rng.integers(0, 6000, size=rng.integers(1, 200))]
        expected = []
        for identifier in batch:
            expected.append(identifier in plain)
            plain.add(identifier)
        assert hashes.add(batch).tolist() == expected
    assert sum(map(len, hashes._runs)) >= len(plain)
    assert len(hashes._runs) < 12


@pytest.mark.real_data
@pytest.mark.skipif(not DATA.is_dir(), reason="no question files at DRO_RL_DATA or ../shared/data")
def test_a_real_corpus_reads_whole() -> None:
    assert sum(1 for _ in read_corpus(DATA / "corpus" / "wow.jsonl.gz")) > 1000


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("c.tsv", '1\t"Opened only\n2\tEnds here\n', ['"Opened only', "Ends here"]),
        ("c.tsv", '1\t"Opened\n2\tand closed"\n', ['"Opened', 'and closed"']),
        ("c.tsv", '1\t"Ja" said "no"\tT\n2\t"A ""b"" c"\tT\n', ['"Ja" said "no"', 'A "b" c']),
        ("c.tsv", "1\t" + "x" * 200_000 + "\tT\n", ["x" * 200_000]),
        ("c.csv", 'id,text\n1,"a,\nb"\n2,' + "x" * 200_000 + "\n", ["a,\nb", "x" * 200_000]),
    ],
)
def test_tabs_and_lines_alone_split_a_tsv_and_quotes_hold_a_csv_together(
    tmp_path: Path, name: str, content: str, texts: list[str]
) -> None:
    """Defect: a quote at the start of a text swallowed the passage after it."""
    path = tmp_path / name
    path.write_text(content)
    assert [passage.text for passage in read_corpus(path)] == texts
