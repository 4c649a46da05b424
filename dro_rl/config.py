"""What the trainer is told: `DROConfig`, TRL's base config with the keys of `dro_rl.keys.training` over it."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass, replace

import torch
from transformers.utils import is_torch_tf32_available
from trl.trainer.base_config import _BaseConfig

from dro_rl.errors import InputError, Phrase
from dro_rl.keys.addresses import urls
from dro_rl.keys.training import TrainingKeys
from dro_rl.likelihood import TOKENS_PER_PASS, Scoring
from dro_rl.objective import Weighting
from dro_rl.proposal import SamplingParams
from dro_rl.rewards import Reward, parse_reward
from dro_rl.roles import ROLES, Role


@dataclass
class DROConfig(TrainingKeys, _BaseConfig):  # type: ignore[misc]  # keys take over fields with narrower types
    """Settings of `DROTrainer`. Keys that TRL or transformers have keep their names and meaning."""

    def __post_init__(self) -> None:
        if not torch.cuda.is_available() and not torch.xpu.is_available():
            # TRL's default precision asks for an accelerator; a laptop gets float32 unless it says otherwise.
            self.use_cpu = True
            self.bf16 = bool(self.bf16)
        self.check()
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            self.ddp_backend = None  # one process talks to nobody, and torch refuses to prepare it for that
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()
        # The stock rule ties this flag to a fixed step interval. Our evaluations fall on iterations, and each comes
        # with a checkpoint, which is what the rule is there to ensure.
        keep_best, self.load_best_model_at_end = self.load_best_model_at_end, False
        super().__post_init__()
        self.load_best_model_at_end = keep_best

    @property
    def device(self) -> torch.device:
        """This process's device. accelerate numbers CPUs by process, and `torch.load` knows no cpu:0 to load to."""
        device: torch.device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    def check(self) -> None:
        """Raise `InputError` for the first value that breaks a rule, those of this machine among them."""
        super().check()
        self._require("tf32", not self.tf32 or is_torch_tf32_available(), "this GPU has it", "Leave it out.")
        self._require(
            "ddp_backend",
            self.ddp_backend != "nccl" or (torch.cuda.is_available() and not self.use_cpu),
            "NCCL talks between GPUs",
            "Leave it unset.",
        )
        self._require(
            "overlap_rollouts",
            not self.overlap_rollouts or (self.engine == "vllm" and self.vllm_mode == "server"),
            "only a server samples while the trainer trains",
            "Use vllm_mode: server, or leave it out.",
        )
        for key, asked in (
            ("activation_offloading", self.activation_offloading),
            ("gradient_checkpointing_kwargs", (self.gradient_checkpointing_kwargs or {}).get("offload", False)),
        ):
            self._require(
                key,
                not asked or (torch.accelerator.is_available() and not self.use_cpu),
                "only an accelerator has activations that the CPU's memory can hold for it",
                "Leave it out on a CPU.",
            )
        if self.engine != "vllm":
            return
        self._require(
            "window_size",
            self.window_size is None or self.vllm_mode == "server" or self.vllm_tensor_parallel_size == 1,
            "processes that share an engine's shards ask it together, and each has windows of its own to ask for",
            "Use vllm_tensor_parallel_size: 1, or vllm_mode: server.",
        )
        needed = (self.max_prompt_length or 0) + self.max_completion_length
        self._require(
            "vllm_max_model_length",
            self.vllm_max_model_length is None or self.vllm_max_model_length >= needed,
            f"max_prompt_length and max_completion_length are {needed} tokens together",
            f"Use {needed}, or leave it unset.",
        )
        self._require(
            "vllm_enable_sleep_mode",
            not self.vllm_enable_sleep_mode or (torch.cuda.is_available() and not self.use_cpu),
            "only a GPU has memory that vLLM can give back",
            "Leave it out on a CPU.",
        )
        self._require(
            "vllm_enable_sleep_mode",
            not self.vllm_enable_sleep_mode or self.answer_engine != "vllm",
            "all that vLLM holds in a process sleeps at once, and rollout_engine and answer_engine take turns there",
            "Leave it out, or use answer_engine: transformers.",
        )
        self._require(
            "vllm_weight_sync",
            self.vllm_mode == "colocate" or self.vllm_weight_sync != "nccl" or len(self.vllm_servers) == 1,
            f"NCCL reaches one server, and there are {len(self.vllm_servers)}",
            "Use folder, or one server with --data-parallel-size.",
        )
        self._require(
            "vllm_weight_sync",
            self.vllm_mode == "colocate" or self.vllm_weight_sync != "nccl" or torch.cuda.is_available(),
            "NCCL travels between GPUs, and there is none here",
            "Use folder.",
        )

    @property
    def vllm_servers(self) -> list[str]:
        """The servers' addresses, without a closing slash."""
        return urls(self.vllm_server_base_url)

    @property
    def engine(self) -> str:
        """The rollout engine, `auto` resolved: vLLM for who names a server mode, or has it installed beside CUDA."""
        if self.rollout_engine != "auto":
            return self.rollout_engine
        if self.vllm_mode == "server":
            return "vllm"
        suits = torch.cuda.is_available() and not self.use_cpu
        return "vllm" if suits and importlib.util.find_spec("vllm") is not None else "transformers"

    def check_batch(self, processes: int, num_questions: int) -> None:
        """Raise `InputError` unless each process has one device, steps hold whole questions, iterations whole steps."""
        if self.n_gpu > 1:
            raise InputError(
                "accelerate launch",
                Phrase(f"one process sees {self.n_gpu} GPUs"),
                "each process has one",
                f"Use accelerate launch --num_processes {self.n_gpu}, or show it one with CUDA_VISIBLE_DEVICES.",
            )
        rollouts = self.per_device_train_batch_size * processes * self.gradient_accumulation_steps
        self._require(
            "per_device_train_batch_size",
            rollouts % self.num_generations == 0,
            f"a step's {rollouts} rollouts ({self.per_device_train_batch_size} a device, {processes} processes, "
            f"{self.gradient_accumulation_steps} accumulated) hold whole groups of "
            f"num_generations = {self.num_generations}",
            "Choose them so that their product is a multiple of num_generations.",
        )
        per_step = rollouts // self.num_generations
        wanted = self.questions_per_iteration
        self._require(
            "questions_per_iteration",
            wanted is None or wanted % per_step == 0,
            f"an iteration has whole steps of {per_step} questions",
            f"Use a multiple of {per_step}.",
        )
        self._require(
            "overlap_rollouts",
            not self.overlap_rollouts or (wanted == per_step and self.m_step_epochs == 1),
            f"rollouts are at most one step old, so an iteration is one step, of {per_step} questions",
            f"Use questions_per_iteration: {per_step} and m_step_epochs: 1.",
        )
        self._require(
            "reuse_sampling_pass",
            self.reuse_sampling_pass != "on"
            or (
                processes == 1
                and self.reuses_sampling
                and self.weighs_in_training
                and per_step == (wanted or num_questions // per_step * per_step)
            ),
            "the pass that samples trains with rollout_engine: transformers, in one process, with shared_prefix, "
            "gradient_accumulation_steps: 1 and no windows, where the E-step is fused",
            "Use auto, which falls back, or see docs/speed.md.",
        )
        needed = per_step if wanted is None else wanted
        if needed > num_questions:
            raise InputError(
                "questions_per_iteration" if wanted else "per_device_train_batch_size",
                needed,
                f"the training set has {num_questions} questions",
                "Lower it, or give more questions.",
            )
        self._require(
            "resample_ties",
            self.resample_ties != "replace" or (wanted is not None and wanted < num_questions),
            f"others take the places of those that tie, and each iteration has all {num_questions} training questions",
            f"Use questions_per_iteration: {per_step}, or redraw.",
        )

    def check_windows(self, num_documents: int) -> None:
        """Raise `InputError` where windows are larger than any list: `num_documents` are the most of a question."""
        self._require(
            "window_size",
            self.window_size is None or self.window_size <= num_documents,
            f"no question has more than {num_documents} documents to slide over",
            "Lower it, or leave it unset.",
        )

    def check_documents(self, num_documents: int, question_id: str) -> None:
        """Raise `InputError` when K > N for a question."""
        self._require(
            "num_selected",
            self.spec.most <= num_documents,
            f"question {question_id} has {num_documents} documents to select from",
            "Lower num_selected, or retrieve more documents.",
        )

    @property
    def scoring(self) -> Scoring:
        """How both models score rows."""
        return Scoring(
            self.answer_likelihood,
            self.answer_aliases,
            self.shared_prefix != "off",
            self.prefix_tree,
            TOKENS_PER_PASS if isinstance(self.tokens_per_microbatch, str) else self.tokens_per_microbatch,
        )

    @property
    def questions_per_batch(self) -> float:
        """Questions whose rollouts make one batch of a device; no whole number where groups are split."""
        return self.per_device_train_batch_size / self.num_generations

    @property
    def roles(self) -> tuple[Role, ...]:
        """The roles whose weights are here."""
        return ROLES if self.generator_endpoint is None else ("selector",)

    @property
    def weighs_in_training(self) -> bool:
        """Whether the pass that trains may weigh too: that of both models, of whole questions, where nothing looks at
        weights or answers before it."""
        return (
            self.fused_e_step == "auto"
            and self.interleave == "joint"
            and all(self.role_learning_rate(role) > 0 for role in ROLES)
            and self.questions_per_batch.is_integer()
            and self.min_weight == 0
            and self.resample_ties == "none"
            and self.reward_rule.is_likelihood
        )

    @property
    def reuses_sampling(self) -> bool:
        """Whether the pass over the prompts that samples may be the one that trains, where the E-step is fused."""
        saves_memory = bool(self.gradient_checkpointing or self.activation_offloading)
        return (
            (self.reuse_sampling_pass == "on" or (self.reuse_sampling_pass == "auto" and not saves_memory))
            and self.engine == "transformers"
            and self.shared_prefix != "off"
            and self.window_size is None
            and self.gradient_accumulation_steps == 1
            and self.world_size == 1
        )

    @property
    def reward_rule(self) -> Reward:
        """What rollouts are weighed by."""
        return replace(parse_reward(self.reward), document_cost=self.document_cost)

    @property
    def weighting_rule(self) -> Weighting:
        """How rollouts are weighed, and what the selector's gradient is made of."""
        return Weighting(
            self.objective,
            self.generator_weights if self.generator_endpoint is None else "uniform",  # nothing learns from them
            0.2 if self.epsilon is None else self.epsilon,
            self.reward_rule.is_likelihood,
            self.weighting,
            self.weight_temperature,
            self.target_ess,
            self.max_log_ratio,
            self.selector_baseline,
            self.beta,
            self.entropy_coef,
            self.min_weight,
        )

    @property
    def sampling(self) -> SamplingParams:
        """The proposal."""
        return SamplingParams(self.max_completion_length, self.temperature, self.top_p, self.top_k, self.min_p)
