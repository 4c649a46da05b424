"""When memory runs out: what fits is found by a trial, less is taken on the way, and an end says who held what.

A CPU's memory does not run out at a known number of tokens, so both models are given one at which it does.
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import nn
from training_world import largest_difference, weights, world

from dro_rl import likelihood, train
from dro_rl.data import load_questions
from dro_rl.em.memory import GiveBack, held, to_come
from dro_rl.errors import InputError, is_out_of_memory
from dro_rl.job.assembly import build_prompters, load_models
from dro_rl.job.model_checks import check_models
from dro_rl.likelihood.packing import Row, lay_out
from dro_rl.likelihood.room import Room
from dro_rl.models.sharing import twin
from dro_rl.recipe import load_recipe
from dro_rl.roles import ROLES
from dro_rl.trainer import DROTrainer

Job = Callable[..., Path]
WIDE = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "load_best_model_at_end": False}
"""Four questions at a time."""


class Memory:
    """Room for some tokens of one model at once.

    Args:
        backward: run out in the backward pass, when a part of the gradients is there already.
    """

    def __init__(self, tokens: int | None = None, *, backward: bool = False) -> None:
        self.tokens, self.backward = tokens, backward
        self.seen: list[int] = []
        self.failures = 0

    def take(self, rows: list[Row], prefix_tree: bool) -> bool:
        """Whether they have no room."""
        count = len(lay_out(rows, prefix_tree=prefix_tree).ids)
        self.seen.append(count)
        full = self.tokens is not None and count > self.tokens
        self.failures += full
        return full


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    memory, plain = Memory(), likelihood.row_logps

    def row_logps(model: Any, rows: list[Row], **options: Any) -> Any:
        full = memory.take(rows, options.get("prefix_tree", False))
        if full and not (memory.backward and torch.is_grad_enabled()):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        scored = plain(model, rows, **options)
        if full:
            scored[0][0].register_hook(fail)
        return scored

    def fail(gradient: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("dro_rl.likelihood.row_logps", row_logps)
    monkeypatch.setattr("dro_rl.models.module.row_logps", row_logps)
    return memory


def trainer_of(folder: Path, **keys: Any) -> DROTrainer:
    recipe = load_recipe(world(folder), {**WIDE, **keys})
    questions = load_questions(recipe.run.dataset_name, "train")
    models = load_models(recipe, {role: recipe.run.of(role).model for role in ROLES})
    return DROTrainer(models, recipe.training, questions, None, build_prompters(recipe))


# What fits


@pytest.mark.parametrize("questions", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("most", [1, 2, 3, 4, 5, 7, 8, 9])
def test_the_most_questions_that_fit_are_found(questions: int, most: int) -> None:
    room, sizes = Room("auto"), [10 + i for i in range(questions)]
    assert room.find(sizes, lambda places: len(places) <= most) is None
    assert room.tokens == sum(sorted(sizes)[-min(most, questions) :]), "the largest ones together"


def test_a_question_that_does_not_fit_alone_is_named() -> None:
    room = Room("auto")
    assert room.find([3, 9, 5], lambda places: False) == 1
    assert room.tokens == likelihood.TOKENS_PER_PASS


def test_auto_trains_in_passes_that_fit_and_to_the_same_weights(
    job: Job, memory: Memory, caplog: pytest.LogCaptureFixture
) -> None:
    expected = weights(job("fixed", **WIDE))
    memory.tokens = max(memory.seen) * 2 // 3
    with caplog.at_level(logging.INFO, "dro_rl"):
        found = weights(job("auto", tokens_per_microbatch="auto", **WIDE))
    assert memory.failures
    assert "tokens go through the models at once: " in caplog.text
    assert largest_difference(expected, found) < 2e-6


def test_the_trial_leaves_nothing_behind(tmp_path: Path, memory: Memory) -> None:
    trainer = trainer_of(tmp_path, tokens_per_microbatch="auto")
    rollouts = trainer.e_step(0)
    state = torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    asked: list[int] = []
    trainer.passes.to_come = lambda: asked.append(1) or 8
    trainer._micro_batches(rollouts, [p * 4 + j for p in trainer.schedule.positions(0) for j in range(4)])
    assert asked, "what the optimizer will hold is taken meanwhile"
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert largest_difference(before, trainer.model.state_dict()) == 0


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    ("optimistic", "batches"), [(False, [0, 16]), (True, [0, 8, 16])], ids=["in the trial", "in the second batch"]
)
def test_memory_that_runs_out_costs_no_gradient(
    tmp_path: Path,
    memory: Memory,
    monkeypatch: pytest.MonkeyPatch,
    optimistic: bool,
    batches: list[int],
    backward: bool,
) -> None:
    """What the step has accumulated by then is computed again, in smaller passes."""
    trainer = trainer_of(tmp_path, tokens_per_microbatch="auto", verify_fast_path=False)
    slots = [p * 4 + j for p in trainer.schedule.positions(0) for j in range(4)]
    rollouts, trainer.current_gradient_accumulation_steps = trainer.e_step(0), len(batches) - 1

    def gradients() -> dict[str, torch.Tensor]:
        trainer.model.zero_grad()
        trainer._slots.clear()
        trainer._losses.clear()
        for start, end in itertools.pairwise(batches):
            trainer.m_step(trainer.model, rollouts, slots[start:end])
        return {name: p.grad.clone() for name, p in trainer.model.named_parameters()} | {
            role: torch.tensor(loss) for role, loss in trainer._losses.items()
        }

    trainer.passes._tried.add(("selector", "generator"))
    memory.seen.clear()
    expected, widest = gradients(), max(memory.seen)
    if not optimistic:
        trainer.passes._tried.clear()
    memory.tokens, memory.backward = widest - 1, backward
    found = gradients()
    assert memory.failures
    assert largest_difference(expected, found) < 1e-6


# Who is told what


def refusal(action: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as error:
        action()
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def test_one_question_that_does_not_fit_says_how_much_it_takes(tmp_path: Path, memory: Memory) -> None:
    trainer = trainer_of(tmp_path, tokens_per_microbatch="auto", verify_fast_path=False)
    rollouts, memory.tokens = trainer.e_step(0), 10
    with pytest.raises(torch.OutOfMemoryError) as raised:
        trainer.m_step(trainer.model, rollouts, [p * 4 + j for p in trainer.schedule.positions(0) for j in range(4)])
    error = str(trainer._out_of_memory(raised.value))
    assert error.startswith("tokens_per_microbatch: question q")
    for part in ("alone takes ", " of the selector and ", " of the generator", "selector 79 KiB", "max_prompt_length"):
        assert part in error


def test_a_trial_of_other_roles_that_fails_ends_the_step(tmp_path: Path, memory: Memory) -> None:
    """Under interleave: alternate, after a trial of the selector alone that found room."""
    trainer = trainer_of(tmp_path, tokens_per_microbatch="auto")
    rollouts, memory.tokens = trainer.e_step(0), 10
    trainer.passes._largest = 999
    with pytest.raises(torch.OutOfMemoryError):
        trainer.m_step(trainer.model, rollouts, [p * 4 + j for p in trainer.schedule.positions(0) for j in range(4)])
    assert len(memory.seen) < 100


def test_a_row_that_cannot_be_scored_says_how_much_it_takes(tmp_path: Path, memory: Memory) -> None:
    trainer, memory.tokens = trainer_of(tmp_path, tokens_per_microbatch="auto"), 10
    with pytest.raises(torch.OutOfMemoryError) as raised:
        trainer.e_step(0)
    error = str(trainer._out_of_memory(raised.value))
    assert error.startswith("tokens_per_microbatch: a prompt with its completions takes ")
    assert "in phase scoring" in error


def test_scoring_goes_on_with_less(tmp_path: Path, memory: Memory) -> None:
    trainer, memory.tokens = trainer_of(tmp_path, tokens_per_microbatch="auto"), 60
    assert trainer.e_step(0).groups
    assert memory.failures
    assert memory.seen[-1] <= 60


def test_a_number_of_tokens_that_does_not_fit_ends_with_who_held_what(job: Job, memory: Memory) -> None:
    memory.tokens = 100
    error = refusal(lambda: job(tokens_per_microbatch=4096, beta=0.1, **WIDE))
    assert error.startswith("tokens_per_microbatch: 4096: ")
    for part in (
        "selector 79 KiB",
        "generator 79 KiB",
        "reference 79 KiB",
        "out of memory",
        "Lower it, or use auto",
    ):
        assert part in error


@pytest.mark.parametrize(
    ("place", "key"),
    [
        ("dro_rl.engines.decoding.Decoder.generate", "per_device_eval_batch_size: 4"),
        ("torch.optim.SGD.step", "optim: 'sgd'"),
    ],
)
def test_the_key_that_helps_is_named(job: Job, monkeypatch: pytest.MonkeyPatch, place: str, key: str) -> None:
    def run_out(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("dro_rl.job.preflight.check_optimizer", lambda training: None)
    monkeypatch.setattr(place, run_out)
    assert refusal(job).startswith(f"{key}: this has room in memory")


def test_memory_that_runs_out_while_models_load_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_out(*_: Any) -> Any:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:73] . DefaultCPUAllocator: can't allocate memory: 1 bytes")

    monkeypatch.setattr("dro_rl.job.run.load_models", run_out)
    assert train.run_job([str(world(tmp_path / "world"))]) == 3
    assert "error: memory: full (" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("x"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("shapes differ"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_which_errors_mean_that_memory_ran_out(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) is is_one


def test_weights_in_common_are_counted_once() -> None:
    base = nn.Linear(8, 4, bias=False).requires_grad_(False)
    assert held({"selector": base, "generator": twin(base)}, None) == {
        "selector": 128, "generator": 0, "gradients": 0, "optimizer state": 0,
    }  # fmt: skip


@pytest.mark.parametrize(("optimizer", "bytes_"), [("adamw_torch", 8), ("adamw_8bit", 2), ("sgd", 0)])
def test_the_trial_leaves_room_for_the_optimizer(optimizer: str, bytes_: int) -> None:
    adam = torch.optim.AdamW([nn.Parameter(torch.ones(10))])
    assert to_come(adam, optimizer) == 10 * bytes_
    adam.param_groups[0]["params"][0].grad = torch.ones(10)
    adam.step()
    assert to_come(adam, optimizer) == 0, "it is there"


# Refused


@pytest.mark.parametrize("value", [0, -1, "all", 1.5, True])
def test_what_is_no_number_of_tokens_is_refused(tmp_path: Path, value: Any) -> None:
    error = refusal(lambda: load_recipe(world(tmp_path), {"tokens_per_microbatch": value}))
    assert error.startswith(f"tokens_per_microbatch: {value!r}: this is ")
    assert "auto" in error


@pytest.mark.parametrize("variable", ["FSDP", "DEEPSPEED"])
def test_auto_is_refused_where_processes_meet_in_each_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    recipe = load_recipe(world(tmp_path), {"tokens_per_microbatch": "auto"})
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")
    assert refusal(lambda: check_models(recipe)).startswith("tokens_per_microbatch: auto, under ")


# What the C library keeps -----------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="malloc_trim is glibc's")
def test_what_a_step_has_freed_goes_back_to_the_system() -> None:
    """Defect: a process grew from step to step, to half as much again, by what lay free between what was held."""
    process, pieces = psutil.Process(), [bytearray(100_000) for _ in range(2000)]
    whole = process.memory_info().rss
    del pieces[::2]  # every second one: nothing is free at the end, where glibc gives back by itself
    kept = process.memory_info().rss
    arguments: Any = SimpleNamespace(device=torch.device("cuda"))
    GiveBack().on_step_end(arguments, None, None)  # type: ignore[arg-type]
    assert process.memory_info().rss > kept - 20_000_000
    arguments.device = torch.device("cpu")
    GiveBack().on_step_end(arguments, None, None)  # type: ignore[arg-type]
    assert process.memory_info().rss < min(kept, whole) - 60_000_000
    assert len(pieces) == 1000


def test_each_step_gives_back(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the warm-ups too."""
    steps: list[object] = []
    monkeypatch.setattr("dro_rl.em.memory.give_back", lambda: steps.append(None))
    job(warmup="both", warmup_selector_steps=2, warmup_generator_steps=3, warmup_batch_size=2, max_steps=2)
    assert len(steps) == 2 + 3 + 2
