"""Requests to servers, several at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def at_once(
    ask: Callable[[Item], Result], items: Sequence[Item], most: int, stop: Callable[[], None] = lambda: None
) -> list[Result]:
    """`ask` of each item, up to `most` at once, in order. The first error, whoever's, calls `stop` and is raised."""
    if not items:
        return []
    with ThreadPoolExecutor(min(most, len(items))) as pool:
        futures = [pool.submit(ask, item) for item in items]
        try:
            for done in as_completed(futures):
                done.result()
        except BaseException:
            stop()
            pool.shutdown(cancel_futures=True)
            raise
    return [future.result() for future in futures]
