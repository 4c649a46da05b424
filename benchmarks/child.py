"""A command in a process of its own: its seconds, those of the processor, and its peak memory.

Imports next to nothing: a child's peak begins at what its parent holds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

DRO_RL = (sys.executable, "-c", "from dro_rl.cli import app; app()")
"""The command line, as its installed script starts it."""


@dataclass(frozen=True)
class Taken:
    """What a command took: seconds on the clock, of the processor, and the most memory that was resident."""

    seconds: float
    cpu_seconds: float
    peak_mib: float


def measure(command: Sequence[str]) -> Taken:
    """Run a command, its output thrown away; its own processes' seconds are in its own where it waits for them."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit status {process.returncode}")
    scale = 2**20 if sys.platform == "darwin" else 2**10
    seconds = time.perf_counter() - started
    return Taken(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / scale)
