"""Ending a job by Ctrl-C or SIGTERM: files are whole at every moment, and one line says how to go on."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

LAUNCHED = "DRO_RL_LAUNCHED"
"""Set by a launcher that says itself that the job was stopped, once for all its processes."""


LAUNCHERS = {"accelerate", "accelerate.commands.launch", "torchrun", "torch.distributed.run", "dro-rl"}
"""What a command line that starts jobs has among its words."""


class Stopped(BaseException):
    """Raised in the job where a signal found it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def status(self) -> int:
        """The exit status of a process that ends by the signal, as shells have it."""
        return 128 + self.number


def stop_on_signals() -> None:
    """Turn the first SIGINT or SIGTERM into `Stopped`. A second one ends the process at once."""

    def stop(number: int, frame: Any) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, lambda number, frame: os._exit(128 + number))
        raise Stopped(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def stop_with_launcher() -> None:
    """Stop, as by SIGTERM, when the launcher that started this process is gone: not every one passes a signal on."""
    parent = os.getppid()
    try:
        words = psutil.Process(parent).cmdline()
    except psutil.Error:
        return
    if LAUNCHERS.isdisjoint(Path(word).name for word in words):
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def say_stopped(number: int) -> None:
    """The line, on standard error."""
    print(
        f"stopped by {signal.Signals(number).name}. The same command with --resume_from_checkpoint auto goes on.",
        file=sys.stderr,
    )
