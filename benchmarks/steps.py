"""Whole optimisation steps, each timed from the end of the one before: `DROTrainer`'s, and a way to watch any."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from benchmarks import harness, world
from dro_rl.config import DROConfig
from dro_rl.models.module import SelectorGenerator
from dro_rl.prompts import Prompter
from dro_rl.records import Question
from dro_rl.roles import Role
from dro_rl.rollouts import log as rollout_log
from dro_rl.trainer import DROTrainer

LEARNING_RATE = 1e-7
"""So small that the policy stays what it was made to be."""


@dataclass(frozen=True)
class Setting:
    """What a step works on.

    Args:
        model: the size of both models.
        questions: of a step.
        m, documents, k: rollouts of a question, candidates, documents of a selection.
        tokens: of a document.
        sharpness: of the selector's policy (`world.write_policy`).
        checkpointing: gradient checkpointing of both models.
        steps: timed, after one that is not.
        device, dtype: as on the command line; bfloat16 is also the precision of autocast.
        trainer: settings of `DROConfig` beside these and the defaults.
    """

    model: str
    questions: int
    m: int
    documents: int
    k: int
    tokens: int
    sharpness: float
    checkpointing: bool
    steps: int
    device: str
    dtype: str
    trainer: dict[str, Any]

    def __str__(self) -> str:
        sizes = f"N={self.documents} m={self.m} K={self.k} questions={self.questions} sharpness={self.sharpness}"
        return f"{self.model} {sizes}"

    def models(self) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
        """The selector, with its policy, and the generator."""
        selector = harness.build_model(self.model, self.device, self.dtype, seed=0)
        world.write_policy(selector, self.documents, self.k, self.sharpness)
        return selector, harness.build_model(self.model, self.device, self.dtype, seed=1)

    def train_questions(self) -> list[Question]:
        """As many as the steps need."""
        return world.questions(self.questions * (self.steps + 1), self.documents, self.tokens)

    @property
    def selection_tokens(self) -> int:
        """R: tokens of every selection."""
        return self.k * world.TOKENS_PER_NUMBER

    def common(self, folder: str) -> dict[str, Any]:
        """Training arguments of any trainer."""
        return {
            "output_dir": folder,
            "num_generations": self.m,
            "max_completion_length": self.selection_tokens,
            "beta": 0.0,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "optim": "adamw_torch_fused",
            "weight_decay": 0.01,
            "gradient_checkpointing": self.checkpointing,
            "bf16": self.dtype == "bfloat16",
            "use_cpu": self.device == "cpu",
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
            "seed": 0,
        }


class StepTimer(TrainerCallback):
    """When each step ended, and the peak memory until then."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.memory = harness.PeakMemory(device)
        self.ends: list[float] = []
        self.cpu_ends: list[float] = []

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        harness.synchronize(self.device)
        self.ends.append(time.perf_counter())
        self.cpu_ends.append(time.process_time())
        self.mib, self.total_mib = self.memory.mib(), self.memory.total_mib()
        control.should_save = False
        return control

    def measured(self) -> dict[str, Any]:
        """Seconds of each step after the first; memory above what stood when the timer was made."""
        return {
            "seconds": _differences(self.ends),
            "cpu_seconds": _differences(self.cpu_ends),
            "mib": self.mib,
            "total_mib": self.total_mib,
        }


def dro_step(setting: Setting, folder: str) -> dict[str, Any]:
    """Measure steps of `DROTrainer`, each with an E-step of its own.

    Returns:
        what `StepTimer.measured` does, `phases` (seconds in each, a list over steps), and `selections` of each step's
        questions.
    """
    torch.manual_seed(0)
    selector, generator = setting.models()
    tokenizer = world.tokenizer()
    prompters: dict[Role, Prompter] = {role: Prompter(tokenizer, role) for role in ("selector", "generator")}
    config = DROConfig(
        **setting.common(folder),
        num_iterations=setting.steps + 1,
        questions_per_iteration=setting.questions,
        per_device_train_batch_size=setting.m,
        gradient_accumulation_steps=setting.questions,
        allow_single_generation=True,
        num_selected=setting.k,
        max_prompt_length=None,
        selector_baseline="mean" if setting.m > 1 else "none",
        eval_iterations=10**9,
        early_stopping_patience=None,
        load_best_model_at_end=False,
        verify_fast_path=False,  # the plain path's memory, once, would be taken for the step's
        **setting.trainer,
    )
    timer = StepTimer(setting.device)
    trainer = DROTrainer(
        SelectorGenerator(selector=selector, generator=generator), config, setting.train_questions(), None, prompters
    )
    trainer.add_callback(timer)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry][1:]
    phases = {name for entry in history for name in entry if name.startswith("time/")}
    return {
        **timer.measured(),
        "phases": {name.removeprefix("time/"): [entry.get(name, 0.0) for entry in history] for name in sorted(phases)},
        "selections": _selections(Path(folder), setting),
    }


def _selections(run: Path, setting: Setting) -> list[list[tuple[int, list[int]]]]:
    """For each timed step, its rollouts as (index of the question, document numbers)."""
    steps = []
    for iteration in range(2, setting.steps + 2):
        rollouts = rollout_log.to_rollouts(rollout_log.read(rollout_log.part_paths(run, iteration)))
        steps.append([(rollout.question, list(rollout.selection.numbers)) for rollout in rollouts])
    return steps


def distinct(selections: list[list[tuple[int, list[int]]]]) -> float:
    """Distinct selections of a question, on average."""
    counts = [
        len({tuple(numbers) for number, numbers in step if number == question})
        for step in selections
        for question in {number for number, _ in step}
    ]
    return sum(counts) / len(counts)


def _differences(times: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(times)]
