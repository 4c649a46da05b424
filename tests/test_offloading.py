"""Claims about activations in the CPU's memory: TRL's manager holds each pass, and changes no gradient.

There is no accelerator here. So the manager is told that the CPU is one, and holds copies in memory that is not pinned.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_prefill import ONE_PASS
from training_world import largest_difference, world
from trl.models import get_act_offloading_ctx_manager
from trl.models.activation_offloading import OffloadActivations

from dro_rl.data import load_questions
from dro_rl.errors import InputError
from dro_rl.job.assembly import build_prompters, load_models
from dro_rl.models import offloading
from dro_rl.models.module import SelectorGenerator
from dro_rl.recipe import load_recipe
from dro_rl.roles import ROLES
from dro_rl.trainer import DROTrainer


@pytest.mark.parametrize(
    "keys",
    [
        {"activation_offloading": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"offload": True}},
    ],
)
def test_without_an_accelerator_it_is_refused(tmp_path: Path, keys: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"only an accelerator has activations .* Leave it out on a CPU") as refused:
        load_recipe(world(tmp_path), keys)
    assert str(refused.value).startswith(f"{[*keys][-1]}: ")


@pytest.mark.parametrize(
    ("asked", "checkpointing"),
    [
        ({"use_reentrant": True}, True),
        ({"every_n_layers": 0}, True),
        ({"every_n_layers": True}, True),
        ({"offload": "yes"}, True),
        ({"every_n_layers": 2}, False),
    ],
)
def test_what_cannot_be_recomputed_so_is_refused(tmp_path: Path, asked: dict[str, Any], checkpointing: bool) -> None:
    keys = {"gradient_checkpointing": checkpointing, "gradient_checkpointing_kwargs": asked}
    with pytest.raises(InputError, match="gradient_checkpointing_kwargs: "):
        load_recipe(world(tmp_path), keys)


def test_every_other_layer_is_recomputed_and_inputs_wait_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By transformers' own way, which the Trainer hands what the recipe says."""
    waiting: list[int] = []

    def save_on_cpu(pin_memory: bool, device_type: str) -> Any:
        assert pin_memory
        return torch.autograd.graph.saved_tensors_hooks(lambda t: waiting.append(t.numel()) or t.clone(), lambda t: t)

    monkeypatch.setattr("transformers.modeling_utils.save_on_cpu", save_on_cpu)
    expected, _ = gradients(tmp_path / "stay", offloads=False)
    options = {"every_n_layers": 2, "offload": True}
    found, trainer = gradients(tmp_path / "leave", offloads=False, recompute=options, gradient_checkpointing=True)
    layers = trainer.model.selector.model.layers
    assert [layer.gradient_checkpointing for layer in layers] == [True, False]
    assert waiting, "the inputs of the first layer of both roles"
    assert largest_difference(expected, found) < 1e-6


def test_a_run_hands_on_which_layers_are_recomputed(job: Callable[..., Path]) -> None:
    every = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"every_n_layers": 2}}
    asked: list[dict[str, Any]] = []
    plain = SelectorGenerator.gradient_checkpointing_enable
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            SelectorGenerator,
            "gradient_checkpointing_enable",
            lambda self, **options: asked.append(options) or plain(self, **options),
        )
        job("run", **ONE_PASS, **every, max_steps=1)
    assert [(each["every_n_layers"], each["gradient_checkpointing_kwargs"]) for each in asked] == [(2, None)]


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    def manager(model: Any) -> OffloadActivations:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
            return get_act_offloading_ctx_manager(model, use_pin_memory=False, use_streams=False)

    monkeypatch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)
    monkeypatch.setattr(offloading, "get_act_offloading_ctx_manager", manager)


def gradients(
    folder: Path, offloads: bool, recompute: dict[str, Any] | None = None, **keys: Any
) -> tuple[dict[str, torch.Tensor], DROTrainer]:
    recipe = load_recipe(
        world(folder),
        {**ONE_PASS, "verify_fast_path": False, **keys, **({} if offloads else {"reuse_sampling_pass": "off"})},
    )
    recipe.training.activation_offloading = offloads  # the recipe's check has seen that this machine has a CPU alone
    questions = load_questions(recipe.run.dataset_name, "train")
    models = load_models(recipe, {role: recipe.run.of(role).model for role in ROLES})
    trainer = DROTrainer(models, recipe.training, questions, None, build_prompters(recipe))
    trainer.current_gradient_accumulation_steps = 1
    if trainer.args.gradient_checkpointing:  # as a training begins
        options = {"gradient_checkpointing_kwargs": None, **(recompute or {})}
        trainer.model.gradient_checkpointing_enable(**options)
    trainer.m_step(
        trainer.model, trainer.e_step(0), [p * 4 + j for p in trainer.schedule.positions(0) for j in range(4)]
    )
    return {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}, trainer


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"gradient_checkpointing": True},
        {"tokens_per_microbatch": 150},
        {"tokens_per_microbatch": "auto"},
        {"shared_prefix": "off"},
        {"selector_lora_r": 4, "generator_lora_r": 4},
    ],
    ids=["packed", "recomputed", "several passes", "tried out", "plain", "adapters"],
)
def test_gradients_are_those_of_activations_that_stay(
    tmp_path: Path, accelerator: None, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any]
) -> None:
    expected, _ = gradients(tmp_path / "stay", offloads=False, **keys)
    moved: list[int] = []
    count_moved(monkeypatch, moved.append)
    found, trainer = gradients(tmp_path / "leave", offloads=True, **keys)
    assert isinstance(trainer.offloading, OffloadActivations)
    assert not trainer.prefills.wanted, "what sampling would keep is kept on the accelerator"
    assert len(moved) >= 8, "what layers begin with, at least"
    assert not trainer.offloading.tracker, "all has come back"
    assert expected.keys() == found.keys()
    assert largest_difference(expected, found) < 1e-6


def count_moved(monkeypatch: pytest.MonkeyPatch, moved: Callable[[int], Any]) -> None:
    """Tell of each tensor that the manager copies, how many numbers it has."""
    plain = torch.Tensor.copy_

    def copy(self: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if non_blocking:
            moved(source.numel())
        return plain(self, source, non_blocking)

    monkeypatch.setattr(torch.Tensor, "copy_", copy)
