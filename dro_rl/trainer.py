"""`DROTrainer`: the loop. E-step when an iteration begins, M-step on its rollouts, evaluate and save when it ends.

The stock Trainer does the rest: distribution, precision, accumulation, optimizer, scheduler, logging. What is computed
stands in `objective`, `likelihood` and `rollouts`; what stands here is when, and on which process.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl.trainer.base_trainer import _BaseTrainer

from dro_rl.config import DROConfig
from dro_rl.em.checkpoints import Checkpoints
from dro_rl.em.e_step import EStep
from dro_rl.em.iteration import IterationRollouts
from dro_rl.em.m_step import Group, MicroBatch
from dro_rl.em.schedule import Schedule, Slots, SlotSampler
from dro_rl.em.timing import Phase, PhaseClock, flops_per_token, peak_flops, rates
from dro_rl.engines.protocol import RolloutEngine
from dro_rl.engines.transformers_engine import TransformersEngine
from dro_rl.engines.vllm_colocate import ColocatedEngine
from dro_rl.engines.vllm_server import ServerEngine, check_servers
from dro_rl.engines.vllm_weights import publisher
from dro_rl.errors import InputError, Phrase
from dro_rl.evaluation.evaluator import evaluate_stage, read_stages, with_stage
from dro_rl.job.console import LineProgress
from dro_rl.likelihood import passes
from dro_rl.likelihood.attention import takes_packed_rows
from dro_rl.likelihood.packing import Row
from dro_rl.likelihood.verify import check, difference
from dro_rl.models.module import SelectorGenerator
from dro_rl.models.saving import export_role, load_role, save_role
from dro_rl.models.sharding import inference
from dro_rl.pipeline import PROMPT, PipelineSettings, RAGPipeline, save_settings
from dro_rl.prompts import Prompter
from dro_rl.records import Question, Rollout
from dro_rl.roles import ROLES, Role
from dro_rl.rollouts.diagnostics import columns, logged, summarize

logger = logging.getLogger(__name__)

MAX_DIFFERENCE = 0.1
"""Nats a token, on average: two implementations of a model in bfloat16 stay below it."""


class DROTrainer(_BaseTrainer):
    """Trains a selector and a generator together (Direct Retrieval-augmented Optimization, Algorithm 1).

    Args:
        model: both models.
        args: the settings.
        train_questions: the training set.
        eval_questions: the dev split, for early stopping and for choosing the best iteration. None: no evaluation.
        prompters: the prompts of each role, with their tokenizers.
        eval_split: the name of the dev split, as reports give it.
        initial_stage: what the evaluation before the first iteration is called: `base` or `warmup`.
        reference: the initial selector, for `beta > 0`.
        callbacks: transformers callbacks.
    """

    _tag_names = ["trl", "dro", "retrieval-augmented-generation"]
    _name = "DRO"
    _paper = {"title": "Direct Retrieval-augmented Optimization", "id": "2505.03075"}
    # `compute_loss` returns a mean over the micro-batch's questions, for the Trainer to average over the accumulation.
    loss_is_scaled_for_ga: Any = False

    args: DROConfig
    model_wrapped: Any

    def __init__(
        self,
        model: SelectorGenerator,
        args: DROConfig,
        train_questions: Sequence[Question],
        eval_questions: Sequence[Question] | None,
        prompters: Mapping[Role, Prompter],
        *,
        eval_split: str = "dev",
        initial_stage: str = "base",
        reference: nn.Module | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        if args.n_gpu > 1:
            raise InputError(
                "accelerate launch",
                Phrase(f"one process sees {args.n_gpu} GPUs"),
                "each process has one",
                f"Use accelerate launch --num_processes {args.n_gpu}, or show it one with CUDA_VISIBLE_DEVICES.",
            )
        args.check_batch(args.world_size, len(train_questions))
        self.train_questions, self.eval_questions = train_questions, eval_questions
        self.prompters, self.eval_split, self.initial_stage = dict(prompters), eval_split, initial_stage
        per_step = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
        per_step //= args.num_generations
        self.schedule = Schedule(
            num_questions=len(train_questions),
            questions_per_iteration=args.questions_per_iteration or len(train_questions) // per_step * per_step,
            questions_per_step=per_step,
            m_step_epochs=args.m_step_epochs,
            num_iterations=args.num_iterations,
            num_generations=args.num_generations,
            seed=args.seed,
        )
        args.num_train_epochs = 1  # one pass over the schedule, which holds every iteration
        args.ddp_find_unused_parameters = args.interleave == "alternate"
        for role in ROLES:
            if args.role_learning_rate(role) == 0:
                model.freeze(role)
        self._done: dict[int, Rollout] = {}  # by slot, those of the step that have been through the models here
        self._group_roles: list[Role] = []  # whose each group of the optimizer is
        self._losses: dict[str, float] = defaultdict(float)
        self._step_metrics: dict[str, list[float]] = defaultdict(list)
        self._verified: set[Role] = set()
        self._plain: set[Role] = set()  # those that were said to take the plain path
        self._warned = False
        self._drops_out = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()) or any(
            getattr(getattr(model, role).config.get_text_config(), "attention_dropout", 0) for role in ROLES
        )
        self._flops = {role: flops_per_token(getattr(model, role)) for role in ROLES}
        self.peak_flops = peak_flops(args.device)
        self.clock = PhaseClock(args.device)
        several = sum(len(question.answers) > 1 for question in train_questions)
        if several:
            logger.info(
                f"{several} of {len(train_questions)} questions have several accepted answers; "
                f"the likelihood takes answer_aliases: {args.answer_aliases}"
            )
        if args.sampling.truncates:
            logger.warning(
                "top_p, top_k and min_p leave out selections that p could write. The weights are right among those "
                "that can be drawn; how much of p these have is logged as sampling/ratio_mean"
            )
        super().__init__(
            model=model,
            args=args,
            data_collator=list,
            train_dataset=Slots(self.schedule),
            callbacks=callbacks,
        )
        self.add_callback(_Iterations(self))
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(LineProgress)
        self.reference = reference.to(self.accelerator.device).eval() if reference is not None else None
        self.stages: list[dict[str, Any]] = read_stages(self.run_dir)
        self.checkpoints = Checkpoints(
            self.run_dir, self.schedule, args.save_total_limit, keep_last_iteration=args.duplicate_threshold is not None
        )
        self._vllm = self._start_vllm() if args.engine == "vllm" else None
        e_step = EStep(
            self._open_engine,
            partial(self._open, "selector"),
            partial(self._open, "generator"),
            self._open_reference if self.reference is not None else None,
            self.prompters["selector"],
            self.prompters["generator"],
            args,
            self.clock,
            {role: flops.forward for role, flops in self._flops.items()},
        )
        self.rollouts = IterationRollouts(
            self.schedule, train_questions, e_step, self._open_engine, self.run_dir, args, self.clock, fused=self.fused
        )
        self._pipeline = RAGPipeline(
            self._open,
            self.prompters,
            self.pipeline_settings(),
            batch_size=args.per_device_eval_batch_size,
            shared_prefix=args.scoring.shared_prefix,
        )

    @property
    def run_dir(self) -> Path:
        """Where the run leaves its files."""
        return Path(str(self.args.output_dir))

    def _send_telemetry(self) -> None:
        """Nothing is reported to anyone."""

    # The E-step

    @property
    def fused(self) -> bool:
        """Whether one forward pass gives likelihoods, weights and losses.

        It does where that is what scoring first would give: when an iteration is a single step of both models (or
        several passes over one step's questions, of which the first is fresh), each question is whole on a process,
        no rollout is to be left out of the backward pass, and no dropout disturbs the pass that weighs.
        """
        return (
            self.args.fused_e_step == "auto"
            and self.schedule.questions_per_iteration == self.schedule.questions_per_step
            and self.args.interleave == "joint"
            and all(self.args.role_learning_rate(role) > 0 for role in ROLES)
            and self.args.per_device_train_batch_size % self.args.num_generations == 0
            and self.args.min_weight == 0
            and not self._drops_out
        )

    @contextmanager
    def _open(self, role: Role) -> Iterator[Any]:
        with inference(self._unwrapped(), self.model_wrapped, role, self.accelerator) as model:
            yield model

    @contextmanager
    def _open_engine(self) -> Iterator[RolloutEngine]:
        if self._vllm is not None:
            updates = self.state.global_step if self.args.role_learning_rate("selector") else 0
            with ExitStack() as stack:
                with self.clock.phase("sync"):
                    engine: RolloutEngine = stack.enter_context(cast(Any, self._vllm.at(updates)))
                yield engine
            return
        with self._open("selector") as model:
            yield TransformersEngine(
                model,
                self.prompters["selector"].ends.stops,
                batch_size=self.args.per_device_eval_batch_size,
                shared_prefix=self.args.scoring.shared_prefix,
            )

    def _start_vllm(self) -> ColocatedEngine | ServerEngine:
        tokenizer, ends = self.prompters["selector"].tokenizer, self.prompters["selector"].ends.stops
        if self.args.vllm_mode == "colocate":
            logger.info("rollouts: vLLM in this process; starting it takes a minute")
            return ColocatedEngine(self._selector, self.accelerator, tokenizer, self.args, ends)
        if self.is_world_process_zero():
            check_servers(self.args)
        self.accelerator.wait_for_everyone()
        folder = Path(self.args.vllm_weights_dir or self.run_dir / "vllm_weights")
        publish = publisher(self.args, folder, self._save_selector, self._selector, tokenizer, self.accelerator)
        logger.info(f"rollouts: vLLM at {', '.join(self.args.vllm_servers)}")
        return ServerEngine(self.args, ends, publish)

    def _selector(self) -> Any:
        return self._unwrapped().selector

    def _save_selector(self, folder: Path) -> None:
        """Write the selector to be read by a vLLM server."""
        state = self._gathered_state()
        if self.is_world_process_zero():
            export_role(self._selector(), self.prompters["selector"].tokenizer, folder, _of_role("selector", state))

    @contextmanager
    def _open_reference(self) -> Iterator[Any]:
        with torch.no_grad(), self.accelerator.autocast():
            yield self.reference

    def _unwrapped(self) -> SelectorGenerator:
        return self.accelerator.unwrap_model(self.model)

    # The M-step

    def _get_train_sampler(self, train_dataset: Any = None) -> SlotSampler:
        return SlotSampler(self.schedule, finished=self.stalled())

    def _active(self, role: Role) -> bool:
        """Whether a role moves in the current step."""
        if self.args.role_learning_rate(role) == 0:
            return False
        if self.args.interleave == "joint":
            return True
        turn = self.state.global_step % (self.args.selector_steps + self.args.generator_steps)
        return (role == "selector") == (turn < self.args.selector_steps)

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Nothing to move: rows become tensors where they are scored."""
        return inputs

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The stock step, once for each part of the Trainer's micro-batch that `tokens_per_microbatch` has room for."""
        step = self.state.global_step
        micro_batches = self._micro_batches(self.rollouts.of(self.schedule.iteration(step), step), inputs)
        loss = torch.zeros((), device=self.args.device)
        for micro_batch in micro_batches[:-1]:
            with self._accumulating(model):
                loss += self._part_of_step(model, micro_batch)
        loss += self._part_of_step(model, micro_batches[-1])
        done = (rollout for micro_batch in micro_batches for rollout in micro_batch.rollouts)
        self._done.update(zip(inputs, done, strict=True))
        if self.accelerator.sync_gradients:
            self._end_of_step(step)
        return loss

    def _part_of_step(self, model: nn.Module, micro_batch: MicroBatch) -> Tensor:
        before = self.clock.switch("other")
        loss = super().training_step(model, cast(Any, micro_batch))
        self.clock.switch(before)
        return loss

    @contextmanager
    def _accumulating(self, model: nn.Module) -> Iterator[None]:
        """A backward pass that more of the same step follow. Sharded gradients are reduced in each all the same."""
        state = self.accelerator.gradient_state
        before = state.sync_gradients
        state._set_sync_gradients(False)
        try:
            with nullcontext() if self.is_fsdp_enabled else self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(before)

    def _micro_batches(self, rollouts: Sequence[Rollout], slots: Sequence[int]) -> list[MicroBatch]:
        """Slots as what the models score: whole groups in the order of the slots, as many at once as have room.

        Every process has as many, since those that shard parameters meet in each pass.
        """
        by_question: dict[int, list[Rollout]] = defaultdict(list)
        for slot in slots:
            by_question[slot // self.args.num_generations].append(rollouts[slot])
        with self.clock.phase("inputs"):
            roles = [role for role in ROLES if self._active(role)]
            groups = [
                Group(group, self.train_questions[group[0].question], self.prompters, self.args, roles)
                for group in by_question.values()
            ]
            packed = {role: self._packs(role, max(group.depth(role) for group in groups)) for role in ROLES}
            sizes = [group.tokens(packed) for group in groups]
            batches = [[groups[i] for i in run] for run in passes(sizes, self.args.tokens_per_microbatch)]
            most = int(self.accelerator.gather(torch.tensor([len(batches)], device=self.args.device)).max())
            batches += [[] for _ in range(most - len(batches))]
            eos = self.prompters["generator"].eos_token_id
            return [MicroBatch(batch, self.args, self.rollouts.on_policy, eos) for batch in batches]

    def _packs(self, role: Role, positions: int) -> bool:
        """Whether a role takes packed rows of so many positions. Says so once where it does not."""
        if self.args.shared_prefix == "off":
            return False
        model = getattr(self._unwrapped(), role)
        if takes_packed_rows(model, positions):
            return True
        config = model.config.get_text_config()
        why = f"{config.model_type} under {config._attn_implementation}, {positions} tokens"
        if window := getattr(config, "sliding_window", None):
            why += f", a window of {window}"
        if self.args.shared_prefix == "on":
            raise InputError(
                "shared_prefix",
                f"on, for the {role}: {why}",
                "a model that shares prefixes packs rows, under sdpa, with no window narrower than a row",
                "Use auto, which takes the plain path here, or lower max_prompt_length.",
            )
        if role not in self._plain:
            self._plain.add(role)
            logger.warning(f"{role}: {why}: the plain path, which computes a prompt once for each completion")
        return False

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Both losses, as means over questions: a micro-batch sums over its share of the step's questions."""
        micro_batch: MicroBatch = inputs
        roles = [role for role in ROLES if self._active(role)]
        for role in roles:
            if self.args.verify_fast_path and role not in self._verified:
                self._verified.add(role)
                self._verify(role, micro_batch.rows(role).rows)
        for role in roles:
            tokens = micro_batch.tokens(role)
            self.clock.count(role, tokens, tokens * self._flops[role].step)
        output = model(
            **{role: micro_batch.rows(role) for role in roles},
            scoring=self.args.scoring,
            weigh=micro_batch.weigh if micro_batch.fresh else None,
            switch=self.clock.switch,
        )
        scale = self.args.num_generations / self.args.per_device_train_batch_size
        losses = []
        for role, loss in (("selector", output.selector_loss), ("generator", output.generator_loss)):
            if loss is not None:
                losses.append(scale * loss)
                self._losses[f"{role}/loss"] += losses[-1].item()
        first_step = self.state.global_step % self.schedule.steps_per_iteration == 0
        own = self._vllm is None and micro_batch.samples_plainly and not self._drops_out
        if own and first_step and output.selection_logps is not None:  # the weights are still those that sampled
            difference = output.selection_logps.double().cpu() - micro_batch.proposal_logps()
            self._compare_with_engine(difference, micro_batch.completion_tokens)
        loss = torch.stack(losses).sum()
        return (loss, output) if return_outputs else loss

    def _compare_with_engine(self, difference: Tensor, tokens: int) -> None:
        """log p less log q of selections of so many tokens, by equal weights: what separates them is the engine."""
        self._step_metrics["sampling/logp_difference_mean"].append(difference.abs().mean().item())
        self._step_metrics["sampling/logp_difference_max"].append(difference.abs().max().item())
        a_token = difference.abs().sum().item() / tokens
        if a_token > MAX_DIFFERENCE and not self.rollouts.staleness and not self._warned:
            self._warned = True
            logger.warning(
                f"the engine's log-probabilities differ from the trainer's by {a_token:.2g} nats a token on average; "
                f"by rounding it would be less than {MAX_DIFFERENCE}: does it hold the weights that it was sent? "
                "Rollouts are corrected by p/q; sampling/logp_difference_mean and sampling/log_ratio_max say how far."
            )

    def _verify(self, role: Role, rows: Sequence[Row]) -> None:
        """Compare the shared-prefix path with the plain one on the first rows; stop when they differ."""
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        half = self.args.bf16 or self.args.fp16
        with self.clock.phase("verification"), self.accelerator.autocast():
            if sharded:
                with self._open(role) as model:
                    found = difference(model, rows, self.args.scoring, gradients=False)
            else:
                found = difference(getattr(self._unwrapped(), role), rows, self.args.scoring, gradients=True)
        if found is not None:
            kind = getattr(self._unwrapped(), role).dtype
            check(role, found, (torch.bfloat16 if self.args.bf16 else torch.float16) if half else kind)
            gradients = "" if found.gradients is None else f", gradients by {found.gradients:.1e} of their norm"
            logger.info(f"{role}: shared prefixes differ from the plain path by {found.logps:.1e} nats{gradients}")

    def _end_of_step(self, step: int) -> None:
        """What the step's forward passes made of its rollouts: shared, written, measured."""
        for name, value in self._losses.items():
            self._step_metrics[name].append(value / self.current_gradient_accumulation_steps)
        self._losses.clear()
        iteration = self.schedule.iteration(step)
        positions, m = self.schedule.positions(step), self.args.num_generations
        rollouts = self.rollouts.weighed(iteration, step, self._done)
        self._done.clear()
        groups = [rollouts[position * m : (position + 1) * m] for position in positions]
        limits = {"max_log_ratio": self.args.max_log_ratio, "min_weight": self.args.min_weight}
        for name, value in logged(summarize(columns(groups, self.train_questions), **limits)).items():
            self._step_metrics[name].append(value)
        plain = [r for group in groups for r in group if self.args.sampling_at(r.temperature).on_policy]
        if self._vllm is not None and plain:  # the E-step scored them by the weights that vLLM was sent
            difference = torch.tensor([rollout.selection_logp - rollout.proposal_logp for rollout in plain])
            self._compare_with_engine(difference, sum(len(rollout.token_ids) for rollout in plain))
        if self.args.overlap_rollouts:
            self._step_metrics["sampling/staleness"].append(self.rollouts.staleness)

    # The optimizer: a learning rate and a clip for each model

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One optimizer with a parameter group (two, with weight decay) for each model that trains."""
        model = model or self.model
        assert model is not None
        if self.optimizer is None:
            decayed = set(self.get_decay_parameter_names(model))
            groups = []
            for role in ROLES:
                for decays in (True, False):
                    parameters = [
                        parameter
                        for name, parameter in model.named_parameters()
                        if name.split(".")[0] == role and parameter.requires_grad and (name in decayed) == decays
                    ]
                    if parameters:
                        self._group_roles.append(role)
                        groups.append(
                            {
                                "params": parameters,
                                "lr": self.args.role_learning_rate(role),
                                "weight_decay": self.args.weight_decay if decays else 0.0,
                            }
                        )
            optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, cast(Any, model))
            self.optimizer = optimizer(groups, **options)
        return self.optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Tensor | float | None:
        """Clip each model's gradient on its own, so that neither's scale decides the other's step."""
        with self.clock.phase("optimizer"):
            return self._clip_each(model)

    def _clip_each(self, model: nn.Module) -> Tensor | float | None:
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            return super()._clip_grad_norm(model)  # the engine clips, over all parameters
        self.accelerator.unscale_gradients()
        total = torch.zeros((), dtype=torch.float64)
        for role in ROLES:
            parameters = [p for p in getattr(self._unwrapped(), role).parameters() if p.grad is not None]
            if parameters:
                norm: Any = nn.utils.clip_grad_norm_(parameters, self.args.max_grad_norm)
                norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
                self._step_metrics[f"{role}/grad_norm"].append(norm.item())
                total += norm.double().cpu() ** 2
        return total.sqrt()

    # Evaluation

    def evaluate(self, *args: Any, stage: str | None = None, **kwargs: Any) -> dict[str, float]:
        """Evaluate on the dev split and add the result to `evaluation/summary.json`.

        Args:
            stage: its name there; `iteration-<t>` after the t iterations done so far, unless told.

        Returns:
            The split's means as `eval_<metric>`: percent, and nats for log-probabilities.
        """
        assert self.eval_questions is not None
        stage = stage or f"iteration-{self.schedule.iteration(self.state.global_step)}"
        with self.clock.phase("evaluation"):
            summary = evaluate_stage(
                self._pipeline,
                self.eval_questions,
                stage=stage,
                split=self.eval_split,
                output_dir=self.run_dir,
                likelihood=self.args.answer_likelihood,
                aliases=self.args.answer_aliases,
            )
        self.stages = with_stage(self.stages, summary)
        return self._report(summary)

    def evaluate_initially(self) -> None:
        """Evaluate before the first iteration, unless a run killed since then already has."""
        known = [stage for stage in self.stages if stage["stage"] == self.initial_stage]
        if known:
            self._report(known[0])
        else:
            self.evaluate(stage=self.initial_stage)

    def _report(self, summary: dict[str, Any]) -> dict[str, float]:
        metrics = {f"eval_{name}": value for name, value in summary.items() if isinstance(value, int | float)}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def stalled(self) -> bool:
        """Whether the dev metric has not improved for `early_stopping_patience` evaluations."""
        patience, metric = self.args.early_stopping_patience, self.args.metric_for_best_model
        if patience is None or metric is None:
            return False
        sign = 1 if self.args.greater_is_better else -1
        counts = [stage for stage in self.stages if stage["stage"].startswith(("iteration-", self.initial_stage))]
        values = [sign * stage[metric] for stage in counts]
        best = max(range(len(values)), key=values.__getitem__, default=0)
        return len(values) - 1 - best >= patience

    # Logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the step's metrics, averaged over micro-batches and processes, and the seconds that each phase took."""
        if "loss" in logs:
            merged: dict[str, list[float]] = defaultdict(list)
            for local in gather_object([dict(self._step_metrics)]):
                for name, values in local.items():
                    merged[name] += values
            for name, values in merged.items():
                known = [value for value in values if value == value]
                if known:
                    logs[name] = max(known) if name.endswith("_max") else sum(known) / len(known)
            for role, rate in self._learning_rates().items():
                logs[f"{role}/learning_rate"] = rate
            logs.update(rates(self.clock.flush(), self.peak_flops))
            self._step_metrics.clear()
        super().log(logs, start_time)

    def phases(self) -> dict[str, Phase]:
        """Seconds, tokens and operations of each phase on this process, since the trainer was made."""
        self.clock.flush()
        return dict(self.clock.total)

    def _learning_rates(self) -> dict[Role, float]:
        """Each training model's current learning rate: the first group of each is its own."""
        assert self.lr_scheduler is not None
        rates = self.lr_scheduler.get_last_lr()
        return {role: float(rates[self._group_roles.index(role)]) for role in dict.fromkeys(self._group_roles)}

    # Checkpoints: whole or absent, and enough to go on bit for bit

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, from the start or from a checkpoint of this run."""
        if self.is_world_process_zero():
            self.checkpoints.restore_logs(Path(str(resume_from_checkpoint)) if resume_from_checkpoint else None)
        self.accelerator.wait_for_everyone()
        self.stages = broadcast_object_list([read_stages(self.run_dir)])[0]
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        self.rollouts.close()
        if isinstance(self._vllm, ServerEngine):
            self._vllm.remove_weights()
        return result

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        cast(dict[str, Any], self.state.stateful_callbacks)["TrainerControl"] = self.control.state()
        with self.checkpoints.written(self.state, self.stages) as folder, self.clock.phase("checkpoint"):
            self.save_model(str(folder), _internal_call=True)
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write `selector/` and `generator/`: to go on from (within a checkpoint), or to serve, with their prompts."""
        folder = Path(output_dir or self.run_dir)
        state = self._gathered_state()
        if not self.args.should_save:
            return
        for role in ROLES:
            own = _of_role(role, state)
            model, prompter = getattr(self._unwrapped(), role), self.prompters[role]
            if _internal_call:
                save_role(model, prompter.tokenizer, folder / role, own)
            else:
                export_role(model, prompter.tokenizer, folder / role, own, extra={PROMPT: prompter.source})
        if not _internal_call:
            save_settings(folder, self.pipeline_settings())

    def _gathered_state(self) -> dict[str, Tensor] | None:
        """The whole state of a sharded model, where this process writes files; None for one that is not sharded."""
        if self.is_fsdp_enabled:
            return self.accelerator.get_state_dict(self.model)
        return self.accelerator.get_state_dict(self.model_wrapped) if self.is_deepspeed_enabled else None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._vllm is not None:
            self._vllm.forget()
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        for role in ROLES:
            load_role(getattr(self._unwrapped(), role), Path(resume_from_checkpoint) / role)

    def _load_best_model(self) -> None:
        """Go back to the best evaluated iteration."""
        best = self.state.best_model_checkpoint
        assert best is not None
        if self.is_deepspeed_enabled:
            self.model_wrapped.load_checkpoint(best, load_optimizer_states=False, load_lr_scheduler_states=False)
        else:
            self._load_from_checkpoint(best, self.model_wrapped)

    def pipeline_settings(self) -> PipelineSettings:
        """What serving needs to know."""
        return PipelineSettings.of(self.args, self.prompters["selector"].chat_template_kwargs)


def _of_role(role: Role, state: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    """One role's part of a gathered state, under the role's own names."""
    return state and {name.removeprefix(f"{role}."): v for name, v in state.items() if name.startswith(f"{role}.")}


class _Iterations(TrainerCallback):
    """Evaluates before the first iteration and after each, saves, and stops when dev no longer improves.

    Times the optimizer too: only callbacks stand on both sides of it.
    """

    def __init__(self, trainer: DROTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0 and self.trainer.eval_questions is not None:
            self.trainer.evaluate_initially()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.clock.switch("optimizer")

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.clock.switch("other")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        done, within = divmod(state.global_step, self.trainer.schedule.steps_per_iteration)
        last = state.global_step == state.max_steps
        if last or (within == 0 and done % self.trainer.args.eval_iterations == 0):
            control.should_evaluate = self.trainer.eval_questions is not None
            control.should_save = True
        return control

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if state.global_step and self.trainer.stalled():
            control.should_training_stop = True
        return control
