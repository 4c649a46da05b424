"""What is checked of models before their weights load: what they are, and whether they can be trained as asked."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from dro_rl.engines.decoding import CACHED
from dro_rl.errors import InputError, LackError, Phrase, first_line
from dro_rl.job.assembly import lora_settings
from dro_rl.keys.run import RunConfig
from dro_rl.likelihood.attention import keeps_state
from dro_rl.models import quantization
from dro_rl.models.loading import add_adapter, check_model, check_pickle
from dro_rl.models.positions import positions_of
from dro_rl.models.sharding import launched_to_shard, whole_parameters
from dro_rl.prompts import load_template
from dro_rl.recipe import Recipe
from dro_rl.roles import ROLES, Role

logger = logging.getLogger(__name__)

TRAINABLE = frozenset({"F64", "F32", "F16", "BF16"})
"""Types of weights in a safetensors file."""


def check_models(recipe: Recipe) -> dict[Role, PreTrainedModel]:
    """Both roles' models against the recipe; of a generator elsewhere the tokenizer and the config alone.

    Returns:
        the models that are loaded, as their configs describe them, on no device.

    Raises:
        InputError: naming the recipe's key.
    """
    run = recipe.run
    check_layout(recipe)
    quantization.check(run.quantization, recipe.training.device)
    models: dict[Role, PreTrainedModel] = {}
    for role in ROLES:
        asked, place = run.of(role), f"{role}_model_name_or_path"
        load_template(asked.prompt_template)
        here = role in recipe.training.roles
        check_model(asked.model, place, revision=asked.revision, trust_remote_code=run.trust_remote_code, loaded=here)
        if not here:
            continue
        model = models[role] = without_weights(run, role)
        if Path(asked.model).is_dir():
            check_weights(Path(asked.model), model, place)
        if asked.lora_r > 0:
            check_adapters(run, role, model)
        check_precision(recipe, role, model.config)
        check_positions(recipe, role, *positions_of(model.config))
        _say_what_is_left_out(role, model)
    return models


def check_layout(recipe: Recipe) -> None:
    """Refuse what needs whole weights in each process where processes hold parts of them."""
    layout = launched_to_shard()
    if layout is None:
        return
    if recipe.training.tokens_per_microbatch == "auto":
        raise InputError(
            "tokens_per_microbatch",
            Phrase(f"auto, under {layout}"),
            f"under {layout} processes meet in every pass, and one that runs out of memory leaves the others waiting",
            "Use a number.",
        )
    if recipe.run.quantization != "none":
        raise InputError(
            "quantization",
            Phrase(f"{recipe.run.quantization}, under {layout}"),
            f"{layout} shards numbers, and quantised weights are codes",
            "Launch with recipes/accelerate/ddp.yaml or single_gpu.yaml, or use none.",
        )
    if recipe.run.share_base:
        raise InputError(
            "share_base",
            Phrase(f"true, under {layout}"),
            f"{layout} lays out the weights of each module for itself, and a shared base would be there twice",
            "Launch with recipes/accelerate/ddp.yaml or single_gpu.yaml, or leave share_base out.",
        )


def check_precision(recipe: Recipe, role: Role, config: PretrainedConfig) -> None:
    """Refuse to train all weights in half precision: an update at a usual rate is less than their last digit.

    DeepSpeed keeps weights in float32 of its own.
    """
    run, training = recipe.run, recipe.training
    held = config.dtype if run.dtype == "auto" else getattr(torch, run.dtype)
    trains = training.role_learning_rate(role) > 0 or run.of(role).warms
    if held not in (torch.bfloat16, torch.float16) or not trains or run.of(role).lora_r > 0:
        return
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
        return
    kind = str(held).removeprefix("torch.")
    raise InputError(
        "dtype",
        run.dtype if run.dtype != "auto" else Phrase(f"auto, and the {role} is held in {kind}"),
        f"all weights of the {role} train, and in {kind} nearly every update is rounded away",
        f"Use dtype: float32 with bf16: true, or adapters ({role}_lora_r: 16).",
    )


def check_positions(recipe: Recipe, role: Role, positions: int | None, what: str) -> None:
    """Refuse sequences longer than the model has positions for; `what` these are."""
    training = recipe.training
    written = training.max_completion_length if role == "selector" else training.max_answer_length
    if positions is not None and (training.max_prompt_length or 0) + written > positions:
        raise InputError(
            "max_prompt_length",
            training.max_prompt_length,
            f"with {written} tokens to write this is at most the {role}'s {positions} {what}",
            f"Lower it to {positions - written}: documents are cut evenly to fit."
            if written < positions
            else f"Lower {'max_completion_length' if role == 'selector' else 'max_answer_length'}.",
        )


def _say_what_is_left_out(role: Role, model: PreTrainedModel) -> None:
    text = model.config.get_text_config()
    cap, attention = getattr(text, "attn_logit_softcapping", None), model.config._attn_implementation
    if cap and attention == "sdpa":
        logger.warning(
            f"{role}: its attention logits are capped at {cap}, which sdpa leaves out; attn_implementation: eager "
            "has it, without shared prefixes"
        )
    if keeps_state(model.config) and text.model_type not in CACHED:
        logger.warning(
            f"{role}: {text.model_type} keeps a state that is not carried from token to token here: each sampled token "
            "reads the prompt again"
        )


def without_weights(run: RunConfig, role: Role) -> PreTrainedModel:
    """The role's model as its config describes it, on no device: names, shapes and sizes."""
    name, trust = run.of(role).model, run.trust_remote_code
    config = AutoConfig.from_pretrained(name, revision=run.of(role).revision, trust_remote_code=trust)
    # Each architecture has errors of its own for a config that it cannot be built from.
    try:
        with torch.device("meta"), whole_parameters():
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    except Exception as error:
        raise InputError(
            f"{role}_model_name_or_path",
            name,
            f"its config.json describes a model ({first_line(error)})",
            "Copy the folder again.",
        ) from None
    if run.attn_implementation is not None:
        try:
            with torch.device("meta"), whole_parameters():
                model = AutoModelForCausalLM.from_config(
                    config, trust_remote_code=trust, attn_implementation=run.attn_implementation
                )
        except Exception as error:
            raise InputError(
                "attn_implementation",
                run.attn_implementation,
                f"the {role} has it here ({first_line(error)})",
                "Use sdpa, or leave it unset.",
            ) from None
    return model


def check_weights(folder: Path, model: PreTrainedModel, place: str) -> None:
    """Refuse a folder whose weights are missing, not whole, or of other shapes. Headers are read, not weights."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    names = [SAFE_WEIGHTS_NAME]
    if not (folder / SAFE_WEIGHTS_NAME).is_file():
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise InputError(
                    place, str(index), "this is the index of the folder's weights", "Copy the folder again."
                ) from None
        elif any((folder / name).is_file() for name in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
            for file in sorted(folder.glob("pytorch_model*.bin")):
                check_pickle(file, place)
            return  # of pickled weights no more can be said without reading them
    shapes = model.state_dict()
    for name in names:
        if not (folder / name).is_file():
            raise InputError(
                place, str(folder), f"a model folder holds its weights, and {name} is missing", "Copy the folder again."
            )
        try:
            with safe_open(folder / name, framework="pt") as weights:
                known = shapes.keys() & set(weights.keys())
                found = {key: tuple(weights.get_slice(key).get_shape()) for key in sorted(known)}
                types = {weights.get_slice(key).get_dtype() for key in known}
        except (SafetensorError, OSError) as error:
            raise InputError(
                place, str(folder / name), f"this is a whole safetensors file ({error})", "Copy the file again."
            ) from None
        if types - TRAINABLE:
            raise InputError(
                place,
                Phrase(f"{folder / name} holds {', '.join(sorted(types))}"),
                "weights that train are of two bytes or more",
                "Use the model that this one was quantised from.",
            )
        for key, shape in found.items():
            if shape != tuple(shapes[key].shape):
                raise InputError(
                    place,
                    str(folder / name),
                    f"weights have the shapes of config.json, and {key} has {shape} for {tuple(shapes[key].shape)}",
                    "Copy the folder again, its config and its weights together.",
                )


def check_adapters(run: RunConfig, role: Role, model: PreTrainedModel) -> None:
    """Refuse adapters without the extra, or on layers that the model does not have."""
    if importlib.util.find_spec("peft") is None:
        raise LackError(
            f"{role}_lora_r",
            run.of(role).lora_r,
            "adapters need the peft extra",
            "pip install 'dro_rl[peft]', or use 0.",
        )
    layers = {name.rpartition(".")[2] for name, part in model.named_modules() if not list(part.children())}
    names = [name for name, _ in model.named_modules()]
    for target in run.lora_target_modules or []:
        if target == "lm_head" or not any(name == target or name.endswith(f".{target}") for name in names):
            raise InputError(
                "lora_target_modules",
                target,
                f"adapters go on layers of the {role} below its head ({', '.join(sorted(layers - {'lm_head'}))})",
                "Take it off the list, or leave the list unset.",
            )
    lora = lora_settings(run, role)
    assert lora is not None
    width = model.config.get_text_config().hidden_size
    if lora.r > width:
        raise InputError(
            f"{role}_lora_r",
            lora.r,
            f"adapters are of less rank than the layers, {width} wide",
            "Use 16, or 0 for none.",
        )
    with torch.device("meta"):
        add_adapter(without_weights(run, role), lora)
