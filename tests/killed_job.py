"""Runs the job, and kills it with SIGKILL when a function is called for the n-th time.

A place is `module:attribute` or `module:Class.attribute`; a leading `after:` kills when the call returns.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any


def kill_at(place: str, count: int) -> None:
    after = place.startswith("after:")
    module_name, _, path = place.removeprefix("after:").partition(":")
    holder: Any = importlib.import_module(module_name)
    *parents, name = path.split(".")
    for parent in parents:
        holder = getattr(holder, parent)
    original = getattr(holder, name)
    calls = 0

    def killing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(holder, name, killing)


def run(arguments: Sequence[str], place: str | None = None, count: int = 0) -> None:
    """The job of a command line, killed at the `count`-th call of a place, if one is given."""
    if place is not None:
        kill_at(place, count)
    from dro_rl.train import run_job

    sys.exit(run_job(list(arguments)))
