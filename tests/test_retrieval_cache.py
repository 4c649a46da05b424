import json
from multiprocessing import get_context

import pytest

from dro_rl.data import load_questions
from dro_rl.data.manifest import manifest_path, questions_hash, read_manifest
from dro_rl.errors import InputError
from dro_rl.locks import owned
from dro_rl.records import iter_questions, read_questions
from dro_rl.retrieval import cache
from dro_rl.retrieval.bm25 import BM25
from dro_rl.retrieval.cache import Search, retrieve
from dro_rl.retrieval.index import Index, build_index
from tests.retrieval_world import GOLD, PASSAGES, write_asked, write_corpus


@pytest.fixture
def index(tmp_path):
    build_index(BM25(), str(write_corpus(tmp_path / "corpus.jsonl")), tmp_path / "index")
    return Index(tmp_path / "index")


@pytest.fixture
def asked(tmp_path):
    return write_asked(tmp_path / "asked.jsonl")


@pytest.fixture
def output(tmp_path):
    return tmp_path / "dev.jsonl.gz"


def test_a_cache_holds_what_the_index_finds(index, asked, output):
    retrieve(index, asked, output, Search(k=3))
    for question in read_questions(output):
        found = index.search([question.question], 3)[0]
        assert question.documents == tuple(candidate.document for candidate in found)
        ids = {document.id for document in question.documents}
        assert set(question.supporting) == ids & set(GOLD[question.id])
        assert set(question.missed) == set(GOLD[question.id]) - ids


def test_its_manifest_says_how_it_was_made(index, asked, output):
    made = retrieve(index, asked, output, Search(k=3))
    assert read_manifest(output) == made
    assert made.retrieval == {
        "corpus": "corpus.jsonl",
        "retriever": "bm25",
        "settings": index.manifest.settings,
        "versions": index.manifest.versions,
        "search_versions": index.versions,
        "corpus_hash": index.manifest.corpus_hash,
        "passages": 8,
        "k": 3,
        "gold": False,
        "seed": 0,
        "labels": True,
        "fewer_than_k": 1,
    }
    assert made.changes == []
    assert made.questions_hash == questions_hash(iter_questions(asked, candidates="optional"))


def test_its_manifest_tells_the_packages_that_searched_from_those_that_built(index, asked, output, monkeypatch):
    monkeypatch.setattr(index, "versions", index.versions | {"bm25s": "9.9"})
    made = retrieve(index, asked, output, Search(k=3))
    assert made.retrieval["search_versions"]["bm25s"] == "9.9"
    assert made.retrieval["versions"] == index.manifest.versions
    monkeypatch.setattr(cache, "_write_part", lambda *_: pytest.fail("searched again"))
    assert retrieve(Index(index.folder), asked, output, Search(k=3)) == made


def test_training_reads_it_without_an_index_and_refuses_one_that_changed(index, asked, output):
    retrieve(index, asked, output, Search(k=3))
    assert len(load_questions(str(output), "dev")) == 3
    assert len(load_questions(str(output.parent), "dev")) == 3
    output.write_bytes(output.read_bytes() + b"\n")
    for name in (output, output.parent):
        with pytest.raises(InputError, match="not those that its manifest describes"):
            load_questions(str(name), "dev")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_job_that_was_killed_goes_on_and_ends_the_same(index, asked, output, tmp_path, monkeypatch, processes):
    monkeypatch.setattr(cache, "PART", 1)
    retrieve(index, asked, tmp_path / "whole" / "dev.jsonl.gz", Search(k=3))
    whole, calls = cache._write_part, []

    def killed(index, questions, path, search):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        whole(index, questions, path, search)

    monkeypatch.setattr(cache, "_write_part", killed)
    with pytest.raises(KeyboardInterrupt):
        retrieve(index, asked, output, Search(k=3))
    assert not output.exists()
    monkeypatch.setattr(cache, "_write_part", whole)
    retrieve(index, asked, output, Search(k=3), processes=processes)
    assert len(calls) == 3
    for name in (output, manifest_path(output)):
        assert name.read_bytes() == (tmp_path / "whole" / name.name).read_bytes()
    assert not list(output.parent.glob(".*"))


def test_two_processes_write_what_one_writes(index, asked, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "PART", 1)
    for processes in (1, 2):
        retrieve(index, asked, tmp_path / str(processes) / "dev.jsonl", Search(k=3), processes=processes)
    assert (tmp_path / "1" / "dev.jsonl").read_bytes() == (tmp_path / "2" / "dev.jsonl").read_bytes()


def test_processes_that_search_have_a_rank_each(monkeypatch):
    ranks = []
    monkeypatch.setattr(cache, "Index", lambda _, rank: ranks.append(rank))
    monkeypatch.setattr(cache, "_index_there", None, raising=False)
    opened = get_context("spawn").Value("i", 0)
    for _ in range(3):
        cache._open_index(None, opened)
    assert ranks == [0, 1, 2]


def test_a_job_that_was_killed_before_the_manifest_goes_on(index, asked, output, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    write = cache.write_manifest
    monkeypatch.setattr(cache, "write_manifest", killed)
    with pytest.raises(KeyboardInterrupt):
        retrieve(index, asked, output, Search(k=3))
    monkeypatch.setattr(cache, "write_manifest", write)
    retrieve(index, asked, output, Search(k=3))
    assert read_manifest(output) is not None


def test_parts_of_another_job_are_not_used(index, asked, output, monkeypatch):
    monkeypatch.setattr(cache, "write_questions", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        retrieve(index, asked, output, Search(k=3))
    monkeypatch.undo()
    retrieve(index, asked, output, Search(k=1))
    assert {len(question.documents) for question in read_questions(output)} == {1}


def test_a_finished_cache_is_left_alone_and_another_not_written_over(index, asked, output, monkeypatch):
    made = retrieve(index, asked, output, Search(k=3))
    before = output.stat().st_mtime_ns
    assert retrieve(index, asked, output, Search(k=3)) == made
    assert output.stat().st_mtime_ns == before
    with pytest.raises(InputError, match="--overwrite"):
        retrieve(index, asked, output, Search(k=2))
    retrieve(index, asked, output, Search(k=2), overwrite=True)
    assert read_manifest(output).retrieval["k"] == 2


def test_gold_that_is_not_in_the_corpus_is_named_counted_or_dropped(index, output, tmp_path):
    asked = write_asked(tmp_path / "asked.jsonl", supporting=["p1", "p99"])
    with pytest.raises(InputError, match=r"question q1: supporting.*'p99'.*--drop-labels"):
        retrieve(index, asked, output, Search(k=3))
    made = retrieve(index, asked, output, Search(k=3), skip_bad=True)
    assert (made.num_questions, sum(made.skipped.values())) == (2, 1)
    made = retrieve(index, asked, tmp_path / "unlabelled.jsonl", Search(k=3, labels=False))
    assert made.changes == [{"change": "drop_labels"}]
    assert all(
        not question.supporting and not question.missed for question in read_questions(tmp_path / "unlabelled.jsonl")
    )


def test_gold_is_inserted_when_asked_for_and_recorded(index, asked, output):
    made = retrieve(index, asked, output, Search(k=2, gold=True, seed=7))
    assert made.changes == [{"change": "insert_gold", "seed": 7}]
    texts = {document.id: document for document in PASSAGES}
    for question in read_questions(output):
        assert set(question.supporting) == set(GOLD[question.id])
        assert not question.missed
        assert len(question.documents) == 2
        assert all(texts[document.id] == document for document in question.documents)


def test_a_question_for_which_nothing_is_found_is_named_or_counted(index, output, tmp_path):
    asked = write_asked(tmp_path / "asked.jsonl", question="zebra?")
    with pytest.raises(InputError, match=r"question q1.*nothing was found"):
        retrieve(index, asked, output, Search(k=3))
    assert not output.exists()
    assert retrieve(index, asked, output, Search(k=3), skip_bad=True).num_questions == 2


def test_what_is_wrong_is_said_before_the_search(index, asked, tmp_path, monkeypatch):
    monkeypatch.setattr(Index, "search", lambda *_: pytest.fail("searched"))
    with pytest.raises(InputError, match="k: 9"):
        retrieve(index, asked, tmp_path / "a.jsonl", Search(k=9))
    with pytest.raises(InputError, match="ends in"):
        retrieve(index, asked, tmp_path / "a.parquet", Search(k=3))


def test_a_question_that_misses_what_it_has_is_refused(tmp_path):
    document = {"id": "d", "text": "t"}
    row = {"id": "q", "question": "?", "answers": ["x"], "documents": [document], "missed": ["d"]}
    (tmp_path / "q.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match="missed"):
        read_questions(tmp_path / "q.jsonl")


@pytest.mark.parametrize(("name", "what"), [("none.jsonl", "no such file"), (".", "a folder")])
def test_questions_that_are_no_file_are_named(index, output, tmp_path, name, what):
    with pytest.raises(InputError, match=what):
        retrieve(index, tmp_path / name, output, Search(k=3))


def test_what_was_searched_is_kept_when_questions_without_finds_are_then_left_out(index, output, tmp_path, monkeypatch):
    asked = write_asked(tmp_path / "asked.jsonl", question="zebra?")
    with pytest.raises(InputError, match=r"nothing was found.*--skip-bad"):
        retrieve(index, asked, output, Search(k=3))
    monkeypatch.setattr(cache, "_write_part", lambda *_: pytest.fail("searched again"))
    made = retrieve(index, asked, output, Search(k=3), skip_bad=True)
    assert (made.num_questions, sum(made.skipped.values())) == (2, 1)


def test_parts_of_the_same_questions_with_other_gold_are_not_used(index, asked, output, monkeypatch):
    monkeypatch.setattr(cache, "write_questions", _part_then_killed(cache.write_questions))
    with pytest.raises(KeyboardInterrupt):
        retrieve(index, asked, output, Search(k=3))
    monkeypatch.undo()
    write_asked(asked, supporting=["p1", "p2"])
    retrieve(index, asked, output, Search(k=3))
    first = next(iter_questions(output))
    assert {*first.supporting, *first.missed} == {"p1", "p2"}


def _part_then_killed(write):
    def killed(path, questions):
        if path.parent.name.endswith(".parts"):
            return write(path, questions)
        raise KeyboardInterrupt

    return killed


def test_a_good_cache_outlives_a_job_that_leaves_no_question(index, asked, output, tmp_path):
    made = retrieve(index, asked, output, Search(k=3))
    nowhere = write_asked(tmp_path / "nowhere.jsonl", gold=False, question="zebra?")
    nowhere.write_text(nowhere.read_text().splitlines()[0])
    with pytest.raises(InputError, match="no question is left"):
        retrieve(index, nowhere, output, Search(k=3), skip_bad=True, overwrite=True)
    assert read_manifest(output) == made
    assert len(read_questions(output)) == 3


def test_two_do_not_write_one_cache(index, asked, output):
    lock = output.with_name(f".{output.name}.lock")
    with owned(lock, "output"), pytest.raises(InputError, match="is in use by process"):
        retrieve(index, asked, output, Search(k=3))
    retrieve(index, asked, output, Search(k=3))
    assert not lock.exists()
