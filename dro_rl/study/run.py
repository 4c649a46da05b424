"""Running a study: what is missing, several arms at once, each a process of its own with a log beside its folder."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from dro_rl.study.arms import Arm

PROGRAM = (sys.executable, "-m", "dro_rl")
SECONDS = 0.2
"""Between two looks at the processes."""
SECONDS_TO_STOP = 60.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an arm.

    Args:
        arm: the arm.
        seconds: that it took.
        wrong: None where it is done, else why not, in a line.
    """

    arm: Arm
    seconds: float
    wrong: str | None


class Watch(Protocol):
    """Is told of the arms as they go."""

    def started(self, arm: Arm) -> None: ...

    def running(self, arm: Arm, seconds: float) -> None: ...

    def ended(self, outcome: Outcome) -> None: ...


@dataclass
class _Job:
    arm: Arm
    process: subprocess.Popen[bytes]
    place: int
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began


def run_arms(arms: Sequence[Arm], places: Sequence[Mapping[str, str]], watch: Watch) -> list[Outcome]:
    """Run arms, as many at once as there are places, each after the one that it needs.

    One that fails stops those alone that need it. When this process is stopped, it stops the arms, and waits until
    their files are whole.

    Args:
        arms: those that are not done, in the order in which they start.
        places: what each place adds to the environment.
        watch: is told.
    """
    waiting = list(arms)
    jobs: list[_Job] = []
    outcomes: list[Outcome] = []
    try:
        while waiting or jobs:
            unfinished = {arm.folder for arm in waiting} | {job.arm.folder for job in jobs}
            failed = {outcome.arm.folder: outcome.arm for outcome in outcomes if outcome.wrong is not None}
            for arm in list(waiting):
                free = set(range(len(places))) - {job.place for job in jobs}
                if arm.needs in failed:
                    outcomes.append(Outcome(arm, 0.0, f"not run: it needs {failed[arm.needs].name}"))
                    watch.ended(outcomes[-1])
                elif free and arm.needs not in unfinished:
                    jobs.append(_start(arm, min(free), places))
                    watch.started(arm)
                else:
                    continue
                waiting.remove(arm)
                break
            else:
                time.sleep(SECONDS)
            for job in [job for job in jobs if job.process.poll() is not None]:
                jobs.remove(job)
                outcomes.append(Outcome(job.arm, job.seconds, _what_went_wrong(job)))
                watch.ended(outcomes[-1])
            for job in jobs:
                watch.running(job.arm, job.seconds)
    finally:
        _stop(jobs)
    return outcomes


def places_of(jobs: int | None) -> list[dict[str, str]]:
    """Places for arms to run in, each with its share of the GPUs that are visible and of the cores.

    Args:
        jobs: how many; None: one a GPU, or two without any.
    """
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [str(i) for i in range(torch.cuda.device_count())]
    if named is not None and gpus:
        gpus = named.split(",")
    count = jobs or len(gpus) or 2
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // count))
    devices = [",".join(gpus[i::count] or [gpus[i % len(gpus)]]) if gpus else None for i in range(count)]
    return [
        {"OMP_NUM_THREADS": threads} | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device})
        for device in devices
    ]


def tail(log: Path) -> str:
    """The last line of a log that says anything."""
    if not log.is_file():
        return ""
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 8192))
        lines = re.split(r"[\r\n]+", stream.read().decode(errors="replace"))
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def how_far(log: Path) -> tuple[int, int] | None:
    """Steps done, of how many, by the last lines of a training's log; None before the first."""
    if not log.is_file():
        return None
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 65536))
        found = re.findall(rb"\bstep (\d+)/(\d+)", stream.read())
    return (int(found[-1][0]), int(found[-1][1])) if found else None


def _start(arm: Arm, place: int, places: Sequence[Mapping[str, str]]) -> _Job:
    arm.log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **places[place], "PYTHONUNBUFFERED": "1"}
    with arm.log.open("ab") as log:
        # In a session of its own: a signal reaches it once, with all its processes, when this process sends it.
        process = subprocess.Popen(
            [*PROGRAM, *arm.command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    return _Job(arm, process, place)


def _what_went_wrong(job: _Job) -> str | None:
    if job.process.returncode == 0 and job.arm.done:
        return None
    return f"{tail(job.arm.log) or f'exit status {job.process.returncode}'} ({job.arm.log})"


def _stop(jobs: Sequence[_Job]) -> None:
    for job in jobs:
        if job.process.poll() is None:
            os.killpg(job.process.pid, signal.SIGTERM)
    until = time.monotonic() + SECONDS_TO_STOP
    for job in jobs:
        try:
            job.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(job.process.pid, signal.SIGKILL)
