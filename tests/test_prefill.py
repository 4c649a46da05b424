"""Claims about prompts that are read once for sampling and training: all is as if they were read twice."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_likelihood import PACKED, ROWS, any_model, assert_same, gradients
from test_quantization import adapted
from test_resume import history
from training_world import largest_difference, weights, world

from dro_rl.data import load_questions
from dro_rl.engines.decoding import Decoder
from dro_rl.engines.protocol import GenerationRequest
from dro_rl.errors import InputError
from dro_rl.job.assembly import build_prompters, load_models
from dro_rl.likelihood import prefill, row_logps
from dro_rl.likelihood.attention import takes_packed_rows
from dro_rl.likelihood.packing import Row
from dro_rl.likelihood.prefill import Prefills
from dro_rl.likelihood.room import Room
from dro_rl.models.loading import LoraSettings, add_adapter
from dro_rl.proposal import SamplingParams
from dro_rl.recipe import load_recipe
from dro_rl.roles import ROLES
from dro_rl.trainer import DROTrainer

Job = Callable[..., Path]
PROMPTS = [list(row.prompt) for row in ROWS]
ONE_PASS = {
    "questions_per_iteration": 4, "num_iterations": 2, "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1, "load_best_model_at_end": False,
}  # fmt: skip
"""An iteration is a step, and a step is a pass."""

RECOMPUTED = {"reuse_sampling_pass": "on", "gradient_checkpointing": True}


@pytest.fixture(autouse=True)
def short_prompts_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "WORTH_KEEPING", 1)


@contextmanager
def tokens_read(model: Any) -> Iterator[list[int]]:
    """How many tokens each pass of a model has."""
    seen: list[int] = []
    embedding = model.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda _, args, __: seen.append(args[0].numel()))
    yield seen
    hook.remove()


@torch.no_grad()
def read(model: Any, prompts: list[list[int]]) -> Prefills:
    prefills = Prefills(Room(1000), wanted=True)
    assert takes_packed_rows(model, 60)
    assert prefills.begin(prompts)
    for prompt in prompts:
        prefills.read(model, prompt)
    return prefills


def flat(scored: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    return [logps for row in scored for logps in row]


# Values and gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("architecture", sorted(PACKED))
def test_a_prompt_read_before_gives_the_values_and_gradients_of_one_read_again(
    architecture: str, checkpointed: bool
) -> None:
    model = any_model(architecture)
    if checkpointed:
        model.gradient_checkpointing_enable()
    prefills = read(model, PROMPTS)
    model.train()
    expected = flat(row_logps(model, ROWS))
    expected_gradients = gradients(model, expected)
    with tokens_read(model) as seen:
        found = flat(row_logps(model, ROWS, prefills=prefills.take(ROWS)))
    assert seen == [sum(len(row) for row in ROWS) - sum(map(len, PROMPTS))]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert all(g.abs().max() > 1e-3 for g in expected_gradients.values())
    assert_same(gradients(model, found), expected_gradients, rtol=2e-6)


@pytest.mark.parametrize("held", ["none", "nf4"])
def test_adapters_have_the_gradients_of_a_prompt_read_again(make_model, tmp_path: Path, held: str) -> None:
    model = (
        add_adapter(make_model(), LoraSettings(4, 8, 0.0, None)) if held == "none" else adapted(tmp_path / "m", held)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    rows = [Row([each % 20 for each in row.prompt], [[4, 9, 1], [7, 1]]) for row in ROWS]
    prefills = read(model, [list(row.prompt) for row in rows])
    expected = gradients(model, flat(row_logps(model, rows)))
    assert_same(gradients(model, flat(row_logps(model, rows, prefills=prefills.take(rows)))), expected, rtol=2e-6)


def test_two_rows_of_one_prompt_have_the_gradients_of_both(make_model) -> None:
    model = make_model()
    rows = [ROWS[0], Row(ROWS[0].prompt, [[5, 6, 7], [9]])]
    prefills = read(model, [PROMPTS[0], PROMPTS[0]])
    expected = gradients(model, flat(row_logps(model, rows)))
    assert_same(gradients(model, flat(row_logps(model, rows, prefills=prefills.take(rows)))), expected, rtol=2e-6)


@pytest.mark.parametrize("architecture", ["llama", "granite", "gemma2"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_samples_are_those_of_prompts_that_are_not_kept(architecture: str, batch_size: int) -> None:
    """From logits that are scaled and capped too."""
    model = any_model(architecture)
    decoder = Decoder(model, 1, batch_size)
    request = GenerationRequest(PROMPTS, 4, SamplingParams(7, 0.8), [11, 22, 33, 44])
    prefills = Prefills(Room(1000), wanted=True)
    assert prefills.begin(PROMPTS)
    with tokens_read(model) as seen:
        found = decoder.generate(request, prefills)
    assert all(seen.count(len(prompt)) == 1 for prompt in PROMPTS if len(prompt) > 12), "a step has 12 tokens at most"
    for one, other in zip(flat(found), flat(decoder.generate(request)), strict=True):
        assert one.ids == other.ids
        assert one.logps == pytest.approx(other.logps, abs=1e-5)
    assert len(prefills.take(ROWS)) == len(ROWS)
    assert not model.training


# What is kept -----------------------------------------------------------------------------------------------


def test_what_is_kept_is_taken_once_and_by_rows_that_are_all_there(make_model) -> None:
    model = make_model()
    prefills = read(model, PROMPTS[:2])
    assert prefills.holds
    assert prefills.take(ROWS) == [], "two of four"
    assert not prefills.holds
    prefills = read(model, PROMPTS)
    assert len(prefills.take(ROWS[1:3])) == 2
    assert prefills.used == len(PROMPTS[1]) + len(PROMPTS[2])
    assert prefills.take(ROWS[1:3]) == [], "its graph has gone through a backward pass"


def test_nothing_is_kept_that_a_pass_has_no_room_for() -> None:
    tokens = sum(map(len, PROMPTS))
    assert Prefills(Room(tokens), wanted=True).begin(PROMPTS)
    assert not Prefills(Room(tokens - 1), wanted=True).begin(PROMPTS)
    assert not Prefills(Room(tokens), wanted=False).begin(PROMPTS)
    room = Room("auto")
    assert not Prefills(room, wanted=True).begin(PROMPTS), "what fits is tried out first"
    room.find([10 * tokens], lambda places: True)
    assert Prefills(room, wanted=True).begin(PROMPTS)


def test_short_prompts_are_packed_and_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "WORTH_KEEPING", 100)
    assert Prefills(Room(1000), wanted=True).begin([[1] * 50, [1] * 150])
    assert not Prefills(Room(1000), wanted=True).begin([[1] * 50, [1] * 149])


def test_nothing_is_given_up_where_nothing_was_kept(make_model) -> None:
    prefills = Prefills(Room(1000), wanted=True)
    assert not prefills.give_up()
    assert prefills.wanted
    prefills = read(make_model(), PROMPTS)
    assert prefills.give_up()
    assert not prefills.begin(PROMPTS)


# Training ---------------------------------------------------------------------------------------------------


def trainer_of(folder: Path, **keys: Any) -> DROTrainer:
    recipe = load_recipe(world(folder), {**ONE_PASS, **keys})
    questions = load_questions(recipe.run.dataset_name, "train")
    models = load_models(recipe, {role: recipe.run.of(role).model for role in ROLES})
    trainer = DROTrainer(models, recipe.training, questions, None, build_prompters(recipe))
    trainer.current_gradient_accumulation_steps = 1
    if trainer.args.gradient_checkpointing:  # as a training begins
        trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=None)
    return trainer


def a_step(trainer: DROTrainer) -> tuple[dict[str, torch.Tensor], list[Any], list[int]]:
    """The gradients of a step, its weighed rollouts, and the tokens of the selector's passes in training."""
    rollouts = trainer.e_step(0)
    slots = [p * 4 + j for p in trainer.schedule.positions(0) for j in range(4)]
    with tokens_read(trainer.model.selector) as seen, trainer.accelerator.autocast():
        trainer.m_step(trainer.model, rollouts, slots)
    found = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return found, [trainer._done[slot] for slot in sorted(trainer._done)], seen


@pytest.mark.parametrize(
    "settings",
    [
        {},
        RECOMPUTED,
        {"temperature": 1.3, "entropy_coef": 0.01, "candidate_orders": 2},
        {"constrain_selection": True, "max_completion_length": 8, "per_device_eval_batch_size": 1},
        {"selector_lora_r": 4, "generator_lora_r": 4, "share_base": True, **RECOMPUTED},
        {"objective": "grpo", "num_generations": 4, "selector_baseline": "none"},
    ],
    ids=["plain", "recomputed", "another proposal, orders, regularised", "constrained", "one base, recomputed", "grpo"],
)
def test_a_step_is_that_of_reading_prompts_twice(tmp_path: Path, settings: dict[str, Any]) -> None:
    if "share_base" in settings:
        base = str(tmp_path / "twice" / "base-selector")
        settings = {**settings, "generator_model_name_or_path": base, "selector_model_name_or_path": base}
    off = {**settings, "reuse_sampling_pass": "off"}
    expected, drawn, twice = a_step(trainer_of(tmp_path / "twice", verify_fast_path=False, **off))
    trainer = trainer_of(tmp_path / "once", verify_fast_path=False, **settings)
    found, sampled, once = a_step(trainer)
    assert trainer.prefills.used > 50
    assert [sum(once)] == [sum(twice) - trainer.prefills.used], "completions alone go through the selector"
    for one, other in zip(sampled, drawn, strict=True):
        assert one.token_ids == other.token_ids
        for name in ("proposal_logp", "weight", "selection_logp"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), abs=1e-4), name
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-6 + 1e-5 * gradient.abs().max(), name


def test_a_step_in_bfloat16_is_that_of_reading_prompts_twice(tmp_path: Path) -> None:
    """Weights are cast once for all that is under one autocast: first with a graph."""
    half = {"bf16": True, "verify_fast_path": False, "per_device_eval_batch_size": 1}
    expected, drawn, _ = a_step(trainer_of(tmp_path / "twice", **half, reuse_sampling_pass="off"))
    trainer = trainer_of(tmp_path / "once", **half)
    found, sampled, _ = a_step(trainer)
    assert trainer.prefills.used > 50
    assert [each.token_ids for each in sampled] == [each.token_ids for each in drawn]
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 0.02 * gradient.norm(), name


def test_a_step_of_several_passes_reads_prompts_again(tmp_path: Path) -> None:
    parts = {"tokens_per_microbatch": 150, "verify_fast_path": False}
    expected, _, twice = a_step(trainer_of(tmp_path / "twice", **parts, reuse_sampling_pass="off"))
    trainer = trainer_of(tmp_path / "once", **parts)
    kept: list[int] = []
    drop = trainer.prefills.drop
    trainer.prefills.drop = lambda: kept.append(len(trainer.prefills._kept)) or drop()  # type: ignore[method-assign]
    found, _, once = a_step(trainer)
    assert kept == [0, 4]
    assert not trainer.prefills.used
    assert len(once) > 1
    assert once == twice
    assert largest_difference(expected, found) < 1e-6


def run_out(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize("when", ["sampling", "training"])
def test_where_memory_runs_out_prompts_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, when: str
) -> None:
    expected, drawn, _ = a_step(trainer_of(tmp_path / "twice", verify_fast_path=False, reuse_sampling_pass="off"))
    trainer, plain = trainer_of(tmp_path / "once", verify_fast_path=False), Prefills.read

    def read(self: Prefills, model: Any, prompt: list[int]) -> Any:
        return run_out() if len(self._kept) == 2 else plain(self, model, prompt)

    def scored(model: Any, rows: list[Row], **options: Any) -> Any:
        logps = row_logps(model, rows, **options)
        if options["prefills"]:
            logps[0][0].register_hook(run_out)
        return logps

    if when == "sampling":
        monkeypatch.setattr(Prefills, "read", read)
    else:
        monkeypatch.setattr("dro_rl.models.module.row_logps", scored)
    with caplog.at_level(logging.WARNING, "dro_rl"):
        found, sampled, _ = a_step(trainer)
    assert "out of memory: prompts are read again to train from here on (reuse_sampling_pass)" in caplog.text
    assert not trainer.prefills.wanted
    assert trainer.passes.room.tokens == 16384
    assert [each.token_ids for each in sampled] == [each.token_ids for each in drawn]
    assert largest_difference(expected, found) < 1e-6


def test_the_backward_pass_of_prompts_counts_for_the_selector(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, verify_fast_path=False)
    switched: list[str] = []
    switch = trainer.clock.switch
    trainer.clock.switch = lambda name: switched.append(name) or switch(name)  # type: ignore[method-assign]
    a_step(trainer)
    roles = [name for name in switched if name in ROLES]
    assert roles[:4] == ["generator", "selector", "selector", "generator"], "forward, and backward from the end"
    assert roles[4:]
    assert {*roles[4:]} == {"selector"}


@pytest.mark.parametrize(
    "keys",
    [
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 4},
        {"shared_prefix": "off"},
        {"rollout_engine": "enumeration", "num_selected": 1},
        {"questions_per_iteration": 8},
        {"min_weight": 0.01},
        {"window_size": 4},
        {"selector_lora_r": 2, "lora_dropout": 0.1},
    ],
)
def test_prompts_are_read_again_where_one_pass_is_not_exact_or_not_lean(tmp_path: Path, keys: dict[str, Any]) -> None:
    assert not trainer_of(tmp_path, **keys).prefills.wanted


@pytest.mark.parametrize(
    ("keys", "processes"),
    [
        ({"gradient_accumulation_steps": 4, "per_device_train_batch_size": 4}, 1),
        ({"questions_per_iteration": 8}, 1),
        ({"rollout_engine": "vllm"}, 1),
        ({"per_device_train_batch_size": 8}, 2),
    ],
)
def test_on_is_refused_where_a_step_is_not_one_pass(tmp_path: Path, keys: dict[str, Any], processes: int) -> None:
    on = {**ONE_PASS, "reuse_sampling_pass": "on"}
    world(tmp_path)
    load_recipe(tmp_path / "recipe.yaml", on).training.check_batch(1, 12)
    with pytest.raises(InputError, match="reuse_sampling_pass: 'on': "):
        load_recipe(tmp_path / "recipe.yaml", {**on, **keys}).training.check_batch(processes, 12)


def test_a_run_is_that_of_reading_prompts_twice_and_resumes_bit_for_bit(job: Job) -> None:
    adam = {**ONE_PASS, "optim": "adamw_torch", "adam_epsilon": 1.0}
    once, twice = job("once", **adam), job("twice", **adam, reuse_sampling_pass="off")
    assert largest_difference(weights(once), weights(twice)) < 2e-6
    job("half", **adam, max_steps=1)
    resumed = job("half", **adam, resume_from_checkpoint="auto")
    assert largest_difference(weights(once), weights(resumed)) == 0
    assert history(once) == history(resumed)
