"""What the trainer is told: `DROConfig`, TRL's base config plus the method's own settings, with the rules they obey."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from urllib.parse import urlsplit

import torch
from trl.trainer.base_config import _BaseConfig

from dro_rl.errors import InputError
from dro_rl.likelihood import Scoring
from dro_rl.proposal import SamplingParams


def _is_address(url: str) -> bool:
    """Whether this is a scheme, a host and perhaps a port, and nothing more."""
    try:
        return bool(re.fullmatch(r"https?://[^/\s?#]+/?", url)) and urlsplit(url).port != 0
    except ValueError:  # no number, or none that a port has
        return False


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class DROConfig(_BaseConfig):
    """Settings of `DROTrainer`. Keys that TRL or transformers have keep their names and meaning.

    `per_device_train_batch_size` counts rollouts, as in TRL: a step covers
    `per_device_train_batch_size * processes * gradient_accumulation_steps / num_generations` questions.
    """

    # > The loop
    num_iterations: int = _option(5, "Iterations (the paper's N): each is one E-step and its M-step.")
    questions_per_iteration: int | None = _option(
        None, "Questions that one E-step covers: from one step's (online) to all of the training set (unset)."
    )
    m_step_epochs: int = _option(1, "Passes of the M-step over the iteration's rollouts, with fixed weights.")
    interleave: Literal["joint", "alternate"] = _option(
        "joint", "Train both models in each step, or in turns of selector_steps and generator_steps."
    )
    selector_steps: int = _option(1, "Consecutive selector steps of a turn (interleave: alternate).")
    generator_steps: int = _option(1, "Consecutive generator steps of a turn (interleave: alternate).")

    # > Rollouts
    num_generations: int = _option(8, "Rollouts sampled for a question (m).")
    allow_single_generation: bool = _option(
        False, "Accept num_generations: 1, whose weights are all one: no selection signal, a control."
    )
    num_selected: int = _option(5, "Documents that the selector is asked for (K).")
    max_prompt_length: int | None = _option(
        4096, "Tokens of a prompt at most; documents are cut evenly to fit, the question never."
    )
    max_completion_length: int = _option(64, "Tokens of a selection at most.")
    max_answer_length: int = _option(64, "Tokens of a generated answer at most (evaluation and serving).")
    constrain_selection: bool = _option(
        False, "Let the selector write K distinct valid numbers and nothing else: sampled, scored and served like that."
    )
    temperature: float = _option(1.0, "Sampling temperature. Other than 1 the weights are corrected by p/q.")
    temperature_end: float | None = _option(
        None, "Temperature of the last iteration, reached in a straight line; unset: temperature throughout."
    )
    duplicate_threshold: float | None = _option(
        None, "Raise the temperature after an iteration in which more than this share of rollouts repeat another."
    )
    temperature_max: float = _option(2.0, "The most that duplicate_threshold raises the temperature to.")
    top_p: float = _option(1.0, "Nucleus truncation of the proposal; 1 is off. Corrected by p/q on what is left.")
    top_k: int = _option(0, "Top-k truncation of the proposal; 0 is off. Corrected by p/q on what is left.")
    min_p: float = _option(
        0.0, "Minimum probability, relative to the likeliest token; 0 is off. Corrected by p/q on what is left."
    )
    max_log_ratio: float = _option(2.0, "Truncation from above of log p/q in the weights, in nats.")

    # > Rollout engine
    rollout_engine: Literal["auto", "transformers", "vllm"] = _option(
        "auto", "What samples rollouts: auto is vllm with a server, or where it is installed beside CUDA."
    )
    vllm_mode: Literal["colocate", "server"] = _option(
        "colocate", "vLLM in the trainer's process, or servers of their own (`dro-rl serve-rollouts`)."
    )
    vllm_dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "auto", "Type that vLLM computes in; auto is the trainer's. Another makes q another: corrected by p/q."
    )
    vllm_model_impl: Literal["auto", "vllm", "transformers"] = _option(
        "auto", "Whose implementation of the model vLLM runs; auto is its own where it has one."
    )
    vllm_max_model_length: int | None = _option(
        None, "Tokens of vLLM's longest sequence; unset: max_prompt_length + max_completion_length."
    )
    vllm_tensor_parallel_size: int = _option(1, "Devices that one copy of the selector in vLLM is spread over.")
    vllm_gpu_memory_utilization: float = _option(
        0.3, "Share of a GPU's memory that vLLM takes beside the trainer (vllm_mode: colocate)."
    )
    vllm_enable_sleep_mode: bool = _option(
        False, "Give vLLM's GPU memory back while models train (vllm_mode: colocate)."
    )
    vllm_server_base_url: str | list[str] = _option(
        "http://127.0.0.1:8000", "The server, or a list of replicas that share the questions (vllm_mode: server)."
    )
    vllm_server_timeout: float = _option(240.0, "Seconds to wait for a server that is not up, or has gone away.")
    vllm_request_timeout: float = _option(600.0, "Seconds that a server may take over the rollouts of one question.")
    overlap_rollouts: bool = _option(
        False, "Sample the next step's rollouts while this one trains: weights one step old, corrected by p/q (server)."
    )
    vllm_weight_sync: Literal["auto", "folder", "nccl"] = _option(
        "auto", "How servers get weights; auto is nccl where trainer and server have it, else folder."
    )
    vllm_weights_dir: str | None = _option(
        None, "Folder that trainer and servers both see, for vllm_weight_sync: folder; unset: in output_dir."
    )
    vllm_group_port: int = _option(51216, "Port of the group that weights travel in (vllm_weight_sync: nccl).")

    # > Objective
    answer_likelihood: Literal["sum", "mean"] = _option(
        "sum", "log p(answer): sum over its tokens (the posterior), or mean (another posterior)."
    )
    answer_aliases: Literal["first", "max", "logsumexp"] = _option(
        "first", "How several accepted answers make one likelihood."
    )
    weighting: Literal["likelihood", "uniform"] = _option(
        "likelihood",
        "What weighs rollouts: the answer's likelihood, or nothing, so that all valid ones tie: no selection signal, "
        "a control.",
    )
    selector_baseline: Literal["none", "mean"] = _option(
        "none", "Control variate of the selector: none (the paper's form) or mean (weight less 1/m, less variance)."
    )
    weight_temperature: float = _option(1.0, "Softens the importance weights; 1 is the posterior.")
    target_ess: float | None = _option(
        None, "Pick, per question, the smallest weight temperature whose effective sample size is this share of m."
    )
    beta: float = _option(0.0, "Weight of the KL divergence to the initial selector.")
    entropy_coef: float = _option(0.0, "Weight of the selector's entropy bonus.")

    # > Optimisation
    learning_rate: float = _option(1e-5, "Learning rate of both models.")
    selector_learning_rate: float | None = _option(None, "Learning rate of the selector; 0 freezes it.")
    generator_learning_rate: float | None = _option(None, "Learning rate of the generator; 0 freezes it.")
    weight_decay: float = _option(0.01, "Weight decay of both models.")

    # > Speed and memory
    tokens_per_microbatch: int = _option(
        16384, "Tokens that go through the models at once: bounds memory. A longer question goes alone."
    )
    shared_prefix: Literal["auto", "on", "off"] = _option(
        "auto", "Compute each prompt once for all its completions: auto where that is exact, on to insist, off never."
    )
    prefix_tree: bool = _option(
        True, "Compute the documents that generator prompts begin with alike once (where prefixes are shared)."
    )
    fused_e_step: Literal["auto", "off"] = _option(
        "auto",
        "Where an iteration is one step (questions_per_iteration), one forward pass gives likelihoods, weights and "
        "losses: auto where that is exact, off to score first.",
    )
    min_weight: float = _option(
        0.0, "The generator skips rollouts of less weight than this; the mass dropped is logged. 0 is off."
    )
    verify_fast_path: bool = _option(
        True, "On the first step compare the shared-prefix path with the plain one, and stop where they differ."
    )

    # > Evaluation, checkpoints, logs
    eval_iterations: int = _option(1, "Iterations between two evaluations on the dev split, each with a checkpoint.")
    early_stopping_patience: int | None = _option(
        1, "Evaluations without improvement after which training stops; unset never stops early."
    )
    metric_for_best_model: str | None = _option("f1", "Dev metric that decides: em, f1, recall@5, answer_logp, …")
    greater_is_better: bool | None = _option(True, "Whether a higher metric is better.")
    load_best_model_at_end: bool = _option(True, "Keep the best evaluated iteration, not the last.")
    save_total_limit: int | None = _option(2, "Checkpoints kept; the best one is always among them.")
    logging_steps: float = _option(1, "Optimizer steps between two log lines.")
    report_to: str | list[str] | None = _option("tensorboard", "tensorboard, wandb, trackio, mlflow, or none.")

    def __post_init__(self) -> None:
        if not torch.cuda.is_available() and not torch.xpu.is_available():
            # TRL's default precision asks for an accelerator; a laptop gets float32 unless it says otherwise.
            self.use_cpu = True
            self.bf16 = bool(self.bf16)
        self.check()
        # The stock rule ties this flag to a fixed step interval. Our evaluations fall on iterations, and each comes
        # with a checkpoint, which is what the rule is there to ensure.
        keep_best, self.load_best_model_at_end = self.load_best_model_at_end, False
        super().__post_init__()
        self.load_best_model_at_end = keep_best

    def check(self) -> None:
        """Raise `InputError` for the first value that breaks a rule."""
        for name in (
            "num_iterations", "m_step_epochs", "num_generations", "num_selected", "max_completion_length",
            "max_answer_length", "selector_steps", "generator_steps", "eval_iterations",
            "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
            "tokens_per_microbatch",
        ):  # fmt: skip
            self._require(name, getattr(self, name) >= 1, "this is at least 1", "Use a positive number.")
        for name in ("questions_per_iteration", "max_prompt_length", "early_stopping_patience"):
            value = getattr(self, name)
            self._require(name, value is None or value >= 1, "this is at least 1, or unset", "Use a positive number.")
        for name in ("beta", "entropy_coef", "max_log_ratio", "max_grad_norm", "weight_decay", "learning_rate"):
            self._require(name, getattr(self, name) >= 0, "this is not negative", "Use 0 or more.")
        for name in ("selector_learning_rate", "generator_learning_rate"):
            value = getattr(self, name)
            self._require(name, value is None or value >= 0, "this is not negative", "Use 0 to freeze the model.")
        self._require(
            "num_generations",
            self.num_generations > 1 or self.allow_single_generation,
            "one rollout has weight one whatever it is, and gives no selection signal",
            "Use 2 or more, or set allow_single_generation: true for the control.",
        )
        self._require(
            "temperature", self.temperature > 0, "rollouts are sampled, so this is above 0", "Use 1.0 to sample from p."
        )
        self._require(
            "temperature_end",
            self.temperature_end is None or self.temperature_end > 0,
            "rollouts are sampled, so this is above 0",
            "Use 1.0 to end at p, or leave it unset.",
        )
        self._require(
            "duplicate_threshold",
            self.duplicate_threshold is None or 0 < self.duplicate_threshold < 1,
            "this is a share of the rollouts, between 0 and 1",
            "Use 0.5, or leave it unset.",
        )
        highest = max(self.temperature, self.temperature_end or 0.0)
        self._require(
            "temperature_max",
            self.duplicate_threshold is None or self.temperature_max > highest,
            f"duplicate_threshold raises the temperature above the {highest} that it has without it",
            "Raise it, or leave duplicate_threshold unset.",
        )
        self._require("top_p", 0 < self.top_p <= 1, "this is in (0, 1]", "Use 1.0 to switch it off.")
        self._require("top_k", self.top_k >= 0, "this is at least 0", "Use 0 to switch it off.")
        self._require("min_p", 0 <= self.min_p < 1, "this is in [0, 1)", "Use 0 to switch it off.")
        self._require(
            "weight_temperature", self.weight_temperature >= 1, "this is at least 1", "Use 1 for the posterior."
        )
        self._require(
            "target_ess",
            self.target_ess is None or 0 < self.target_ess < 1,
            "this is a share of num_generations, between 0 and 1",
            "Use 0.5, or leave it unset.",
        )
        self._require(
            "target_ess",
            self.target_ess is None or self.weight_temperature == 1,
            "target_ess chooses the weight temperature itself",
            "Set one of target_ess and weight_temperature.",
        )
        self._require(
            "weighting",
            self.weighting == "likelihood" or (self.target_ess is None and self.weight_temperature == 1),
            "uniform weights have no temperature",
            "Leave target_ess and weight_temperature unset, or use weighting: likelihood.",
        )
        self._require(
            "min_weight",
            0 <= self.min_weight < 1 / self.num_generations,
            f"this is at least 0, and below 1/num_generations = {1 / self.num_generations:.4g}, which the largest "
            "weight of a question reaches",
            "Use 0 to switch it off.",
        )
        self._require(
            "generator_learning_rate",
            self.role_learning_rate("selector") > 0 or self.role_learning_rate("generator") > 0,
            "one of the two models trains",
            "Give one a learning rate above 0.",
        )
        self._check_vllm()
        self._require(
            "interleave",
            self.interleave == "joint" or min(map(self.role_learning_rate, ("selector", "generator"))) > 0,
            "taking turns needs two models that train",
            "Use interleave: joint, which skips the frozen model.",
        )

    def _check_vllm(self) -> None:
        for name in ("vllm_tensor_parallel_size", "vllm_max_model_length", "vllm_group_port"):
            value = getattr(self, name)
            self._require(name, value is None or value >= 1, "this is at least 1", "Use a positive number.")
        for name in ("vllm_server_timeout", "vllm_request_timeout"):
            self._require(name, getattr(self, name) > 0, "this is a time in seconds", "Use a positive number.")
        self._require(
            "vllm_gpu_memory_utilization", 0 < self.vllm_gpu_memory_utilization <= 1, "this is a share", "Use 0.3."
        )
        for url in self.vllm_servers:
            self._require(
                "vllm_server_base_url",
                _is_address(url),
                "a server is a scheme, a host and a port, or a list of them",
                "Use http://127.0.0.1:8000.",
            )
        self._require("vllm_server_base_url", bool(self.vllm_servers), "there is at least one", "Name a server.")
        self._require(
            "vllm_enable_sleep_mode",
            not self.vllm_enable_sleep_mode or self.vllm_mode == "colocate",
            "a server has its memory to itself",
            "Leave it out, or use vllm_mode: colocate.",
        )
        self._require(
            "overlap_rollouts",
            not self.overlap_rollouts or (self.engine == "vllm" and self.vllm_mode == "server"),
            "only a server samples while the trainer trains",
            "Use vllm_mode: server, or leave it out.",
        )
        if self.engine != "vllm":
            return
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
        urls = self.vllm_server_base_url
        return [url.rstrip("/") for url in ([urls] if isinstance(urls, str) else urls)]

    @property
    def engine(self) -> Literal["transformers", "vllm"]:
        """The rollout engine, `auto` resolved: vLLM for who names a server mode, or has it installed beside CUDA."""
        if self.rollout_engine != "auto":
            return self.rollout_engine
        if self.vllm_mode == "server":
            return "vllm"
        suits = torch.cuda.is_available() and not self.use_cpu
        return "vllm" if suits and importlib.util.find_spec("vllm") is not None else "transformers"

    def check_batch(self, processes: int, num_questions: int) -> None:
        """Raise `InputError` unless steps hold whole questions and iterations whole steps."""
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
        needed = per_step if wanted is None else wanted
        if needed > num_questions:
            raise InputError(
                "questions_per_iteration" if wanted else "per_device_train_batch_size",
                needed,
                f"the training set has {num_questions} questions",
                "Lower it, or give more questions.",
            )

    def check_documents(self, num_documents: int, question_id: str) -> None:
        """Raise `InputError` when K > N for a question."""
        self._require(
            "num_selected",
            self.num_selected <= num_documents,
            f"question {question_id} has {num_documents} documents to select from",
            "Lower num_selected, or retrieve more documents.",
        )

    def _require(self, name: str, holds: bool, rule: str, fix: str) -> None:
        if not holds:
            raise InputError(name, getattr(self, name), rule, fix)

    def role_learning_rate(self, role: str) -> float:
        """The learning rate of `selector` or `generator`, in the optimizer's units."""
        own = getattr(self, f"{role}_learning_rate")
        return self.learning_rate if own is None else own

    @property
    def scoring(self) -> Scoring:
        """How both models score rows."""
        return Scoring(self.answer_likelihood, self.answer_aliases, self.shared_prefix != "off", self.prefix_tree)

    def sampling_at(self, temperature: float | None) -> SamplingParams:
        """The proposal at a temperature; at `temperature` itself, unless told."""
        return self.sampling if temperature is None else replace(self.sampling, temperature=temperature)

    @property
    def sampling(self) -> SamplingParams:
        """The proposal."""
        return SamplingParams(self.max_completion_length, self.temperature, self.top_p, self.top_k, self.min_p)
