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
    from dro_rl.recipe import Recipe
    from dro_rl.roles import Role

ENGINES: dict[str, str] = {
    "transformers": "dro_rl.engines.transformers_engine:TransformersEngine",
    "vllm": "dro_rl.engines.vllm_start:VLLMEngine",
    "enumeration": "dro_rl.engines.enumeration:EnumerationEngine",
}
"""Values of `rollout_engine`, each with the class that it stands for: `module:name`."""


def check(config: DROConfig, recipe: Recipe | None = None) -> None:
    """Refuse an engine that there is not, or that could not run here. Raises `InputError`.

    Args:
        recipe: says which adapters each role has.
    """
    _check(config.engine, config, recipe, "selector")
    if config.answer_engine == "vllm":
        from dro_rl.engines.answers import named_for_answers, settings_for_answers

        with named_for_answers():
            _check(config.answer_engine, settings_for_answers(config), recipe, "generator")


def _check(name: str, config: DROConfig, recipe: Recipe | None, role: Role) -> None:
    from dro_rl.engines.vllm_adapters import of_recipe

    kind = _engine(name)
    kind.check(
        config,
        of_recipe(recipe, config, role, on_cpu=config.use_cpu) if recipe is not None and name == "vllm" else None,
    )


def check_candidates(config: DROConfig, num_documents: int, question_id: str) -> None:
    """Refuse a training question that an engine could not take. Raises `InputError`.

    Args:
        num_documents: its candidates.
        question_id: which it is, for the reader.
    """
    if config.engine == "enumeration":
        from dro_rl.engines.enumeration import check_listed

        listed = config.num_generations // config.candidate_orders
        check_listed(config.spec, num_documents, listed, f", of question {question_id}")


def start(config: DROConfig, selector: TrainedSelector, generator: TrainedSelector | None = None) -> RolloutEngine:
    """The engine that a recipe names, for the selector that trains. All processes call together.

    Args:
        generator: where its answers are to be written by an engine too.
    """
    return _engine(config.engine).start(config, selector, generator if config.answer_engine == "vllm" else None)


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


def answerer(
    config: DROConfig, generator: TrainedSelector, updates: Callable[[], int], room: Room, selections: RolloutEngine
) -> Answerer:
    """What scores and writes the answers of a training. All processes call together.

    Args:
        config: says whether the model, an engine of its own, or an endpoint writes them.
        generator: the model, where its weights are here.
        updates: how many it has had.
        room: for how many tokens a pass has room.
        selections: the engine that samples them, which may have room for the generator over the same base.
    """
    from dro_rl.engines.answers import EngineAnswerer, ModelAnswerer, named_for_answers, settings_for_answers
    from dro_rl.engines.vllm_colocate import ColocatedEngine

    if (there := elsewhere(config, generator.prompter)) is not None:
        return there
    if config.answer_engine == "transformers":
        size = config.per_device_eval_batch_size
        return ModelAnswerer(generator.open, generator.prompter, config.scoring, size, room)
    told = settings_for_answers(config)
    with named_for_answers():
        if isinstance(selections, ColocatedEngine) and selections.has_room:
            engine: RolloutEngine = selections.also(generator.module, told, generator.prompter.ends.stops)
        else:
            engine = start(told, generator)
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
