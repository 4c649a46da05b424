"""A trained role, loaded as `dro_rl.models.saving.export_role` left it: a whole model, or adapters over their base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dro_rl.errors import InputError, Phrase
from dro_rl.models import quantization
from dro_rl.models.loading import check_model, load_model
from dro_rl.models.saving import ADAPTERS

ADAPTER = "adapter_config.json"


def load_role_to_serve(folder: Path, device: torch.device, dtype: torch.dtype | None) -> Any:
    """A role's model on a device, to be called without gradient.

    Args:
        folder: its folder.
        device: where to.
        dtype: that of the saved weights, unless told; of adapters, that of their base, which is held as in training.

    Raises:
        InputError: it is no model, or adapters whose base is not there, or is another.
    """
    place = str(folder)
    if not (folder / ADAPTER).is_file() or (folder / "config.json").is_file():
        check_model(place, place)
        whole: Any = load_model(place, dtype=dtype or "auto", device_map=None)
        return whole.eval().to(device)
    settings = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
    base, revision = str(settings["base_model_name_or_path"]), settings.get("revision")
    check_model(base, f"{folder / ADAPTER}: base_model_name_or_path", revision=revision)
    check_adapters_fit(folder, base, revision)
    options: dict[str, Any] = {"dtype": dtype or "auto", "revision": revision}
    held = quantization.read(folder)
    if held is not None:
        quantization.check(quantization.name_of(held), device)
        options["quantization_config"] = held
    from peft import PeftModel

    model: Any = load_model(base, **options)
    return PeftModel.from_pretrained(model.to(device), place).eval()


def check_adapters_fit(folder: Path, base: str, revision: str | None) -> None:
    """Refuse adapters of layers that their base does not have, or not in that shape. No weights are read.

    Raises:
        InputError: naming the first such layer.
    """
    from safetensors import safe_open

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base, revision=revision))
    layers = dict(model.named_modules())
    with safe_open(folder / ADAPTERS, framework="pt") as weights:
        for key in sorted(weights.keys()):
            name, _, part = key.removeprefix("base_model.model.").rpartition(".lora_")
            layer = layers.get(name)
            wide = part.startswith("A")
            expected = None if layer is None else getattr(layer, "in_features" if wide else "out_features", None)
            found = weights.get_slice(key).get_shape()[1 if wide else 0]
            if layer is None or (expected is not None and expected != found):
                raise InputError(
                    str(folder / ADAPTERS),
                    Phrase(f"{name}, {found} {'in' if wide else 'out'}"),
                    f"adapters are of their base, {base}, which has {expected or 'no such layer'} there",
                    f"Put the base back that they were trained on, or name it in {ADAPTER}.",
                )
