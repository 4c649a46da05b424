"""From llama.cpp's format to a plain model folder: weights as numbers again, the tokenizer with the ends it names.

transformers reads the file, and leaves a model that it will not save and, for some tokenizers, the wrong end of
sequence. Both are put right here.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dro_rl.errors import InputError, LackError, Phrase, first_line
from dro_rl.files import file_sha256, folder_written_whole
from dro_rl.models.loading import refuse_taken

MAGIC = b"GGUF"
SOURCE = "converted_from.json"
"""In the folder: name and hash of the file that it was made of."""
TOKENS = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id"}
"""A tokenizer's special tokens, and under what names the file has their ids."""


def convert_gguf(file: Path, folder: Path) -> None:
    """Write a GGUF file's model and tokenizer as a folder that trains: float32 safetensors, whole and sealed, or not.

    Args:
        file: of any architecture and quantisation that transformers reads.
        folder: where to; it must not hold anything.

    Raises:
        InputError: there is no gguf package, no such file, something in the folder's place, or nothing that
            transformers reads.
    """
    _check(file, folder)
    try:
        read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        said = _said(file)
    except Exception as error:  # a parser, a config class and a tokenizer library, each with errors of its own
        raise InputError(
            str(file),
            Phrase(first_line(error)),
            "transformers reads the file",
            "Use another file of the model, or its original.",
        ) from None
    config = read.config
    del config.quantization_config  # what it was; the weights that were read are numbers
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    for name, key in TOKENS.items():
        if f"tokenizer.ggml.{key}" in said:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(int(said[f"tokenizer.ggml.{key}"])))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.clean_up_tokenization_spaces = False  # byte-pair encodings spell spaces out
    ends = [tokenizer.eos_token_id, said.get("tokenizer.ggml.eot_token_id", tokenizer.eos_token_id)]
    model.generation_config.eos_token_id = list(dict.fromkeys(map(int, ends)))
    for settings in (model.config, model.generation_config):
        settings.bos_token_id, settings.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    with folder_written_whole(folder, sealed=True) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        (beside / SOURCE).write_text(json.dumps({"file": file.name, "sha256": file_sha256(file)}) + "\n", "utf-8")


def check_conversion(file: str | Path, folder: Path) -> None:
    """Raise `InputError` where no file could be converted, or where something is in the folder's place."""
    if importlib.util.find_spec("gguf") is None:
        raise LackError(
            str(file), Phrase("llama.cpp's format"), "reading it needs the gguf extra", "pip install 'dro_rl[gguf]'"
        )
    refuse_taken(folder)


def _check(file: Path, folder: Path) -> None:
    check_conversion(file, folder)
    if not file.is_file():
        raise InputError(str(file), Phrase("no such file"), "a GGUF file is converted", "Check the path.")
    with file.open("rb") as stream:
        start = stream.read(len(MAGIC))
    if start != MAGIC:
        raise InputError(str(file), Phrase(f"begins with {start!r}"), "a GGUF file begins with GGUF", "Check the path.")


def _said(file: Path) -> dict[str, Any]:
    """The file's own words of its tokenizer."""
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    return {key: fields[key].contents() for key in fields if key.endswith("_token_id")}
