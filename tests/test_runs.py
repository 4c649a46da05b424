"""Claims about `dro-rl runs`: what a folder says of its run, whatever state that is in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dro_rl.cli import app
from dro_rl.errors import InputError
from dro_rl.evaluation.stages import best_stage, write_stages
from dro_rl.locks import LOCK, owned, owner_of
from dro_rl.runs import read_run, runs_in

RECIPE = "output_dir: x\nnum_iterations: 9\nnum_selected: 3\n"


def stage(name: str, f1: float) -> dict[str, Any]:
    figures = {"em": f1 - 1, "f1": f1, "recall@1": 1.0, "recall@3": 2.0, "answer_logp": -1.0, "valid": 100.0}
    return {"stage": name, "split": "dev", "n": 10, **figures}


def run_in(folder: Path, *stages: dict[str, Any], rollouts: int = 0, recipe: str = RECIPE) -> Path:
    """A run's folder; one whose stages end with `final` has ended."""
    (folder / "rollouts").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe)
    for iteration in range(1, rollouts + 1):
        (folder / "rollouts" / f"iteration-{iteration:05d}-part-00000.parquet").touch()
    if stages:
        write_stages(folder, stages)
    if stages and stages[-1]["stage"] == "final":
        logged = [{"step": 1, "signals/clean": 1.0, "signals/valid": 0.0}, {"step": 1, "eval_f1": 3.0}]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": logged}))
    return folder


def invoke(*arguments: object, columns: int = 80) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": str(columns)})


def listed(folder: Path) -> dict[str, dict[str, Any]]:
    result = invoke("runs", "ls", folder, "--json")
    assert result.exit_code == 0, result.output
    return {str(Path(run["path"]).relative_to(folder)): run for run in json.loads(result.stdout)["runs"]}


def test_ls_finds_runs_at_any_depth_and_none_within_a_run(tmp_path: Path) -> None:
    run_in(tmp_path / "a" / "seed-0")
    run_in(tmp_path / "a" / "seed-0" / "checkpoint-1")
    run_in(tmp_path / ".hidden")
    run_in(tmp_path / "b")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "recipe.yaml").write_text(RECIPE)  # anybody's
    assert [str(path.relative_to(tmp_path)) for path in runs_in(tmp_path)] == ["a/seed-0", "b"]
    assert [path.name for path in runs_in(tmp_path / "b")] == ["b"]


def test_ls_says_state_stage_metrics_what_is_kept_and_warnings(tmp_path: Path) -> None:
    stages = [stage("base", 5.0), stage("iteration-3", 7.0), stage("iteration-6", 6.0)]
    run_in(tmp_path / "ended", *stages, stage("final", 7.0), rollouts=6)
    run_in(tmp_path / "killed", *stages, rollouts=7)
    run_in(tmp_path / "young")
    found = listed(tmp_path)
    assert {name: run["state"] for name, run in found.items()} == {
        "ended": "finished",
        "killed": "stopped",
        "young": "stopped",
    }
    ended, killed, young = found["ended"], found["killed"], found["young"]
    assert (ended["stage"], ended["metrics"]["f1"], ended["kept"], ended["warnings"]) == (
        "final",
        7.0,
        "iteration-3",
        ["clean"],
    )
    assert (killed["iteration"], killed["iterations"], killed["stage"]) == (7, 9, "iteration-6")
    assert (young["stage"], young["kept"], young["iteration"]) == (None, None, 0)
    assert ended["disk_bytes"] == sum(path.stat().st_size for path in (tmp_path / "ended").rglob("*") if path.is_file())


def test_a_run_that_a_job_owns_runs(tmp_path: Path) -> None:
    run = run_in(tmp_path / "run")
    with owned(run / LOCK, "output_dir"):
        found = read_run(run)
    assert found.state == "running"
    assert found.owner is not None
    assert found.owner.startswith("process ")
    assert read_run(run).state == "stopped"


def test_a_lock_file_that_a_killed_process_left_is_nobodys(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("process 1 on here")
    assert owner_of(tmp_path / LOCK) is None
    with owned(tmp_path / LOCK, "output_dir"):
        assert owner_of(tmp_path / LOCK) is not None


@pytest.mark.parametrize(
    ("values", "greater", "best"),
    [
        ({"base": 5, "iteration-1": 7, "iteration-2": 7}, True, "iteration-1"),
        ({"base": 7, "iteration-1": 7}, True, "iteration-1"),
        ({"base": 9, "warmup": 6, "iteration-1": 5}, True, "warmup"),
        ({"base": 5, "iteration-1": 7, "iteration-2": 6}, False, "base"),
        ({"base": 5, "final": 9}, True, "base"),
        ({}, True, None),
    ],
)
def test_what_would_be_kept_is_what_the_trainer_would_keep(
    values: dict[str, float], greater: bool, best: str | None
) -> None:
    assert best_stage([{"stage": name, "f1": value} for name, value in values.items()], "f1", greater) == best


def test_without_the_best_model_the_last_iteration_is_kept(tmp_path: Path) -> None:
    stages = [stage("base", 5.0), stage("iteration-3", 7.0), stage("iteration-6", 6.0)]
    run = run_in(tmp_path / "run", *stages, recipe=f"{RECIPE}load_best_model_at_end: false\n")
    assert read_run(run).kept == "iteration-6"


def test_a_damaged_run_hides_no_other(tmp_path: Path) -> None:
    run_in(tmp_path / "a", recipe="num_iterations: [")
    run_in(tmp_path / "b")
    (run_in(tmp_path / "c", stage("base", 1.0)) / "evaluation" / "summary.json").write_text('{"stages": 3}')
    found = listed(tmp_path)
    assert {name: run["state"] for name, run in found.items()} == {"a": "damaged", "b": "stopped", "c": "damaged"}
    assert "recipe.yaml" in found["a"]["error"]
    with pytest.raises(InputError, match="other fields"):
        read_run(tmp_path / "c")


def test_show_prints_the_end_again(tmp_path: Path) -> None:
    """From what the job wrote into run.json, signals that are over among it."""
    run = run_in(tmp_path / "run", stage("base", 5.0), stage("iteration-9", 7.0), stage("final", 7.0), rollouts=9)
    over = {"name": "clean", "iterations": "1-4", "reading": "clean 99 %", "keys": ["warmup"], "stands": False}
    rates = {"time/e_step": 6.0, "time/m_step": 2.0, "tokens_per_second/e_step": 1234.5}
    ended = {"at": "2000-01-01T00:00:00+00:00", "kept": "iteration-9", "rates": rates, "signals": [over]}
    (run / "run.json").write_text(json.dumps({"inputs": {}, "sessions": [{}, {"ended": ended}]}))
    text = invoke("runs", "show", run).stdout
    for part in ("e_step", "75.0%", "1,234", "clean: over", "iteration-9, of 1 evaluated, with f1 7.00; base had 5.00"):
        assert part in text
    assert json.loads(invoke("runs", "show", run, "--json").stdout)["ending"] == ended


def test_show_of_a_run_that_goes_on_says_where_it_is(tmp_path: Path) -> None:
    run = run_in(tmp_path / "run", stage("base", 5.0), stage("iteration-1", 7.0), rollouts=2)
    text = invoke("runs", "show", run).stdout
    assert "state       stopped, iteration 2 of 9" in text
    assert "would keep  iteration-1, of 1 evaluated, with f1 7.00; base had 5.00" in text


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_ls_is_readable_at_any_width(tmp_path: Path, columns: int) -> None:
    run_in(tmp_path / "東京[red]\x1b[31m", stage("base", 5.0))
    result = invoke("runs", "ls", tmp_path, columns=columns)
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout
    assert "stopped" in result.stdout
    assert "0/9" in result.stdout


@pytest.mark.parametrize("arguments", [("ls", "nowhere"), ("show", "nowhere"), ("show", ".")])
def test_what_is_no_run_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str]) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("runs", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
