"""What a generator is asked: how likely an answer is, and to write one. Here, of the model at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dro_rl.engines.decoding import Decoder
from dro_rl.engines.protocol import GenerationRequest
from dro_rl.likelihood import Model, Scoring, score_rows
from dro_rl.likelihood.packing import Row
from dro_rl.likelihood.room import Room
from dro_rl.models.positions import positions_of
from dro_rl.prompts import Prompter
from dro_rl.proposal import SamplingParams
from dro_rl.selection.thinking import without_thinking


@dataclass(frozen=True, slots=True)
class Written:
    """What a generator wrote.

    Args:
        text: outside a thinking block, without special tokens.
        logp: log-probability of all that it wrote, its end included, nats; NaN where nobody says it.
    """

    text: str
    logp: float


class Answerer(Protocol):
    """A generator at work: the model at hand, or one behind an endpoint (`endpoint.EndpointAnswerer`)."""

    def score(self, rows: Sequence[Row]) -> list[list[Tensor]]:
        """Token log-probabilities of each row's completions, nats. All processes call together."""
        ...

    def write(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, seeds: Sequence[int]) -> list[Written]:
        """An answer to each prompt, by a seed each; see `GenerationRequest`. All processes call together."""
        ...

    def positions(self) -> tuple[int | None, str]:
        """How many tokens prompt and answer may have together, and what these are; None where nothing bounds them."""
        ...


class ModelAnswerer:
    """The generator whose weights are here.

    Args:
        open: opens it for calls without gradient; all processes enter together.
        prompter: its prompts and its tokenizer.
        scoring: how rows are scored.
        batch_size: answers written at once.
        room: for how many tokens a pass has room; what `scoring` says, unless told.
    """

    def __init__(
        self,
        open: Callable[[], AbstractContextManager[Model]],
        prompter: Prompter,
        scoring: Scoring,
        batch_size: int = 8,
        room: Room | None = None,
    ) -> None:
        self._open, self._prompter, self._scoring, self._batch_size = open, prompter, scoring, batch_size
        self._room = room or Room(scoring.tokens)

    def score(self, rows: Sequence[Row]) -> list[list[Tensor]]:
        """See `Answerer.score`."""
        scoring = self._scoring
        with self._open() as model:
            return self._room.within(
                lambda tokens: score_rows(model, rows, tokens, scoring.shared_prefix, scoring.prefix_tree),
                map(len, rows),
            )

    def write(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, seeds: Sequence[int]) -> list[Written]:
        """See `Answerer.write`."""
        with self._open() as model:
            decoder = Decoder(model, self._prompter.ends.stops, self._batch_size, self._scoring.shared_prefix)
            groups = decoder.generate(GenerationRequest(prompts, 1, sampling, seeds))
        return [
            Written(without_thinking(self._prompter.decode(only.ids)).strip(), sum(only.logps)) for (only,) in groups
        ]

    def positions(self) -> tuple[int | None, str]:
        """See `Answerer.positions`."""
        with self._open() as model:
            return positions_of(model.config)
