"""From a recipe to live objects: prompters, warmed-up models, the module that trains."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import PreTrainedModel

from dro_rl import engines
from dro_rl.errors import InputError
from dro_rl.evaluation.evaluator import evaluate_stage
from dro_rl.evaluation.stages import read_stages
from dro_rl.job.warmup import WarmUp, warm_up
from dro_rl.keys.run import RunConfig
from dro_rl.likelihood.attention import ARCHITECTURES, takes_packed_rows
from dro_rl.models.loading import (
    LoraSettings,
    add_adapter,
    declared_ends,
    load_adapter,
    load_model,
    load_tokenizer,
)
from dro_rl.models.module import SelectorGenerator
from dro_rl.models.quantization import settings_of
from dro_rl.models.saving import is_adapted
from dro_rl.models.sharding import launched_to_shard, whole_parameters
from dro_rl.models.sharing import twin
from dro_rl.pipeline import PipelineSettings, RAGPipeline
from dro_rl.prompts import Prompter
from dro_rl.recipe import Recipe
from dro_rl.records import Question
from dro_rl.roles import ROLES, Role

logger = logging.getLogger(__name__)


def model_kwargs(recipe: Recipe, role: Role) -> dict[str, Any]:
    """How a role's model is loaded."""
    run, training = recipe.run, recipe.training
    kwargs: dict[str, Any] = {
        "dtype": "auto" if run.dtype == "auto" else getattr(torch, run.dtype),
        "trust_remote_code": run.trust_remote_code,
    }
    if run.attn_implementation is not None:
        kwargs["attn_implementation"] = run.attn_implementation
    if run.of(role).lora_r:
        half = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None
        held = torch.float32 if run.dtype == "auto" else kwargs["dtype"]
        kwargs |= settings_of(run.quantization, half or held)
    revision = run.of(role).revision
    return {**kwargs, "revision": revision} if revision else kwargs


def lora_settings(run: RunConfig, role: Role) -> LoraSettings | None:
    """A role's adapters, None for full training."""
    r = run.of(role).lora_r
    if r == 0:
        return None
    targets = tuple(run.lora_target_modules) if run.lora_target_modules else None
    return LoraSettings(r, run.lora_alpha, run.lora_dropout, targets)


def build_prompters(recipe: Recipe) -> dict[Role, Prompter]:
    """The prompts of each role, with their tokenizers."""
    run = recipe.run
    prompters: dict[Role, Prompter] = {}
    for role in ROLES:
        name, revision = run.of(role).model, run.of(role).revision
        prompters[role] = Prompter(
            load_tokenizer(name, revision=revision, trust_remote_code=run.trust_remote_code),
            run.of(role).prompt_template,
            recipe.training.max_prompt_length,
            run.chat_template_kwargs,
            declared_ends(name, revision=revision, trust_remote_code=run.trust_remote_code),
        )
    return prompters


def warm_up_models(recipe: Recipe, train: Sequence[Question], prompters: dict[Role, Prompter]) -> dict[Role, str]:
    """Where each role starts from: the recipe's model, or its warmed-up copy in the cache."""
    run, training = recipe.run, recipe.training
    sources: dict[Role, str] = {}
    for role in training.roles:
        sources[role] = run.of(role).model
        if run.of(role).warms:
            job = WarmUp(
                role=role,
                model=sources[role],
                model_kwargs=model_kwargs(recipe, role),
                lora=lora_settings(run, role),
                prompter=prompters[role],
                steps=run.of(role).warmup_steps,
                learning_rate=run.of(role).warmup_learning_rate,
                merged=not run.share_base,
            )
            sources[role] = warm_up(job, train, run, training)
    return sources


def load_models(recipe: Recipe, sources: dict[Role, str]) -> SelectorGenerator:
    """Both models in one module, with adapters where the recipe asks for them."""
    models = {}
    for role, model in _bases(recipe, sources).items():
        if recipe.training.shared_prefix == "on" and not takes_packed_rows(model, positions=1):
            raise InputError(
                "shared_prefix",
                f"on, for the {role}: {model.config.model_type} under {model.config._attn_implementation}",
                f"it needs sdpa attention and one of {', '.join(sorted(ARCHITECTURES))}",
                "Use auto, which takes the plain path here.",
            )
        lora = lora_settings(recipe.run, role)
        if recipe.run.share_base and sources[role] != recipe.run.of(role).model:
            models[role] = load_adapter(model, sources[role])
        else:
            models[role] = model if lora is None else add_adapter(model, lora)
    return SelectorGenerator(**models)


def _bases(recipe: Recipe, sources: dict[Role, str]) -> dict[Role, PreTrainedModel]:
    """What each role is before its adapters. A shared one is the recipe's model: a warm-up moved adapters alone."""
    if not recipe.run.share_base:
        return {
            role: load_model(sources[role], **_source_kwargs(recipe, role, sources)) for role in recipe.training.roles
        }
    first, *others = ROLES
    base = load_model(recipe.run.of(first).model, **model_kwargs(recipe, first)).requires_grad_(False)
    return {first: base} | {role: twin(base) for role in others}


def load_reference(recipe: Recipe, sources: dict[Role, str], models: SelectorGenerator) -> nn.Module | None:
    """The initial selector, when the objective keeps the trained one near it.

    Under adapters it is the base that is there, with the adapters as they begin.
    """
    if recipe.training.beta == 0:
        return None
    if is_adapted(models.selector) and launched_to_shard() is None:
        return twin(models.selector).requires_grad_(False)
    with whole_parameters():
        model = load_model(sources["selector"], **_source_kwargs(recipe, "selector", sources))
    return model.requires_grad_(False)


def _source_kwargs(recipe: Recipe, role: Role, sources: Mapping[Role, str]) -> dict[str, Any]:
    kwargs = model_kwargs(recipe, role)
    if sources[role] != recipe.run.of(role).model:
        kwargs.pop("revision", None)  # a warmed-up copy has none
    return kwargs


def one_role_at_a_time(recipe: Recipe, sources: Mapping[Role, str]) -> Callable[[Role], AbstractContextManager[Any]]:
    """Opens a role as it starts, whole on each process and without gradient; the other one leaves the memory."""
    training, state = recipe.training, PartialState()
    loaded: dict[Role, Any] = {}

    def load(role: Role) -> Any:
        if recipe.run.share_base and sources[role] != recipe.run.of(role).model:
            return load_adapter(load_model(recipe.run.of(role).model, **model_kwargs(recipe, role)), sources[role])
        return load_model(sources[role], **_source_kwargs(recipe, role, sources))

    @contextmanager
    def open_role(role: Role) -> Iterator[Any]:
        if role not in loaded:
            loaded.clear()
            gc.collect()
            with whole_parameters():
                loaded[role] = load(role).to(state.device).eval()
        half = torch.float16 if training.fp16 else torch.bfloat16
        with torch.no_grad(), torch.autocast(state.device.type, half, enabled=bool(training.bf16 or training.fp16)):
            yield loaded[role]

    return open_role


def evaluate_base(recipe: Recipe, dev: Sequence[Question], prompters: dict[Role, Prompter]) -> None:
    """Evaluate the models as the recipe names them, when a warm-up would change them before the first look.

    One model at a time is in memory. A resumed run that has the stage keeps it.
    """
    run, training = recipe.run, recipe.training
    folder = str(training.output_dir)
    if run.warmup == "none" or any(stage["stage"] == "base" for stage in read_stages(folder)):
        return
    settings = PipelineSettings.of(training, run.chat_template_kwargs)
    pipeline = RAGPipeline(
        one_role_at_a_time(recipe, {role: run.of(role).model for role in ROLES}),
        prompters,
        settings,
        training.per_device_eval_batch_size,
        training.scoring.shared_prefix,
        engines.elsewhere(training, prompters["generator"]),
    )
    logger.info(f"evaluation of the base models: {len(dev)} dev questions")
    evaluate_stage(
        pipeline,
        dev,
        stage="base",
        split=run.dataset_eval_split,
        output_dir=folder,
        likelihood=training.answer_likelihood,
        aliases=training.answer_aliases,
    )
    PartialState().wait_for_everyone()
