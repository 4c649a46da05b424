"""Claims about the doctor: what is broken ends with status 3 and a way out; what is missing and optional is a note."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from dro_rl import doctor
from dro_rl.cli import app


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["doctor", *arguments])


def found(name: str) -> doctor.Finding:
    return next(each for each in doctor.examine(self_test=False) if each.check == name)


def version_of(others: dict[str, str | None]) -> Callable[[str], str]:
    known = importlib.metadata.version

    def version(name: str) -> str:
        told = others[name] if name in others else known(name)
        if told is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return told

    return version


def test_a_whole_machine_is_fine() -> None:
    done = run("--no-self-test", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["ok"]
    assert {"python", "versions", "cpu", "gpu", "vllm", "colbert", "dense", "serve", "disk"} <= {
        each["check"] for each in told["findings"]
    }


@pytest.mark.parametrize(
    ("package", "version", "says"),
    [
        ("bm25s", None, "not installed"),
        ("trl", "2.0.0", "dro_rl wants"),
        ("transformers", "4.57.0", "dro_rl wants"),
    ],
)
def test_a_package_that_is_missing_or_out_of_range_is_broken(
    package: str, version: str | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", version_of({package: version}))
    done = run("--no-self-test")
    assert done.exit_code == 3
    assert says in done.stdout
    assert f"pip install '{package}" in done.stdout


def test_another_version_than_tested_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    tested = doctor.tested_versions()
    monkeypatch.setattr(importlib.metadata, "version", version_of({"scipy": "1.15.9"}))
    note = found("versions")
    assert note.state == "note"
    assert f"scipy 1.15.9 ({tested['scipy']})" in note.says


@pytest.mark.parametrize(
    ("extra", "module"), [("vllm", "vllm"), ("colbert", "colbert"), ("dense", "faiss"), ("serve", "uvicorn")]
)
def test_a_missing_extra_is_a_note_with_its_name(extra: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == module else known(name, *rest))
    note = found(extra)
    assert (note.state, note.fix) == ("note", f"pip install 'dro_rl[{extra}]' to have it.")


def test_a_check_that_fails_is_broken_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> Any:
        raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(doctor, "_devices", fails)
    states = {each.check: each for each in doctor.examine(self_test=False)}
    assert states["devices"].state == "broken"
    assert "libcudart" in states["devices"].says
    assert "disk" in states


def test_a_step_that_fails_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = SimpleNamespace(returncode=1, stderr="Traceback\nRuntimeError: illegal instruction\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    (last,) = [each for each in doctor.examine() if each.check == "self-test"]
    assert (last.state, last.says) == ("broken", "exit status 1: RuntimeError: illegal instruction")


@pytest.mark.slow
def test_a_step_is_trained_whole() -> None:
    (last,) = list(doctor._self_test())
    assert last.state == "ok", last
