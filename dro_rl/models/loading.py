"""Loading a role: what is refused before anything large is read, the tokenizer, the adapters."""

from __future__ import annotations

import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from dro_rl.errors import InputError, LackError, Phrase, first_line
from dro_rl.hub import look_up
from dro_rl.models.quantization import keep_differentiable


def check_model(
    name: str, place: str, *, revision: str | None = None, trust_remote_code: bool = False, loaded: bool = True
) -> None:
    """Refuse what is not a causal LM with a tokenizer that fits it, before anything large is read.

    Args:
        loaded: its weights will be: they are whole, and not quantised.

    Raises:
        InputError: naming `place`, the recipe key.
    """
    _check_folder(Path(name), place)
    if not Path(name).exists():
        look_up("model", name, revision)
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:
        # A hub, a config class and a tokenizer library stand behind these, each with errors of its own.
        raise InputError(
            place,
            name,
            f"this is a model folder or a hub name ({first_line(error)})",
            "Check the name and the network.",
        ) from None
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not (
        config.auto_map if trust_remote_code else None
    ):
        raise InputError(
            place, f"{name} ({config.model_type})", "this is a causal language model", "Use a decoder-only model."
        )
    encodes = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if config.is_encoder_decoder or encodes:
        raise InputError(
            place,
            f"{name} ({config.model_type})",
            "this is a causal language model, and an encoder reads what comes after",
            "Use a decoder-only model.",
        )
    quantised = getattr(config, "quantization_config", None)
    if loaded and quantised is not None:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised.quant_method
        raise _quantised(place, Phrase(f"{name} ({getattr(method, 'value', method)})"))
    try:
        declared_ends(name, revision=revision, trust_remote_code=trust_remote_code)
    except (ValueError, TypeError) as error:
        raise InputError(
            place,
            Phrase(f"{name}: generation_config.json"),
            f"transformers reads it ({first_line(error)})",
            "Correct it, or take the file away.",
        ) from None
    rows = config.get_text_config().vocab_size
    if len(tokenizer) > rows:
        raise InputError(
            place,
            f"{name}: {len(tokenizer)} tokens, {rows} embeddings",
            "every token of the tokenizer has an embedding in the model",
            "Use the tokenizer that the model was trained with, or resize its embeddings.",
        )
    if not tokenizer.is_fast:
        raise InputError(place, name, "the tokenizer is a fast one (documents are cut by offsets)", "Convert it.")
    if tokenizer.eos_token_id is None:
        raise InputError(place, name, "the tokenizer has an end-of-sequence token", "Set eos_token in its config.")


def refuse_taken(folder: Path) -> None:
    """Refuse to write a model where something is. Raises `InputError`."""
    if folder.exists() and (folder.is_file() or any(folder.iterdir())):
        raise InputError(str(folder), Phrase("something is there"), "a model gets a folder of its own", "Name another.")


def _check_folder(path: Path, place: str) -> None:
    """Refuse a path that is no model folder, and say what it is where that is known."""
    gguf = path if path.suffix == ".gguf" else next(iter(sorted(path.glob("*.gguf"))), None)
    if path.exists() and gguf is not None and not [*path.glob("*.safetensors"), *path.glob("*.bin")]:
        raise InputError(
            place,
            str(path),
            "a model is a folder with config.json and safetensors, and this is llama.cpp's format",
            f"Make one of it: dro-rl model convert {gguf} FOLDER.",
        )
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise InputError(
            place,
            str(path),
            "a model folder holds a whole model, and these are adapters of one",
            "Merge them into it, with peft's merge_and_unload, and save that.",
        )
    if path.exists() and not (path / "config.json").is_file():
        raise InputError(place, str(path), "a model folder holds a config.json", "Check the path.")
    for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        if (path / name).is_file():
            raise _quantised(place, Phrase(f"{path} ({method}, by its {name})"))


def _quantised(place: str, value: Phrase) -> InputError:
    return InputError(
        place,
        value,
        "weights that train are not quantised",
        "Use the model that this one was made from; adapters (lora_r) save memory.",
    )


def load_model(name: str, **kwargs: Any) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained`, float32 unless `dtype` says otherwise.

    A mixture of experts gives no router logits: nothing here reads them, and the losses made of them go wrong where a
    pass has a mask of its own or a cache. TRL's supervised training, which uses them, leaves them on in the config.
    """
    kwargs.setdefault("dtype", torch.float32)
    try:
        model = AutoModelForCausalLM.from_pretrained(name, **kwargs)
    except pickle.UnpicklingError:
        raise _pickled(str(name), Phrase("its pickled weights")) from None
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "output_router_logits", False):
            config.output_router_logits = False
    _keep_what_can_be_saved(model)
    keep_differentiable(model)
    return model


def _keep_what_can_be_saved(model: PreTrainedModel) -> None:
    """Of a generation config that contradicts itself, its tokens alone: transformers reads it, but refuses to save it,
    which would end a run at its first checkpoint. How to sample is never taken from it."""
    given = model.generation_config
    try:
        given.validate(strict=True)
    except ValueError:
        model.generation_config = GenerationConfig(
            bos_token_id=given.bos_token_id, eos_token_id=given.eos_token_id, pad_token_id=given.pad_token_id
        )


def check_pickle(file: Path, place: str) -> None:
    """Refuse a pickled weight file that holds more than tensors, or is not whole. Its tensors are not read."""
    try:
        torch.load(file, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(file))
    except Exception:  # whatever a pickle of anyone's raises on its way
        raise _pickled(place, str(file)) from None


def _pickled(place: str, found: str) -> InputError:
    return InputError(
        place,
        found,
        "a pickled weight file (.bin) holds tensors alone: reading more would run code of whoever wrote it",
        "Get the model as safetensors, or copy the file again if it should hold tensors.",
    )


def load_tokenizer(name: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer, with a padding token, which saving and serving expect; prompts are padded without it."""
    tokenizer = AutoTokenizer.from_pretrained(name, **kwargs)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def declared_ends(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> tuple[int, ...]:
    """The tokens that a model says its sequences end in: of its generation config, else of its config."""
    try:
        declared = GenerationConfig.from_pretrained(name, revision=revision or "main").eos_token_id
    except OSError:  # there is none
        declared = None
    if declared is None:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
        declared = getattr(config.get_text_config(), "eos_token_id", None)
    return () if declared is None else (declared,) if isinstance(declared, int) else tuple(declared)


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Low-rank adapters for one role: rank `r`, scale `alpha` / r, on `target_modules` (None: all linear layers)."""

    r: int
    alpha: int
    dropout: float
    target_modules: tuple[str, ...] | None


MERGED_WRONG = frozenset({"jamba"})
"""Decoders that peft takes, but whose adapters do not merge into the model that was trained."""


def add_adapter(model: PreTrainedModel, lora: LoraSettings) -> Any:
    """Freeze the model and put trainable adapters on it.

    The head stays as it is: its adapter would be left out of completion-only scoring in some architectures.

    Raises:
        InputError: there is no peft, or it has no adapters for these layers that could be merged.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise LackError(
            "selector_lora_r / generator_lora_r", lora.r, "adapters need the peft extra", "pip install 'dro_rl[peft]'"
        ) from None
    if lora.target_modules and "lm_head" in lora.target_modules:
        raise InputError(
            "lora_target_modules", "lm_head", "adapters go on the layers below the head", "Take lm_head off the list."
        )
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules) if lora.target_modules else "all-linear",
        exclude_modules=None if lora.target_modules else routers(model) or None,
        task_type="CAUSAL_LM",
    )
    try:
        if model.config.model_type in MERGED_WRONG:
            raise ValueError("what merging makes of them is another model")
        adapted = get_peft_model(model, config, revision=getattr(model.config, "_commit_hash", None))
    except ValueError as error:  # peft knows what it cannot adapt, state-space layers among them
        raise InputError(
            "selector_lora_r / generator_lora_r",
            Phrase(f"{lora.r}, on {model.config.model_type}"),
            f"peft adapts the layers ({first_line(error)})",
            "Name layers that it does in lora_target_modules, or train all weights.",
        ) from None
    return adapted


def load_adapter(model: PreTrainedModel, folder: str) -> Any:
    """Freeze the model and put adapters on it that `dro_rl.models.saving.export_role` left alone, to train on."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, folder, is_trainable=True)


def routers(model: PreTrainedModel) -> list[str]:
    """Layers that choose experts and are linear layers by their class, as in Phi's and Llama 4's mixtures: what they
    give is a tuple, which an adapter would add to."""
    linear = (each for each in model.named_modules() if isinstance(each[1], torch.nn.Linear))
    return [name for name, part in linear if "Router" in type(part).__name__]
