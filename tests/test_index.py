import json
import os
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from dro_rl.cli import app
from dro_rl.data.corpus import corpus_hash
from dro_rl.errors import InputError
from dro_rl.files import sampled_sha256
from dro_rl.locks import owned
from dro_rl.records import Document
from dro_rl.retrieval import passages
from dro_rl.retrieval.bm25 import BM25
from dro_rl.retrieval.index import Index, build_index
from dro_rl.retrieval.passages import PassageStore, write_lookup, write_passages
from dro_rl.rows import Skips
from tests.retrieval_world import PASSAGES, write_corpus


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "corpus.jsonl")


def fail(*_):
    raise AssertionError("work that was done is done again")


# Passages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("part", "batch"), [(3, 2), (8, 8), (100, 3)])
def test_any_passage_is_read_by_its_row_and_found_by_its_id(tmp_path, monkeypatch, part, batch):
    monkeypatch.setattr(passages, "PART", part)
    monkeypatch.setattr(passages, "BATCH", batch)
    assert write_passages(tmp_path, PASSAGES) == corpus_hash(PASSAGES)
    store = PassageStore(tmp_path)
    write_lookup(store)
    assert [store[row] for row in range(len(store))] == list(store) == PASSAGES
    assert [store.row_of(document.id) for document in PASSAGES] == list(range(8))
    assert store.row_of("p9") is None
    for row in (-1, 8):
        with pytest.raises(IndexError):
            store[row]


def test_passages_go_on_after_the_last_whole_part(tmp_path, monkeypatch):
    monkeypatch.setattr(passages, "PART", 3)
    monkeypatch.setattr(passages, "BATCH", 1)

    def breaks_off():
        yield from PASSAGES[:7]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_passages(tmp_path, breaks_off())
    first = {path.name: path.stat().st_mtime_ns for path in passages.part_paths(tmp_path)}
    assert len(first) == 2
    assert write_passages(tmp_path, PASSAGES) == corpus_hash(PASSAGES)
    assert list(PassageStore(tmp_path)) == PASSAGES
    assert first.items() <= {path.name: path.stat().st_mtime_ns for path in passages.part_paths(tmp_path)}.items()


@pytest.mark.parametrize("changed", [[replace(PASSAGES[0], text="Other."), *PASSAGES[1:]], PASSAGES[:2]])
def test_passages_do_not_go_on_with_another_corpus(tmp_path, monkeypatch, changed):
    monkeypatch.setattr(passages, "PART", 2)
    write_passages(tmp_path, PASSAGES[:4])
    with pytest.raises(InputError, match="other passages"):
        write_passages(tmp_path, changed)


def test_a_copy_of_a_passage_is_refused_or_counted(tmp_path):
    copied = [*PASSAGES, Document("p9", PASSAGES[2].title, PASSAGES[2].text)]
    with pytest.raises(InputError, match=r"id p9.*stands once"):
        write_passages(tmp_path / "strict", copied)
    skips = Skips()
    assert write_passages(tmp_path / "loose", copied, bad=skips) == corpus_hash(PASSAGES)
    assert skips.total == 1


def test_a_torn_part_is_refused(tmp_path):
    write_passages(tmp_path, PASSAGES)
    path = passages.part_paths(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match="passages of an index are whole"):
        PassageStore(tmp_path)


# The index --------------------------------------------------------------------------------------------------


def test_an_index_finds_documents_and_says_what_it_is(corpus, tmp_path):
    build_index(BM25(), str(corpus), tmp_path / "index")
    index = Index(tmp_path / "index")
    best = index.search(["Who sold the boat?"], 2)[0]
    assert [candidate.document for candidate in best] == [PASSAGES[3], PASSAGES[6]]
    assert best[0].score > best[1].score > 0
    assert index.manifest.corpus_hash == corpus_hash(PASSAGES)
    assert (index.manifest.retriever, index.manifest.passages) == ("bm25", 8)
    assert index.manifest.settings == {"k1": 0.9, "b": 0.4, "language": "english"}
    assert set(index.manifest.versions) == {"bm25s", "PyStemmer"}
    assert not (tmp_path / "index" / "building.json").exists()


def test_a_finished_index_is_left_alone(corpus, tmp_path, monkeypatch):
    made = build_index(BM25(), str(corpus), tmp_path / "index")
    monkeypatch.setattr(BM25, "build", fail)
    os.utime(corpus)
    assert build_index(BM25(), str(corpus), tmp_path / "index") == made


def test_an_index_that_was_killed_is_none_until_it_is_finished(corpus, tmp_path, monkeypatch):
    whole = BM25.build

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(BM25, "build", killed)
    with pytest.raises(KeyboardInterrupt):
        build_index(BM25(), str(corpus), tmp_path / "index")
    with pytest.raises(InputError, match=r"not finished.*same dro-rl index command"):
        Index(tmp_path / "index")
    monkeypatch.setattr(BM25, "build", whole)
    with pytest.raises(InputError, match="goes on as it began"):
        build_index(BM25(k1=1.2), str(corpus), tmp_path / "index")
    monkeypatch.setattr(passages, "_write_part", fail)
    build_index(BM25(), str(corpus), tmp_path / "index")
    assert len(Index(tmp_path / "index").passages) == 8


def test_another_index_is_not_written_over(corpus, tmp_path):
    build_index(BM25(), str(corpus), tmp_path / "index")
    with pytest.raises(InputError, match="settings"):
        build_index(BM25(b=0.75), str(corpus), tmp_path / "index")
    other = write_corpus(tmp_path / "other.jsonl", PASSAGES[:5])
    with pytest.raises(InputError, match="corpus"):
        build_index(BM25(), str(other), tmp_path / "index")


def test_a_folder_with_something_else_is_not_an_index_folder(corpus, tmp_path):
    with pytest.raises(InputError, match="folder of its own"):
        build_index(BM25(), str(corpus), tmp_path)
    with pytest.raises(InputError, match="no index"):
        Index(tmp_path)


def test_a_corpus_that_changed_under_its_index_is_noticed(corpus, tmp_path):
    build_index(BM25(), str(corpus), tmp_path / "index")
    os.utime(corpus)
    Index(tmp_path / "index")
    write_corpus(corpus, PASSAGES[1:])
    with pytest.raises(InputError, match="changed since"):
        Index(tmp_path / "index")
    corpus.unlink()
    assert len(Index(tmp_path / "index").passages) == 8


def test_a_shard_that_came_since_is_noticed_and_one_that_went_is_no_matter(tmp_path, monkeypatch):
    (tmp_path / "shards").mkdir()
    first, second = (tmp_path / "shards" / name for name in ("a.jsonl", "b.jsonl"))
    write_corpus(first, PASSAGES[:4])
    write_corpus(second, PASSAGES[4:])
    (tmp_path / "shards" / "README.md").touch()
    monkeypatch.chdir(tmp_path)
    build_index(BM25(), "shards", tmp_path / "index")
    monkeypatch.chdir("/")
    Index(tmp_path / "index")
    third = write_corpus(tmp_path / "shards" / "c.jsonl", PASSAGES[:1])
    with pytest.raises(InputError, match="not there when") as caught:
        Index(tmp_path / "index")
    assert caught.value.place == str(third)
    for path in (third, first, second):
        path.unlink()
        assert len(Index(tmp_path / "index").passages) == 8


def test_a_neighbour_of_a_corpus_that_is_one_file_is_no_shard(corpus, tmp_path):
    build_index(BM25(), str(corpus), tmp_path / "index")
    write_corpus(tmp_path / "other.jsonl", PASSAGES[:1])
    Index(tmp_path / "index")


def test_a_hub_corpus_is_known_by_name_configuration_and_split(tmp_path, monkeypatch):
    def load(name, config, *, split, streaming):
        return iter([{"id": f"{config}-{split}", "text": name}])

    monkeypatch.setattr("datasets.load_dataset", load)
    made = build_index(BM25(), "someone/wiki", tmp_path / "index", config="w100", split="all")
    assert (made.corpus, made.files) == ("someone/wiki/w100/all", [])
    assert Index(tmp_path / "index").passages[0] == Document("w100-all", "", "someone/wiki")
    with pytest.raises(InputError, match="corpus"):
        build_index(BM25(), "someone/wiki", tmp_path / "index", config="w100")


def test_configuration_and_split_of_a_hub_corpus_are_options(tmp_path, monkeypatch):
    asked = []

    def load(name, config, *, split, streaming):
        asked.append((name, config, split))
        return iter([{"id": "1", "text": "A heron."}])

    monkeypatch.setattr("datasets.load_dataset", load)
    arguments = ["index", "bm25", "someone/wiki", str(tmp_path / "index"), "--config", "w100", "--split", "all"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert set(asked) == {("someone/wiki", "w100", "all")}


def test_k_beyond_the_corpus_is_refused(corpus, tmp_path):
    build_index(BM25(), str(corpus), tmp_path / "index")
    index = Index(tmp_path / "index")
    for k in (0, 9):
        with pytest.raises(InputError, match="1 to 8"):
            index.search(["boat"], k)


def test_bad_rows_are_counted_in_the_manifest(corpus, tmp_path):
    with corpus.open("a") as file:
        file.write('{"id": "p9", "text": ""}\n{"id": "p1", "text": "Again."}\nnot json\n')
        file.write(json.dumps({"id": "p10", "title": PASSAGES[1].title, "text": PASSAGES[1].text}) + "\n")
    with pytest.raises(InputError, match="line 9"):
        build_index(BM25(), str(corpus), tmp_path / "strict")
    made = build_index(BM25(), str(corpus), tmp_path / "loose", skip_bad=True)
    assert made.passages == 8
    assert sum(made.skipped.values()) == 4
    assert len(made.skipped) == 4


@pytest.mark.parametrize("change", [{"format": 9}, {"retriever": "oracle"}, {"passages": None}, {"extra": 1}])
def test_an_odd_index_manifest_is_refused(corpus, tmp_path, change):
    build_index(BM25(), str(corpus), tmp_path / "index")
    path = tmp_path / "index" / "index.json"
    values = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    with pytest.raises(InputError, match="Build the index again"):
        Index(tmp_path / "index")


def test_an_index_of_older_rules_is_refused_for_what_it_is(corpus, tmp_path):
    """Its words were split in another way: what is searched would not be what was indexed."""
    build_index(BM25(), str(corpus), tmp_path / "index")
    path = tmp_path / "index" / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 1}))
    for again in (lambda: Index(tmp_path / "index"), lambda: build_index(BM25(), str(corpus), tmp_path / "index")):
        with pytest.raises(
            InputError, match=r"index\.json: format: 1: .*bm25 indexes of format 2; .*other rules\. Build"
        ):
            again()


@pytest.mark.parametrize("place", [0, 1, -1])
def test_an_index_whose_own_files_were_damaged_is_refused(corpus, tmp_path, place):
    """Defect: a changed byte killed the process within Arrow, or ended in an IndexError of numpy."""
    build_index(BM25(), str(corpus), tmp_path / "index")
    for path in sorted((tmp_path / "index").glob("*/*")):
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[place] ^= 255
        for content in (bytes(damaged), whole[:-1], None):
            path.unlink() if content is None else path.write_bytes(content)
            with pytest.raises(InputError, match=rf"{path}: .*an index is whole"):
                Index(tmp_path / "index")
        path.write_bytes(whole)
    assert Index(tmp_path / "index").search(["lamp"], 1)[0]


def test_a_large_file_is_known_by_blocks_all_over_it(tmp_path):
    path = tmp_path / "large"
    path.write_bytes(bytes(1000))
    plain = sampled_sha256(path, blocks=4, block=16)
    for place in (0, 330, 999):
        path.write_bytes(bytes(1 if at == place else 0 for at in range(1000)))
        assert sampled_sha256(path, blocks=4, block=16) != plain
    path.write_bytes(bytes(1001))
    assert sampled_sha256(path, blocks=4, block=16) != plain


def test_two_do_not_build_in_one_folder(tmp_path, corpus):
    with (
        owned(tmp_path / "index" / ".lock", "index"),
        pytest.raises(InputError, match="is in use by process"),
    ):
        build_index(BM25(), str(corpus), tmp_path / "index")
    build_index(BM25(), str(corpus), tmp_path / "index")
    with owned(tmp_path / "index" / ".lock", "index"):
        assert Index(tmp_path / "index").search(["tin"], 1), "a finished index is read by as many as like"


@pytest.mark.parametrize(
    "change",
    [
        {"settings": {"k1": 0.9, "b": 0.4, "language": "klingon"}},
        {"settings": {"k1": "0.9", "b": 0.4, "language": "english"}},
        {"settings": {"k2": 0.9}},
        {"parts": {"x" * 5000: "0"}},
        {"parts": {"a\0b": "0"}},
        {"files": [{"path": 1}]},
        {"corpus_hash": None, "passages": "8"},
    ],
)
def test_what_an_edited_manifest_says_is_refused_with_its_place(corpus, tmp_path, change):
    build_index(BM25(), str(corpus), tmp_path / "index")
    path = tmp_path / "index" / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=str(tmp_path / "index")):
        Index(tmp_path / "index")


def test_a_corpus_under_a_name_that_no_file_can_have_is_gone(corpus, tmp_path):
    build_index(BM25(), str(corpus), tmp_path / "index")
    path = tmp_path / "index" / "index.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"files": [values["files"][0] | {"path": "x" * 5000}], "corpus": "x" * 5000}))
    assert Index(tmp_path / "index").search(["lamp"], 1)[0]
