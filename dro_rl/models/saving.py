"""Saving a role: for a checkpoint, bit for bit, and to serve, with adapters merged."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dro_rl.errors import InputError, Phrase
from dro_rl.files import folder_written_whole
from dro_rl.models import quantization
from dro_rl.models.sharding import whole_parameters
from dro_rl.roles import Role

ADAPTERS = "adapter_model.safetensors"


def is_adapted(model: nn.Module) -> bool:
    """Whether the role is a PEFT model."""
    return hasattr(model, "peft_config")


def save_role(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Save one role for a checkpoint: the whole model under its modules' own names, or its adapters alone."""
    if is_adapted(model):
        model.save_pretrained(folder, state_dict=state_dict)
    else:
        model.save_pretrained(folder, state_dict=state_dict, save_original_format=False)
    tokenizer.save_pretrained(folder)


def save_adapters(model: Any, folder: Path) -> None:
    """Write a PEFT model's adapters alone, as peft writes them; nothing is said of the base, and no hub is asked."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, folder / ADAPTERS)
    model.peft_config[model.active_adapter].save_pretrained(folder)


def of_role(role: Role, state: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    """One role's part of a gathered state, under the role's own names."""
    return state and {name.removeprefix(f"{role}."): v for name, v in state.items() if name.startswith(f"{role}.")}


def load_role(model: PreTrainedModel, folder: Path) -> None:
    """Load into `model` what `save_role` wrote, in place and bit for bit."""
    from safetensors.torch import load_file

    if is_adapted(model):
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, load_file(folder / ADAPTERS))
        return
    state: dict[str, Tensor] = {}
    for part in sorted(folder.glob("model*.safetensors")):
        state.update(load_file(part))
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = set(model.all_tied_weights_keys)
    if unexpected or set(missing) - tied:
        raise InputError(
            str(folder),
            Phrase(f"{len(missing)} missing, {len(unexpected)} unexpected tensors"),
            "the checkpoint belongs to this model",
            "Resume with the recipe that wrote it.",
        )
    model.tie_weights()


def export_role(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    state_dict: dict[str, Tensor] | None = None,
    extra: Mapping[str, str] | None = None,
    *,
    merged: bool = True,
    ends: Sequence[int] = (),
    sealed: bool = False,
) -> None:
    """Write one role to serve: a plain causal LM with its tokenizer, and `extra` text files by name.

    Its generation config names `ends` as what ends a sequence, so that any server stops where the run did.

    Adapters are merged into the model, and kept in `adapter/`; not `merged`, the folder holds them alone, with the name
    of their base. The folder is whole or the one before; `sealed`, it
    can be told later whether it is (`dro_rl.files.damage`).
    """
    with folder_written_whole(folder, sealed=sealed) as beside:
        if is_adapted(model):
            from peft import PeftModel

            assert isinstance(model, PeftModel)
            model.save_pretrained(beside / "adapter" if merged else beside, state_dict=state_dict)
            if merged:
                merged_copy(model, state_dict).save_pretrained(beside)
            elif held := quantization.settings_in(model):
                quantization.write(held, beside)
        else:
            model.save_pretrained(beside, state_dict=state_dict)
        if ends:
            generation = copy.deepcopy(model.generation_config)
            generation.eos_token_id = list(ends)
            generation.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        for name, text in (extra or {}).items():
            (beside / name).write_text(text, encoding="utf-8")


def merged_copy(model: Any, state_dict: Mapping[str, Tensor] | None = None) -> PreTrainedModel:
    """The model with its adapters merged, made of the weights at hand; the trained model is never touched.

    Quantised weights are merged as the numbers that they stand for: what comes out is what was trained.

    Args:
        model: a PEFT model.
        state_dict: its whole state, where it is sharded.
    """
    from peft import get_peft_model

    base = model.get_base_model()
    with whole_parameters(), torch.random.fork_rng():  # what is drawn here is replaced below
        whole = get_peft_model(
            type(base)(quantization.plain_config(base.config)), model.peft_config[model.active_adapter]
        )
    whole.load_state_dict(quantization.state_in_numbers(model) if state_dict is None else state_dict)
    merged = whole.merge_and_unload().to(base.dtype)
    merged.generation_config = base.generation_config
    return merged
