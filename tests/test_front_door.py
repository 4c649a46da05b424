"""Claims about the front door: public names, shipped recipes, `dro-rl train` and what it starts."""

from __future__ import annotations

import ast
import importlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from training_world import ROOT, world
from typer.testing import CliRunner

import dro_rl
from dro_rl import shipped
from dro_rl.cli import app
from dro_rl.errors import InputError
from dro_rl.job import launch
from dro_rl.recipe import load_recipe

DRO_RL = [sys.executable, "-c", "from dro_rl.cli import app; app()"]


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# Public names -----------------------------------------------------------------------------------------------


def test_every_public_name_is_that_of_its_room() -> None:
    """For people and for type checkers, which read what is never run."""
    tree = ast.parse(Path(dro_rl.__file__).read_text())
    checked = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dro_rl.")
        for alias in node.names
    }
    assert set(dro_rl.__all__) == {"__version__", *checked}
    for name, room in checked.items():
        assert getattr(dro_rl, name) is getattr(importlib.import_module(room), name)


def test_the_names_of_the_first_page_are_public() -> None:
    from dro_rl import DROConfig, DROTrainer, RAGPipeline, read_questions

    assert {DROConfig, DROTrainer, RAGPipeline, read_questions} <= {
        vars(dro_rl).get(n, getattr(dro_rl, n)) for n in dro_rl.__all__
    }
    with pytest.raises(AttributeError, match="no attribute 'DROTrainr'"):
        dro_rl.DROTrainr  # noqa: B018


@pytest.mark.parametrize("source", ["import dro_rl; dir(dro_rl)", "import dro_rl.cli", "from dro_rl import InputError"])
def test_what_needs_no_torch_does_not_import_it(source: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"{source}\nimport sys; print('torch' in sys.modules)"],
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.stdout == "False\n", done.stderr


READS = {
    "recipe ls": "dro_rl.cli.recipe dro_rl.shipped",
    "recipe keys": "dro_rl.keys.reference",
    "a recipe's keys": "dro_rl.recipe",
    "data check, data show": "dro_rl.data.check dro_rl.data.readers",
    "rollouts ls, show, stats, top": "dro_rl.rollouts.read dro_rl.rollouts.find dro_rl.rollouts.signals",
    "runs ls, show": "dro_rl.runs dro_rl.job.console",
    "compare": "dro_rl.evaluation.comparison dro_rl.evaluation.report",
    "retrieval report": "dro_rl.retrieval.report",
}


@pytest.mark.parametrize("command", READS)
def test_a_command_that_only_reads_files_does_not_wait_for_torch(command: str) -> None:
    modules = READS[command].replace(" ", ", ")
    done = subprocess.run([sys.executable, "-c", f"import {modules}, sys; print('torch' in sys.modules)"],
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.stdout == "False\n", done.stderr


# Shipped recipes --------------------------------------------------------------------------------------------


def test_a_recipe_is_found_by_its_name_wherever_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()  # a folder of that name is no recipe
    assert load_recipe("quickstart").values == load_recipe(ROOT / "recipes" / "quickstart.yaml").values
    assert shipped.find("quickstart.yaml") == shipped.find("quickstart")


def test_a_file_goes_before_a_shipped_recipe_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart.yaml").write_text("num_iterations: 3\n")
    assert shipped.find("quickstart.yaml") == Path("quickstart.yaml")


@pytest.mark.parametrize("name", ["quickstrt", "runs/quickstart", "../quickstart.yaml", "", "."])
def test_a_recipe_that_is_nowhere_is_one_line(name: str) -> None:
    with pytest.raises(InputError, match="no such file: this is a YAML file, or one of 2wiki") as error:
        load_recipe(name)
    assert ("Did you mean quickstart?" in str(error.value)) == ("quickst" in name)


def test_recipe_ls_names_all_with_what_they_train() -> None:
    listed = dict(re.split(r"  +", line, maxsplit=1) for line in run("recipe", "ls").stdout.splitlines())
    assert set(listed) == {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    assert listed["musique"] == "MuSiQue, the paper's setting"


def test_recipe_show_prints_the_file() -> None:
    assert run("recipe", "show", "nq").stdout == (ROOT / "recipes" / "nq.yaml").read_text()


def test_recipe_cp_copies_and_replaces_nothing_unless_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("recipe", "cp", "quickstart", "mine/own.yaml").exit_code == 0
    assert load_recipe("mine/own.yaml").values == load_recipe("quickstart").values
    assert run("recipe", "cp", "quickstart").stdout == "quickstart.yaml\n"
    (tmp_path / "quickstart.yaml").write_text("changed")
    again = run("recipe", "cp", "quickstart")
    assert again.exit_code == 2
    assert "error: quickstart.yaml: it is there" in again.stderr
    assert (tmp_path / "quickstart.yaml").read_text() == "changed"
    assert run("recipe", "cp", "quickstart", "--force").exit_code == 0
    assert load_recipe("quickstart.yaml").values == load_recipe("quickstart").values


# What `dro-rl train` starts ---------------------------------------------------------------------------------


class Started(Exception):
    """In place of a process."""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """What would have been started: a command with its environment, or accelerate's arguments for several."""
    found: list[Any] = []

    def become(file: str, command: Sequence[str], environment: dict[str, str]) -> None:
        found.append((command, environment))
        raise Started

    def several(args: Any) -> None:
        found.append(args)

    monkeypatch.setattr(launch.logging, "disable", lambda level: None)
    monkeypatch.setattr(launch.os, "execvpe", become)
    monkeypatch.setattr(launch, "launch_command", several)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    return found


def test_one_process_where_there_is_no_more_than_one_device(started: list[Any]) -> None:
    with pytest.raises(Started):
        launch.launch_job("", ["quickstart", "--seed", "1", "--bf16"])
    ((command, environment),) = started
    assert command == [sys.executable, str(ROOT / "dro_rl" / "train.py"), "quickstart", "--seed", "1", "--bf16"]
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"


def test_options_of_accelerate_reach_it_and_its_configurations_have_names(started: list[Any]) -> None:
    with pytest.raises(Started):
        launch.launch_job("--config_file cpu --mixed_precision bf16", ["quickstart"])
    assert started[0][1]["ACCELERATE_USE_CPU"] == "True"
    assert started[0][1]["ACCELERATE_MIXED_PRECISION"] == "bf16"


def test_several_processes_where_the_configuration_says_so(started: list[Any]) -> None:
    assert launch.launch_job("--config_file fsdp2 --num_processes 4", ["musique", "--output_dir", "runs/x"]) == 0
    (args,) = started
    assert args.num_processes == 4
    assert args.training_script_args == ["musique", "--output_dir", "runs/x"]


@pytest.fixture
def three_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)


def test_several_devices_have_a_process_each(started: list[Any], three_devices: None) -> None:
    assert launch.launch_job("", ["quickstart"]) == 0
    assert len(started) == 1


def test_a_recipe_for_the_cpu_has_one_process_among_several_devices(started: list[Any], three_devices: None) -> None:
    with pytest.raises(Started):
        launch.launch_job("", ["quickstart"], on_cpu=True)
    assert started[0][1]["ACCELERATE_USE_CPU"] == "True"


def test_options_go_before_a_recipe_for_the_cpu(started: list[Any], three_devices: None) -> None:
    """Two processes on a CPU are what ddp.yaml gives under ACCELERATE_USE_CPU."""
    assert launch.launch_job("--config_file ddp --num_processes 2", ["quickstart"], on_cpu=True) == 0


def test_a_wrong_key_is_refused_before_anything_starts(started: list[Any]) -> None:
    done = run("train", "quickstart", "--num_iteration", "3", "--launch", "--nonsense")
    assert done.exit_code == 2
    assert done.stderr == "error: num_iteration: 3: there is no such key. Did you mean num_iterations?\n"


def test_recipe_keys_finds_a_key_by_a_word() -> None:
    said = run("recipe", "keys", "num_iterations").stdout
    assert re.search(r"^ +num_iterations: .+ \[.+\]\n +\S", said, re.MULTILINE)
    assert "learning_rate" not in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--num_proceses 2", "unrecognized arguments: --num_proceses"),
        ("--num_processes two", "argument --num_processes"),
        ("--config_file nowhere", "one of cpu, ddp, fsdp2"),
        ("--multi_gpu --num_processes 1", "at least 2 processes"),
        ("'--config_file cpu", "No closing quotation"),
        ("--cpu --multi_gpu", "You can only use one of"),
    ],
)
def test_options_that_accelerate_does_not_take_are_one_line(started: list[Any], options: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        launch.launch_job(options, ["quickstart"])
    assert "\n" not in str(error.value)
    assert not started


def test_deepspeed_that_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.logging, "disable", lambda level: None)
    monkeypatch.setattr("accelerate.commands.launch.is_deepspeed_available", lambda: False)
    with pytest.raises(InputError, match="DeepSpeed is not installed"):
        launch.launch_job("--config_file zero3", ["quickstart"])


# Processes --------------------------------------------------------------------------------------------------

TWO = "--config_file ddp --num_processes 2 --mixed_precision no --main_process_port 0"


@pytest.mark.slow
def test_a_mistake_is_one_line_from_two_processes(tmp_path: Path) -> None:
    recipe = world(tmp_path, dataset_name=str(tmp_path / "nowhere"))
    done = subprocess.run([*DRO_RL, "train", str(recipe), "--launch", TWO], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: dataset_name: ")
    assert done.stderr.count("\n") == 1


def processes_of(folder: Path) -> list[int]:
    """Whoever has the folder's name in its command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder) in (process / "cmdline").read_text():
                found.append(int(process.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "options", "processes"),
    [(signal.SIGTERM, "", 1), (signal.SIGINT, TWO, 3)],
    ids=["SIGTERM, one process", "SIGINT, two under a launcher"],
)
def test_a_signal_ends_every_process_in_one_line(
    tmp_path: Path, number: signal.Signals, options: str, processes: int
) -> None:
    recipe = world(tmp_path, num_iterations=1000, eval_iterations=1000)
    command = [*DRO_RL, "train", str(recipe), "--launch", options]
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        job = subprocess.Popen(command, stdout=out, stderr=err, start_new_session=True)
        try:
            while not list(tmp_path.glob("run/rollouts/*.parquet")):
                assert job.poll() is None, (tmp_path / "err").read_text()
                time.sleep(0.1)
            assert len(processes_of(tmp_path)) == processes
            os.kill(job.pid, number)
            assert job.wait(60) == 128 + number
        finally:
            job.kill()
    assert processes_of(tmp_path) == []
    last = (tmp_path / "err").read_text().splitlines()[-1]
    assert last == f"stopped by {number.name}. The same command with --resume_from_checkpoint auto goes on."
    assert "Traceback" not in (tmp_path / "err").read_text()


# The wheel --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_wheel_in_an_empty_environment_trains_the_quick_start(tmp_path: Path) -> None:
    """It holds every file that the package needs. What the package depends on is borrowed from this environment."""
    build = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), "--quiet"], check=True, timeout=120)
    (wheel,) = tmp_path.glob("dro_rl-*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True, timeout=120)
    bin, (site,) = tmp_path / "venv" / "bin", (tmp_path / "venv" / "lib").glob("*/site-packages")
    # Read after the environment's own packages. A path file within it, which may point here, is not followed.
    (site / "borrowed.pth").write_text(str(Path(yaml.__file__).parent.parent))
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    subprocess.run(
        [bin / "pip", "install", "--no-deps", "--no-index", "--quiet", wheel], env=alone, check=True, timeout=120
    )
    small = ["--num_iterations", "2", "--eval_iterations", "2", "--max_eval_samples", "8", "--max_train_samples", "64",
             "--warmup_selector_steps", "2", "--warmup_generator_steps", "2",
             "--warmup_cache_dir", str(tmp_path / "cache")]  # fmt: skip
    done = subprocess.run(
        [bin / "dro-rl", "train", "quickstart", *small],
        cwd=tmp_path,
        env=alone,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "quickstart" / "generator" / "model.safetensors").is_file()
    home = subprocess.run(
        [bin / "python", "-c", "import dro_rl; print(dro_rl.__file__)"],
        cwd=tmp_path,
        env=alone,
        capture_output=True,
        text=True,
    )
    assert home.stdout.startswith(str(site))
