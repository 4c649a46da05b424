"""A model's twin that has learned nothing: its architecture and tokenizer, with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from dro_rl.files import folder_written_whole
from dro_rl.models.loading import check_model, declared_ends, load_tokenizer, refuse_taken


def write_scratch(name: str, folder: Path, seed: int = 0) -> int:
    """Write a folder like the model `name`, its weights drawn as its architecture draws them; return their number.

    Args:
        name: a model folder or a hub name. No weights of it are read.
        folder: where to; it must not hold anything.
        seed: of the weights.

    Raises:
        InputError: `name` is no causal language model, or something is in the folder's place.
    """
    refuse_taken(folder)
    check_model(name, "MODEL")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name), dtype=torch.float32)
    tokenizer = load_tokenizer(name)
    model.generation_config = GenerationConfig(
        eos_token_id=list(declared_ends(name)), pad_token_id=tokenizer.pad_token_id
    )
    with folder_written_whole(folder) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
    return int(model.num_parameters())
