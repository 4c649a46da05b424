"""How far a long loop is: a bar on a terminal; elsewhere, where a bar would be noise, a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

INTERVAL = 30.0
"""Seconds between two lines. What takes less says nothing."""


class Progress:
    """Counts what is done of a loop, and says so on standard error.

    Args:
        total: how much there is to do.
        what: what is done: `evaluation of the base models`.
        unit: what is counted.
        bars: draw one where there is a terminal.
        quiet: say nothing.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        total: int,
        what: str,
        unit: str = "questions",
        *,
        bars: bool = True,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.what, self.unit, self.done = total, what, unit, 0
        self._clock, self._quiet = clock, quiet
        self._skipped = 0
        self._began = self._said = clock()
        self._bar: Any = None
        if bars and not quiet and on_terminal():
            self._bar = tqdm(total=total, desc=what, unit=f" {unit}", leave=False)

    def update(self, count: int, what: str = "") -> None:
        """So many more are done, with what else there is to say of it."""
        self.done += count
        if self._bar is not None:
            self._bar.set_postfix_str(what, refresh=False)
            self._bar.update(count)
        elif self._clock() - self._said >= INTERVAL:
            self.note(what)

    def skip(self, count: int) -> None:
        """So many more were done before, and took none of this time."""
        self.done += count
        self._skipped += count
        if self._bar is not None:
            self._bar.initial += count
            self._bar.update(count)

    def note(self, what: str = "") -> None:
        """Say how far it is now, with what else there is to say."""
        if self._quiet:
            return
        self._said = self._clock()
        far = how_far(self.done, self.total, self.unit, self._said - self._began, self.done - self._skipped)
        line = f"{self.what}: {', '.join(filter(None, (far, what)))}"
        say(line) if self._bar is None else self._bar.write(line)

    def close(self) -> None:
        """The loop has ended."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *how: object) -> None:
        self.close()


def on_terminal() -> bool:
    """Whether someone watches: a bar can be drawn, and drawn again."""
    return sys.stderr.isatty()


def say(line: str) -> None:
    """A line on standard error, at once."""
    print(line, file=sys.stderr, flush=True)


def how_far(done: int, total: int, unit: str, seconds: float, here: int | None = None) -> str:
    """Done, rate and time left, in words: `48 of 1,920 questions, 12 a second, 3 min left`.

    Args:
        seconds: since the loop began.
        here: how many were done in these; `done`, unless it went on from where another had stopped.
    """
    here = done if here is None else here
    said = f"{done:,} of {total:,} {unit}"
    if here <= 0 or seconds <= 0:
        return said
    rate = here / seconds
    speed = f"{1 / rate:.1f} s each" if rate < 1 else f"{rate:.1f} a second" if rate < 10 else f"{rate:,.0f} a second"
    return f"{said}, {speed}" + (f", {duration((total - done) / rate)} left" if done < total else "")


def duration(seconds: float) -> str:
    """`45 s`, `3 min`, `2 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
