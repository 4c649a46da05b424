"""One base under two adapters: in memory once, and nothing else is different."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from training_world import largest_difference, launch, save_model, weights, world
from transformers import set_seed

from dro_rl import train
from dro_rl.data import load_questions
from dro_rl.errors import InputError
from dro_rl.job.assembly import build_prompters, load_models, load_reference
from dro_rl.job.model_checks import check_models
from dro_rl.models.module import SelectorGenerator
from dro_rl.models.sharing import twin
from dro_rl.recipe import load_recipe
from dro_rl.roles import ROLES
from dro_rl.rollouts import log as rollout_log
from dro_rl.trainer import DROTrainer

Job = Callable[..., Path]


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Any]:
    """Both roles with adapters on one base."""
    base = str(save_model(tmp_path / "base", 1))
    return {
        "selector_model_name_or_path": base, "generator_model_name_or_path": base, "selector_lora_r": 4,
        "generator_lora_r": 2,
    }  # fmt: skip


def loaded(folder: Path, **keys: Any) -> tuple[SelectorGenerator, nn.Module | None]:
    recipe = load_recipe(world(folder), {"beta": 0.1, **keys})
    sources = {role: recipe.run.of(role).model for role in ROLES}
    set_seed(0)
    models = load_models(recipe, sources)
    return models, load_reference(recipe, sources, models)


def places(module: nn.Module, adapters: bool) -> list[int]:
    """Where the weights of the base, or of the adapters, lie in memory."""
    return [p.data_ptr() for name, p in module.named_parameters() if ("lora_" in name) == adapters]


@pytest.mark.parametrize("moved", [False, True], ids=["as loaded", "moved"])
@pytest.mark.parametrize("tied", [False, True], ids=["a head of its own", "a tied head"])
def test_base_and_reference_are_the_same_memory_and_adapters_are_not(
    tmp_path: Path, keys: dict[str, Any], tied: bool, moved: bool
) -> None:
    save_model(tmp_path / "base", 1, tie_word_embeddings=tied)
    models, reference = loaded(tmp_path / "world", share_base=True, **keys)
    assert reference is not None
    if moved:  # as to a device: every weight is another tensor afterwards
        models.to(torch.float64), reference.to(torch.float64)
    assert places(models.selector, False) == places(models.generator, False) == places(reference, False)
    adapters = [place for each in (models.selector, models.generator, reference) for place in places(each, True)]
    assert len(adapters) == len(set(adapters)) > 0
    assert not any(parameter.requires_grad for parameter in reference.parameters())


def test_what_trains_is_copied_and_what_is_frozen_is_not() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].requires_grad_(False)
    other = twin(model)
    assert other[0].weight is model[0].weight
    assert other[1].weight is not model[1].weight
    assert other[2].running_mean is model[2].running_mean
    other[0].register_forward_hook(lambda *_: None)
    assert not model[0]._forward_hooks


PATHS: dict[str, dict[str, Any]] = {
    "packed": {},
    "plain": {"shared_prefix": "off"},
    "recomputed": {"gradient_checkpointing": True},
    "recomputed, plain": {"gradient_checkpointing": True, "shared_prefix": "off"},
}


@pytest.mark.parametrize("path", PATHS)
def test_losses_and_gradients_are_those_of_two_bases(tmp_path: Path, keys: dict[str, Any], path: str) -> None:
    shared, apart = (
        gradients(tmp_path / str(share), share_base=share, **keys, **PATHS[path]) for share in (True, False)
    )
    assert largest_difference(shared, apart) < 1e-6
    assert {name.split(".")[0] for name in shared} == {"loss", *ROLES}
    assert all("lora_" in name for name in shared if name != "loss")


def gradients(folder: Path, **keys: Any) -> dict[str, torch.Tensor]:
    """Those of a step, with adapters that do something: of new ones half has no gradient."""
    models, _ = loaded(folder, **keys)
    fixed = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in models.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=fixed))
    recipe = load_recipe(folder / "recipe.yaml", {"questions_per_iteration": 4, "fused_e_step": "off", **keys})
    questions = load_questions(recipe.run.dataset_name, "train")
    trainer = DROTrainer(models, recipe.training, questions, None, build_prompters(recipe))
    if recipe.training.gradient_checkpointing:
        models.gradient_checkpointing_enable()
    slots = [p * 4 + j for p in trainer.schedule.positions(0) for j in range(4)]
    (micro_batch,) = trainer._micro_batches(trainer.e_step(0), slots)
    loss = trainer.compute_loss(models.train(), micro_batch)
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in models.named_parameters() if p.grad is not None}}


def test_a_training_is_that_of_two_bases(job: Job, keys: dict[str, Any]) -> None:
    keys |= {"beta": 0.3, "selector_learning_rate": 0.01, "questions_per_iteration": 4}
    assert largest_difference(weights(job("apart", **keys)), weights(job("shared", share_base=True, **keys))) < 1e-6


def test_a_run_resumes_bit_for_bit(job: Job, keys: dict[str, Any]) -> None:
    keys |= {"share_base": True, "optim": "adamw_torch", "beta": 0.1}
    whole = job("whole", **keys)
    job("half", **keys, max_steps=2)
    half = job("half", **keys, resume_from_checkpoint="auto")
    assert largest_difference(weights(whole), weights(half)) == 0


def test_a_warm_up_moves_adapters_and_leaves_the_base(job: Job, keys: dict[str, Any], tmp_path: Path) -> None:
    """The cache has adapters alone, and training begins with them: they are what `beta` stays near."""
    warm = {"warmup": "both", "warmup_selector_steps": 4, "warmup_generator_steps": 4, "warmup_batch_size": 4}
    warm |= {f"warmup_{role}_learning_rate": 0.05 for role in ROLES}
    run = job(share_base=True, beta=0.1, load_best_model_at_end=False, **warm, **keys)
    cached = {path.name.partition("-")[0]: path for path in (tmp_path / "world" / "cache").glob("*/")}
    assert set(cached) == set(ROLES)
    for folder in cached.values():
        assert [path.name for path in folder.glob("*.safetensors")] == ["adapter_model.safetensors"]
        assert any(bool(tensor.any()) for name, tensor in load_file(folder / "adapter_model.safetensors").items()
                   if "lora_B" in name)  # fmt: skip
    rows = rollout_log.read(rollout_log.part_paths(run, 1)).to_pylist()
    assert all(abs(row["reference_logp"] - row["selection_logp"]) < 1e-4 for row in rows)
    base = load_file(tmp_path / "base" / "model.safetensors")
    for role in ROLES:
        exported = load_file(run / role / "model.safetensors")
        assert torch.equal(exported["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
        assert not torch.equal(*(each["model.layers.0.self_attn.q_proj.weight"] for each in (exported, base)))


def test_a_selector_of_full_weights_trains_beside_an_adapted_generator(job: Job, keys: dict[str, Any]) -> None:
    run = job(**{**keys, "selector_lora_r": 0}, load_best_model_at_end=False)
    assert not (run / "selector" / "adapter").exists()
    assert (run / "generator" / "adapter").is_dir()


@pytest.mark.slow
def test_two_processes_train_to_the_weights_of_one(tmp_path: Path, keys: dict[str, Any]) -> None:
    recipe = world(tmp_path / "world", share_base=True, beta=0.1, **keys)
    one = launch(recipe, tmp_path / "one")
    assert one.returncode == 0, one.stderr[-3000:]
    two = launch(recipe, tmp_path / "two", "--gradient_accumulation_steps", "2", processes=2)
    assert two.returncode == 0, two.stderr[-3000:]
    assert largest_difference(weights(tmp_path / "one"), weights(tmp_path / "two")) < 2e-6


REFUSED = {
    "another base": (
        {"generator_model_name_or_path": "toy"}, ("the same model", "the selector has", "base.", "Name one")
    ),
    "another revision": ({"generator_model_revision": "v2"}, ("has v2", "same revision", "has None")),
    "no adapters": (
        {"selector_lora_r": 0, "generator_lora_r": 0}, ("selector_lora_r: 0, generator_lora_r: 0", "frozen", "Set both")
    ),
    "adapters on one side": ({"generator_lora_r": 0}, ("selector_lora_r: 4, generator_lora_r: 0", "frozen")),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bases_that_cannot_be_shared_are_refused(tmp_path: Path, keys: dict[str, Any], case: str) -> None:
    changed, parts = REFUSED[case]
    recipe = yaml.safe_load(world(tmp_path / "world").read_text()) | keys | {"share_base": True} | changed
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(InputError) as error:
        train.main([str(tmp_path / "recipe.yaml")])
    assert str(error.value).startswith("share_base: ")
    assert all(part in str(error.value) for part in parts)


def test_the_same_base_under_another_name_is_the_same(tmp_path: Path, keys: dict[str, Any]) -> None:
    keys["generator_model_name_or_path"] += "/../base/"
    load_recipe(world(tmp_path / "world"), {**keys, "share_base": True})


@pytest.mark.parametrize(("variable", "layout"), [("FSDP", "FSDP"), ("DEEPSPEED", "DeepSpeed")])
def test_a_layout_that_shards_cannot_share(
    tmp_path: Path, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch, variable: str, layout: str
) -> None:
    recipe = load_recipe(world(tmp_path / "world"), {**keys, "share_base": True})
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")
    with pytest.raises(InputError, match=f"share_base: true, under {layout}: .* would be there twice. Launch with"):
        check_models(recipe)
