"""What a generator is asked: how likely an answer is, and to write one. Here, of the model at hand.

The model may have an engine of its own that writes, vLLM: the engine of selections, told other lengths.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dro_rl.config import DROConfig
from dro_rl.engines.decoding import Decoder
from dro_rl.engines.protocol import GenerationRequest, RolloutEngine, TrainedSelector
from dro_rl.errors import InputError
from dro_rl.likelihood import Model, Scoring, score_rows
from dro_rl.likelihood.packing import Row
from dro_rl.likelihood.room import Room
from dro_rl.models.positions import positions_of
from dro_rl.prompts import Prompter
from dro_rl.proposal import Completion, SamplingParams
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

    def forget(self) -> None:
        """The generator's weights have been replaced; see `RolloutEngine.forget`."""
        ...

    def close(self) -> None:
        """The run is over: leave nothing behind."""
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
        groups = self._generate(GenerationRequest(prompts, 1, sampling, seeds))
        return [
            Written(without_thinking(self._prompter.decode(only.ids)).strip(), sum(only.logps)) for (only,) in groups
        ]

    def _generate(self, request: GenerationRequest) -> list[list[Completion]]:
        with self._open() as model:
            decoder = Decoder(model, self._prompter.ends.stops, self._batch_size, self._scoring.shared_prefix)
            return decoder.generate(request)

    def positions(self) -> tuple[int | None, str]:
        """See `Answerer.positions`."""
        with self._open() as model:
            return positions_of(model.config)

    def forget(self) -> None:
        """It keeps no weights."""

    def close(self) -> None:
        """It leaves nothing."""


class EngineAnswerer(ModelAnswerer):
    """The generator whose weights are here, and an engine that writes with them.

    Args:
        generator: as engines ask for a model that trains.
        scoring: how rows are scored, which is the model's own to do.
        engine: writes.
        updates: how many the generator has had; the engine takes new weights when they are more.
        room: as in `ModelAnswerer`.
    """

    def __init__(
        self,
        generator: TrainedSelector,
        scoring: Scoring,
        engine: RolloutEngine,
        updates: Callable[[], int],
        room: Room | None = None,
    ) -> None:
        super().__init__(generator.open, generator.prompter, scoring, room=room)
        self._engine, self._updates = engine, updates

    def _generate(self, request: GenerationRequest) -> list[list[Completion]]:
        with named_for_answers(), self._engine.at(self._updates()) as engine:
            return engine.generate(request)

    def forget(self) -> None:
        """See `Answerer.forget`."""
        self._engine.forget()

    def close(self) -> None:
        """See `Answerer.close`."""
        self._engine.close()


def settings_for_answers(config: DROConfig) -> DROConfig:
    """What an engine of selections is told so that it writes answers: other lengths, no constraint, its own servers.

    Weights go to servers by folder: the group that they travel in over NCCL is the selector's.
    """
    told = copy.copy(config)
    told.rollout_engine, told.max_completion_length = config.answer_engine, config.max_answer_length
    told.constrain_selection, told.vllm_max_model_length = False, None
    told.vllm_server_base_url = config.vllm_answer_server_base_url or []
    told.vllm_weight_sync = "folder"
    return told


OWN_KEYS = {"rollout_engine": "answer_engine", "vllm_server_base_url": "vllm_answer_server_base_url"}
"""By keys of the engine of selections, those of the engine of answers."""


@contextmanager
def named_for_answers() -> Iterator[None]:
    """Errors of an engine that writes answers name its own keys."""
    try:
        yield
    except InputError as error:
        place, command = OWN_KEYS.get(error.place, error.place), "serve-rollouts RECIPE"
        fix = error.fix.replace(command, f"{command} --role generator").replace("rollout_engine", "answer_engine")
        raise type(error)(place, error.value, error.rule, fix) from None
