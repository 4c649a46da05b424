"""Claims about exports: what a peer's reader finds in the file is what stood in the question file."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from test_cli_rollouts import QUESTIONS as LOGGED
from test_report import run_in
from typer.testing import CliRunner

from dro_rl.cli import app
from dro_rl.data.export import export_questions
from dro_rl.data.readers import FORMATS
from dro_rl.data.readers.fields import Fields, Source
from dro_rl.errors import InputError
from dro_rl.records import Document, Question, write_questions

DOCUMENTS = (
    Document("d1", "Béla Bartók", "A composer.\nOf two lines."),
    Document("d2", "", "A passage without a title."),
    Document("d3", '東京 "tower"', "A <b>tower</b>, with a \u202emark."),
)
QUESTIONS = (
    Question("a", "Who was he?", ("Bartók", "Béla"), DOCUMENTS, ("d3", "d1"), "mine", "2-hop"),
    Question("é東", "東京は？", ("はい",), DOCUMENTS[1:], ()),
)


def read(peer: str, rows: list[Any], **known: Any) -> list[Question]:
    source = Source("", "train", **known)
    return [question for row in rows for question in FORMATS[peer].read(Fields(row, "row"), source)]


def exported(folder: Path, peer: Any, questions: tuple[Question, ...] = QUESTIONS) -> Path:
    path = folder / ("out.parquet" if peer == "search-r1" else "out.jsonl")
    assert export_questions(questions, peer, path, dataset="others", split="dev") == len(questions)
    return path


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_flashrag_has_questions_answers_types_and_candidates_in_order(tmp_path: Path) -> None:
    found = read("flashrag", lines(exported(tmp_path, "flashrag")))
    for ours, theirs in zip(QUESTIONS, found, strict=True):
        assert (theirs.id, theirs.question, theirs.answers) == (ours.id, ours.question, ours.answers)
        assert theirs.type == ours.type
        texts = [(document.title, " ".join(document.text.split())) for document in ours.documents]
        assert [(document.title, " ".join(document.text.split())) for document in theirs.documents] == texts
        assert set(theirs.supporting_numbers) == set(ours.supporting_numbers)


def test_search_r1_has_questions_answers_and_their_dataset(tmp_path: Path) -> None:
    rows = pq.read_table(exported(tmp_path, "search-r1")).to_pylist()
    found = read("search-r1", rows)
    assert [question.id for question in found] == ["mine-a", "others-é東"]
    assert [question.answers for question in found] == [question.answers for question in QUESTIONS]
    assert [row["extra_info"] for row in rows] == [{"index": 0, "split": "dev"}, {"index": 1, "split": "dev"}]
    assert rows[0]["reward_model"] == {"ground_truth": {"target": ["Bartók", "Béla"]}, "style": "rule"}
    bare = [
        {key: value for key, value in row.items() if key not in ("id", "question", "golden_answers")} for row in rows
    ]
    assert [question.question for question in read("search-r1", bare)] == [q.question for q in QUESTIONS]


def test_rank_llm_has_candidates_with_ids_best_first(tmp_path: Path) -> None:
    rows = lines(exported(tmp_path, "rank-llm"))
    found = read("rank-llm", rows, answers={question.id: question.answers for question in QUESTIONS})
    assert [question.documents for question in found] == [question.documents for question in QUESTIONS]
    scores = [candidate["score"] for candidate in rows[0]["candidates"]]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == len(scores)


def test_rank_llm_wants_candidates(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="question a"):
        export_questions([replace(QUESTIONS[0], documents=())], "rank-llm", tmp_path / "x.jsonl", dataset="", split="")
    assert not (tmp_path / "x.jsonl").exists()


@pytest.mark.parametrize(("peer", "name"), [("search-r1", "x.jsonl"), ("flashrag", "x.parquet"), ("rank-llm", "x")])
def test_another_ending_is_refused(peer: Any, name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--output"):
        export_questions(QUESTIONS, peer, tmp_path / name, dataset="", split="")


def test_the_command_exports_a_file_and_refuses_what_is_none(tmp_path: Path) -> None:
    source = tmp_path / "q.jsonl"
    source.write_text("\n".join(json.dumps(asdict(question)) for question in QUESTIONS))
    out = tmp_path / "o.jsonl.gz"
    done = CliRunner().invoke(app, ["data", "export", str(source), "--to", "flashrag", "--output", str(out), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["questions"] == 2
    assert out.is_file()
    gone = CliRunner().invoke(
        app, ["data", "export", str(tmp_path / "no.jsonl"), "--to", "flashrag", "--output", str(out)]
    )
    assert gone.exit_code == 2
    assert gone.stderr.startswith("error: ")


def logged(folder: Path) -> Path:
    """A run of two questions over two iterations, whose data are still there."""
    write_questions(folder / "train.jsonl", LOGGED)
    return run_in(folder / "run", data=str(folder / "train.jsonl"))


def exported_rollouts(run: Path, peer: str, output: Path) -> Any:
    return CliRunner().invoke(app, ["rollouts", "export", str(run), "--to", peer, "--output", str(output), "--json"])


def test_rollouts_go_to_a_peer_as_questions_with_the_selected_documents_first(tmp_path: Path) -> None:
    """Of question a the heaviest rollout is [1, 3], of b all are [2, 1]; see `run_in`."""
    run = logged(tmp_path)
    said = exported_rollouts(run, "rank-llm", tmp_path / "out.jsonl")
    assert json.loads(said.stdout)["questions"] == 2
    rows = {row["query"]["qid"]: row["candidates"] for row in lines(tmp_path / "out.jsonl")}
    for question, first in zip(LOGGED[:2], ((1, 3), (2, 1)), strict=True):
        ids = [document.id for document in question.documents]
        wanted = [ids[number - 1] for number in first]
        wanted += [each for each in ids if each not in wanted]
        assert [candidate["docid"] for candidate in rows[question.id]] == wanted
    for peer, name in (("flashrag", "f.jsonl"), ("search-r1", "s.parquet")):
        assert json.loads(exported_rollouts(run, peer, tmp_path / name).stdout)["questions"] == 2


def test_rollouts_whose_data_has_gone_say_so(tmp_path: Path) -> None:
    run = logged(tmp_path)
    write_questions(tmp_path / "train.jsonl", LOGGED[1:])
    said = exported_rollouts(run, "rank-llm", tmp_path / "out.jsonl")
    assert said.exit_code == 2
    assert "the run's data: " in said.stderr
    assert not (tmp_path / "out.jsonl").exists()
    (tmp_path / "train.jsonl").unlink()
    assert "it is on this machine" in exported_rollouts(run, "rank-llm", tmp_path / "out.jsonl").stderr
