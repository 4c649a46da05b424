"""A night's run is never lost: killed at any moment and resumed, it ends bit for bit where it would have."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import killed_job
import pytest
from apart import apart
from training_world import launch, weights, world

from dro_rl.rollouts import log as rollout_log

MOMENTS = {
    "in the first E-step": ("dro_rl.likelihood:row_logps", 2),
    "before the rollouts are in place": ("dro_rl.rollouts.log:write", 2),
    "after the rollouts are in place": ("after:dro_rl.rollouts.log:write", 2),
    "in the M-step": ("dro_rl.trainer:DROTrainer.compute_loss", 11),
    "between the two models of a checkpoint": ("dro_rl.trainer:save_role", 4),
    "before a checkpoint is in place": ("dro_rl.em.checkpoints:_copy_parts", 2),
    "after a checkpoint is in place": ("after:dro_rl.trainer:DROTrainer._save_checkpoint", 2),
    "between evaluation and checkpoint": ("dro_rl.trainer:DROTrainer._save_checkpoint", 3),
    "while the summary is written": ("dro_rl.evaluation.evaluator:write_stages", 4),
    "between the two exported models": ("dro_rl.trainer:export_role", 2),
}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    # Adam, so that optimizer state matters; a checkpoint in the middle of each iteration of two steps.
    recipe = world(
        folder, optim="adamw_torch", learning_rate=1e-3, save_steps=1, m_step_epochs=2, gradient_accumulation_steps=4,
        selector_lora_r=0, temperature=1.3, temperature_end=1.1, duplicate_threshold=0.01, num_iterations=2,
    )  # fmt: skip
    finished = launch(recipe, folder / "unbroken")
    assert finished.returncode == 0, finished.stderr[-2000:]
    temperatures = [entry["sampling/temperature"] for entry in history(folder / "unbroken") if "loss" in entry]
    assert temperatures[-1] > 1.3, "the guard, whose memory is the rollout log, has raised the second iteration's"
    return folder


def history(run: Path) -> list[dict[str, Any]]:
    """Everything that was logged, less what a clock said."""
    state = json.loads((run / "trainer_state.json").read_text())
    clock = (
        "time/",
        "tokens_per_second/",
        "train_runtime",
        "train_samples_per_second",
        "train_steps_per_second",
        "train_loss",
    )
    return [
        {name: value for name, value in entry.items() if not name.startswith(clock)} for entry in state["log_history"]
    ]


def rollouts(run: Path) -> str:
    """The log's rows as text, in which NaN equals NaN and floats are exact."""
    return repr(rollout_log.read(rollout_log.part_paths(run)).to_pylist())


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_and_resumed_run_equals_one_never_killed(unbroken: Path, moment: str) -> None:
    place, count = MOMENTS[moment]
    run = unbroken / moment.replace(" ", "-")
    options = [str(unbroken / "recipe.yaml"), "--output_dir", str(run)]
    assert apart(killed_job.run, options, place, count).returncode == -signal.SIGKILL
    rest = apart(killed_job.run, [*options, "--resume_from_checkpoint", "auto"])
    assert rest.returncode == 0, rest.stderr[-2000:]

    expected, actual = weights(unbroken / "unbroken"), weights(run)
    assert set(expected) == set(actual)
    assert all(bool((expected[name] == actual[name]).all()) for name in expected)
    assert rollouts(run) == rollouts(unbroken / "unbroken")
    assert history(run) == history(unbroken / "unbroken")
    summaries = [json.loads((r / "evaluation" / "summary.json").read_text()) for r in (unbroken / "unbroken", run)]
    assert summaries[0] == summaries[1]
    assert not list(run.glob(".*.tmp"))


def test_a_finished_run_is_not_overwritten(unbroken: Path) -> None:
    again = launch(unbroken / "recipe.yaml", unbroken / "unbroken")
    assert again.returncode == 2
    assert "holds a run" in again.stderr
    assert "Traceback" not in again.stderr


def test_a_run_is_not_resumed_with_other_settings(unbroken: Path) -> None:
    other = launch(
        unbroken / "recipe.yaml", unbroken / "unbroken", "--resume_from_checkpoint", "auto", "--learning_rate", "0.5"
    )
    assert other.returncode == 2
    assert "learning_rate: 0.5" in other.stderr
    assert "0.001" in other.stderr
