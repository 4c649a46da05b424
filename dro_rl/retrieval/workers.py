"""Processes that encode a corpus side by side, each its own numbers, and the GPU that each of them takes.

They do not talk to each other, so one that dies is seen at once, and costs what it was at.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from typing import Any

from dro_rl.errors import InputError, Phrase


def take_gpu(rank: int) -> bool:
    """Work on the GPU of this rank from now on, with more processes than GPUs on a shared one; False without a GPU."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
    return torch.cuda.is_available()


def side_by_side(
    work: Callable[..., None], given: tuple[Any, ...], numbers: Sequence[int], processes: int, bar: Any
) -> None:
    """Have `work(*given, its numbers, done)` run by so many processes, which put what they have finished into `done`.

    Args:
        work: a function of a module. Its process has a GPU of its own where there are several, or its share of the
            cores.
        given: its first arguments, the same for all.
        numbers: what is shared out among them.
        processes: how many there are.
        bar: whose `update` is told each count that comes through `done`.

    Raises:
        InputError: one of them raised it, or died; the others are ended.
    """
    context = get_context("spawn")
    done: Any = context.SimpleQueue()
    workers = [
        context.Process(
            target=_work, args=(work, given, list(numbers[rank::processes]), rank, processes, done), daemon=True
        )
        for rank in range(processes)
    ]
    for worker in workers:
        worker.start()
    try:
        while True:
            working = any(worker.is_alive() for worker in workers)
            while not done.empty():
                said = done.get()
                if isinstance(said, InputError):
                    raise said
                bar.update(said)
            dead = [worker for worker in workers if worker.exitcode not in (None, 0)]
            if dead:
                raise InputError(
                    "index",
                    Phrase(f"an encoding process died with status {dead[0].exitcode}"),
                    "what is done is kept",
                    "Look above for why; of memory, use fewer --processes or a smaller --batch-size. The same command "
                    "goes on where it stopped.",
                )
            if not working:
                return
            time.sleep(0.2)
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def _work(
    work: Callable[..., None], given: tuple[Any, ...], numbers: list[int], rank: int, processes: int, done: Any
) -> None:
    """A process's share."""
    import torch

    if not take_gpu(rank):
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    try:
        work(*given, numbers, done)
    except InputError as error:
        done.put(error)
