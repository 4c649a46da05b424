"""The whole job on real questions of the five datasets, with models too small to learn and large enough to run."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from dro_rl import train
from dro_rl.cli import app
from dro_rl.evaluation.stages import read_stages
from dro_rl.pipeline import RAGPipeline
from dro_rl.records import read_questions
from dro_rl.rollouts import log as rollout_log
from dro_rl.toy.tiny_model import build

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("DRO_RL_DATA") or ROOT.parent / "shared" / "data")
DATASETS = ("musique", "hotpotqa", "2wikimultihopqa", "nq", "wow")

pytestmark = [
    pytest.mark.real_data,
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason="no question files at DRO_RL_DATA or ../shared/data"),
]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs by dataset, each made once."""
    return {}


@pytest.fixture(params=DATASETS)
def finished(request: pytest.FixtureRequest, run_of: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    name = request.param
    if name not in run_of:
        folder = tmp_path_factory.mktemp(name)
        questions = read_questions(DATA / "train" / f"{name}.jsonl.gz")
        for role, seed in (("selector", 1), ("generator", 2)):
            build(questions[:64], folder / role, vocab_size=2048, hidden_size=32, layers=1, seed=seed)
        keys = {
            "dataset_name": DATA,
            "selector_model_name_or_path": folder / "selector",
            "generator_model_name_or_path": folder / "generator",
            "output_dir": folder / "run",
            "warmup_cache_dir": folder / "cache",
            "max_train_samples": 4,
            "max_eval_samples": 2,
            "num_iterations": 1,
            "questions_per_iteration": "null",
            "num_generations": 4,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "per_device_eval_batch_size": 4,
            "max_prompt_length": 1024,
            "max_completion_length": 32,
            "max_answer_length": 8,
            "warmup_selector_steps": 2,
            "warmup_generator_steps": 2,
            "warmup_batch_size": 2,
            "report_to": "none",
            "disable_tqdm": "true",
        }
        options = [part for key, value in keys.items() for part in (f"--{key}", str(value))]
        train.main([str(ROOT / "recipes" / f"{name}_smoke.yaml"), *options])
        run_of[name] = folder / "run"
    return run_of[name]


def test_all_files_of_a_run_are_there(finished: Path) -> None:
    for name in ("recipe.yaml", "trainer_state.json", "pipeline.json", "evaluation/summary.json"):
        assert (finished / name).is_file(), name
    for role in ("selector", "generator"):
        AutoModelForCausalLM.from_pretrained(finished / role)
    assert (finished / "checkpoint-2" / "trainer_state.json").is_file()
    assert rollout_log.read(rollout_log.part_paths(finished)).num_rows == 4 * 4
    assert not list(finished.rglob(".*.tmp"))


def test_every_stage_is_reported_with_finite_numbers(finished: Path) -> None:
    stages = read_stages(finished)
    assert [stage["stage"] for stage in stages] == ["base", "warmup", "iteration-1", "final"]
    for stage in stages:
        assert stage["n"] == 2
        assert all(math.isfinite(stage[name]) for name in ("em", "f1", "answer_logp", "valid"))


def test_every_logged_number_is_finite(finished: Path) -> None:
    history = json.loads((finished / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    assert len(steps) == 2
    for entry in steps:
        assert all(value is None or math.isfinite(value) for value in entry.values() if not isinstance(value, str))


def test_rollouts_name_the_documents_of_their_question(finished: Path) -> None:
    name = finished.parent.name.rstrip("0123456789")
    known = {question.id: question for question in read_questions(DATA / "train" / f"{name}.jsonl.gz")}
    for row in rollout_log.read(rollout_log.part_paths(finished)).to_pylist():
        question = known[row["question_id"]]
        assert row["document_ids"] == [question.documents[number - 1].id for number in row["selection"]]
        assert row["valid"] == bool(row["selection"])
        assert math.isfinite(row["selection_logp"])
        assert math.isfinite(row["answer_logp"]) == row["valid"]


def test_the_trained_pair_answers(finished: Path) -> None:
    name = finished.parent.name.rstrip("0123456789")
    question = read_questions(DATA / "dev" / f"{name}.jsonl.gz")[0]
    answer = RAGPipeline.from_pretrained(finished).answer(question.question, question.documents)
    assert set(answer.selection.numbers) <= set(range(1, 21))


def test_the_trained_pair_is_evaluated_and_compared_with_its_controls(finished: Path, tmp_path: Path) -> None:
    name = finished.parent.name.rstrip("0123456789")
    for control in ("none", "gold"):
        done = CliRunner().invoke(
            app,
            ["evaluate", str(finished), "--data", str(DATA / "dev" / f"{name}.jsonl.gz"), "--limit", "3",
             "--control", control, "--output", str(tmp_path / control)],
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        report = json.loads((tmp_path / control / "report.json").read_text())
        assert report["conditions"]["split"] == f"{name}/dev, first 3"
        assert all(
            math.isfinite(report["metrics"][metric]["mean"]) for metric in ("em", "f1", "rouge_l", "answer_logp")
        )
    assert report["metrics"]["precision@1"]["mean"] == 100
    done = CliRunner().invoke(app, ["compare", str(tmp_path / "none"), str(tmp_path / "gold")])
    assert done.exit_code == 0, done.output
    assert "what selects differs" in done.output


@pytest.mark.parametrize("name", ["nq", "hotpotqa", "musique"])
def test_the_recipes_of_the_small_pretrained_model_train(name: str, tmp_path: Path) -> None:
    """With another model in its place: keys, prompts, warm-up, orders and controls on real questions."""
    questions = read_questions(DATA / "train" / f"{name}.jsonl.gz")[:64]
    build(questions, tmp_path / "model", vocab_size=2048, hidden_size=32, layers=1, seed=1)
    keys = {
        "dataset_name": DATA,
        "selector_model_name_or_path": tmp_path / "model",
        "generator_model_name_or_path": tmp_path / "model",
        "output_dir": tmp_path / "run",
        "warmup_cache_dir": tmp_path / "cache",
        "warmup_selector_steps": 2,
        "warmup_generator_steps": 2,
        "max_train_samples": 16,
        "max_eval_samples": 4,
        "num_iterations": 2,
        "max_prompt_length": 1024,
        "report_to": "none",
        "disable_tqdm": "true",
    }
    options = [part for key, value in keys.items() for part in (f"--{key}", str(value))]
    train.main([str(ROOT / "recipes" / f"{name}_smollm2.yaml"), *options])
    assert [stage["stage"] for stage in read_stages(tmp_path / "run")] == ["base", "warmup", "iteration-2", "final"]
    rows = rollout_log.read(rollout_log.part_paths(tmp_path / "run")).to_pylist()
    assert all(row["valid"] and not row["problems"] for row in rows)
    orders = {tuple(row["order"]) for row in rows if row["position"] == 0 and row["iteration"] == 1}
    assert len(orders) == (1 if name == "nq" else 2)
    command = [
        "evaluate",
        str(tmp_path / "run"),
        "--data",
        str(DATA),
        "--config",
        name,
        "--split",
        "dev",
        "--limit",
        "2",
    ]
    done = CliRunner().invoke(app, [*command, "--control", "retriever-order"])
    assert done.exit_code == 0, done.output
