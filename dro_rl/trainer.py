"""`DROTrainer`: the loop. E-step when an iteration begins, M-step on its rollouts, evaluate and save when it ends.

The stock Trainer does the rest: distribution, precision, accumulation, optimizer, scheduler, logging. What is computed
stands in `objective`, `likelihood` and `rollouts`; what stands here is when, and on which process.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl.trainer.base_trainer import _BaseTrainer

from dro_rl import engines
from dro_rl.config import DROConfig
from dro_rl.em.best import ranked, stalled
from dro_rl.em.boundaries import Boundaries
from dro_rl.em.checkpoints import Checkpoints
from dro_rl.em.e_step import EStep
from dro_rl.em.fast_path import FastPath
from dro_rl.em.finite import largest, refuse_nonfinite, refuse_nonfinite_rollouts
from dro_rl.em.iteration import Iterations, Rollouts
from dro_rl.em.m_step import MicroBatch
from dro_rl.em.memory import KEYS, TOKENS, GiveBack, held, out_of_memory, to_come
from dro_rl.em.method import Method
from dro_rl.em.mismatch import EngineMismatch
from dro_rl.em.optimizer import align, clip, parameter_groups, role_factors
from dro_rl.em.passes import Passes, accumulating
from dro_rl.em.progress import LineProgress, SignalWatch, say_at_the_start
from dro_rl.em.schedule import Schedule, Slots, SlotSampler, fuses
from dro_rl.em.timing import PhaseClock, flops_per_token, peak_flops, rates
from dro_rl.engines.protocol import TrainedSelector
from dro_rl.errors import InputError, is_out_of_memory
from dro_rl.evaluation.evaluator import evaluate_stage, evaluated_before
from dro_rl.evaluation.results import UNITS
from dro_rl.evaluation.stages import FINAL, means_of, with_stage
from dro_rl.likelihood.prefill import Prefills
from dro_rl.likelihood.room import Room
from dro_rl.models.module import SelectorGenerator
from dro_rl.models.offloading import offloading
from dro_rl.models.saving import export_role, load_role, of_role, save_role
from dro_rl.models.sharding import inference
from dro_rl.pipeline import PROMPT, PipelineSettings, RAGPipeline, save_settings
from dro_rl.processes import told_by_main
from dro_rl.prompts import Prompter
from dro_rl.records import Question, Rollout
from dro_rl.roles import POLICIES, ROLES, Role
from dro_rl.rollouts.diagnostics import Summary, columns, logged, summarize
from dro_rl.runs import step_of

logger = logging.getLogger(__name__)


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
        args.check_batch(args.world_size, len(train_questions))
        self.train_questions, self.eval_questions = train_questions, eval_questions
        self.prompters, self.eval_split, self.initial_stage = dict(prompters), eval_split, initial_stage
        self.schedule = Schedule.of(args, args.world_size, len(train_questions))
        args.num_train_epochs = 1  # one pass over the schedule, which holds every iteration
        args.ddp_find_unused_parameters = args.interleave == "alternate"
        for role in args.roles:
            if args.role_learning_rate(role) == 0:
                model.freeze(role)
        self.method = Method.of(args)
        self._rollouts: Rollouts | None = None
        self._done: dict[int, Rollout] = {}  # by slot, those of the step that have been through the models here
        self._slots: list[Sequence[int]] = []  # of the step, as the Trainer has handed them out so far
        self._group_roles: list[Role] = []  # whose each group of the optimizer is
        self._step_metrics: dict[str, list[float]] = defaultdict(list)
        self._losses: dict[str, float] = defaultdict(float)
        self._skipped = 0  # tokens of the selector's rows in the step that would have taught it nothing
        self._mismatch = EngineMismatch(self.method.sampling)
        self._drops_out = model.drops_out
        self._flops = {role: flops_per_token(getattr(model, role)) for role in args.roles}
        self.peak_flops = peak_flops(args.device)
        self.clock = PhaseClock(args.device)
        say_at_the_start(args, train_questions)
        slots = Slots(self.schedule)
        super().__init__(model=model, args=args, data_collator=list, train_dataset=slots, callbacks=callbacks)
        self.add_callback(Boundaries(self, args.eval_iterations))
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        metric = None if args.metric_for_best_model in UNITS else args.metric_for_best_model
        self.signals = SignalWatch(self.schedule, self.run_dir, metric, speaks=self.is_world_process_zero())
        self.add_callback(self.signals)
        self.add_callback(LineProgress(self.schedule, self.signals))
        self.add_callback(GiveBack())
        self.reference = reference.to(self.accelerator.device).eval() if reference is not None else None
        self.stages: list[dict[str, Any]] = []
        self._kept_step: int | None = None  # whose weights were gone back to
        self.checkpoints = Checkpoints(
            self.run_dir,
            self.schedule,
            args.save_total_limit,
            keep_last_iteration=args.duplicate_threshold is not None,
            sample_again=self.fused,
        )
        self.fast_path = FastPath(
            args, self._module, self._open, sharded=self.is_fsdp_enabled or self.is_deepspeed_enabled
        )
        room = Room(args.tokens_per_microbatch)
        self.prefills = Prefills(room, wanted=self.fused and args.reuses_sampling and not self.fast_path.sharded)
        self.offloading = offloading(self._unwrapped()) if args.activation_offloading else nullcontext()
        self.passes = Passes(
            self.schedule, train_questions, self.prompters, self.method, self.fast_path, room, self.prefills,
            self._unwrapped, lambda: to_come(self.optimizer, args.optim), self.offloading, self.accelerator, self.clock,
        )  # fmt: skip
        generator, updates = self._trained("generator"), partial(self._updates, "generator")
        self.engine = engines.start(args, self._trained("selector"), generator)
        self.answerer = engines.answerer(args, generator, updates, room, self.engine)
        opened = self._open_reference if self.reference is not None else None
        flops = {role: each.forward for role, each in self._flops.items()}
        told = (self.prompters, self.method, self.clock, flops, self.answerer, room)
        e_step = EStep(self.engine, self._open, opened, *told)
        self.iterations = Iterations(self.schedule, train_questions, e_step, self.run_dir, args, fused=self.fused)
        self._pipeline = RAGPipeline(
            self._open,
            self.prompters,
            self.pipeline_settings(),
            batch_size=args.per_device_eval_batch_size,
            shared_prefix=args.scoring.shared_prefix,
            answerer=None if args.generator_endpoint is None else self.answerer,
        )

    @property
    def run_dir(self) -> Path:
        """Where the run leaves its files."""
        return Path(str(self.args.output_dir))

    def _send_telemetry(self) -> None:
        """Nothing is reported to anyone."""

    # The loop: E-step, M-step, and at the end of a step what it was. `Boundaries` evaluates and saves.

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One of the Trainer's micro-batches: some slots of the step's rollouts."""
        step = self.state.global_step
        rollouts = self.e_step(step)
        loss = self.m_step(model, rollouts, inputs)
        if self.accelerator.sync_gradients:
            self.end_step(step, rollouts)
        return loss

    def e_step(self, step: int) -> Rollouts:
        """The rollouts of the step's iteration: sampled, scored and weighed when it begins."""
        iteration = self.schedule.iteration(step)
        if self._rollouts is None or self._rollouts.iteration != iteration:
            self._rollouts = self.iterations.begin(iteration, self._updates("selector"), self._rollouts)
        return self._rollouts

    def m_step(self, model: nn.Module, rollouts: Rollouts, slots: Sequence[int]) -> Tensor:
        """Forward and backward of both models over some rollouts, in passes that `tokens_per_microbatch` has room for.

        Where `auto` has overestimated that, the step begins again with smaller ones.

        Returns:
            Their loss, detached.
        """
        self._slots.append(slots)
        todo = [slots]
        while True:
            try:
                return [self._pass_through(model, rollouts, each) for each in todo][-1]
            except Exception as error:
                if not (is_out_of_memory(error) and self.passes.can_lower):
                    raise
            model.zero_grad()
            self.passes.lower()  # when nothing holds the failed pass any more
            self._losses.clear()
            self._done.clear()
            self._skipped, todo = 0, [*self._slots]
            self.clock.switch("other")

    def _pass_through(self, model: nn.Module, rollouts: Rollouts, slots: Sequence[int]) -> Tensor:
        loss = torch.zeros((), device=self.args.device)
        micro_batches = self._micro_batches(rollouts, slots)
        for micro_batch in micro_batches:
            last = micro_batch is micro_batches[-1]
            more = nullcontext() if last else accumulating(self.accelerator, model, sharded=self.is_fsdp_enabled)
            with self.offloading, more:
                before = self.clock.switch("other")
                loss += super().training_step(model, cast(Any, micro_batch))
                self.clock.switch(before)
        done = (rollout for micro_batch in micro_batches for rollout in micro_batch.rollouts)
        self._done.update(zip(slots, cast(Iterator[Rollout], done), strict=True))
        return loss

    def end_step(self, step: int, rollouts: Rollouts) -> None:
        """What the step's forward passes made of its rollouts: shared, written, measured."""
        for name, value in self._losses.items():
            self._step_metrics[name].append(value / self.current_gradient_accumulation_steps)
        self._losses.clear()
        self._slots.clear()
        self._step_metrics["selector/tokens_skipped"].append(float(self._skipped))
        self._skipped = 0
        if not rollouts.weighed:
            self._rollouts = rollouts = self.iterations.weighed(rollouts, self._done)
        self._done.clear()
        groups = rollouts.at(self.schedule.positions(step))
        drawn = [rollout for group in groups for rollout in group]
        refuse_nonfinite_rollouts(drawn, self.args.roles, step, self.run_dir)
        metrics = logged(self._summarize(groups))
        if not rollouts.on_policy:
            metrics |= self._mismatch.of_rollouts(drawn, stale=rollouts.staleness > 0)
        if self.args.overlap_rollouts:
            metrics["sampling/staleness"] = rollouts.staleness
        if self.schedule.ends_iteration(step):
            ended = self._summarize(rollouts.at(range(len(rollouts.groups))))
            metrics |= self.signals.end_iteration(rollouts.iteration + 1, ended, self._mismatch.a_token)
        self._note(metrics)

    def _note(self, metrics: Mapping[str, float]) -> None:
        """For the step's log."""
        for name, value in metrics.items():
            self._step_metrics[name].append(value)

    def _summarize(self, groups: Sequence[Sequence[Rollout]]) -> Summary:
        rule = self.method.weighting
        return summarize(
            columns(groups, self.train_questions), max_log_ratio=rule.max_log_ratio, min_weight=rule.min_weight
        )

    # The E-step's models

    @property
    def fused(self) -> bool:
        """Whether one forward pass gives likelihoods, weights and losses."""
        return fuses(self.args, self.schedule, drops_out=self._drops_out)

    @contextmanager
    def _open(self, role: Role) -> Iterator[Any]:
        with inference(self._unwrapped(), self.model_wrapped, role, self.accelerator) as model:
            yield model

    @contextmanager
    def _open_reference(self) -> Iterator[Any]:
        with torch.no_grad(), self.accelerator.autocast():
            yield self.reference

    def _unwrapped(self) -> SelectorGenerator:
        return self.accelerator.unwrap_model(self.model)

    def _module(self, role: Role) -> Any:
        return getattr(self._unwrapped(), role)

    def _trained(self, role: Role) -> TrainedSelector:
        """A role, as an engine may ask for it."""
        opened, module, save = partial(self._open, role), partial(self._module, role), partial(self._save_served, role)
        kept = self.prefills if role in POLICIES else None
        return TrainedSelector(opened, module, save, self.prompters[role], self.accelerator, self.run_dir, kept)

    def _save_served(self, role: Role, folder: Path) -> None:
        """Write a role to be read by a server."""
        state = self._gathered_state()
        if self.is_world_process_zero():
            export_role(self._module(role), self.prompters[role].tokenizer, folder, of_role(role, state))

    def _updates(self, role: Role) -> int:
        """How many a role has had."""
        return self.state.global_step if self.args.role_learning_rate(role) else 0

    # The M-step's passes

    def _get_train_sampler(self, train_dataset: Any = None) -> SlotSampler:
        most = self.args.max_steps if self.args.max_steps > 0 else None
        return SlotSampler(self.schedule, steps=0 if self.stalled() else most)

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Nothing to move: rows become tensors where they are scored."""
        return inputs

    def _active(self) -> list[Role]:
        """The roles that move in the current step."""
        training = [role for role in ROLES if self.args.role_learning_rate(role) > 0]
        if self.args.interleave == "joint":
            return training
        turn = self.state.global_step % (self.args.selector_steps + self.args.generator_steps)
        return ["selector" if turn < self.args.selector_steps else "generator"]

    def _micro_batches(self, rollouts: Rollouts, slots: Sequence[int]) -> list[MicroBatch]:
        unmoved = self.schedule.begins_iteration(self.state.global_step) and not self._drops_out
        with self.clock.phase("inputs"):
            return self.passes.of(rollouts, slots, self._active(), unmoved=unmoved)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Both losses, as means over questions: a micro-batch sums over its share of the step's questions."""
        micro_batch: MicroBatch = inputs
        for role in micro_batch.roles:
            with self.clock.phase("verification"), self.accelerator.autocast():
                self.fast_path.verify(role, micro_batch.all_rows(role))
        scoring, prefills = self.method.scoring, self.prefills
        output = model(batch=micro_batch, scoring=scoring, switch=self.clock.switch, prefills=prefills)
        for role, tokens in micro_batch.tokens.items():
            read = prefills.used * self._flops[role].forward if role in POLICIES else 0.0  # while sampling
            self.clock.count(role, tokens, tokens * self._flops[role].step - read)
        self._skipped += micro_batch.tokens_skipped
        losses = {role: loss / self.args.questions_per_batch for role, loss in output.losses.items()}
        for role, loss in losses.items():
            self._losses[f"{role}/loss"] += (value := loss.item())
            self._refuse_nonfinite(value, "the loss", role)
        self._note(self._mismatch.of_pass(micro_batch, output.logps.get("selector")))
        loss = torch.stack(list(losses.values())).sum()
        return (loss, output) if return_outputs else loss

    # The optimizer: a learning rate and a clip for each model

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One optimizer with a parameter group (two, with weight decay) for each model that trains."""
        model = model or self.model
        assert model is not None
        if self.optimizer is None:
            decayed = set(self.get_decay_parameter_names(model))
            rates = {role: self.args.role_learning_rate(role) for role in ROLES}
            groups, self._group_roles = parameter_groups(model, rates, decayed, self.args.weight_decay)
            optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, cast(Any, model))
            self.optimizer = optimizer(groups, **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Each model's own schedule, so that an absolute floor is the same for both."""
        optimizer = optimizer or self.optimizer
        assert optimizer is not None
        if self.lr_scheduler is None:
            factors = role_factors(self.args, [group["lr"] for group in optimizer.param_groups], num_training_steps)
            self.lr_scheduler, self._created_lr_scheduler = LambdaLR(optimizer, factors), True
        return self.lr_scheduler

    def _clip_grad_norm(self, model: nn.Module) -> Tensor | float | None:
        """Clip each model's gradient on its own, and stop where it is not finite."""
        with self.clock.phase("optimizer"):
            if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
                return super()._clip_grad_norm(model)  # the engine clips, over all parameters
            self.accelerator.unscale_gradients()
            norms = {role: clip(self._module(role), self.args.max_grad_norm) for role in self.args.roles}
        for role, norm in norms.items():
            if norm is not None:
                self._step_metrics[f"{role}/grad_norm"].append(norm)
                if self.accelerator.scaler is None:  # which takes no step with such a gradient, and lowers its scale
                    self._refuse_nonfinite(norm, "the gradient's norm", role)
        return sum(norm**2 for norm in norms.values() if norm is not None) ** 0.5

    def check_weights(self, *, moved: bool = False) -> None:
        """Raise `InputError` where a model holds a number that is not finite; with `moved`, of weights that train."""
        for role in self.args.roles:
            weights = (weight for weight in self._module(role).parameters() if weight.requires_grad or not moved)
            self._refuse_nonfinite(largest(weights), "a weight", role)

    def _refuse_nonfinite(self, value: float, what: str, role: Role) -> None:
        refuse_nonfinite(value, what, role, self.state.global_step, self.run_dir)

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
        """Evaluate what the run starts from, unless one killed since then already has, and keep it."""
        known = [stage for stage in self.stages if stage["stage"] == self.initial_stage]
        metrics = self._report(known[0]) if known else self.evaluate(stage=self.initial_stage)
        if self.args.load_best_model_at_end:
            self._determine_best_metric(metrics, None)
            self._save_checkpoint(cast(nn.Module, self.model), None)

    def evaluate_kept(self) -> dict[str, float]:
        """The stage `final`: the weights that are kept. Those gone back to are evaluated as they were loaded; the last
        ones are, unless they have been since the last step."""
        evaluated = self._kept_step is None and any(stage["stage"] == self.kept_stage for stage in self.stages)
        summary = evaluated_before(self.run_dir, self.kept_stage, FINAL) if evaluated else None
        if summary is None:
            return self.evaluate(stage=FINAL)
        self.stages = with_stage(self.stages, summary)
        return means_of(summary)

    def _report(self, summary: dict[str, Any]) -> dict[str, float]:
        metrics = means_of(summary)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _ranked(self) -> list[int]:
        metric = str(self.args.metric_for_best_model)
        return ranked(self.state.log_history, metric, bool(self.args.greater_is_better))

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Keep in mind which step is the best so far, the start among them. Returns whether it is this one."""
        best = self._ranked()[0]
        if best == self.state.global_step:
            self.state.best_global_step = best
            self.state.best_metric = metrics[f"eval_{self.args.metric_for_best_model}"]
        return best == self.state.global_step

    @property
    def kept_stage(self) -> str:
        """The stage whose weights the models have."""
        step = self.state.global_step if self._kept_step is None else self._kept_step
        return f"iteration-{self.schedule.iteration(step)}" if step else self.initial_stage

    def stalled(self) -> bool:
        """Whether the dev metric has not improved for `early_stopping_patience` evaluations."""
        metric = str(self.args.metric_for_best_model)
        counts = [stage for stage in self.stages if stage["stage"].startswith(("iteration-", self.initial_stage))]
        values = [stage[metric] for stage in counts]
        return stalled(values, self.args.early_stopping_patience, bool(self.args.greater_is_better))

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

    def _learning_rates(self) -> dict[Role, float]:
        """Each training model's current learning rate: the first group of each is its own."""
        rates = cast(Any, self.lr_scheduler).get_last_lr()
        return {role: float(rates[self._group_roles.index(role)]) for role in dict.fromkeys(self._group_roles)}

    # Checkpoints: whole or absent, and enough to go on bit for bit

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, from the start or from a checkpoint of this run."""
        checkpoint = Path(str(resume_from_checkpoint)) if resume_from_checkpoint else None
        self.stages = told_by_main(lambda: self.checkpoints.restore_logs(checkpoint))
        if checkpoint is not None and self.stalled():
            logger.info("the run has stopped early and stays so; a higher early_stopping_patience would go on")
        # Told to keep one, the stock loop ends by deleting all but the best: what a longer run goes on from.
        kept, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            result = super().train(resume_from_checkpoint, *args, **kwargs)
        except Exception as error:
            if is_out_of_memory(error):
                raise self._out_of_memory(error) from None
            raise
        finally:
            self.args.save_total_limit = kept
        self.iterations.close()
        return result

    def _out_of_memory(self, error: Exception) -> InputError:
        phase = self.clock.failed or self.clock.now
        holders = held(
            {role: self._module(role) for role in self.args.roles} | {"reference": self.reference}, self.optimizer
        )
        return out_of_memory(error, phase, getattr(self.args, KEYS.get(phase, TOKENS)), holders, self.passes.room.alone)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        written = self.checkpoints.written(self.state, self.control, self.stages)
        with written as folder, self.clock.phase("checkpoint"):
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
        for role in self.args.roles:
            own = of_role(role, state)
            model, prompter = getattr(self._unwrapped(), role), self.prompters[role]
            if _internal_call:
                save_role(model, prompter.tokenizer, folder / role, own)
            else:
                extra, ends, merged = {PROMPT: prompter.source}, prompter.ends.stops, self.args.save_merged
                export_role(model, prompter.tokenizer, folder / role, own, extra, merged=merged, ends=ends)
        if not _internal_call:
            save_settings(folder, self.pipeline_settings(), self.prompters["generator"])

    def _gathered_state(self) -> dict[str, Tensor] | None:
        """The whole state of a sharded model, where this process writes files; None for one that is not sharded."""
        if self.is_fsdp_enabled:
            return self.accelerator.get_state_dict(self.model)
        return self.accelerator.get_state_dict(self.model_wrapped) if self.is_deepspeed_enabled else None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.engine.forget()
        self.answerer.forget()
        self._rollouts = None
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        for role in self.args.roles:
            load_role(getattr(self._unwrapped(), role), Path(resume_from_checkpoint) / role)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and align(self.lr_scheduler):
            logger.warning(
                f"the run ends at step {self.state.max_steps} now, and the schedule of its learning rates with it: "
                f"from step {self.state.global_step} on they are those of a run of this length"
            )

    def _load_best_model(self) -> None:
        """Go back to the best of the start and the evaluated iterations whose checkpoint is whole."""
        best = told_by_main(lambda: self.checkpoints.best_whole(self._ranked()))
        self.state.best_model_checkpoint = None if best is None else str(best)
        if best is None:
            logger.warning("no checkpoint of an evaluated iteration is whole: the last weights are kept")
            return
        self._kept_step = step_of(best)
        if self.is_deepspeed_enabled:
            self.model_wrapped.load_checkpoint(best, load_optimizer_states=False, load_lr_scheduler_states=False)
        else:
            self._load_from_checkpoint(str(best), self.model_wrapped)

    def pipeline_settings(self) -> PipelineSettings:
        """What serving needs to know."""
        return PipelineSettings.of(self.args, self.prompters["selector"].chat_template_kwargs)
