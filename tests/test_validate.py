"""Claims about `dro-rl recipe validate`: it says what training would say before it loads a model, and how much."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from training_world import world
from typer.testing import CliRunner

from dro_rl.cli import app


def validate(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["recipe", "validate", *map(str, arguments)])


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve training questions of five documents; four questions a step, eight an iteration, two iterations."""
    return world(tmp_path_factory.mktemp("validate"))


def test_it_says_what_would_be_trained_and_how_much(recipe: Path) -> None:
    result = validate(recipe)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"ok {recipe}: selector_model_name_or_path ")
    assert ", questions 12, questions_per_step 4, steps 4, rollouts 64, disk_gib 0.0" in result.stdout
    (found,) = json.loads(validate(recipe, "--json").stdout)["recipes"]
    assert (found["ok"], found["file"], found["num_generations"], found["steps"]) == (True, str(recipe), 4, 4)


def test_more_processes_mean_more_questions_a_step(recipe: Path) -> None:
    assert "questions_per_step 8, steps 2" in validate(recipe, "--processes", 2).stdout
    assert "questions_per_iteration: 8: an iteration has whole steps of 16" in validate(recipe, "--processes", 4).stderr


def test_a_run_that_stops_before_its_last_iteration_samples_less(recipe: Path) -> None:
    assert "steps 1, rollouts 32" in validate(recipe, "--max_steps", 1).stdout


def test_an_optimizer_whose_library_is_missing_is_refused(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    result = validate(recipe, "--optim", "adamw_8bit")
    assert result.exit_code == 2
    assert "optim: 'adamw_8bit': the optimizer can be made of this" in result.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--num_selected", "6"], "num_selected: 6: question q0 has 5 documents"),
        (["--num_documents", "1"], "num_selected: 2: num_documents: 1 are there"),
        (["--dataset_name", "none.jsonl"], "dataset_name: 'none.jsonl': a question file or folder exists"),
        (["--generator_model_name_or_path", "/none"], "generator_model_name_or_path: '/none': this is a model folder"),
        (["--max_steps", "5"], "max_steps: 5: num_iterations: 2 is 4 steps in all"),
        (["--selector_prompt_template", "none.jinja"], "'none.jinja'"),
        (["--num_generation", "4"], "num_generation: 4: there is no such key"),
    ],
)
def test_it_refuses_what_training_refuses(recipe: Path, overrides: list[str], message: str) -> None:
    result = validate(recipe, *overrides)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {recipe}: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_every_file_is_checked_whatever_is_wrong_with_another(recipe: Path, tmp_path: Path) -> None:
    bad, none = tmp_path / "bad.yaml", tmp_path / "none.yaml"
    bad.write_text("seed: -1\n")
    result = validate(bad, none, recipe, "--json")
    assert result.exit_code == 2
    found = json.loads(result.stdout)["recipes"]
    assert [entry["ok"] for entry in found] == [False, False, True]
    assert found[0]["error"].startswith(f"{bad}: ")
    assert found[1]["error"].count("none.yaml") == 1


def test_keys_can_be_checked_where_data_and_models_are_elsewhere(recipe: Path) -> None:
    absent = ["--dataset_name", "elsewhere.jsonl", "--selector_model_name_or_path", "/elsewhere"]
    assert validate(recipe, "--keys-only", *absent).exit_code == 0
    assert "seed: -1" in validate(recipe, "--keys-only", "--seed", "-1").stderr
