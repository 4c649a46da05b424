"""A few iterations of a run, in a process of its own: how long its parts take here.

It is the job itself, on the recipe's models and questions, cut short and into a folder that is deleted.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import psutil
from transformers import set_seed

from dro_rl.em import timing
from dro_rl.job import preflight
from dro_rl.job.assembly import build_prompters, warm_up_models
from dro_rl.job.run import run_recipe
from dro_rl.recipe import load_recipe
from dro_rl.resources.costs import Counts, Done
from dro_rl.roles import ROLES, Role

STEPS = 6
"""Optimizer steps that are timed, or more where an iteration has more."""
EVALUATED = 64
"""Questions of the evaluation that is timed, at most."""
WARMUP = (2, 8)
"""Steps of the two warm-ups whose difference tells what a step takes."""
OF_AN_E_STEP = ("rollout", "scoring", "answers", "sync")
APART = ("evaluation", "checkpoint", "verification")
"""Phases that do not come with every step."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a short run took.

    Args:
        of_a_question: seconds of the E-step's phases, a question.
        of_a_step: seconds of the other phases, an optimizer step.
        evaluation: seconds a question of the dev split.
        checkpoint: seconds of one.
        warmup_step, warmup_start: seconds of a step of a role's warm-up, and of all else of it.
        rest: seconds before and after: imports, questions, models, verification, tables.
        steps: that were timed.
    """

    of_a_question: Mapping[str, float]
    of_a_step: Mapping[str, float]
    evaluation: float
    checkpoint: float
    warmup_step: Mapping[Role, float]
    warmup_start: Mapping[Role, float]
    rest: float
    steps: int


Clock = Literal["wall", "processor"]


def calibrate(
    recipe: Mapping[str, Any],
    steps_per_iteration: int,
    per_step: int,
    clock: Clock = "wall",
) -> Calibration:
    """Run the job shortly, by itself, and say what it took.

    Args:
        recipe: every key with its value.
        steps_per_iteration, per_step: of its schedule: optimizer steps, and the questions of one.
        clock: `processor` counts the processor's seconds, which other jobs on the machine disturb less.

    Raises:
        InputError: the job found its input wrong.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_short_run, dict(recipe), steps_per_iteration, per_step, clock).result()


def seconds(done: Sequence[Done], measured: Calibration, counts: Counts) -> list[Done]:
    """The phases of a whole run with the seconds that they come to at the pace of a short one."""
    taken = {name: value * counts.sampled for name, value in measured.of_a_question.items()}
    taken |= {name: value * counts.steps for name, value in measured.of_a_step.items()}
    taken["evaluation"] = measured.evaluation * counts.evaluations * counts.dev
    taken["checkpoint"] = measured.checkpoint * counts.checkpoints
    for role, steps in counts.warmup_steps.items():
        taken[f"warm-up {role}"] = measured.warmup_start[role] + steps * measured.warmup_step[role]
    taken["before and after"] = measured.rest
    known = {each.phase: each for each in done}
    return [replace(known.get(name, Done(name, 0.0, 0.0)), seconds=value) for name, value in taken.items()]


def _short_run(values: dict[str, Any], steps_per_iteration: int, per_step: int, clock: Clock) -> Calibration:
    if clock == "processor":
        timing.now = time.process_time
    with (
        tempfile.TemporaryDirectory(prefix="dro-rl-plan-") as folder,
        open(os.devnull, "w") as nowhere,
        redirect_stdout(nowhere),
        redirect_stderr(nowhere),
    ):
        logging.disable(logging.CRITICAL)
        return _measure(values, steps_per_iteration, per_step, Path(folder), clock)


def _measure(
    values: dict[str, Any], steps_per_iteration: int, per_step: int, folder: Path, clock: Clock
) -> Calibration:
    recipe = load_recipe(None, values)
    most = max(1, STEPS // recipe.training.m_step_epochs)
    questions = min(steps_per_iteration // recipe.training.m_step_epochs, most) * per_step
    an_iteration = questions // per_step * recipe.training.m_step_epochs
    iterations = 1 + math.ceil(STEPS / an_iteration)  # the first is not timed: it verifies, and allocates
    evaluated = min(recipe.run.max_eval_samples or EVALUATED, EVALUATED)
    changes: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "questions_per_iteration": questions,
        "num_iterations": iterations,
        "max_steps": -1,
        "eval_iterations": iterations,
        "early_stopping_patience": None,
        "max_eval_samples": evaluated,
        "load_best_model_at_end": True,  # so that a checkpoint is written, and timed, before the first step
        "resume_from_checkpoint": None,
        "save_steps": 0,
        "logging_steps": 1,
        "report_to": "none",
        "warmup": "none",
    }
    if recipe.run.of("selector").warms:
        changes["constrain_selection"] = True  # a selector that was not warmed up does not write selections
    warmups = {role: _time_warmup(values, role, folder) for role in ROLES if recipe.run.of(role).warms}
    run_recipe(load_recipe(None, values | changes))
    whole = time.process_time() if clock == "processor" else time.time() - psutil.Process().create_time()
    history = json.loads((folder / "run" / "trainer_state.json").read_text())["log_history"]
    logged = [{name[5:]: value for name, value in each.items() if name.startswith("time/")} for each in history]
    logged = [each for each in logged if each]
    dev = next(each["eval_n"] for each in history if "eval_n" in each)
    timed = logged[an_iteration:]
    names = sorted({name for each in timed for name in each} - {*APART})
    taken = {name: sum(each.get(name, 0.0) for each in timed) for name in names}
    sampled = (iterations - 1) * questions
    evaluation, checkpoint = (logged[0].get(name, 0.0) for name in ("evaluation", "checkpoint"))
    known = [sum(each.values()) for each in logged] + [sum(times) for times in warmups.values()]
    rest = whole - sum(known) - 2 * evaluation - checkpoint  # these after the last line of the log
    steps = {role: (times[2] - times[1]) / (WARMUP[1] - WARMUP[0]) for role, times in warmups.items()}
    return Calibration(
        of_a_question={name: taken[name] / sampled for name in names if name in OF_AN_E_STEP},
        of_a_step={name: taken[name] / len(timed) for name in names if name not in OF_AN_E_STEP},
        evaluation=evaluation / dev,
        checkpoint=checkpoint,
        warmup_step=steps,
        warmup_start={role: times[1] - WARMUP[0] * steps[role] for role, times in warmups.items()},
        rest=max(0.0, rest),
        steps=len(timed),
    )


def _time_warmup(values: dict[str, Any], role: Role, folder: Path) -> list[float]:
    """Seconds of three warm-ups of a role: one that allocates, and those of `WARMUP` steps."""
    taken = []
    for number, steps in enumerate((1, *WARMUP)):
        changes = {
            "warmup": role,
            f"warmup_{role}_steps": steps,
            "output_dir": str(folder / f"{role}-{number}"),
            "warmup_cache_dir": str(folder / "cache"),
        }
        before = timing.now()
        recipe = load_recipe(None, values | changes)
        train, _ = preflight.read_splits(recipe)
        set_seed(recipe.training.seed)
        warm_up_models(recipe, train, build_prompters(recipe))
        taken.append(timing.now() - before)
    return taken
