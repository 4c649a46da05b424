import json
import math

import pytest
from typer.testing import CliRunner

from dro_rl.cli import app
from dro_rl.records import Document, Question, write_questions
from dro_rl.retrieval.report import report_file
from tests.retrieval_world import write_asked, write_corpus


def question(number, texts, supporting=(), missed=()):
    documents = tuple(Document(f"d{n}", "", text) for n, text in enumerate(texts, start=1))
    return Question(f"q{number}", "?", ("red",), documents, supporting, missed=missed)


QUESTIONS = [
    question(1, ["blue", "red lamp", "green", "red"], ("d2", "d4")),
    question(2, ["red", "blue", "green", "gold"], ("d3",), ("far",)),
    question(3, ["blue", "infrared", "green", "gold"], (), ("far", "away")),
    question(4, ["blue", "blue again", "the red", "gold"]),
]
BY_IDS = [([0, 1, 0, 1], 2), ([0, 0, 1, 0], 2), ([0, 0, 0, 0], 2)]
BY_ANSWER = [([0, 1, 0, 1], 2), ([1, 0, 0, 0], 1), ([0, 0, 0, 0], 0), ([0, 0, 1, 0], 1)]


def gain(relevant):
    return sum(each / math.log2(place + 1) for place, each in enumerate(relevant, start=1))


def plain(judged, k):
    """Recall, reciprocal rank and nDCG of binary relevance, as the textbooks define them."""
    recall = [sum(rel[:k]) / total if total else 0 for rel, total in judged]
    first = [next((1 / place for place, each in enumerate(rel[:k], start=1) if each), 0) for rel, _ in judged]
    ndcg = [gain(rel[:k]) / gain([1] * min(k, total)) if total else 0 for rel, total in judged]
    return [sum(values) / len(values) for values in (recall, first, ndcg)]


@pytest.fixture
def file(tmp_path):
    write_questions(tmp_path / "dev.jsonl", QUESTIONS)
    return tmp_path / "dev.jsonl"


def test_measures_by_ids_count_what_was_missed(file):
    judged = report_file(file).judged["ids"]
    assert judged.questions == 3
    for k in (1, 2, 3, 4):
        assert [judged.measures[name][k - 1] for name in ("recall", "MRR", "nDCG")] == pytest.approx(plain(BY_IDS, k))


def test_measures_by_answer_string_count_questions(file):
    judged = report_file(file).judged["answer"]
    assert judged.questions == 4
    for k in (1, 2, 3, 4):
        _, first, ndcg = plain(BY_ANSWER, k)
        hit = sum(any(rel[:k]) for rel, _ in BY_ANSWER) / 4
        assert [judged.measures[name][k - 1] for name in ("recall", "MRR", "nDCG")] == pytest.approx([hit, first, ndcg])


def test_without_labels_there_is_the_answer_string(tmp_path):
    write_questions(tmp_path / "dev.jsonl", QUESTIONS[3:])
    report = report_file(tmp_path / "dev.jsonl")
    assert list(report.judged) == ["answer"]
    assert (report.retriever, report.ks, report.shown) == ("unknown", [1, 2, 3, 4], [1, 3, 4])


# The commands -----------------------------------------------------------------------------------------------


def run(*arguments, status=0):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == status, done.output
    return done


def test_from_a_corpus_to_a_report(tmp_path):
    corpus, asked = write_corpus(tmp_path / "corpus.jsonl"), write_asked(tmp_path / "dev.jsonl")
    done = run("index", "bm25", corpus, tmp_path / "index")
    assert "8 passages" in done.stdout
    done = run("retrieve", tmp_path / "index", asked, "--k", 4, "--output", tmp_path / "out.jsonl", "--insert-gold")
    assert "3 questions, 4 candidates" in done.stdout
    places = [tmp_path / name for name in ("report.json", "report.png")]
    done = run("retrieval", "report", tmp_path / "out.jsonl", "--output", places[0], "--plot", places[1])
    assert "bm25, 3 questions, 4 candidates" in done.stdout
    assert "\\n" not in done.stdout  # of a heading on two lines
    assert places[1].read_bytes().startswith(b"\x89PNG")
    (report,) = json.loads(places[0].read_text())["reports"]
    assert report["judged"]["ids"]["measures"]["recall"][-1] == 1.0
    assert json.loads(run("retrieval", "report", tmp_path / "out.jsonl", "--json").stdout)["reports"] == [report]


def test_the_commands_print_json(tmp_path):
    corpus, asked = write_corpus(tmp_path / "corpus.jsonl"), write_asked(tmp_path / "dev.jsonl")
    assert json.loads(run("index", "bm25", corpus, tmp_path / "index", "--json").stdout)["passages"] == 8
    found = run("retrieve", tmp_path / "index", asked, "--k", 2, "--output", tmp_path / "out.jsonl", "--json")
    assert json.loads(found.stdout)["num_questions"] == 3


def test_bad_input_is_one_line(tmp_path):
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    for arguments, said in (
        (("index", "bm25", tmp_path / "none.jsonl", tmp_path / "index"), "no such file"),
        (("index", "bm25", corpus, tmp_path / "index", "--b", 2), "b: 2.0"),
        (("index", "colbert", corpus, tmp_path / "index", "--checkpoint", "bert"), "checkpoint"),
        (("retrieve", tmp_path, corpus, "--output", tmp_path / "out.jsonl"), "no index"),
    ):
        done = run(*arguments, status=2)
        assert said in done.stderr
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "index").exists()
