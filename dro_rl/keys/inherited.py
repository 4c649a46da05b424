"""Keys of transformers and TRL that are no keys here. Those that are stand in `training`; a test misses none."""

from __future__ import annotations

EVALUATION = "nothing: the dev split is evaluated as docs/evaluation.md says"
READING = "nothing: questions are in memory, and no workers read them"
HUB = "`hf upload` on selector/ and generator/ when the run is done"
LAYOUT = "accelerate's own file: accelerate launch --config_file recipes/accelerate/…"

WITHOUT_EFFECT = {
    "num_train_epochs": "num_iterations (E-steps) and m_step_epochs (passes over their rollouts)",
    "logging_strategy": "logging_steps",
    "eval_strategy": "eval_iterations",
    "eval_steps": "eval_iterations",
    "eval_delay": "eval_iterations",
    "eval_on_start": "nothing: the models are always evaluated before the first iteration",
    "prediction_loss_only": EVALUATION,
    "eval_do_concat_batches": EVALUATION,
    "eval_use_gather_object": EVALUATION,
    "eval_accumulation_steps": EVALUATION,
    "include_for_metrics": EVALUATION,
    "batch_eval_metrics": EVALUATION,
    "label_names": EVALUATION,
    "bf16_full_eval": "bf16, which evaluation follows too",
    "fp16_full_eval": "fp16, which evaluation follows too",
    "save_strategy": "eval_iterations, each of which comes with a checkpoint, and save_steps for more between",
    "save_only_model": "nothing: a checkpoint is there to go on from",
    "save_on_each_node": "an output_dir that every node sees",
    "auto_find_batch_size": "a smaller tokens_per_microbatch",
    "label_smoothing_factor": "nothing: the likelihood is exact",
    "average_tokens_across_devices": "nothing: losses are means over questions, on however many processes",
    "use_cache": "nothing: sampling caches, and training does not",
    "data_seed": "seed, from which the order of questions follows too",
    "ignore_data_skip": "nothing: a resumed run finds its place without reading data",
    "restore_callback_states_from_checkpoint": "nothing: what a checkpoint needs is restored",
    "include_num_input_tokens_seen": "nothing: the tokens of each phase are counted and logged",
    "skip_memory_metrics": "nothing: torch's own counters are logged where there is a GPU",
    "train_sampling_strategy": "nothing: the order of questions follows from seed",
    "length_column_name": "nothing: rows of like lengths go together by tokens_per_microbatch",
    "remove_unused_columns": READING,
    "dataloader_drop_last": "nothing: iterations hold whole steps",
    "dataloader_num_workers": READING,
    "dataloader_pin_memory": READING,
    "dataloader_persistent_workers": READING,
    "dataloader_prefetch_factor": READING,
    "dataloader_multiprocessing_context": READING,
    "dataloader_in_order": READING,
    "do_train": "dro-rl train",
    "do_eval": "dro-rl evaluate",
    "do_predict": "dro-rl ask",
    "debug": "nothing: the run stops at the first loss that is not finite",
    "push_to_hub": HUB,
    "hub_token": HUB,
    "hub_private_repo": HUB,
    "hub_model_id": HUB,
    "hub_strategy": HUB,
    "hub_always_push": HUB,
    "hub_revision": HUB,
    "ddp_find_unused_parameters": "nothing: it follows from interleave",
    "local_rank": "nothing: the launcher says it",
    "use_vllm": "rollout_engine: vllm",
    "vllm_server_host": "vllm_server_base_url: http://host:port",
    "vllm_server_port": "vllm_server_base_url: http://host:port",
    "vllm_importance_sampling_correction": "max_log_ratio: rollouts are always corrected by p/q",
}
"""Keys that have no effect here, with what to use instead."""

_PATCHED = (
    "log-probabilities come from the models as they are, and the same in sampling, scoring and training",
    "Leave it out.",
)
_LAYOUT = ("how processes share the models is said to the launcher, which must know before they start", f"Use {LAYOUT}")
_TRACKER = (
    "a run's logs go where report_to sends them and nowhere else",
    "Leave it out; `trackio sync` publishes a project that is done.",
)
_BOUNDED = ("the correction is bounded in nats", "Use max_log_ratio, the logarithm of this.")

REFUSED = {
    "repetition_penalty": (
        "a penalty on what was written before falls on the brackets and arrows of the format itself",
        "Leave it out; constrain_selection: true keeps numbers from repeating.",
    ),
    "generation_kwargs": (
        "what is handed to an engine alone makes it sample from something that the weights do not know",
        "Use temperature, top_p, top_k, min_p or constrain_selection, which they do.",
    ),
    "vllm_structured_outputs_regex": (
        "a pattern that the engine keeps and the trainer does not score makes every ratio p/q wrong",
        "Use constrain_selection: true, which both keep.",
    ),
    "vllm_importance_sampling_mode": (
        "the correction is a factor p/q of each rollout's weight, truncated from above",
        "Leave it out; max_log_ratio bounds the correction.",
    ),
    "vllm_importance_sampling_clip_max": _BOUNDED,
    "vllm_importance_sampling_cap": _BOUNDED,
    "vllm_importance_sampling_clip_min": (
        "a ratio near zero is a rollout that p would hardly write, and stays near zero",
        "Leave it out.",
    ),
    "use_liger_kernel": _PATCHED,
    "liger_kernel_config": _PATCHED,
    "neftune_noise_alpha": (
        "noise on embeddings would make the policy that trains another than the one that sampled",
        "Leave it out.",
    ),
    "torch_compile": (
        "rows have other lengths in every step, and each would be compiled anew",
        "Leave it out; rollout_engine: vllm is what makes sampling fast.",
    ),
    "torch_compile_backend": ("models are not compiled (torch_compile says why)", "Leave it out."),
    "torch_compile_mode": ("models are not compiled (torch_compile says why)", "Leave it out."),
    "optim_target_modules": (
        "each model has one learning rate for all of its weights",
        "Leave it out; lora_target_modules chooses the layers that have adapters.",
    ),
    "logging_nan_inf_filter": (
        "a loss that is not finite is never hidden",
        "Leave it out.",
    ),
    "enable_jit_checkpoint": (
        "a checkpoint stands between two steps, where it can be gone on from bit for bit",
        "Use save_steps, for more of them.",
    ),
    "trackio_space_id": _TRACKER,
    "trackio_bucket_id": _TRACKER,
    "trackio_static_space_id": _TRACKER,
    "ddp_static_graph": (
        "micro-batches differ in number and in who trains from step to step",
        "Leave it out.",
    ),
    "accelerator_config": (
        "it would change how many questions a step holds, behind the schedule's back",
        "Leave it out.",
    ),
    "parallelism_config": _LAYOUT,
    "fsdp": _LAYOUT,
    "fsdp_config": _LAYOUT,
    "deepspeed": _LAYOUT,
}
"""Keys that would make the proposal dishonest, or break a run: the rule and the fix."""
