"""LoRA adapters that vLLM is sent alone, over a base that it holds: whether they can be, and what it is told of them.

Where they cannot, vLLM is sent the merged model, which it always takes. Imports no vLLM: a server's trainer needs none.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from dro_rl.config import DROConfig
from dro_rl.errors import InputError
from dro_rl.likelihood import without_adapters
from dro_rl.models import quantization
from dro_rl.models.saving import is_adapted
from dro_rl.models.sharding import is_sharded, launched_to_shard
from dro_rl.recipe import Recipe
from dro_rl.roles import Role

logger = logging.getLogger(__name__)

KEY = "vllm_lora_sync"
RANKS = (8, 16, 32, 64, 128, 256, 512)
"""What vLLM can be started with as `--max-lora-rank`."""

SLOW = "on a CPU vLLM reads adapters anew for each token"
"""Why `auto` merges there: what a sync saves, sampling loses many times over (docs/benchmarks.md)."""

NOT_IN_VLLM = (
    "use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "target_parameters", "trainable_token_indices",
    "layer_replication", "lora_bias", "use_qalora", "alora_invocation_tokens",
)  # fmt: skip
"""Of peft's `LoraConfig`: what vLLM refuses, or reads past as if it were not there."""


@dataclass(frozen=True, slots=True)
class Adapters:
    """The adapters of one model, as vLLM knows them.

    Args:
        rank: their r.
        base: the model that they are trained over, as it was named when it was loaded.
        revision: its revision, where a recipe says it; None: not known here.
        required: vLLM is sent them alone or nothing.
    """

    rank: int
    base: str
    revision: str | None = None
    required: bool = False

    @property
    def max_rank(self) -> int:
        """The least `--max-lora-rank` that takes them."""
        return next(each for each in RANKS if each >= self.rank)

    def trained_over(self, model: str, revision: str | None) -> bool:
        """Whether a model, as vLLM names it, is their base. With HF_HUB_OFFLINE it names the folder in the cache."""
        if self.revision is not None and (revision or "main") != self.revision:
            return False
        same_folder = Path(self.base).exists() and Path(model).resolve() == Path(self.base).resolve()
        return model == self.base or same_folder or f"models--{self.base.replace('/', '--')}" in Path(model).parts


def of_recipe(recipe: Recipe, config: DROConfig, role: Role, *, on_cpu: bool) -> Adapters | None:
    """The adapters that vLLM will be sent alone of a role, as far as its recipe says; None: what it is sent is whole.

    Args:
        config: the settings of the engine, which are the recipe's or `answers.settings_for_answers` of them.
        on_cpu: whether the trainer is.

    Raises:
        InputError: `vllm_lora_sync: adapter`, and they cannot be.
    """
    run, asked = recipe.run, recipe.run.of(role)
    problem = _problem(
        config,
        asked.lora_r,
        quantised=run.quantization != quantization.NONE,
        moved=asked.warms and not run.share_base,
        sharded=launched_to_shard() is not None,
    )
    if problem is None and config.vllm_lora_sync == "auto" and config.vllm_mode == "colocate" and on_cpu:
        problem = SLOW
    return _decided(config, problem, Adapters(asked.lora_r, asked.model, asked.revision or "main"))


def of_model(config: DROConfig, model: Any, accelerator: Accelerator) -> Adapters | None:
    """The same of a model as it was loaded. Says so in the log where adapters are merged for a reason.

    Raises:
        InputError: `vllm_lora_sync: adapter`, and they cannot be.
    """
    base = without_adapters(model)
    settings = model.peft_config[model.active_adapter] if is_adapted(model) else None
    rank = getattr(settings, "r", 0)
    quantised = quantization.settings_in(base) is not None
    problem = _problem(config, rank, quantised=quantised, moved=False, sharded=is_sharded(accelerator))
    if problem is None and settings is not None:
        problem = _unknown_to_vllm(model, settings)
    if problem is None and config.vllm_lora_sync == "auto" and config.vllm_mode == "colocate" and config.use_cpu:
        problem = SLOW
    if problem is None and config.vllm_mode == "colocate" and not runs_adapters(base.config, config.vllm_model_impl):
        problem = f"vLLM has no LoRA for {base.config.model_type}"
    if settings is not None and problem is not None and config.vllm_lora_sync == "auto":
        logger.info(f"vLLM is sent merged weights each time, not adapters alone: {problem}")
    return _decided(config, problem, Adapters(rank, str(base.name_or_path)))


def runs_adapters(config: Any, implementation: str) -> bool:
    """Whether the vLLM that is installed runs LoRA on a model.

    Args:
        config: the model's own.
        implementation: `vllm_model_impl`. The transformers models that vLLM runs all have it.
    """
    from vllm import ModelRegistry
    from vllm.model_executor.models import supports_lora

    known = ModelRegistry.models.get((config.architectures or [""])[0])
    return implementation == "transformers" or known is None or supports_lora(known.load_model_cls())


def _decided(config: DROConfig, problem: str | None, adapters: Adapters) -> Adapters | None:
    if config.vllm_lora_sync == "merged":
        return None
    required = config.vllm_lora_sync == "adapter"
    if problem is None:
        return Adapters(adapters.rank, adapters.base, adapters.revision, required)
    if required:
        raise InputError(KEY, "adapter", problem, "Use auto, or merged.")
    return None


def _problem(config: DROConfig, rank: int, *, quantised: bool, moved: bool, sharded: bool) -> str | None:
    """Why vLLM cannot be sent adapters of a rank alone: a rule that does not hold.

    Args:
        quantised: their base is held in codes.
        moved: its weights are not the recipe's model's any more.
        sharded: a process has a part of each of them.
    """
    if rank == 0:
        return "what is sent alone are LoRA adapters, and the model has none"
    if rank > RANKS[-1]:
        return f"vLLM takes LoRA to rank {RANKS[-1]}, and these have {rank}"
    if sharded:
        return "a process that holds a part of each adapter has none to send alone"
    if config.vllm_mode == "colocate":
        return None
    if config.vllm_weight_sync == "nccl":
        return "adapters go to a server by folder, and vllm_weight_sync is nccl"
    if quantised:
        return "a server holds the model's own numbers, and the adapters are trained over those that codes stand for"
    if moved:
        return "a server holds the recipe's model, and a warm-up without share_base moves its weights"
    return None


def _unknown_to_vllm(model: Any, settings: Any) -> str | None:
    kind = settings.peft_type.value
    if kind != "LORA":
        return f"vLLM takes LoRA, and this is {kind}"
    if len(model.active_adapters) > 1:
        return "vLLM takes one adapter at a time, and several are active"
    found = [name for name in NOT_IN_VLLM if getattr(settings, name, None)]
    if settings.bias != "none":
        found.append(f"bias={settings.bias}")
    if settings.init_lora_weights not in (True, False, "gaussian"):  # the others change the base too
        found.append(f"init_lora_weights={settings.init_lora_weights}")
    if any("lora_embedding_" in name for name, _ in model.named_parameters()):
        found.append("adapters of embeddings")
    return f"vLLM takes plain LoRA, without {', '.join(found)}" if found else None
