"""Bases in four and eight bits under adapters: what trains, what is left, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from training_world import largest_difference, questions, save_model, weights, world
from transformers import AutoModelForCausalLM, set_seed

from dro_rl import train
from dro_rl.engines.vllm_colocate import numbers_of
from dro_rl.errors import InputError
from dro_rl.job.assembly import load_models, load_reference
from dro_rl.job.model_checks import check_models
from dro_rl.likelihood import completion_logps
from dro_rl.models import quantization
from dro_rl.models.loading import LoraSettings, add_adapter, load_model
from dro_rl.models.saving import export_role, merged_copy
from dro_rl.models.serving import load_role_to_serve
from dro_rl.models.sharing import twin
from dro_rl.pipeline import RAGPipeline
from dro_rl.recipe import load_recipe
from dro_rl.roles import ROLES

Job = Callable[..., Path]
HELD = ("nf4", "int8")
SIZE = {"hidden_size": 64, "intermediate_size": 128}
ROUNDING = {"nf4": 1e-4, "int8": 0.1}
"""Of a log-probability: eight bits are multiplied in float16, and the activations are rounded to eight bits too."""


def adapted(folder: Path, held: str, seed: int = 1, targets: tuple[str, ...] | None = None) -> Any:
    """A model with adapters that do something on a quantised base."""
    options = quantization.settings_of(held, torch.float32)
    model = load_model(str(folder if folder.exists() else save_model(folder, seed, **SIZE)), **options)
    set_seed(0)
    model = add_adapter(model, LoraSettings(4, 8, 0.0, targets))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def logps(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat(completion_logps(model, list(range(2, 20)), [[4, 9, 1], [7, 1]]))


@pytest.mark.parametrize("held", HELD)
def test_a_base_is_held_in_codes_and_adapters_in_numbers(tmp_path: Path, held: str) -> None:
    model = adapted(tmp_path / "m", held)
    codes = [p for name, p in model.named_parameters() if "proj.base_layer" in name]
    bits = (
        8
        * sum(p.numel() * p.element_size() for p in codes)
        / sum(layer.in_features * layer.out_features for layer in model.modules() if quantization.is_quantised(layer))
    )
    assert bits == {"nf4": 4, "int8": 8}[held]
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert all(("lora_" in name) == p.requires_grad for name, p in model.named_parameters())


@pytest.mark.parametrize("held", HELD)
def test_gradients_after_an_evaluation_are_those_before(tmp_path: Path, held: str) -> None:
    """bitsandbytes packs weights anew in an evaluation on some processors, for a kernel that has no gradient."""
    model = adapted(tmp_path / "m", held)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model.train()
        torch.cat(completion_logps(model, list(range(2, 20)), [[4, 9, 1], [7, 1]])).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    before = gradients()
    model.eval()
    logps(model)
    assert largest_difference(before, gradients()) == 0
    first = next(name for name in before if "layers.0" in name and "lora_A" in name)
    assert before[first].abs().max() > 1e-3, "through the layers above"


@pytest.mark.parametrize("held", HELD)
def test_what_is_merged_is_what_was_trained_in_full_precision(tmp_path: Path, held: str) -> None:
    model = adapted(tmp_path / "m", held)
    expected = logps(model)
    merged = merged_copy(model).eval()
    assert not hasattr(merged.config, "quantization_config")
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    torch.testing.assert_close(logps(merged), expected, rtol=0, atol=ROUNDING[held])
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert (logps(base) - expected).abs().max() > 0.2
    assert torch.equal(logps(model), expected), "the trained model is as it was"


@pytest.mark.parametrize("targets", [None, ("q_proj",)], ids=["all layers", "one layer"])
@pytest.mark.parametrize("held", HELD)
def test_vllm_is_handed_numbers(tmp_path: Path, held: str, targets: tuple[str, ...] | None) -> None:
    model = adapted(tmp_path / "m", held, targets=targets)
    handed, merged = dict(numbers_of(model)), dict(merged_copy(model).named_parameters())
    assert set(handed) == set(merged)
    assert largest_difference(handed, {name: p.detach() for name, p in merged.items()}) < 1e-6


@pytest.mark.parametrize("held", HELD)
def test_a_twin_has_the_same_codes_and_scales(tmp_path: Path, held: str) -> None:
    base = load_model(str(save_model(tmp_path / "m", 1, **SIZE)), **quantization.settings_of(held, torch.float32))
    expected = logps(base.requires_grad_(False))
    other = twin(base)
    assert all(one is two for one, two in zip(base.parameters(), other.parameters(), strict=True))
    scales = list(quantization.beside_weights(base))
    assert scales
    assert all(one is two for one, two in zip(scales, quantization.beside_weights(other), strict=True))
    assert torch.equal(logps(other), expected)
    assert torch.equal(logps(base), expected), "the first still has its own"


@pytest.mark.parametrize("held", ["none", *HELD])
def test_adapters_left_alone_are_loaded_over_the_base_they_name(tmp_path: Path, tokenizer: Any, held: str) -> None:
    model = adapted(tmp_path / "m", held)
    export_role(model, tokenizer, tmp_path / "role", merged=False)
    assert [path.name for path in (tmp_path / "role").glob("*.safetensors")] == ["adapter_model.safetensors"]
    served = load_role_to_serve(tmp_path / "role", torch.device("cpu"), None)
    torch.testing.assert_close(logps(served), logps(model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("wrong", ["wider", "fewer layers", "gone"])
def test_adapters_of_another_base_are_refused_before_it_loads(tmp_path: Path, tokenizer: Any, wrong: str) -> None:
    export_role(adapted(tmp_path / "m", "none"), tokenizer, tmp_path / "role", merged=False)
    shutil.rmtree(tmp_path / "m")
    if wrong == "wider":
        save_model(tmp_path / "m", 1, hidden_size=96, intermediate_size=128)
    if wrong == "fewer layers":
        save_model(tmp_path / "m", 1, num_hidden_layers=1, **SIZE)
    with pytest.raises(InputError) as error:
        load_role_to_serve(tmp_path / "role", torch.device("cpu"), None)
    parts = {"wider": "96", "fewer layers": "no such layer", "gone": "base_model_name_or_path"}
    assert "adapter" in str(error.value)
    assert parts[wrong] in str(error.value)


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Any]:
    base = str(save_model(tmp_path / "base", 1, **SIZE))
    return {
        "selector_model_name_or_path": base, "generator_model_name_or_path": base, "selector_lora_r": 4,
        "generator_lora_r": 2,
    }  # fmt: skip


@pytest.mark.parametrize("held", HELD)
def test_a_run_on_a_shared_quantised_base_resumes_and_is_served(job: Job, keys: dict[str, Any], held: str) -> None:
    keys |= {"quantization": held, "share_base": True, "gradient_checkpointing": True}
    whole = job("whole", **keys)
    job("half", **keys, max_steps=2)
    half = job("half", **keys, resume_from_checkpoint="auto")
    assert largest_difference(weights(whole), weights(half)) == 0
    alone = job("alone", **keys, save_merged=False)
    assert not list(alone.glob("*/model*.safetensors"))
    asked = questions(4, seed=1)
    merged, over = (RAGPipeline.from_pretrained(run) for run in (whole, alone))
    if held == "nf4":
        found = [[(a.text, a.selection.numbers) for a in each.answer_all(asked)] for each in (merged, over)]
        assert found[0] == found[1]
    assert len(over.answer_all(asked)) == 4


def test_a_quantised_base_is_shared_with_the_reference(tmp_path: Path, keys: dict[str, Any]) -> None:
    recipe = load_recipe(world(tmp_path / "world"), {**keys, "quantization": "nf4", "share_base": True, "beta": 0.1})
    sources = {role: recipe.run.of(role).model for role in ROLES}
    models = load_models(recipe, sources)
    reference = load_reference(recipe, sources, models)
    assert reference is not None

    def codes(module: nn.Module) -> list[int]:
        return [p.data_ptr() for name, p in module.named_parameters() if "base_layer" in name]

    assert codes(models.selector) == codes(models.generator) == codes(reference) != []


def test_full_weights_stay_numbers_beside_a_quantised_base(tmp_path: Path, keys: dict[str, Any]) -> None:
    recipe = load_recipe(world(tmp_path / "world"), {**keys, "quantization": "nf4", "selector_lora_r": 0})
    models = load_models(recipe, {role: recipe.run.of(role).model for role in ROLES})
    assert not any(map(quantization.is_quantised, models.selector.modules()))
    assert any(map(quantization.is_quantised, models.generator.modules()))


# Refused


@pytest.mark.parametrize("held", HELD)
def test_without_adapters_it_is_refused(tmp_path: Path, held: str) -> None:
    recipe = yaml.safe_load(world(tmp_path / "world").read_text()) | {"quantization": held}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(InputError, match=f"quantization: '{held}': weights that train are not quantised, .* Set "):
        train.main([str(tmp_path / "recipe.yaml")])


def test_a_quantisation_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="quantization: 'fp4': this is one of none, nf4, int8"):
        load_recipe(world(tmp_path), {"quantization": "fp4"})


@pytest.mark.parametrize("held", HELD)
def test_a_device_that_is_not_served_is_refused(held: str) -> None:
    with pytest.raises(InputError, match=f"quantization: '{held}': bitsandbytes serves meta here"):
        quantization.check(held, torch.device("meta"))


def test_the_extra_is_named(tmp_path: Path, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(world(tmp_path / "world"), {**keys, "quantization": "nf4"})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"quantization: 'nf4': .* pip install 'dro_rl\[quantization\]'"):
        check_models(recipe)


@pytest.mark.parametrize("variable", ["FSDP", "DEEPSPEED"])
def test_a_layout_that_shards_is_refused(
    tmp_path: Path, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    recipe = load_recipe(world(tmp_path / "world"), {**keys, "quantization": "nf4"})
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")
    with pytest.raises(InputError, match="quantization: nf4, under "):
        check_models(recipe)
