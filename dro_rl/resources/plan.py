"""The plan of a run: what it does, what it takes on each device, whether that fits, and which keys to turn if not."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from dro_rl.em.schedule import Schedule, fuses
from dro_rl.engines.vllm_common import cpu_cache_bytes, engine_length
from dro_rl.engines.vllm_start import have_one_engine
from dro_rl.errors import InputError
from dro_rl.job.assembly import build_prompters
from dro_rl.job.model_checks import without_weights
from dro_rl.job.preflight import check_questions, check_steps, disk_of, read_splits
from dro_rl.job.prompt_checks import check_prompts
from dro_rl.likelihood.prefill import WORTH_KEEPING
from dro_rl.models.loading import check_model
from dro_rl.recipe import Recipe, load_recipe
from dro_rl.resources.calibration import Calibration, Clock, calibrate, seconds
from dro_rl.resources.costs import Counts, Done, by_card, operations
from dro_rl.resources.machine import Machine, Sharding
from dro_rl.resources.memory import CONTEXT, Phase, Settings, peak, phases
from dro_rl.resources.models import RoleSize, size_of
from dro_rl.resources.work import Rows, Work, quoted_of, rows_of, windows_of, work_of
from dro_rl.roles import ROLES, Role


@dataclass(frozen=True)
class Advice:
    """What would make a run fit.

    Args:
        changes: recipe keys with other values, and `--sharding`.
        memory: bytes of the fullest phase with all of them.
        fits: whether that is enough.
    """

    changes: Mapping[str, Any]
    memory: float
    fits: bool


@dataclass(frozen=True)
class Plan:
    """What a run will do and take.

    Args:
        machine: the devices it is for.
        sharding: how their processes share the models.
        precision: what is computed in.
        counts: how often it does what.
        rollouts: samples over the run, at most: it may stop early.
        sizes: both models.
        work: the tokens of a question.
        phases: bytes on one device, by what the run does.
        fits: whether the fullest phase has room.
        advice: what would make it fit; None where it does.
        disk: bytes of checkpoints and models.
        done: operations and seconds by phase, on all devices.
        calibration: what a short run took here; None without one.
    """

    machine: Machine
    sharding: Sharding
    precision: str
    counts: Counts
    rollouts: int
    sizes: Mapping[Role, RoleSize]
    work: Work
    phases: Sequence[Phase]
    fits: bool
    advice: Advice | None
    disk: int
    done: Sequence[Done]
    calibration: Calibration | None

    @property
    def peak(self) -> Phase:
        """The fullest phase."""
        return peak(self.phases)

    @property
    def seconds(self) -> float | None:
        """Of the whole run; None where a phase's cannot be told."""
        known = [each.seconds for each in self.done]
        return None if None in known else sum(value for value in known if value is not None)


def make_plan(
    recipe: Recipe,
    machine: Machine,
    sharding: Sharding | None = None,
    *,
    calibrated: bool = False,
    clock: Clock = "wall",
) -> Plan:
    """Plan a recipe.

    Args:
        recipe: the recipe.
        machine: what it would run on.
        sharding: how processes share the models; None: not at all, or copies of both for several devices.
        calibrated: whether a few iterations are run, here, to tell the time.
        clock: whose seconds are told.

    Raises:
        InputError: its questions, its models or the combination is wrong.
    """
    sharding = sharding or ("ddp" if machine.devices > 1 else "none")
    if machine.devices == 1 and sharding not in ("none", "ddp"):
        raise InputError("--sharding", sharding, "several devices share models, and there is one", "Leave it out.")
    if calibrated and not (machine.here and machine.devices == 1):
        raise InputError(
            "--calibrate",
            True,
            "time is measured on one device of this machine",
            "Leave it out, or plan for one device, without --card of another.",
        )
    for role in recipe.training.roles:
        asked = recipe.run.of(role)
        place, trust = f"{role}_model_name_or_path", recipe.run.trust_remote_code
        check_model(asked.model, place, revision=asked.revision, trust_remote_code=trust)
    train, dev = read_splits(recipe)
    training = recipe.training
    training.check_batch(machine.devices, len(train))
    schedule = Schedule.of(training, machine.devices, len(train))
    check_steps(training, schedule)
    check_questions(recipe, train, dev)
    prompters = build_prompters(recipe)
    check_prompts(recipe, [*train, *dev], prompters)
    rows, windows = rows_of(training, train, prompters), windows_of(training, train)
    quoted = quoted_of(recipe, train, prompters["selector"])
    planner = _Planner(machine, rows, windows, quoted, len(train), psutil.Process().memory_info().rss)
    sizes, work, found = planner.at(recipe, sharding)
    counts = _counts(recipe, schedule, len(train), len(dev), machine.devices)
    scores, reuses = planner.scores(recipe, sizes), planner.reuses(recipe, sizes, work)
    recomputes = bool(training.gradient_checkpointing)
    done = operations(sizes, work, counts, scores=scores, reuses=reuses, recomputes=recomputes)
    measured = None
    if calibrated:
        steps, per_step = schedule.steps_per_iteration, schedule.questions_per_step
        measured = calibrate(recipe.values, steps, per_step, clock)
        done = seconds(done, measured, counts)
    else:
        done = by_card(done, sizes, work, counts, machine, training.per_device_eval_batch_size)
    fits = peak(found).total <= machine.memory_of_a_process
    return Plan(
        machine=machine,
        sharding=sharding,
        precision=planner.precision(recipe),
        counts=counts,
        rollouts=counts.sampled * schedule.num_generations,
        sizes=sizes,
        work=work,
        phases=found,
        fits=fits,
        advice=None if fits else planner.advice(recipe, sharding),
        disk=disk_of(recipe, {role: without_weights(recipe.run, role) for role in sizes}),
        done=done,
        calibration=measured,
    )


def _counts(recipe: Recipe, schedule: Schedule, questions: int, dev: int, devices: int) -> Counts:
    run, training = recipe.run, recipe.training
    steps = schedule.steps(training.max_steps)
    iterations = schedule.iterations(steps)
    boundaries = math.ceil(iterations / training.eval_iterations)
    every = training.save_steps * steps if 0 < training.save_steps < 1 else training.save_steps
    batch = run.warmup_questions * devices
    asked = {role: run.of(role).warmup_steps for role in ROLES if run.of(role).warms}
    return Counts(
        schedule=schedule,
        steps=steps,
        iterations=iterations,
        evaluations=boundaries + 2 + bool(asked),  # before the first iteration, after the last, and of the bare models
        dev=dev,
        checkpoints=boundaries + bool(training.load_best_model_at_end) + (int(steps / every) if every else 0),
        warmup_steps={role: steps if steps > 0 else math.ceil(questions / batch) for role, steps in asked.items()},
        warmup_batch=batch,
    )


class _Planner:
    """Memory of a recipe and of what it could be changed to, over the same questions.

    Args:
        machine: what it is for.
        rows: of some questions.
        windows: that a question's candidates are shown in.
        quoted: tokens of conversations of the selector's warm-up, if it has them.
        questions: of the training set.
        resident: bytes of this process, which has imported what a job imports and read what it reads.
    """

    def __init__(
        self,
        machine: Machine,
        rows: Sequence[Rows],
        windows: float,
        quoted: Sequence[int],
        questions: int,
        resident: int,
    ) -> None:
        self.machine, self.rows, self.windows, self.quoted, self.questions = machine, rows, windows, quoted, questions
        self.process = resident if machine.kind == "cpu" else CONTEXT
        self._sizes: dict[Any, RoleSize] = {}

    def precision(self, recipe: Recipe) -> str:
        """What is computed in, on the machine that is planned for."""
        given, training = recipe.values["bf16"], recipe.training
        if training.fp16:
            return "float16"
        bf16 = given if given is not None else self.machine.kind == "cuda"
        return "bfloat16" if bf16 else str(recipe.run.dtype)

    def at(self, recipe: Recipe, sharding: Sharding) -> tuple[dict[Role, RoleSize], Work, list[Phase]]:
        """Models, work and memory of a recipe."""
        sizes = {role: self._size(recipe, role) for role in recipe.training.roles}
        packed = {role: size.packed for role, size in sizes.items()}
        work = work_of(recipe.training, self.rows, packed, self.windows, self.quoted)
        return sizes, work, phases(self._settings(recipe, sharding, sizes, work), sizes, work)

    def scores(self, recipe: Recipe, sizes: Mapping[Role, RoleSize]) -> bool:
        """Whether the E-step scores in passes of its own."""
        schedule = Schedule.of(recipe.training, self.machine.devices, self.questions)
        return not fuses(recipe.training, schedule, drops_out=any(each.drops_out for each in sizes.values()))

    def reuses(self, recipe: Recipe, sizes: Mapping[Role, RoleSize], work: Work) -> bool:
        """Whether the pass over the prompts that samples is the one that trains."""
        alone = self.machine.devices == 1 and work.passes == 1
        keeps = sizes["selector"].packed and work.prompt >= WORTH_KEEPING
        return recipe.training.reuses_sampling and alone and keeps and not self.scores(recipe, sizes)

    def advice(self, recipe: Recipe, sharding: Sharding) -> Advice:
        """The first single change that makes it fit, else the changes that come nearest to it together."""
        room = self.machine.memory_of_a_process
        changes = list(self._changes(recipe, sharding))
        for change in changes:
            if (taken := self._peak(recipe, sharding, change)) <= room:
                return Advice(change, taken, True)
        together: dict[str, Any] = {}
        lowest = self._peak(recipe, sharding, {})
        for change in changes:
            taken = self._peak(recipe, sharding, together | change)
            if taken < lowest:
                together, lowest = together | change, taken
            if lowest <= room:
                break
        return Advice(together, lowest, lowest <= room)

    def _changes(self, recipe: Recipe, sharding: Sharding) -> Iterator[dict[str, Any]]:
        """What takes less memory, the cheapest first."""
        training, run = recipe.training, recipe.run
        tokens = training.scoring.tokens // 2
        while tokens >= 1024:
            yield {"tokens_per_microbatch": tokens}
            tokens //= 2
        if run.warmup != "none" and run.warmup_batch_size > 1:
            yield {"warmup_batch_size": 1, "warmup_gradient_accumulation_steps": run.warmup_questions}
        if training.per_device_eval_batch_size > 1:
            yield {"per_device_eval_batch_size": 1}
        if not training.gradient_checkpointing:
            yield {"gradient_checkpointing": True}
        if self._engine(recipe) == "vllm" and training.vllm_mode == "colocate" and self.machine.kind == "cuda":
            yield {"vllm_gpu_memory_utilization": training.vllm_gpu_memory_utilization / 2}
            if torch.cuda.is_available() and not training.vllm_enable_sleep_mode:  # elsewhere the key is refused
                yield {"vllm_enable_sleep_mode": True}
        if self.machine.devices > 1 and sharding in ("none", "ddp"):
            yield {"--sharding": "fsdp2"}
        full = [role for role in training.roles if run.of(role).lora_r == 0 and training.role_learning_rate(role) > 0]
        if full:
            yield {f"{role}_lora_r": 16 for role in full}
            yield {f"{role}_lora_r": 16 for role in full} | {"dtype": "bfloat16"}

    def _peak(self, recipe: Recipe, sharding: Sharding, change: Mapping[str, Any]) -> float:
        keys = {key: value for key, value in change.items() if not key.startswith("--")}
        recipe = load_recipe(None, {**recipe.values, **keys})
        return peak(self.at(recipe, change.get("--sharding", sharding))[2]).total

    def _size(self, recipe: Recipe, role: Role) -> RoleSize:
        precision = self.precision(recipe)
        half = getattr(torch, precision) if precision in ("bfloat16", "float16") else None
        training, run = recipe.training, recipe.run
        key = (role, run.of(role), run.dtype, run.quantization, half, training.shared_prefix, training.prefix_tree)
        if key not in self._sizes:
            self._sizes[key] = size_of(recipe, role, half, [rows[role] for rows in self.rows])
        return self._sizes[key]

    def _engine(self, recipe: Recipe) -> str:
        training = recipe.training
        if self.machine.kind == "cpu" or training.rollout_engine != "auto" or training.vllm_mode == "server":
            return training.engine
        return "vllm" if importlib.util.find_spec("vllm") else "transformers"

    def _settings(self, recipe: Recipe, sharding: Sharding, sizes: Mapping[Role, RoleSize], work: Work) -> Settings:
        run, training = recipe.run, recipe.training
        engine, vllm = self._engine(recipe), 0.0
        if training.vllm_mode == "colocate":  # an engine of its own for each that samples, unless one has both
            roles = [
                *(["selector"] if engine == "vllm" else []),
                *(["generator"] if training.answer_engine == "vllm" else []),
            ]
            if len(roles) == 2 and have_one_engine(recipe, on_cpu=self.machine.kind == "cpu"):
                roles.pop()
            share, length = training.vllm_gpu_memory_utilization * self.machine.memory, engine_length(training, None)
            on_gpu = self.machine.kind == "cuda"
            vllm = sum(
                share if on_gpu else cpu_cache_bytes(size.cache_bytes, length) + size.weight_bytes
                for role, size in sizes.items()
                if role in roles
            )
        return Settings(
            devices=self.machine.devices,
            sharding=sharding,
            half=2 if self.precision(recipe) in ("bfloat16", "float16") else None,
            recomputes=bool(training.gradient_checkpointing),
            optim=str(getattr(training.optim, "value", training.optim)),
            accumulates=work.passes > 1,
            scores=self.scores(recipe, sizes),
            reuses=self.reuses(recipe, sizes, work),
            shares_base=run.share_base,
            reference=training.beta > 0,
            warms=tuple(role for role in ROLES if run.of(role).warms),
            warmup_batch=run.warmup_batch_size,
            engine=engine,
            sampled_at_once=min(training.per_device_eval_batch_size, training.questions_per_iteration or 10**9),
            num_generations=training.num_generations,
            decoded=training.max_completion_length,
            constrained=training.constrain_selection,
            vllm=vllm,
            vllm_sleeps=training.vllm_enable_sleep_mode,
            process=float(self.process),
        )
