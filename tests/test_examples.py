"""The examples run as they are written, one after the other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(*arguments: str) -> str:
    finished = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=300, check=False, cwd=ROOT
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    return finished.stdout


def test_a_pair_trained_in_python_answers(tmp_path: Path) -> None:
    assert "step 3/3" in run("examples/train_in_python.py", str(tmp_path / "run"))
    printed = run("examples/answer.py", str(tmp_path / "run"))
    assert printed.startswith("answer ")
    assert "selection " in printed


def test_every_example_is_tested() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == {"answer.py", "train_in_python.py"}
