"""Rollouts of the next iteration, sampled while this one trains: by weights one step old, corrected by p/q."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from dro_rl.em.e_step import Asked, EStep, Sampled
from dro_rl.engines.selecting import Selecting
from dro_rl.proposal import Completion


@dataclass(frozen=True, slots=True)
class Ahead:
    """An iteration in flight.

    Args:
        iteration: which, 0-based.
        step: updates that the weights which sample it have had.
        temperature: of the sampling.
        selecting: what is drawn, a part of the iteration each.
        parts: the engine's answers to them.
    """

    iteration: int
    step: int
    temperature: float
    selecting: Sequence[Selecting]
    parts: Sequence[Future[list[list[Completion]]]]

    @classmethod
    def start(cls, e_step: EStep, iteration: int, step: int, parts: Sequence[Asked]) -> Ahead:
        """Ask the engine, which answers from elsewhere, with the weights of now."""
        pool = ThreadPoolExecutor(1, "rollouts")
        selecting = [e_step.selecting(asked) for asked in parts]
        with e_step.engine.at(step) as engine:
            futures = [pool.submit(engine.generate, each.request) for each in selecting if each.request is not None]
        pool.shutdown(wait=False)  # it ends with its last part
        return cls(iteration, step, parts[0].temperature, selecting, futures)

    def samples(self, e_step: EStep, part: int, asked: Asked) -> Sampled:
        """What the engine answered for a part, when it has."""
        selecting = self.selecting[part]
        selecting.take(self.parts[part].result())
        return e_step.read(asked, selecting, on_policy=False)

    def wait(self) -> None:
        """Wait for what is in flight: it reads the weights' folder."""
        wait(self.parts)
