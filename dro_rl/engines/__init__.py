"""Rollout engines: what turns prompts into sampled completions with log q. A new one is a class, and a line here."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

from dro_rl.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from dro_rl.config import DROConfig
    from dro_rl.engines.answers import Answerer
    from dro_rl.engines.endpoint import EndpointAnswerer
    from dro_rl.engines.protocol import EngineKind, RolloutEngine, TrainedSelector
    from dro_rl.likelihood.room import Room
    from dro_rl.prompts import Prompter

ENGINES: dict[str, str] = {
    "transformers": "dro_rl.engines.transformers_engine:TransformersEngine",
    "vllm": "dro_rl.engines.vllm_start:VLLMEngine",
    "enumeration": "dro_rl.engines.enumeration:EnumerationEngine",
}
"""Values of `rollout_engine`, each with the class that it stands for: `module:name`."""


def check(config: DROConfig) -> None:
    """Refuse an engine that there is not, or that could not run here. Raises `InputError`."""
    _engine(config.engine).check(config)
    if config.answer_engine == "vllm":
        from dro_rl.engines.answers import named_for_answers, settings_for_answers

        with named_for_answers():
            _engine(config.answer_engine).check(settings_for_answers(config))


def start(config: DROConfig, selector: TrainedSelector) -> RolloutEngine:
    """The engine that a recipe names, for the selector that trains. All processes call together."""
    return _engine(config.engine).start(config, selector)


def elsewhere(config: DROConfig, prompter: Prompter) -> EndpointAnswerer | None:
    """The generator behind a recipe's endpoint; None where its weights are here."""
    from dro_rl.engines.endpoint import EndpointAnswerer, EndpointSettings

    settings = EndpointSettings.of(config)
    if settings is None:
        return None
    needed = "likelihood" in config.reward_rule.names or config.metric_for_best_model == "answer_logp"
    return EndpointAnswerer(settings, prompter, needs_likelihoods=needed)


def served(url: str, model: str | None, prompter: Prompter) -> Answerer:
    """The generator behind an endpoint that a finished run names."""
    from dro_rl.engines.endpoint import EndpointAnswerer, EndpointSettings

    return EndpointAnswerer(EndpointSettings(url, model), prompter)


def answerer(config: DROConfig, generator: TrainedSelector, updates: Callable[[], int], room: Room) -> Answerer:
    """What scores and writes the answers of a training. All processes call together.

    Args:
        config: says whether the model, an engine of its own, or an endpoint writes them.
        generator: the model, where its weights are here.
        updates: how many it has had.
        room: for how many tokens a pass has room.
    """
    from dro_rl.engines.answers import EngineAnswerer, ModelAnswerer, named_for_answers, settings_for_answers

    if (there := elsewhere(config, generator.prompter)) is not None:
        return there
    if config.answer_engine == "transformers":
        size = config.per_device_eval_batch_size
        return ModelAnswerer(generator.open, generator.prompter, config.scoring, size, room)
    with named_for_answers():
        engine = start(settings_for_answers(config), generator)
    return EngineAnswerer(generator, config.scoring, engine, updates, room)


def _engine(name: str) -> EngineKind:
    if name not in ENGINES:
        raise InputError(
            "rollout_engine",
            name,
            f"this is one of auto, {', '.join(ENGINES)}",
            did_you_mean(name, ENGINES, "Use one of them."),
        )
    module, _, attribute = ENGINES[name].partition(":")
    return getattr(import_module(module), attribute)
