"""vLLM, in the trainer's process or as servers: which of the two, and what is checked before."""

from __future__ import annotations

import logging
from pathlib import Path

from accelerate import PartialState

from dro_rl.config import DROConfig
from dro_rl.engines.answers import named_for_answers, settings_for_answers
from dro_rl.engines.protocol import RolloutEngine, TrainedSelector
from dro_rl.engines.vllm_adapters import Adapters, of_model, of_recipe
from dro_rl.engines.vllm_common import check_installed
from dro_rl.engines.vllm_server import ServerEngine, check_servers, taken_by_servers
from dro_rl.likelihood import without_adapters
from dro_rl.recipe import Recipe

logger = logging.getLogger(__name__)


class VLLMEngine:
    """What `rollout_engine: vllm` names: `ColocatedEngine` or `ServerEngine`, by `vllm_mode`."""

    @classmethod
    def check(cls, config: DROConfig, adapters: Adapters | None = None) -> None:
        """vLLM is installed, or its servers answer and are as rollouts need them."""
        if config.vllm_mode == "colocate":
            check_installed("rollout_engine", config.rollout_engine)
        elif PartialState().is_main_process:
            check_servers(config, adapters)

    @classmethod
    def start(
        cls, config: DROConfig, selector: TrainedSelector, generator: TrainedSelector | None = None
    ) -> RolloutEngine:
        tokenizer, ends = selector.prompter.tokenizer, selector.prompter.ends.stops
        accelerator = selector.accelerator
        if config.vllm_mode == "colocate":
            from dro_rl.engines.vllm_colocate import ColocatedEngine

            check_installed("rollout_engine", config.rollout_engine)
            adapters = of_model(config, selector.module(), accelerator)
            others = [] if adapters is None or generator is None else _over_the_same_base(config, selector, generator)
            logger.info("rollouts: vLLM in this process; starting it takes a minute")
            return ColocatedEngine(selector.module, accelerator, tokenizer, config, ends, adapters, others)
        from dro_rl.engines.vllm_weights import publisher

        adapters = of_model(config, selector.module(), accelerator)
        cls.check(config, adapters)
        accelerator.wait_for_everyone()
        if adapters is not None:
            adapters = taken_by_servers(config, adapters)
        folder = Path(config.vllm_weights_dir or selector.run_dir / "vllm_weights")
        publish = publisher(config, folder, selector.save, selector.module, tokenizer, accelerator, adapters)
        logger.info(f"rollouts: vLLM at {', '.join(config.vllm_servers)}")
        return ServerEngine(config, ends, publish, adapters)


def have_one_engine(recipe: Recipe, *, on_cpu: bool) -> bool:
    """Whether selections and answers will come from one engine in the trainer's process, as far as a recipe says."""
    run, training = recipe.run, recipe.training
    if training.answer_engine != "vllm" or training.vllm_mode != "colocate":
        return False
    moved = not run.share_base and (run.of("selector").warms or run.of("generator").warms)
    found = (
        of_recipe(recipe, training, "selector", on_cpu=on_cpu),
        of_recipe(recipe, settings_for_answers(training), "generator", on_cpu=on_cpu),
    )
    return not moved and None not in found and len({(each.base, each.revision) for each in found if each}) == 1


def _over_the_same_base(
    config: DROConfig, selector: TrainedSelector, generator: TrainedSelector
) -> list[tuple[DROConfig, Adapters]]:
    """The generator's settings and adapters, where one engine can have both roles'."""
    bases = [without_adapters(each.module()) for each in (selector, generator)]
    with named_for_answers():
        told = settings_for_answers(config)
        found = of_model(told, generator.module(), generator.accelerator)
    same = len({(base.name_or_path, base.config._commit_hash, base.dtype) for base in bases}) == 1
    return [(told, found)] if found is not None and same else []
