"""Claims about every command of `dro-rl`: examples, JSON, exit statuses, no traceback, and what is imported."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from dro_rl.cli import app
from dro_rl.errors import InputError, LackError, from_system


def leaves(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    if hasattr(command, "commands"):
        for name, sub in command.commands.items():
            yield from leaves(sub, (*path, name))
    else:
        yield " ".join(path), command


COMMANDS = dict(leaves(typer.main.get_command(app)))
JOBS = {"train", "study run", "serve-rollouts", "serve"}
"""They start something that runs, and print no answer."""


def invoke(*arguments: object, columns: int = 80) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": str(columns)})


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_a_command_does_with_examples_of_itself(name: str) -> None:
    result = invoke(*name.split(), "--help")
    assert result.exit_code == 0
    _, _, examples = result.stdout.partition("Examples:\n")
    assert f"dro-rl {name}" in examples
    assert "\x1b" not in result.stdout


GROUPS = [group.name for group in typer.main.get_command(app).commands.values() if hasattr(group, "commands")]


@pytest.mark.parametrize("name", GROUPS)
def test_a_group_s_help_has_examples_too(name: str) -> None:
    assert f"    dro-rl {name} " in invoke(name, "--help").stdout.partition("Examples:\n")[2]


@pytest.mark.parametrize("name", COMMANDS)
def test_arguments_and_outputs_are_named_alike(name: str) -> None:
    usage = invoke(*name.split(), "--help").stdout.splitlines()[0]
    assert "[[" not in usage
    assert "…" not in usage
    for parameter in COMMANDS[name].params:
        if "--output" in parameter.opts:
            assert "-o" in parameter.opts


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - JOBS))
def test_what_prints_an_answer_prints_it_as_json(name: str) -> None:
    assert "--json" in {option for parameter in COMMANDS[name].params for option in parameter.opts}


@pytest.mark.parametrize(
    "arguments",
    [
        ["recipe", "ls"],
        ["recipe", "show", "musique"],
        ["recipe", "keys", "warmup"],
        ["recipe", "diff", "musique", "nq"],
        ["study", "ls"],
    ],
)
def test_json_is_one_document(arguments: list[str]) -> None:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)


@pytest.mark.parametrize(
    "arguments",
    [
        ["rollouts", "ls", "nowhere"],
        ["rollouts", "show", "nowhere", "q"],
        ["rollouts", "export", "nowhere", "--output", "x.jsonl"],
        ["runs", "show", "nowhere"],
        ["recipe", "show", "nowhere"],
        ["recipe", "diff", "nowhere", "musique"],
        ["recipe", "resolve", "nowhere"],
        ["recipe", "cp", "nowhere"],
        ["study", "show", "nowhere"],
        ["compare", "nowhere", "elsewhere"],
        ["retrieval", "report", "nowhere"],
        ["no-such-command"],
        ["rollouts", "ls"],
        ["rollouts", "top", "nowhere", "--sort", "size"],
    ],
)
def test_a_users_mistake_ends_with_two_and_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert "rror" in result.stderr


def test_what_the_machine_lacks_ends_with_three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "duckdb", None)
    result = invoke("rollouts", "sql", tmp_path, "select 1")
    assert result.exit_code == 3
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("number", "status"), [(errno.ENOSPC, 3), (errno.EDQUOT, 3), (errno.ENOENT, 2), (errno.EISDIR, 2)]
)
def test_a_full_disk_is_the_machines_and_a_wrong_path_the_users(number: int, status: int) -> None:
    found = from_system(OSError(number, "said", "a file"))
    assert found is not None
    assert found.status == status
    assert (InputError.status, LackError.status) == (2, 3)


def test_shells_complete_commands() -> None:
    assert "--install-completion" in invoke("--help").stdout


FILES_ALONE = [
    ["recipe", "ls"],
    ["recipe", "show", "musique", "--json"],
    ["recipe", "keys"],
    ["recipe", "diff", "musique", "nq"],
    ["recipe", "resolve", "nowhere"],
    ["study", "ls"],
    ["study", "show", "nowhere"],
    ["report", "nowhere"],
    ["runs", "ls", "."],
    ["runs", "show", "nowhere"],
    ["compare", "nowhere", "elsewhere"],
    *([["rollouts", name, "nowhere"] for name in ("ls", "show", "stats", "top", "diff", "watch")]),
    ["rollouts", "export", "nowhere", "--output", "x.jsonl"],
]


def test_what_reads_files_alone_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom dro_rl.cli import app\n"
        f"for arguments in {FILES_ALONE!r}:\n"
        "    CliRunner().invoke(app, arguments)\n"
        "    assert 'torch' not in sys.modules, arguments\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
