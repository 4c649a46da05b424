"""`dro-rl evaluate` and `dro-rl compare` on a tiny pair: controls, resuming, hashes, files."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import Result
from training_world import ROOT, questions, save_model, world, write_questions
from typer.testing import CliRunner

from dro_rl.cli import app
from dro_rl.data import load_questions
from dro_rl.data.candidates import shape_candidates
from dro_rl.data.manifest import Manifest, questions_hash, write_manifest
from dro_rl.errors import InputError
from dro_rl.evaluation import job
from dro_rl.evaluation.controls import control_selection
from dro_rl.evaluation.results import METRICS, SCHEMA, UNITS, VERSION, candidates_hash, read_results, write_results
from dro_rl.files import file_sha256
from dro_rl.pipeline import PipelineSettings, RAGPipeline, save_settings

Run = Callable[..., Result]
COUNT = 150  # three parts


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a finished run leaves it, with `data/dev.jsonl` (one- and two-hop, the last ten without labels)."""
    folder = tmp_path_factory.mktemp("pair")
    world(folder)
    for role, seed in (("selector", 1), ("generator", 2)):
        save_model(folder / role, seed)
        (folder / role / "prompt.jinja").write_text((folder / f"{role[0]}.jinja").read_text())
    save_settings(folder, PipelineSettings(2, 128, 6, 4, {}))
    made = [replace(q, type=f"{1 + i % 2}-hop") for i, q in enumerate(questions(COUNT, seed=5))]
    made[-10:] = [replace(question, supporting=()) for question in made[-10:]]
    (folder / "data").mkdir()
    write_questions(folder / "data" / "dev.jsonl", made)
    return folder


@pytest.fixture
def evaluate(pair: Path, tmp_path: Path) -> Run:
    def run(*options: Any, output: str = "out", data: Path = pair / "data" / "dev.jsonl", code: int = 0) -> Result:
        command = ["evaluate", str(pair), "--data", str(data), "--output", str(tmp_path / output), *map(str, options)]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == code, result.output
        return result

    return run


def dro_rl(*arguments: Any, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


# What comes out ---------------------------------------------------------------------------------------------


def test_the_report_says_what_was_asked_and_its_means_are_those_of_the_rows(evaluate, pair, tmp_path) -> None:
    evaluate()
    rows, conditions = read_results(tmp_path / "out" / "questions.parquet")
    found = report(tmp_path / "out")
    assert found["conditions"]["split"] == "data/dev"
    assert found["conditions"]["questions_hash"] == conditions.questions_hash
    assert len(rows) == found["conditions"]["num_questions"] == COUNT
    for metric in METRICS:
        values = [row.scores[metric] for row in rows if row.scores[metric] == row.scores[metric]]
        scale = 1 if metric in UNITS else 100
        assert found["metrics"][metric]["mean"] == pytest.approx(scale * sum(values) / len(values))
        assert (
            found["metrics"][metric]["n"]
            == len(values)
            == (COUNT - 10 if "precision" in metric or metric.startswith("recall") else COUNT)
        )
        assert found["metrics"][metric]["low"] <= found["metrics"][metric]["mean"] <= found["metrics"][metric]["high"]
    assert {kind: of_type["em"]["n"] for kind, of_type in found["by_type"].items()} == {"1-hop": 75, "2-hop": 75}
    page = (tmp_path / "out" / "report.md").read_text()
    assert conditions.questions_hash in page
    assert "| 2-hop | 75 |" in page


def test_rows_are_what_the_pair_answers_one_question_at_a_time(evaluate, pair, tmp_path) -> None:
    """The plain twin: no parts, no batches."""
    evaluate("--limit", 12)
    rag = RAGPipeline.from_pretrained(pair)
    for row, question in zip(
        read_results(tmp_path / "out" / "questions.parquet")[0], questions(12, seed=5), strict=True
    ):
        answer = rag.answer(question.question, question.documents)
        assert (row.id, row.prediction, row.selection) == (question.id, answer.text, list(answer.selection.numbers))
        assert row.prediction_logp == pytest.approx(answer.logp, abs=1e-4)


def test_the_default_folder_is_named_after_the_split(pair: Path) -> None:
    dro_rl(
        "evaluate", pair, "--data", pair / "data", "--split", "dev", "--limit", 3, "--control", "random", "--seed", 4
    )
    assert report(pair / "evaluation" / "data-dev-first-3-random-4")["conditions"]["seed"] == 4


def test_a_manifest_names_the_split_and_stands_in_the_report(evaluate, tmp_path) -> None:
    path = tmp_path / "q.jsonl"
    made = questions(3)
    write_questions(path, made)
    retrieval = {"corpus": "wiki", "retriever": "bm25", "settings": {"k1": 0.9}, "k": 5}
    write_manifest(
        path, Manifest("made-up", "test", 3, questions_hash(made), file_sha256(path), "CC0", retrieval=retrieval)
    )
    shown = evaluate(data=path).output
    assert "made-up/test: 3 questions" in shown
    assert "retriever bm25, corpus wiki, k 5" in shown
    assert report(tmp_path / "out")["manifest"]["retrieval"] == retrieval


@pytest.mark.parametrize(
    ("file", "named", "options", "said"),
    [
        ("nq/dev.jsonl", None, (), "nq/dev"),
        ("dev/nq.jsonl", None, (), "nq/dev"),
        ("x/hotpot_dev_v1.jsonl", None, (), "hotpot_dev_v1/dev"),
        ("mine/hard.jsonl", None, (), "mine/hard"),
        ("mine/hard.jsonl", None, ("--split", "test"), "mine/test"),
        ("x/q.jsonl", ("nq", "dev"), (), "nq/dev"),
        ("x/q.jsonl", ("nq", "dev"), ("--split", "test"), "nq/test"),
        ("x/q.jsonl", ("", "dev"), (), "dev"),
    ],
)
def test_dataset_and_split_are_told_by_manifest_or_names(tmp_path, file, named, options, said) -> None:
    """Defects: `/dev` and a folder `-dev` where no dataset is known; a `--split` that a manifest silently overruled."""
    path, made = tmp_path / file, questions(2)
    path.parent.mkdir()
    write_questions(path, made)
    if named:
        write_manifest(path, Manifest(*named, 2, questions_hash(made), file_sha256(path)))
    split = options[1] if options else None
    assert job._questions(job.EvaluationJob(tmp_path, str(path), split=split))[1] == said


def test_every_column_of_the_results_is_documented() -> None:
    text = (ROOT / "docs" / "evaluation.md").read_text()
    assert f"Version {VERSION}:" in text
    rows = re.findall(r"^\| `([\w@]+)` \| `?(.+?)`? \| (.+) \|$", text.replace("\\|", "|"), flags=re.MULTILINE)
    assert rows == [(f.name, str(f.type), f.metadata[b"description"].decode()) for f in SCHEMA]


# Resuming ---------------------------------------------------------------------------------------------------

KILL = """
import sys
from killed_job import kill_at
kill_at(sys.argv[1], int(sys.argv[2]))
from dro_rl.cli import app
app(sys.argv[3:])
"""
MOMENTS = {
    "in the third part": ("dro_rl.engines.answers:ModelAnswerer.score", 3, 2),
    "after the rows are in place, before the parts are gone": ("after:dro_rl.evaluation.results:write_results", 4, 0),
}
"""Where it is killed, in which call, and how many files of rows are still to be written then."""


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.slow
def test_a_killed_evaluation_goes_on_and_ends_with_equal_rows(
    evaluate, pair, tmp_path, monkeypatch, moment: str
) -> None:
    *place, left = MOMENTS[moment]
    evaluate(output="unbroken")
    command = ["evaluate", str(pair), "--data", str(pair / "data" / "dev.jsonl"), "--output", str(tmp_path / "killed")]
    killed = subprocess.run(
        [sys.executable, "-c", KILL, *map(str, place), *command],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "killed" / "report.json").exists()
    written: list[Path] = []
    monkeypatch.setattr(job, "write_results", lambda path, *rest: written.append(path) or write_results(path, *rest))
    evaluate(output="killed")
    assert len(written) == left
    one, other = (read_results(tmp_path / name / "questions.parquet") for name in ("killed", "unbroken"))
    assert repr(one) == repr(other)  # NaN is equal to itself here
    assert report(tmp_path / "killed")["metrics"] == report(tmp_path / "unbroken")["metrics"]
    assert not (tmp_path / "killed" / "parts").exists()
    assert not list(tmp_path.rglob(".*.tmp"))


def test_a_finished_evaluation_is_reported_without_loading_a_model(evaluate, monkeypatch) -> None:
    first = evaluate("--limit", 5).stdout
    monkeypatch.setattr(RAGPipeline, "from_pretrained", None)
    assert evaluate("--limit", 5).stdout == first


@pytest.mark.parametrize("options", [("--limit", 7), ("--control", "random"), ("--dtype", "bfloat16")])
def test_rows_under_other_settings_are_not_mixed_in(evaluate, tmp_path, options) -> None:
    evaluate("--limit", 5)
    before = (tmp_path / "out" / "questions.parquet").read_bytes()
    refused = evaluate(*(("--limit", 5) if options[0] != "--limit" else ()), *options, code=2)
    assert "results under another" in refused.output
    assert "--overwrite" in refused.output
    assert (tmp_path / "out" / "questions.parquet").read_bytes() == before
    evaluate("--limit", 4, "--overwrite")
    assert report(tmp_path / "out")["conditions"]["num_questions"] == 4


def test_rows_of_a_pair_that_was_trained_again_are_not_mixed_in(pair, tmp_path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(pair, copy, ignore=shutil.ignore_patterns("evaluation", "base-*"))
    command = ["evaluate", copy, "--data", pair / "data" / "dev.jsonl", "--limit", 3]
    dro_rl(*command)
    save_model(copy / "generator", seed=9)
    assert "results under another models" in dro_rl(*command, code=2).output


def test_a_folder_that_holds_something_else_is_left_alone(evaluate, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    assert "holds what was begun there" in evaluate("--overwrite", code=2).output
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


# Controls ---------------------------------------------------------------------------------------------------


def test_the_retrievers_order_is_the_first_k_candidates() -> None:
    question = questions(1)[0]
    assert control_selection("retriever-order", question, 2, 0).numbers == (1, 2)
    assert control_selection("retriever-order", question, 9, 0).numbers == (1, 2, 3, 4, 5)


def test_random_documents_follow_from_seed_and_question_alone() -> None:
    made = questions(40)
    drawn = [control_selection("random", question, 2, 0).numbers for question in made]
    assert drawn == [control_selection("random", question, 2, 0).numbers for question in made]
    assert drawn != [control_selection("random", question, 2, 1).numbers for question in made]
    assert all(len(set(numbers)) == 2 for numbers in drawn)
    assert {number for numbers in drawn for number in numbers} == {1, 2, 3, 4, 5}
    assert len({numbers[0] < numbers[1] for numbers in drawn}) == 2


def test_gold_documents_are_the_labelled_ones_and_questions_without_labels_are_counted(evaluate, tmp_path) -> None:
    shown = evaluate("--control", "gold").output
    assert "10 questions: no labelled document" in shown
    found = report(tmp_path / "out")
    assert found["skipped"] == {"no labelled document among the candidates": 10}
    assert found["metrics"]["recall@1"]["mean"] == 100
    assert found["metrics"]["em"]["n"] == COUNT - 10
    assert found["conditions"]["num_questions"] == COUNT


def test_candidates_may_be_cut_as_in_training(pair, evaluate, tmp_path) -> None:
    evaluate("--limit", 20, "--num-documents", 3)
    rows, conditions = read_results(tmp_path / "out" / "questions.parquet")
    assert conditions.num_documents == 3
    assert {number for row in rows for number in row.selection} <= {1, 2, 3}
    assert "K=2 of N=3" in (tmp_path / "out" / "report.md").read_text()
    assert "results under another candidates_hash, num_documents" in evaluate("--limit", 20, code=2).output


@pytest.fixture
def trained(pair: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the run, as one that was trained with some keys."""

    def make(name: str = "trained", **keys: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(pair, folder, ignore=shutil.ignore_patterns("evaluation", "base-*"))
        values = yaml.safe_load((folder / "recipe.yaml").read_text())
        (folder / "recipe.yaml").write_text(yaml.safe_dump({**values, **keys}))
        return folder

    return make


def test_a_run_is_evaluated_on_candidates_as_it_was_trained_to_read(pair, trained, tmp_path) -> None:
    """Defect: all candidates, silently, for a pair that was trained on the first four."""
    command = ["--data", pair / "data" / "dev.jsonl", "--limit", 8]
    shown = dro_rl("evaluate", trained(num_documents=3), *command, "--output", tmp_path / "a").output
    assert "candidates     the first 3, as recipe.yaml says" in shown
    assert report(tmp_path / "a")["conditions"]["num_documents"] == 3
    other = dro_rl("evaluate", tmp_path / "trained", *command, "--num-documents", 4, "--output", tmp_path / "b").output
    assert "the first 4\n" in other
    assert report(tmp_path / "b")["conditions"]["num_documents"] == 4
    assert "as the file has them" in dro_rl("evaluate", pair, *command, "--output", tmp_path / "c").output


def test_a_run_that_was_trained_on_shuffled_candidates_reads_shuffled_ones(pair, trained, tmp_path) -> None:
    """By the seed and the questions' ids, as its dev split was: what `compare` sees are the same candidates."""
    run = trained(shuffle_documents=True, seed=7)
    command = ["evaluate", run, "--data", pair / "data" / "dev.jsonl", "--limit", 8]
    assert "shuffled by seed 7, as recipe.yaml says" in dro_rl(*command, "--output", tmp_path / "a").output
    made = shape_candidates(load_questions(str(pair / "data" / "dev.jsonl"), "dev", limit=8), shuffle_seed=7)
    assert report(tmp_path / "a")["conditions"]["candidates_hash"] == candidates_hash(made)
    assert "as the file has them" in dro_rl(*command, "--in-order", "--output", tmp_path / "b").output


def test_the_retrievers_order_is_that_before_the_shuffling(pair, trained, tmp_path) -> None:
    """Defect: the first K of shuffled candidates, which is chance, under the name of the retriever's order."""
    command = ["evaluate", trained(shuffle_documents=True, num_documents=4, seed=7), "--limit", 8]
    command += ["--data", pair / "data" / "dev.jsonl", "--control"]
    made = load_questions(str(pair / "data" / "dev.jsonl"), "dev", limit=8)
    for name, control, shuffle_seed in (("a", "retriever-order", None), ("b", "random", 7), ("c", "gold", 7)):
        dro_rl(*command, control, "--output", tmp_path / name)
        expected = candidates_hash(shape_candidates(made, 4, shuffle_seed=shuffle_seed))
        assert report(tmp_path / name)["conditions"]["candidates_hash"] == expected
    first = [row.selection for row in read_results(tmp_path / "a" / "questions.parquet")[0]]
    assert first == [[1, 2]] * 8
    dro_rl(*command, "retriever-order", "--shuffle-documents", "--output", tmp_path / "d")
    shuffled = candidates_hash(shape_candidates(made, 4, shuffle_seed=7))
    assert report(tmp_path / "d")["conditions"]["candidates_hash"] == shuffled


def test_a_dataset_of_a_folder_that_holds_several_is_named_as_in_a_recipe(tmp_path) -> None:
    for name, count in (("nq", 3), ("wow", 5)):
        (tmp_path / "dev").mkdir(exist_ok=True)
        write_questions(tmp_path / "dev" / f"{name}.jsonl", questions(count))
        asked = job.EvaluationJob(tmp_path, str(tmp_path), config=name, split="dev")
        assert (len(job._questions(asked)[0]), job._questions(asked)[1]) == (count, f"{name}/dev")
    with pytest.raises(InputError, match="files for split dev"):
        job._questions(job.EvaluationJob(tmp_path, str(tmp_path), split="dev"))
    deep = job.EvaluationJob(tmp_path, "toy", config="16", split="dev", limit=2)
    assert (len(job._questions(deep)[0][0].documents), job._questions(deep)[1]) == (16, "toy/16/dev, first 2")


def test_a_recipe_of_the_run_that_is_broken_is_named(pair, trained) -> None:
    run = trained(num_documents=0)
    assert "num_documents: 0" in dro_rl("evaluate", run, "--data", pair / "data" / "dev.jsonl", code=2).output


def test_a_copied_run_goes_on_with_its_evaluation(pair, trained, tmp_path, monkeypatch) -> None:
    """Defect: the time of its files made it another run."""
    run = trained("run")
    command = ["--data", pair / "data" / "dev.jsonl", "--limit", 5]
    dro_rl("evaluate", run, *command)
    copy = tmp_path / "moved" / "elsewhere"
    shutil.copytree(run, copy, copy_function=shutil.copyfile)
    monkeypatch.setattr(RAGPipeline, "from_pretrained", None)
    dro_rl("evaluate", copy, *command)
    (name,) = (folder.name for folder in (copy / "evaluation").iterdir())
    one, other = (report(folder / "evaluation" / name) for folder in (run, copy))
    assert one | {"run": ""} == other | {"run": ""}


OF_THIS_VERSION = {b"dro_rl.evaluation.version": VERSION.encode()}
DAMAGES: dict[str, Callable[[Path], Any]] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "no results": lambda path: pq.write_table(pa.table({"id": ["a"]}), path),
    "a column less": lambda path: pq.write_table(pq.read_table(path).drop_columns(["em"]), path),
    "a hole": lambda path: pq.write_table(pa.Table.from_pylist([{"id": "a"}], schema=pq.read_table(path).schema), path),
    "conditions that are none": lambda path: pq.write_table(
        pq.read_table(path).replace_schema_metadata({**OF_THIS_VERSION, b"dro_rl.evaluation": b"[]"}),
        path,
    ),
    "conditions of other fields": lambda path: pq.write_table(
        pq.read_table(path).replace_schema_metadata({**OF_THIS_VERSION, b"dro_rl.evaluation": b'{"stage": 3}'}),
        path,
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_results_are_refused(evaluate, tmp_path, name: str) -> None:
    evaluate("--limit", 3)
    path = tmp_path / "out" / "questions.parquet"
    DAMAGES[name](path)
    refused = dro_rl("compare", path, path, code=2).output
    assert str(path) in refused
    assert "Evaluate again" in refused


def test_damaged_settings_are_named(evaluate, tmp_path) -> None:
    evaluate("--limit", 3)
    (tmp_path / "out" / "settings.json").write_text("{")
    assert "settings.json: not JSON" in evaluate("--limit", 3, code=2).output
    evaluate("--limit", 3, "--overwrite")


def test_gold_needs_some_label(evaluate, tmp_path) -> None:
    path = write_questions(tmp_path / "q.jsonl", [replace(q, supporting=()) for q in questions(3)])
    assert "no question has labels" in evaluate("--control", "gold", data=path, code=2).output


def test_a_control_loads_no_selector(pair, tmp_path, monkeypatch) -> None:
    loaded = []
    original = RAGPipeline.from_pretrained
    monkeypatch.setattr(RAGPipeline, "from_pretrained", lambda *a, **k: loaded.append(k["roles"]) or original(*a, **k))
    dro_rl("evaluate", pair, "--data", pair / "data" / "dev.jsonl", "--limit", 2, "--control", "random",
           "--output", tmp_path / "out")  # fmt: skip
    assert loaded == [("generator",)]


# A pair that is no finished run -----------------------------------------------------------------------------


def test_a_pair_without_settings_takes_them_from_a_recipe(pair, tmp_path, evaluate) -> None:
    bare = tmp_path / "bare"
    for role in ("selector", "generator"):
        shutil.copytree(pair / role, bare / role, ignore=shutil.ignore_patterns("prompt.jinja"))
    command = ["evaluate", bare, "--data", pair / "data" / "dev.jsonl", "--limit", 6, "--output", tmp_path / "bare-out"]
    assert "--recipe FILE" in dro_rl(*command, code=2).output
    dro_rl(*command, "--recipe", pair / "recipe.yaml")
    evaluate("--limit", 6)
    one, other = (read_results(tmp_path / name / "questions.parquet")[0] for name in ("bare-out", "out"))
    assert repr(one) == repr(other)


def test_a_folder_without_a_pair_is_refused(tmp_path) -> None:
    assert "finished run" in dro_rl("evaluate", tmp_path, "--data", "toy", code=2).output


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_read(evaluate, tmp_path, device: str) -> None:
    assert "this machine has it" in evaluate("--device", device, code=2).output
    assert not (tmp_path / "out").exists()


# Comparing --------------------------------------------------------------------------------------------------


def test_two_evaluations_are_compared_pair_by_pair(evaluate, tmp_path) -> None:
    evaluate(output="a")
    evaluate("--control", "random", output="b")
    found = json.loads(dro_rl("compare", tmp_path / "a", tmp_path / "b", "--json").output)
    (rows_a, _), (rows_b, _) = (read_results(tmp_path / name / "questions.parquet") for name in "ab")
    gains = [100 * (b.scores["f1"] - a.scores["f1"]) for a, b in zip(rows_a, rows_b, strict=True)]
    f1 = found["metrics"]["f1"]
    assert f1["difference"] == pytest.approx(sum(gains) / COUNT)
    assert (f1["wins"], f1["losses"], f1["n"]) == (sum(g > 0 for g in gains), sum(g < 0 for g in gains), COUNT)
    assert found["metrics"]["recall@1"]["n"] == COUNT - 10
    assert found["notes"] == ["what selects differs"]
    assert [change["f1_b"] - change["f1_a"] for change in found["won"]] == pytest.approx(
        sorted((g for g in gains if g > 0), reverse=True)[:5]
    )
    assert all(change["f1_b"] < change["f1_a"] for change in found["lost"])


def test_a_comparison_shows_what_was_won_and_lost(evaluate, tmp_path) -> None:
    evaluate(output="a")
    evaluate("--control", "gold", output="b")
    path = tmp_path / "comparison.json"
    shown = dro_rl("compare", tmp_path / "a", tmp_path / "b", "--output", path).output
    assert "note: 140 questions are in both, of 150 and 140" in shown
    assert "won" in shown
    assert json.loads(path.read_text())["n"] == 140


def test_evaluations_of_other_questions_are_refused(evaluate, tmp_path) -> None:
    """A higher number on other questions says nothing."""
    evaluate("--limit", 20, output="a")
    evaluate("--limit", 21, output="b")
    refused = dro_rl("compare", tmp_path / "a", tmp_path / "b", code=2).output
    assert "both evaluations are of the same questions" in refused
    assert refused.count("\n") == 1
    for name in "ab":
        assert report(tmp_path / name)["conditions"]["questions_hash"][:12] in refused


def test_a_run_with_several_evaluations_needs_a_name(pair, tmp_path) -> None:
    data = ["--data", pair / "data" / "dev.jsonl", "--limit", 4]
    for name in ("one", "two"):
        dro_rl("evaluate", pair, *data, "--output", tmp_path / "run" / "evaluation" / name)
    refused = dro_rl("compare", tmp_path / "run", tmp_path / "run", code=2).output
    assert "one, two" in refused
    assert "--name" in refused
    assert "two" in dro_rl("compare", tmp_path / "run", tmp_path / "run", "--name", "two").output
    assert "Run dro-rl evaluate first" in dro_rl("compare", tmp_path, tmp_path, code=2).output


def test_a_file_that_is_no_evaluation_is_refused(tmp_path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and no more")
    assert "Evaluate again" in dro_rl("compare", tmp_path / "x.parquet", tmp_path / "x.parquet", code=2).output
