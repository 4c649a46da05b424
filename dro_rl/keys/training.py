"""Keys of training: the method's own, and those of transformers and TRL that mean here what they mean there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from dro_rl.errors import InputError
from dro_rl.keys import Rule, above, at_least, check_keys, either, option, within
from dro_rl.keys.addresses import ADDRESSES, API, urls
from dro_rl.rewards import parse_reward
from dro_rl.selection import SelectionSpec
from dro_rl.selection.windows import Windows

RATE = at_least(0, "Use 0 to freeze the model.")
SHARE = within("(0, 1)", "Use 0.5, or leave it unset.")
BETA = within("[0, 1)", "Leave it out for the usual value.")
EVERY = Rule(
    "above 0: a share of all steps, or a whole number of them",
    "Use a whole number.",
    lambda value: 0 < value < 1 or (value >= 1 and value == int(value)),
)

OPTIM_ARGS = {
    "sgd": ("momentum", "dampening", "nesterov"),
    "adagrad": ("lr_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "centered"),
}
"""What `optim_args` may say of an optimizer. Others have keys of their own, or nothing to say."""

RECOMPUTATION = Rule(
    "every_n_layers, a whole number from 1 on, and offload, true or false; activations are recomputed without entering "
    "autograd again, which is what packed rows take",
    "Use {every_n_layers: 2, offload: true}, say, or leave it out.",
    lambda value: (
        {*value} <= {"every_n_layers", "offload"}
        and type(value.get("every_n_layers", 1)) is int
        and value.get("every_n_layers", 1) >= 1
        and type(value.get("offload", False)) is bool
    ),
)

NAMED_VALUES = Rule(
    "name=value, or several with commas between, of numbers and true or false",
    "Use momentum=0.9, say, or leave it out.",
    lambda value: all(
        re.fullmatch(r"\s*\w+\s*=\s*([0-9.]+([eE]-?[0-9]+)?|true|false)\s*", part) for part in value.split(",")
    ),
)


def _is_count(value: Any) -> bool:
    try:
        return bool(SelectionSpec.of(value))
    except ValueError:
        return False


COUNT = Rule("at least 1, or {min: 1, max: 5} with 1 <= min <= max", "Use 5, or {min: 1, max: 5}.", _is_count)


@dataclass
class TrainingKeys:
    """What `DROConfig` adds to TRL's base config, and what of that it takes over.

    `per_device_train_batch_size` counts rollouts, as in TRL: a step covers
    `per_device_train_batch_size * processes * gradient_accumulation_steps / num_generations` questions.
    """

    output_dir: str | None = option(None, "The run's folder.", group="The run", resumes=True)
    seed: int = option(
        42, "What every draw, shuffle and sample follows from.", within("[0, 4294967295]", "Use 0 or more.")
    )
    resume_from_checkpoint: str | None = option(
        None, "Go on from the last whole checkpoint (auto), or from this one.", resumes=True
    )
    full_determinism: bool = option(False, "Ask every operation of torch for a deterministic form, at a price.")
    use_cpu: bool = option(False, "Train on the CPU even where there is a GPU.")

    num_iterations: int = option(
        5,
        "Iterations (the paper's N): each is one E-step and its M-step.",
        at_least(1),
        resumes=True,
        group="The loop",
    )
    questions_per_iteration: int | None = option(
        None, "Questions that one E-step covers: from one step's (online) to all of the training set (unset).",
        at_least(1),
    )  # fmt: skip
    m_step_epochs: int = option(
        1, "Passes of the M-step over the iteration's rollouts, with fixed weights.", at_least(1)
    )
    max_steps: int = option(
        -1, "Stop after so many optimizer steps.", either(-1, at_least(1), "all of num_iterations"), resumes=True
    )
    per_device_train_batch_size: int = option(8, "Rollouts that one device trains on at a time.", at_least(1))
    gradient_accumulation_steps: int = option(1, "Batches that make one optimizer step.", at_least(1))
    interleave: Literal["joint", "alternate"] = option(
        "joint", "Train both models in each step, or in turns of selector_steps and generator_steps."
    )
    selector_steps: int = option(1, "Consecutive selector steps of a turn (interleave: alternate).", at_least(1))
    generator_steps: int = option(1, "Consecutive generator steps of a turn (interleave: alternate).", at_least(1))

    num_generations: int = option(8, "Rollouts sampled for a question (m).", at_least(1), group="Rollouts")
    candidate_orders: int = option(
        1,
        "Orders of its candidates that a question's rollouts are split over, drawn anew each time; 1: as they stand. "
        "From 2 on even a policy that names one place names several documents.",
        at_least(1),
    )
    allow_single_generation: bool = option(
        False, "Accept num_generations: 1, whose weights are all one: no selection signal, a control."
    )
    num_selected: int | dict[str, Any] = option(
        5, "Documents that the selector is asked for (K), or {min: 1, max: 5}: it decides how many.", COUNT
    )
    window_size: int | None = option(
        None,
        "Candidates that the selector is shown at a time: a window slides from the end of a longer list to its front, "
        "and what is picked goes on to the next; unset: all at once.",
        at_least(2),
    )
    window_stride: int | None = option(
        None,
        "New candidates of each further window; unset: window_size less K, all that there is room for.",
        at_least(1),
    )
    max_prompt_length: int | None = option(
        4096, "Tokens of a prompt at most; documents are cut evenly to fit, the question never.", at_least(1)
    )
    max_completion_length: int = option(64, "Tokens of a selection at most.", at_least(1))
    max_answer_length: int = option(64, "Tokens of a generated answer at most (evaluation and serving).", at_least(1))
    constrain_selection: bool = option(
        False, "Let the selector write K distinct valid numbers and nothing else: sampled, scored and served like that."
    )
    temperature: float = option(
        1.0,
        "Sampling temperature. Other than 1 the weights are corrected by p/q.",
        above(0, "Use 1.0 to sample from p."),
    )
    temperature_end: float | None = option(
        None,
        "Temperature of the last iteration, reached in a straight line; unset: temperature throughout.",
        above(0, "Use 1.0 to end at p, or leave it unset."),
    )
    duplicate_threshold: float | None = option(
        None,
        "Raise the temperature after an iteration in which more than this share of rollouts repeat another.",
        SHARE,
    )  # fmt: skip
    temperature_max: float = option(2.0, "The most that duplicate_threshold raises the temperature to.", above(0))
    resample_ties: Literal["none", "redraw", "replace"] = option(
        "none",
        "What becomes of a question whose rollouts all tie: nothing, it is drawn again, or another question takes its "
        "place (DAPO's dynamic sampling).",
    )
    resample_rounds: int = option(3, "Times that resample_ties draws again for a place, at most.", at_least(1))
    top_p: float = option(
        1.0,
        "Nucleus truncation of the proposal; 1 is off. Corrected by p/q on what is left.",
        within("(0, 1]", "Use 1.0 to switch it off."),
    )
    top_k: int = option(
        0,
        "Top-k truncation of the proposal; 0 is off. Corrected by p/q on what is left.",
        at_least(0, "Use 0 to switch it off."),
    )
    min_p: float = option(
        0.0,
        "Minimum probability, relative to the likeliest token; 0 is off. Corrected by p/q on what is left.",
        within("[0, 1)", "Use 0 to switch it off."),
    )
    max_log_ratio: float = option(2.0, "Truncation from above of log p/q in the weights, in nats.", at_least(0))

    rollout_engine: str = option(
        "auto",
        "What samples: transformers, vllm, or auto: vllm with a server, or where it is installed beside CUDA. "
        "enumeration lists every selection instead: the exact E-step.",
        group="Rollout engine",
    )
    answer_engine: Literal["transformers", "vllm"] = option(
        "transformers",
        "What writes the answers that rewards look at: the generator itself, or vLLM with its weights (vllm_mode).",
    )
    vllm_mode: Literal["colocate", "server"] = option(
        "colocate", "vLLM in the trainer's process, or servers of their own (`dro-rl serve-rollouts`)."
    )
    vllm_dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "Type that vLLM computes in; auto is the trainer's. Another makes q another: corrected by p/q."
    )
    vllm_model_impl: Literal["auto", "vllm", "transformers"] = option(
        "auto", "Whose implementation of the model vLLM runs; auto is its own where it has one."
    )
    vllm_max_model_length: int | None = option(
        None, "Tokens of vLLM's longest sequence; unset: max_prompt_length + max_completion_length.", at_least(1)
    )
    vllm_tensor_parallel_size: int = option(
        1, "Devices that one copy of the selector in vLLM is spread over.", at_least(1), resumes=True
    )
    vllm_gpu_memory_utilization: float = option(
        0.3,
        "Share of a GPU's memory that vLLM takes beside the trainer (vllm_mode: colocate).",
        within("(0, 1]", "Use 0.3."),
        resumes=True,
    )
    vllm_enable_sleep_mode: bool = option(
        False, "Give vLLM's GPU memory back while models train (vllm_mode: colocate).", resumes=True
    )
    vllm_server_base_url: str | list[str] = option(
        "http://127.0.0.1:8000",
        "The server, or a list of replicas that share the questions (vllm_mode: server).",
        ADDRESSES,
        resumes=True,
    )
    vllm_answer_server_base_url: str | list[str] | None = option(
        None,
        "The same for answer_engine: vllm: servers of the generator (`dro-rl serve-rollouts --role generator`).",
        ADDRESSES,
        resumes=True,
    )
    vllm_server_timeout: float = option(
        240.0, "Seconds to wait for a server that is not up, or has gone away.", above(0), resumes=True
    )
    vllm_server_key_file: str = option(
        "~/.cache/dro_rl/server_key",
        "The key that a server asks for, made where there is none; DRO_RL_SERVER_KEY goes before it.",
        resumes=True,
    )
    vllm_request_timeout: float = option(
        600.0, "Seconds that a server may take over the rollouts of one question.", above(0), resumes=True
    )
    overlap_rollouts: bool = option(
        False, "Sample the next step's rollouts while this one trains: weights one step old, corrected by p/q (server)."
    )
    vllm_weight_sync: Literal["auto", "folder", "nccl"] = option(
        "auto", "How servers get weights; auto is nccl where trainer and server have it, else folder.", resumes=True
    )
    vllm_lora_sync: Literal["auto", "adapter", "merged"] = option(
        "auto",
        "What vLLM is sent of a model with LoRA: the adapters alone, over a base that it holds, or the model with them "
        "merged; auto is adapter where vLLM takes it, and not on a CPU, where its LoRA is slow.",
    )
    vllm_weights_dir: str | None = option(
        None,
        "Folder that trainer and servers both see, for vllm_weight_sync: folder; unset: in output_dir.",
        resumes=True,
    )
    vllm_group_port: int = option(
        51216,
        "Port of the group that weights travel in (vllm_weight_sync: nccl).",
        within("[1, 65535]", "Use 51216."),
        resumes=True,
    )

    generator_endpoint: str | None = option(
        None,
        "Where a frozen generator is served in OpenAI's style, http://127.0.0.1:8001/v1: it scores and writes answers, "
        "and none of its weights are loaded here. generator_model_name_or_path names its tokenizer.",
        API,
        resumes=True,
        group="A generator elsewhere",
    )
    generator_endpoint_model: str | None = option(None, "Its name there; unset: the only one that is served.")
    generator_endpoint_timeout: float = option(
        240.0, "Seconds to go on asking an endpoint that is away or has too much to do.", above(0), resumes=True
    )
    generator_endpoint_request_timeout: float = option(
        120.0, "Seconds that the endpoint may take over one request.", above(0), resumes=True
    )
    generator_endpoint_concurrency: int = option(
        32, "Requests that a process has in flight at once.", at_least(1), resumes=True
    )

    objective: Literal["dro", "grpo", "rloo", "maxrl", "best_of_m"] = option(
        "dro",
        "What moves the selector: importance weights (dro), advantages (grpo, rloo), weights by reward (maxrl), or the "
        "best rollout.",
        group="Objective",
    )
    reward: str | dict[str, Any] = option(
        "likelihood",
        "What rollouts are weighed by: likelihood, em, f1, contains, rouge_l, package.module:function, or a mixture: "
        "{f1: 10, likelihood: 1}.",
    )
    document_cost: float = option(
        0.0,
        "Taken off a rollout's reward for each document that it selects, where num_selected is a range: nats under "
        "reward: likelihood.",
        at_least(0),
    )
    answer_temperature: float = option(
        0.0, "How the generator writes the answers that rewards look at; 0 is greedy.", at_least(0)
    )
    generator_weights: Literal["posterior", "uniform"] = option(
        "posterior", "What the generator learns from under grpo and rloo: the answers' posterior, or all valid alike."
    )
    epsilon: float | None = option(
        None, "Under grpo: how far p/p_old may carry a rollout, 1 ± epsilon; unset: 0.2.", within("(0, 1)", "Use 0.2.")
    )
    answer_likelihood: Literal["sum", "mean"] = option(
        "sum", "log p(answer): sum over its tokens (the posterior), or mean (another posterior)."
    )
    answer_aliases: Literal["first", "max", "logsumexp"] = option(
        "first", "How several accepted answers make one likelihood."
    )
    weighting: Literal["likelihood", "uniform"] = option(
        "likelihood",
        "What weighs rollouts: the answer's likelihood, or nothing, so that all valid ones tie: no selection signal, "
        "a control.",
    )
    selector_baseline: Literal["none", "mean"] = option(
        "none", "Control variate of the selector: none (the paper's form) or mean (weight less 1/m, less variance)."
    )
    weight_temperature: float = option(
        1.0, "Softens the importance weights; 1 is the posterior.", at_least(1, "Use 1 for the posterior.")
    )
    target_ess: float | None = option(
        None, "Pick, per question, the smallest weight temperature whose effective sample size is this share of m.",
        SHARE,
    )  # fmt: skip
    beta: float = option(0.0, "Weight of the KL divergence to the initial selector.", at_least(0))
    entropy_coef: float = option(0.0, "Weight of the selector's entropy bonus.", at_least(0))

    learning_rate: float = option(1e-5, "Learning rate of both models.", at_least(0), group="Optimisation")
    selector_learning_rate: float | None = option(None, "Learning rate of the selector; 0 freezes it.", RATE)
    generator_learning_rate: float | None = option(None, "Learning rate of the generator; 0 freezes it.", RATE)
    weight_decay: float = option(0.01, "Weight decay of both models.", at_least(0))
    max_grad_norm: float = option(1.0, "The norm that each model's gradient is clipped to.", at_least(0))
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
        "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay",
    ] = option("linear", "How both learning rates go from the first step to the last.")  # fmt: skip
    lr_scheduler_kwargs: dict[str, Any] | None = option(
        None, "What else the schedule takes, such as {min_lr_rate: 0.1} of cosine_with_min_lr."
    )
    warmup_steps: float = option(
        0, "Steps over which learning rates rise from 0, or the share of all steps (below 1).", at_least(0)
    )
    optim: Literal[
        "adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop", "adamw_8bit",
        "adamw_bnb_8bit", "paged_adamw_32bit", "paged_adamw_8bit",
    ] = option("adamw_torch_fused", "The optimizer; those named 8bit or paged need bitsandbytes.")  # fmt: skip
    optim_args: str | None = option(None, "What else sgd, adagrad or rmsprop take, as momentum=0.9.", NAMED_VALUES)
    adam_beta1: float = option(0.9, "Decay of AdamW's mean of gradients.", BETA)
    adam_beta2: float = option(0.999, "Decay of AdamW's mean of squares.", BETA)
    adam_epsilon: float = option(1e-8, "What AdamW adds to the root of the mean of squares.", above(0))

    bf16: bool | None = option(
        None, "Compute in bfloat16; unset: on a GPU yes, unless fp16, on a CPU no.", group="Speed and memory"
    )
    fp16: bool = option(False, "Compute in float16, with a scaled loss.")
    tf32: bool | None = option(None, "Multiply float32 by TF32 (Ampere and later GPUs); unset: as torch has it.")
    gradient_checkpointing: bool = option(True, "Recompute activations in the backward pass: less memory, more time.")
    gradient_checkpointing_kwargs: dict[str, Any] | None = option(
        None,
        "Which layers gradient_checkpointing recomputes, {every_n_layers: 2}, and where their inputs wait, "
        "{offload: true}: in the CPU's memory.",
        RECOMPUTATION,
    )
    activation_offloading: bool = option(
        False,
        "Keep activations in the CPU's memory from forward to backward (TRL's): less of the accelerator's, more time.",
    )
    torch_empty_cache_steps: int | None = option(
        None, "Steps after which torch's cache of GPU memory is emptied; unset: never.", at_least(1)
    )
    tokens_per_microbatch: int | Literal["auto"] = option(
        16384,
        "Tokens that go through the models at once: bounds memory. A longer question goes alone. auto tries how many "
        "fit, and takes fewer where memory runs out.",
        Rule("at least 1, or auto", "Use 16384, or auto.", lambda value: value == "auto" or value >= 1),
    )
    shared_prefix: Literal["auto", "on", "off"] = option(
        "auto", "Compute each prompt once for all its completions: auto where that is exact, on to insist, off never."
    )
    prefix_tree: bool = option(
        True, "Compute the documents that generator prompts begin with alike once (where prefixes are shared)."
    )
    fused_e_step: Literal["auto", "off"] = option(
        "auto",
        "Where an iteration is one step (questions_per_iteration), one forward pass gives likelihoods, weights and "
        "losses: auto where that is exact, off to score first.",
    )
    reuse_sampling_pass: Literal["auto", "on", "off"] = option(
        "auto",
        "Where the E-step is fused, let the pass over the prompts that sampling begins with keep its graph and be the "
        "one that trains (rollout_engine: transformers, one process, one pass a step): auto where activations are "
        "kept in any case, on with gradient_checkpointing too, off never.",
    )
    min_weight: float = option(
        0.0,
        "The generator skips rollouts of less weight than this; the mass dropped is logged. 0 is off.",
        within("[0, 1)", "Use 0 to switch it off."),
    )
    verify_fast_path: bool = option(
        True, "On the first step compare the shared-prefix path with the plain one, and stop where they differ."
    )
    ddp_backend: Literal["nccl", "gloo"] | None = option(
        None, "What processes talk by; unset: nccl between GPUs, gloo between CPUs."
    )
    ddp_timeout: int = option(
        1800, "Seconds that processes wait for each other.", within("[1, 31536000]", "Use 1800."), resumes=True
    )
    ddp_bucket_cap_mb: int | None = option(
        None, "MB of gradients that travel at once between processes.", within("[1, 65536]", "Leave it unset.")
    )
    ddp_broadcast_buffers: bool | None = option(None, "Whether DDP broadcasts the models' buffers in each pass.")

    eval_iterations: int = option(
        1,
        "Iterations between two evaluations on the dev split, each with a checkpoint.",
        at_least(1),
        group="Evaluation, checkpoints, logs",
    )
    per_device_eval_batch_size: int = option(
        8, "Sequences that one device samples or evaluates at a time.", at_least(1), resumes=True
    )
    early_stopping_patience: int | None = option(
        1,
        "Evaluations without improvement after which training stops; unset never stops early.",
        at_least(1),
        resumes=True,
    )
    metric_for_best_model: str | None = option("f1", "Dev metric that decides: em, f1, recall@5, answer_logp, …")
    greater_is_better: bool | None = option(True, "Whether a higher metric is better.")
    load_best_model_at_end: bool = option(True, "Keep the best evaluated iteration, not the last.")
    save_merged: bool = option(
        True,
        "Merge adapters into the models that a run leaves, in full precision; false leaves adapters alone, for "
        "their base.",
        resumes=True,
    )
    save_steps: float = option(
        500, "Optimizer steps between two checkpoints within an iteration.", either(0, EVERY, "none"), resumes=True
    )
    save_total_limit: int | None = option(
        2, "Checkpoints kept; the best one is always among them.", at_least(1), resumes=True
    )
    logging_steps: float = option(1, "Optimizer steps between two log lines.", EVERY, resumes=True)
    logging_first_step: bool = option(False, "Log the first step too.", resumes=True)
    log_level: Literal["passive", "detail", "debug", "info", "warning", "error", "critical"] = option(
        "passive", "What transformers says of itself in the main process; passive leaves it.", resumes=True
    )
    log_level_replica: Literal["passive", "detail", "debug", "info", "warning", "error", "critical"] = option(
        "warning", "What it says in the other processes.", resumes=True
    )
    log_on_each_node: bool = option(True, "Whether the main process of each node counts as one, or the first's alone.")
    disable_tqdm: bool | None = option(
        None, "No progress bar; unset: where standard error is no terminal.", resumes=True
    )
    report_to: str | list[str] | None = option(
        "tensorboard", "tensorboard, wandb, trackio, mlflow, or none.", resumes=True
    )
    run_name: str | None = option(None, "What trackers call the run.", resumes=True)
    project: str = option("huggingface", "The project that trackio keeps the run in.", resumes=True)

    def check(self) -> None:
        """Raise `InputError` for the first value that breaks its key's rule, or a rule over several keys."""
        check_keys(self)
        self._require(
            "num_generations",
            self.num_generations > 1 or self.allow_single_generation,
            "one rollout has weight one whatever it is, and gives no selection signal",
            "Use 2 or more, or set allow_single_generation: true for the control.",
        )
        self._require(
            "candidate_orders",
            self.num_generations % self.candidate_orders == 0,
            f"each order has as many of the num_generations = {self.num_generations} rollouts of a question",
            "Use a divisor of it.",
        )
        Windows.of(self.window_size, self.window_stride, self.spec.most)
        self._require(
            "window_size",
            self.window_size is None or not self.overlap_rollouts,
            "rollouts sampled ahead are one request each, and each window is one of its own",
            "Leave overlap_rollouts out.",
        )
        highest = max(self.temperature, self.temperature_end or 0.0)
        self._require(
            "temperature_max",
            self.duplicate_threshold is None or self.temperature_max > highest,
            f"duplicate_threshold raises the temperature above the {highest} that it has without it",
            "Raise it, or leave duplicate_threshold unset.",
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
            self.min_weight < 1 / self.num_generations,
            f"this is below 1/num_generations = {1 / self.num_generations:.4g}, which the largest weight of a question "
            "reaches",
            "Use 0 to switch it off.",
        )
        self._check_objective()
        self._check_answers()
        self._require(
            "generator_endpoint_model",
            self.generator_endpoint is not None or self.generator_endpoint_model is None,
            "this names a model of generator_endpoint, which is not given",
            "Give its address, or leave this out.",
        )
        self._require(
            "generator_learning_rate",
            self.generator_endpoint is None or not self.generator_learning_rate,
            "a generator behind generator_endpoint is frozen",
            "Leave it out, or load the generator's weights.",
        )
        resamples, out = self.resample_ties != "none", "Leave it out."
        rule = "one rollout ties with itself whatever it is, and so do all under uniform weights"
        self._require(
            "resample_ties", not resamples or (self.num_generations > 1 and self.weighting == "likelihood"), rule, out
        )
        rule = "rollouts sampled ahead are weighed when the weights that sampled them are gone"
        self._require("resample_ties", not (resamples and self.overlap_rollouts), rule, out)
        rates = [self.role_learning_rate(role) for role in ("selector", "generator")]
        self._require(
            "learning_rate" if self.generator_learning_rate is None else "generator_learning_rate",
            max(rates) > 0,
            "one of the two models trains",
            "Give one a rate above 0.",
        )
        self._require(
            "interleave",
            self.interleave == "joint" or min(rates) > 0,
            "taking turns needs two models that train",
            "Use interleave: joint, which skips the frozen model.",
        )
        self._require(
            "gradient_checkpointing_kwargs",
            self.gradient_checkpointing or not self.gradient_checkpointing_kwargs,
            "gradient_checkpointing is off, and takes none",
            "Leave it out, or use gradient_checkpointing: true.",
        )
        takes = OPTIM_ARGS.get(self.optim, ())
        given = [part.partition("=")[0].strip() for part in (self.optim_args or "").split(",") if part]
        self._require(
            "optim_args",
            {*given} <= {*takes},
            f"optim: {self.optim} takes {', '.join(takes) or 'none'}",
            "Use one of them." if takes else "Leave it out.",
        )
        constant = self.lr_scheduler_type in ("constant", "constant_with_warmup")
        self._require(
            "lr_scheduler_kwargs",
            not (constant and self.lr_scheduler_kwargs),
            f"lr_scheduler_type: {self.lr_scheduler_type} takes none",
            "Leave it out, or name another schedule.",
        )
        self._require(
            "warmup_steps",
            self.lr_scheduler_type != "constant" or self.warmup_steps == 0,
            "lr_scheduler_type: constant has one rate from the first step on",
            "Use lr_scheduler_type: constant_with_warmup.",
        )
        self._require(
            "fp16", not (self.fp16 and self.bf16), "one type is computed in, and bf16 is another", "Set one of them."
        )
        self._require(
            "vllm_enable_sleep_mode",
            not self.vllm_enable_sleep_mode or self.vllm_mode == "colocate",
            "a server has its memory to itself",
            "Leave it out, or use vllm_mode: colocate.",
        )

    def _check_objective(self) -> None:
        """Rules over the objective and the reward: what would mean nothing together."""
        objective, reward = self.objective, parse_reward(self.reward)
        softened = self.target_ess is not None or self.weight_temperature != 1
        elsewhere = "Leave it out, or use another objective."
        out = "Leave it out."
        if objective == "best_of_m":
            rule = "best_of_m imitates, without a policy gradient to hold back or to spread"
            self._require("beta", self.beta == 0, rule, elsewhere)
            self._require("entropy_coef", self.entropy_coef == 0, rule, elsewhere)
        if objective in ("grpo", "rloo", "best_of_m"):
            self._require("selector_baseline", self.selector_baseline == "none", f"{objective} has its own", out)
        if objective in ("maxrl", "best_of_m"):
            rule = f"weight_temperature and target_ess soften importance weights, and {objective} has none"
            self._require("objective", not softened, rule, "Leave them out, or use dro.")
        if objective == "maxrl":
            rule = "maxrl takes a likelihood as p and other rewards as they are, which cannot be added"
            self._require("reward", reward.is_likelihood or "likelihood" not in reward.names, rule, "Use one of them.")
        if objective != "dro":
            self._require("weighting", self.weighting == "likelihood", "uniform is the control of objective: dro", out)
        if objective != "grpo":
            self._require("epsilon", self.epsilon is None, f"{objective} does not clip", out)
        if objective not in ("grpo", "rloo"):
            rule = f"under {objective} the generator learns from the weights that move the selector"
            self._require("generator_weights", self.generator_weights == "posterior", rule, out)
        if self.document_cost:
            rule, shorter = "what every selection costs alike moves nothing", "Use num_selected: {min: 1, max: 5}."
            self._require("document_cost", self.spec.chooses, rule, shorter)
            rule = "uniform weights look at no reward, and so at no cost"
            self._require("document_cost", self.weighting == "likelihood", rule, out)
            rule = "maxrl takes logarithms of rewards, which a cost may carry below 0"
            self._require("document_cost", objective != "maxrl" or reward.is_likelihood, rule, "Use dro, say.")
        if "likelihood" not in reward.names:
            rule = "this is how the likelihood is a reward, and the reward has none"
            self._require("answer_likelihood", self.answer_likelihood == "sum", rule, out)
        if not reward.others:
            rule = "answers are written where a reward looks at them"
            self._require("answer_temperature", self.answer_temperature == 0, rule, "Use a reward such as f1.")

    @property
    def spec(self) -> SelectionSpec:
        """What the selector is asked for."""
        return SelectionSpec.of(self.num_selected, self.constrain_selection)

    @property
    def windows(self) -> Windows | None:
        """How long lists of candidates are shown."""
        return Windows.of(self.window_size, self.window_stride, self.spec.most)

    def _check_answers(self) -> None:
        """Rules over what writes answers."""
        engine = self.answer_engine == "vllm"
        self._require(
            "answer_engine",
            not engine or (bool(parse_reward(self.reward).others) and self.generator_endpoint is None),
            "vLLM writes answers where a reward looks at them, and the generator's weights are here",
            "Use transformers.",
        )
        served = engine and self.vllm_mode == "server"
        rule = "answer_engine: vllm under vllm_mode: server, and it alone, has servers that hold the generator"
        fix = "Name one, and start it with --role generator." if served else "Leave it out."
        self._require(
            "vllm_answer_server_base_url", (self.vllm_answer_server_base_url is not None) == served, rule, fix
        )
        self._require(
            "vllm_answer_server_base_url",
            not served or {*urls(self.vllm_answer_server_base_url)}.isdisjoint(urls(self.vllm_server_base_url)),
            "a server holds one model, and vllm_server_base_url is the selector's",
            "Use another port, http://127.0.0.1:8001.",
        )

    def _require(self, name: str, holds: bool, rule: str, fix: str) -> None:
        if not holds:
            raise InputError(name, getattr(self, name), rule, fix)

    def role_learning_rate(self, role: str) -> float:
        """The learning rate of `selector` or `generator`, in the optimizer's units."""
        if role == "generator" and self.generator_endpoint is not None:
            return 0.0
        own = getattr(self, f"{role}_learning_rate")
        return self.learning_rate if own is None else own
