"""A job ends with whoever started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

JOB = """
import sys, time
from pathlib import Path
from dro_rl.job.stopping import Stopped, stop_on_signals, stop_with_launcher
stop_on_signals()
stop_with_launcher()
said = Path(sys.argv[1])
try:
    said.write_text("at work")
    time.sleep(int(sys.argv[2]))
    said.write_text("done")
except Stopped as stopped:
    said.write_text(f"stopped by {stopped.number}")
"""
LAUNCHER = """
import subprocess, sys
subprocess.Popen([sys.executable, *sys.argv[1:]]).wait()
"""


def until(said: Path, text: str) -> None:
    deadline = time.monotonic() + 60
    while not said.exists() or said.read_text() != text:
        assert time.monotonic() < deadline, said.read_text()
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_launcher_that_is_ended_takes_the_job_with_it(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "accelerate").write_text(LAUNCHER)
    (tmp_path / "job.py").write_text(JOB)
    said = tmp_path / "said"
    launcher = subprocess.Popen([sys.executable, *map(str, (tmp_path / "accelerate", tmp_path / "job.py", said, 60))])
    until(said, "at work")
    os.kill(launcher.pid, number)
    launcher.wait()
    until(said, f"stopped by {signal.SIGTERM.value}")


def test_a_shell_that_ends_leaves_the_job_at_work(tmp_path: Path) -> None:
    """As after nohup."""
    (tmp_path / "shell").write_text(LAUNCHER)
    (tmp_path / "job.py").write_text(JOB)
    said = tmp_path / "said"
    shell = subprocess.Popen([sys.executable, *map(str, (tmp_path / "shell", tmp_path / "job.py", said, 3))])
    until(said, "at work")
    shell.kill()
    shell.wait()
    until(said, "done")
