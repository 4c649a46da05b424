"""What every rollout engine is given and gives back. An engine turns prompts into sampled completions with log q."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator

from dro_rl.config import DROConfig
from dro_rl.engines.vllm_adapters import Adapters
from dro_rl.likelihood import Model
from dro_rl.likelihood.prefill import Prefills
from dro_rl.prompts import Prompter
from dro_rl.proposal import Completion, SamplingParams
from dro_rl.selection.constraint import SelectionConstraint


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What an engine is asked for.

    Args:
        prompts: token ids.
        num_generations: m, completions of each prompt.
        sampling: the proposal.
        seeds: one a prompt. The same prompt, seed and weights give the same completions, whatever else is in the
            request: runs resume exactly, and do not depend on the number of processes. An engine that cannot promise
            that says so in its docstring.
        constraints: one a prompt. Tokens are drawn from the softmax over those that it allows, then tempered and
            truncated, and log q is that distribution's: p, to which it is compared, is constrained too.
    """

    prompts: Sequence[Sequence[int]]
    num_generations: int
    sampling: SamplingParams
    seeds: Sequence[int]
    constraints: Sequence[SelectionConstraint] | None = None


@dataclass(frozen=True, slots=True)
class TrainedSelector:
    """The selector that trains, or the generator where the engine writes answers, as an engine may ask for it.

    Args:
        open: opens it for calls without gradient; all processes enter together.
        module: the module as it is now, for its weights.
        save: writes it into a folder, to be served; all processes call together.
        prompter: its prompts and its tokenizer.
        accelerator: the trainer's.
        run_dir: where the run leaves its files.
        prefills: keeps what prompts come to for training, where that is the same pass; None without.
    """

    open: Callable[[], AbstractContextManager[Model]]
    module: Callable[[], Any]
    save: Callable[[Path], None]
    prompter: Prompter
    accelerator: Accelerator
    run_dir: Path
    prefills: Prefills | None = None


class RolloutEngine(Protocol):
    """Samples completions with the selector's weights."""

    def at(self, step: int) -> AbstractContextManager[RolloutEngine]:
        """The engine with the weights that the selector has after `step` updates. All processes enter together."""
        ...

    def generate(self, request: GenerationRequest) -> list[list[Completion]]:
        """`num_generations` completions for each prompt, of any number; an engine batches as it sees fit."""
        ...

    def samples_policy(self, sampling: SamplingParams) -> bool:
        """Whether its log q is the trainer's own log p, so that the importance ratio is one by definition."""
        ...

    def forget(self) -> None:
        """The trainer's weights have been replaced: take them again before the next sample, whatever the step."""
        ...

    def close(self) -> None:
        """The run is over: leave nothing behind."""
        ...


class EngineKind(Protocol):
    """What `engines.ENGINES` lists: a way to have rollouts, which may be the engine's own class."""

    def check(self, config: DROConfig, adapters: Adapters | None = None) -> None:
        """Raise `InputError` where the engine could not run, before models load.

        Args:
            adapters: of the model that it will have, where it could be sent them alone.
        """
        ...

    def start(
        self, config: DROConfig, selector: TrainedSelector, generator: TrainedSelector | None = None
    ) -> RolloutEngine:
        """The engine of a training. All processes call together.

        Args:
            generator: what writes answers, for an engine that can hold both over one base.
        """
        ...
