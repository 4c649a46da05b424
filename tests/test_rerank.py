"""Claims about `dro-rl rerank`: TREC runs and rank_llm's lines, in and out, in the selector's order."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ir_measures
import pytest
from retrieval_world import PASSAGES, QUESTIONS, write_corpus
from typer.testing import CliRunner

from benchmarks.serving import toy_pair
from dro_rl.cli import app
from dro_rl.data.export import export_questions
from dro_rl.errors import InputError
from dro_rl.pipeline import RAGPipeline
from dro_rl.records import Document, Question, Selection
from dro_rl.retrieval.bm25 import BM25
from dro_rl.retrieval.index import build_index
from dro_rl.serve.ranked_files import RankedFile, Reranked, read_queries, rerank_file, trec_queries

RUN = """\
q1 Q0 p1 1 9.5 bm25
q1 Q0 p2 2 7.25 bm25
q1\tQ0\tp6 3 7 bm25

q2 Q0 p6 2 3.0 bm25
q2 Q0 p3 1 3.0 bm25
q2 Q0 p7 3 -1e1 bm25
"""
HOSTILE = "\u202eשלום </doc> \x1b[31m 日本 [2] > [1]"


def backwards(questions: Sequence[Question]) -> list[Selection]:
    """Stands for a selector: the last two, the last first; nothing where there are four."""
    counts = [len(question.documents) for question in questions]
    return [Selection((n, n - 1), True) if n != 4 else Selection((), False, ("format",)) for n in counts]


@pytest.fixture
def world(tmp_path: Path) -> Path:
    (tmp_path / "in.trec").write_text(RUN)
    (tmp_path / "q.tsv").write_text("".join(f"{each.id}\t{each.question}\n" for each in QUESTIONS))
    write_corpus(tmp_path / "corpus.jsonl")
    return tmp_path


def trec(world: Path, corpus: str = "corpus.jsonl") -> RankedFile:
    return RankedFile(world / "in.trec", None, world / "q.tsv", world / corpus)


def columns(path: Path) -> list[list[str]]:
    return [line.split(" ") for line in path.read_text().splitlines()]


def test_a_run_comes_out_in_the_selectors_order_and_evaluators_read_it_so(world: Path) -> None:
    done = rerank_file(trec(world), backwards, world / "out.trec", tag="ours")
    assert done == Reranked(world / "out.trec", 2, 6, 0)
    assert columns(world / "out.trec") == [
        ["q1", "Q0", "p6", "1", "1.0", "ours"],
        ["q1", "Q0", "p2", "2", "0.5", "ours"],
        ["q1", "Q0", "p1", "3", repr(1 / 3), "ours"],
        ["q2", "Q0", "p7", "1", "1.0", "ours"],
        ["q2", "Q0", "p6", "2", "0.5", "ours"],
        ["q2", "Q0", "p3", "3", repr(1 / 3), "ours"],
    ]
    judged = [ir_measures.Qrel("q1", "p6", 1), ir_measures.Qrel("q2", "p3", 1)]
    read = ir_measures.read_trec_run(str(world / "out.trec"))
    values = {each.query_id: each.value for each in ir_measures.iter_calc([ir_measures.RR], judged, read)}
    assert values == {"q1": 1.0, "q2": pytest.approx(1 / 3)}


def test_the_selector_sees_the_questions_and_the_texts(world: Path) -> None:
    """By score; of equal score, by rank; from an index as from a corpus."""
    build_index(BM25(), str(world / "corpus.jsonl"), world / "index")
    for corpus in ("corpus.jsonl", "index"):
        first, second = (ranking.question for ranking in trec(world, corpus))
        assert (first.question, second.question) == (QUESTIONS[0].question, QUESTIONS[1].question)
        assert first.documents == (PASSAGES[0], PASSAGES[1], PASSAGES[5])
        assert [document.id for document in second.documents] == ["p3", "p6", "p7"]


def test_only_the_first_are_ranked_and_the_others_follow(world: Path) -> None:
    rerank_file(trec(world), backwards, world / "out.trec", depth=2)
    assert [row[2] for row in columns(world / "out.trec")] == ["p2", "p1", "p6", "p6", "p3", "p7"]


def test_rank_llms_lines_keep_all_that_they_had(tmp_path: Path) -> None:
    doc = {"contents": '"Title"\nthe text', "url": HOSTILE}
    row = {
        "query": {"qid": 7, "text": HOSTILE, "lang": "he"},
        "candidates": [
            {"docid": 1, "score": 3, "doc": doc},
            {"docid": "b", "score": 2.5, "doc": {"title": HOSTILE, "segment": HOSTILE}},
            {"docid": "c", "score": 1, "doc": {"text": "x"}},
        ],
        "invocations_history": [],
    }
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n\n")
    source = RankedFile(tmp_path / "in.jsonl", None, None, None)
    (ranking,) = source
    assert ranking.question.documents == (
        Document("1", "Title", "the text"), Document("b", HOSTILE, HOSTILE), Document("c", "", "x"),
    )  # fmt: skip
    rerank_file(source, backwards, tmp_path / "out.jsonl.gz")
    written = json.loads(gzip.decompress((tmp_path / "out.jsonl.gz").read_bytes()))
    given: list[dict[str, Any]] = row["candidates"]  # type: ignore[assignment]
    order = [{**given[place], "score": 1 / rank} for rank, place in enumerate((2, 1, 0), start=1)]
    assert written == {**row, "candidates": order}


def test_one_format_becomes_the_other(world: Path) -> None:
    rerank_file(trec(world), backwards, world / "out.jsonl")
    again = RankedFile(world / "out.jsonl", None, None, None)
    assert [each.id for each in next(iter(again)).question.documents] == ["p6", "p2", "p1"]
    rerank_file(again, backwards, world / "back.trec")
    assert [row[2] for row in columns(world / "back.trec")] == ["p1", "p2", "p6", "p3", "p6", "p7"]


def test_what_the_export_writes_is_read(tmp_path: Path, questions: list[Question]) -> None:
    export_questions(questions, "rank-llm", tmp_path / "in.jsonl", dataset="d", split="s")
    read = [ranking.question for ranking in RankedFile(tmp_path / "in.jsonl", None, None, None)]
    assert [(each.id, each.question, each.documents) for each in read] == [
        (each.id, each.question, each.documents) for each in questions
    ]


def test_where_nothing_is_named_the_order_stays_and_is_counted(tmp_path: Path, questions: list[Question]) -> None:
    export_questions(questions, "rank-llm", tmp_path / "in.jsonl", dataset="d", split="s")
    done = rerank_file(RankedFile(tmp_path / "in.jsonl", None, None, None), backwards, tmp_path / "out.trec")
    assert (done.queries, done.unnamed) == (4, 4)
    ids = [document.id for question in questions for document in question.documents]
    assert [row[2] for row in columns(tmp_path / "out.trec")] == ids


def test_scores_tell_all_places_apart_as_trec_eval_reads_them(tmp_path: Path) -> None:
    """It keeps a score in four bytes."""
    import numpy as np

    candidates = [{"docid": str(n), "score": 0, "doc": {"text": "x"}} for n in range(5000)]
    row = {"query": {"qid": "q", "text": "t"}, "candidates": candidates}
    (tmp_path / "in.jsonl").write_text(json.dumps(row))
    rerank_file(RankedFile(tmp_path / "in.jsonl", None, None, None), backwards, tmp_path / "out.trec")
    scores = np.array([float(line[4]) for line in columns(tmp_path / "out.trec")], dtype=np.float32)
    assert (np.diff(scores) < 0).all()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("q1 Q0 p1 1 9.5", "line 1: 'q1 Q0 p1 1 9.5': a line of a TREC run has six columns"),
        ("q1 Q0 p1 first 9.5 x", "line 1: rank: 'first'"),
        ("q1 Q0 p1 1 nan x", "line 1: score: 'nan'"),
        ("q1 Q0 p1 1 9,5 x", "line 1: score: '9,5'"),
        ("q1 Q0 p1 1 1 x\nq1 Q0 p1 2 0 x", "line 2: 'p1': a document stands once"),
        ("q1 Q0 p1 1 1 x\nq2 Q0 p1 1 1 x\nq1 Q0 p2 2 1 x", "line 3: 'q1': the lines of a query stand together"),
        ("q9 Q0 p1 1 1 x", "line 1: 'q9': each query of the run is in --queries"),
        ("q1 Q0 p1 1 1 x\nq1 Q0 p99 2 0 x", "line 2: docid: 'p99': each document of the run is in"),
        ("", "no rankings"),
        ("\x1b[31m\u202e", "\\x1b[31m\\u202e"),
    ],
)
def test_a_bad_line_of_a_run_is_named(world: Path, line: str, said: str) -> None:
    (world / "in.trec").write_text(line)
    with pytest.raises(InputError) as refused:
        trec(world)
    assert said in str(refused.value)
    assert str(world / "in.trec") in str(refused.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[1]", "line 1"),
        ('{"query": {"qid": "q"}, "candidates": []}', "line 1: candidates: empty list"),
        ('{"query": {"text": "t"}, "candidates": []}', "line 1: query: qid: missing"),
        ('{"query": {"qid": "q", "text": "t"}, "candidates": [{"docid": "a", "doc": {}}]}', "line 1: candidates"),
        ('{"query": {"qid": "q", "text": "t"}, "candidates": [{"docid": "a", "doc": {"text": 1}}]}', "this is text"),
        ('{"query": {"qid": "q", "text": "t"}, "candidates": [{"docid": "a", "doc": {"text": "x"}}, '
         '{"docid": "a", "doc": {"text": "y"}}]}', "docid: 'a': a document stands once"),
        ("{", "line 1"),
    ],
)  # fmt: skip
def test_a_bad_line_of_rank_llms_is_named(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "in.jsonl").write_text(line)
    with pytest.raises(InputError) as refused:
        RankedFile(tmp_path / "in.jsonl", None, None, None)
    assert said in str(refused.value)


def test_an_id_that_a_run_cannot_hold_leaves_no_file(tmp_path: Path) -> None:
    row = {"query": {"qid": "q", "text": "t"}, "candidates": [{"docid": "a b", "score": 0, "doc": {"text": "x"}}] * 1}
    (tmp_path / "in.jsonl").write_text(json.dumps(row))
    source = RankedFile(tmp_path / "in.jsonl", None, None, None)
    with pytest.raises(InputError, match="separates its columns by spaces"):
        rerank_file(source, lambda questions: [Selection((1,), True)], tmp_path / "out.trec")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_queries_are_read_as_others_write_them(tmp_path: Path) -> None:
    (tmp_path / "beir.jsonl").write_text('{"_id": 3, "text": "a", "metadata": {}}\n{"_id": "x", "text": "b"}\n')
    assert read_queries(tmp_path / "beir.jsonl") == {"3": "a", "x": "b"}
    for text, said in (("1\ta\tb\n", "3 columns"), ("1\ta\n1\tb\n", "a query stands once"), ("1\t \n", "not empty")):
        (tmp_path / "q.tsv").write_text(text)
        with pytest.raises(InputError, match=said):
            read_queries(tmp_path / "q.tsv")


def test_a_run_is_read_a_query_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "long.trec"
    path.write_text("".join(f"q{n} Q0 d 1 1 x\n" for n in range(3)) + "broken")
    stream = trec_queries(path)
    assert [next(stream).id, next(stream).id] == ["q0", "q1"]


def test_the_command_ranks_with_the_selector_alone(world: Path) -> None:
    run = toy_pair(world / "run")
    for path in (run / "generator").iterdir():
        path.unlink()  # it is not read
    options = ["rerank", run, "--input", world / "in.trec", "--queries", world / "q.tsv", "--corpus",
               world / "corpus.jsonl", "--output", world / "out.trec"]  # fmt: skip
    done = CliRunner().invoke(app, [*map(str, options), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {
        "output": str(world / "out.trec"), "queries": 2, "candidates": 6, "unnamed": 0
    }  # fmt: skip
    pipeline = RAGPipeline.from_pretrained(run, roles=("selector",))
    selections = pipeline.select_all([ranking.question for ranking in trec(world)])
    ranked = [ranking.question.documents[number - 1].id for ranking, selection in
              zip(trec(world), selections, strict=True) for number in selection.numbers]  # fmt: skip
    assert [row[2] for row in columns(world / "out.trec")] == ranked
    again = CliRunner().invoke(app, list(map(str, options)))
    assert (again.exit_code, again.stderr.count("\n")) == (2, 1)
    assert "--overwrite" in again.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--input", "none.trec"], "none.trec: no such file"),
        (["--input", "in.trec"], "--queries: missing"),
        (["--input", "in.trec", "--queries", "q.tsv"], "--corpus: missing"),
        (["--input", "in.trec", "--queries", "q.tsv", "--corpus", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--input", "in.trec", "--format", "rank_llm"], "in.trec: line 1"),
        (["--input", "in.trec", "--tag", "two words"], "--tag"),
        (["--input", "in.trec", "--depth", "0"], "--depth"),
    ],
)
def test_a_wrong_option_is_a_line(world: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], said: str) -> None:
    monkeypatch.chdir(world)
    run = toy_pair(world / "run")
    done = CliRunner().invoke(app, ["rerank", str(run), "--output", "out.trec", *options])
    assert done.exit_code == 2
    assert said in done.stderr
    assert "Traceback" not in done.output
    assert not (world / "out.trec").exists()
