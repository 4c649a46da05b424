"""Frozen weights in four or eight bits under adapters: by bitsandbytes, through transformers' own settings of it."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PretrainedConfig

from dro_rl.errors import InputError, first_line

NONE, NF4, INT8 = "none", "nf4", "int8"
FILE = "quantization_config.json"


def settings_of(name: str, compute: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` is told of `quantization: name`.

    Args:
        name: `nf4` (Dettmers et al. 2023, with quantised constants), `int8` (Dettmers et al. 2022), or `none`.
        compute: the type that four-bit weights are multiplied in.
    """
    if name == NONE:
        return {}
    if name == INT8:
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
    }


def check(name: str, device: torch.device) -> None:
    """Refuse a quantisation that this machine does not have, by a layer of it that goes forward and backward.

    Raises:
        InputError: bitsandbytes is not installed, or has nothing for the device.
    """
    if name == NONE:
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            "quantization", name, "it needs the quantization extra", "pip install 'dro_rl[quantization]', or use none."
        )
    try:
        layers: Any = importlib.import_module("bitsandbytes.nn")
        if name == INT8:
            layer = layers.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False, threshold=6.0)
        else:
            layer = layers.Linear4bit(64, 64, bias=False, quant_type=NF4, compute_dtype=torch.float32)
        layer.requires_grad_(False)
        layer.to(device)(torch.ones(1, 64, device=device, requires_grad=True)).sum().backward()
    except Exception as error:  # each device and release has errors of its own
        raise InputError(
            "quantization",
            name,
            f"bitsandbytes serves {device.type} here ({first_line(error)})",
            "Use none, or a device that it serves.",
        ) from None


def keep_differentiable(model: nn.Module) -> None:
    """Keep four-bit weights in the layout that has gradients.

    On a CPU with AVX512-BF16 bitsandbytes 0.50 packs them anew in the first evaluation, for a kernel that has none: a
    training that goes on from there gets no gradient through them, and says so in a warning alone.
    """
    for module in model.modules():
        if is_quantised(module) and hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False


def settings_in(model: Any) -> BitsAndBytesConfig | None:
    """How a model's frozen weights are held; None where they are numbers."""
    return getattr(model.config, "quantization_config", None)


def name_of(settings: BitsAndBytesConfig) -> str:
    """What recipes call it."""
    return INT8 if settings.load_in_8bit else NF4


def write(settings: BitsAndBytesConfig, folder: Path) -> None:
    """Say beside adapters how the base was held that they were trained on."""
    (folder / FILE).write_text(settings.to_json_string(), encoding="utf-8")


def read(folder: Path) -> BitsAndBytesConfig | None:
    """What `write` left in a folder of adapters."""
    path = folder / FILE
    return BitsAndBytesConfig.from_dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def plain_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config of the same model in numbers."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def is_quantised(module: nn.Module) -> bool:
    """Whether a layer's weights are codes, not numbers."""
    return type(module._parameters.get("weight")).__name__ in ("Params4bit", "Int8Params")


def in_numbers(module: nn.Module) -> Tensor:
    """The numbers that a quantised layer's weights stand for; the weights themselves of any other."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    weight: Any = module.weight
    return dequantize_bnb_weight(weight, getattr(module, "state", None)).detach() if is_quantised(module) else weight


def beside_weights(model: nn.Module) -> Iterator[Any]:
    """What quantised layers hold beside parameters and buffers: scales, and codes where the first pass puts them."""
    for module in model.modules():
        if not is_quantised(module):
            continue
        layer: Any = module
        if hasattr(layer, "init_8bit_state"):
            if layer.weight.CB is not None:
                layer.init_8bit_state()
            yield from (layer.state.CB, layer.state.SCB)
        else:
            yield from (layer.quant_state, layer.weight.quant_state)


def state_in_numbers(model: nn.Module) -> dict[str, Tensor]:
    """A model's state with its quantised weights as numbers, in memory of the CPU where they are made."""
    quantised = {name: module for name, module in model.named_modules() if is_quantised(module)}
    codes = tuple(f"{name}.{part}" for name in quantised for part in ("weight", "SCB"))
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(codes)}
    return state | {f"{name}.weight": in_numbers(module).cpu() for name, module in quantised.items()}
