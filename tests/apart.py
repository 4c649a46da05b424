"""Processes of a test's own, each of which begins as a copy of one that has imported everything: an interpreter's start
takes seconds, and a launcher's as many again. How the job is started by a launcher is what test_front_door.py is about.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import psutil
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env


def apart(
    function: Callable[..., None], *arguments: Any, environments: Sequence[dict[str, str]] = ({},), seconds: float = 300
) -> subprocess.CompletedProcess[str]:
    """A function in a process for each environment, side by side: the first status that is not 0, and what all said.

    One that fails ends the others, as under a launcher; none is left when the time is over.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killed_job", "dro_rl.job.run"])
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        processes = [
            context.Process(target=_begin, args=(out, err, {**os.environ, **environment}, function, arguments))
            for environment in environments
        ]
        for process in processes:
            process.start()
        status = _ended(processes, time.monotonic() + seconds)
        said = [path.read_text(encoding="utf-8") if path.exists() else "" for path in (out, err)]
    return subprocess.CompletedProcess([function.__name__, *arguments], status, *said)


def script(path: str, arguments: Sequence[str]) -> None:
    """A script, as the interpreter runs it."""
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(path, run_name="__main__")


def ranks(config: Path, processes: int) -> list[dict[str, str]]:
    """What `accelerate launch` with this file tells each of its processes."""
    options = ["--config_file", str(config), "--num_processes", str(processes), "--mixed_precision", "no"]
    arguments, *_ = _validate_launch_command(
        launch_command_parser().parse_args([*options, "--main_process_port", "0", "job"])
    )
    told = prepare_multi_gpu_env(arguments)
    shared = {**told, "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": arguments.master_port}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def _begin(
    out: Path, err: Path, environment: dict[str, str], function: Callable[..., None], arguments: Sequence[Any]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    function(*arguments)


def _ended(processes: Sequence[Any], deadline: float) -> int:
    """The first exit status that is not 0, or 0; the others are ended. The time being over, that of those killed."""
    running, status = list(processes), 0
    while running and not status and wait([each.sentinel for each in running], max(0, deadline - time.monotonic())):
        status = next((each.exitcode for each in running if each.exitcode), 0)
        running = [each for each in running if each.exitcode is None]
    for process in running:
        with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            for each in psutil.Process(process.pid).children(recursive=True):
                each.kill()
        process.kill()
        process.join()
        status = status or process.exitcode
    return status
