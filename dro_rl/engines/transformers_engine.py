"""The engine that needs nothing but the model that is being trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dro_rl.config import DROConfig
from dro_rl.engines.decoding import Decoder
from dro_rl.engines.protocol import GenerationRequest, TrainedSelector
from dro_rl.engines.vllm_adapters import Adapters
from dro_rl.errors import is_out_of_memory
from dro_rl.proposal import Completion, SamplingParams


class TransformersEngine:
    """Samples with the selector itself, on every process.

    Args:
        selector: the one that trains.
        batch_size: prompts decoded at once.
        shared_prefix: decode the m samples of a prompt over one cache where that is exact.
    """

    def __init__(self, selector: TrainedSelector, batch_size: int, shared_prefix: bool) -> None:
        self._selector, self._batch_size, self._shared_prefix = selector, batch_size, shared_prefix
        self._decoder: Decoder | None = None

    @classmethod
    def check(cls, config: DROConfig, adapters: Adapters | None = None) -> None:
        """Nothing can be missing."""

    @classmethod
    def start(
        cls, config: DROConfig, selector: TrainedSelector, generator: TrainedSelector | None = None
    ) -> TransformersEngine:
        return cls(selector, config.per_device_eval_batch_size, config.scoring.shared_prefix)

    @contextmanager
    def at(self, step: int) -> Iterator[TransformersEngine]:
        """The weights are the model's own, whatever the step."""
        with self._selector.open() as model:
            ends = self._selector.prompter.ends.stops
            self._decoder = Decoder(model, ends, self._batch_size, self._shared_prefix)
            yield self
            self._decoder = None

    def generate(self, request: GenerationRequest) -> list[list[Completion]]:
        assert self._decoder is not None, "within `at`"
        prefills = self._selector.prefills
        if prefills is not None and prefills.begin(request.prompts):
            try:
                return self._decoder.generate(request, prefills)
            except Exception as error:
                if not (is_out_of_memory(error) and prefills.give_up()):
                    raise
        return self._decoder.generate(request)

    def samples_policy(self, sampling: SamplingParams) -> bool:
        return sampling.on_policy

    def forget(self) -> None:
        """It keeps no weights."""

    def close(self) -> None:
        """It leaves nothing."""
