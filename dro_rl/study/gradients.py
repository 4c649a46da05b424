"""How much the selector's gradient varies, where a training would start: over rollouts, and over questions.

One question's estimate is what the training takes: m rollouts, weighed, and Σ c_i ∇ log p(z_i|x). Averages over more
questions vary less by their number, so one measurement of the estimate says what any number of rollouts, or of tokens,
would buy. Nothing is trained.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dro_rl.em.e_step import Asked, EStep
from dro_rl.em.m_step import Group, MicroBatch
from dro_rl.files import written_whole
from dro_rl.models.module import SelectorGenerator
from dro_rl.proposal import rollout_seed
from dro_rl.recipe import Recipe
from dro_rl.records import Question
from dro_rl.roles import Role
from dro_rl.study.metrics import RESULT

REPEATS = 4
"""Estimates of each question, from rollouts of their own."""
ROLLOUTS, TOKENS = 1000, 1_000_000
"""What an average is taken to cost, so that numbers of rollouts are compared at the same price."""


@dataclass(frozen=True, slots=True)
class Moments:
    """The estimate's moments, all without bias.

    Args:
        questions, repeats: how many, and how often each.
        within: trace of the covariance over the rollouts of a question, mean over questions.
        between: trace of the covariance of the questions' expectations.
        squared_norm: of the expectation; below zero where noise hides it.
    """

    questions: int
    repeats: int
    within: float
    between: float
    squared_norm: float

    @property
    def variance(self) -> float:
        """Of one estimate of one question drawn at random."""
        return self.within + self.between


def moments(gradients: Iterable[Sequence[Tensor]]) -> Moments:
    """The moments of estimates.

    Args:
        gradients: for each of two or more questions, two or more independent estimates, vectors of one size. One
            question's are in memory at a time.
    """
    total: Tensor | None = None
    questions = repeats = 0
    within = squares = 0.0
    for estimates in gradients:
        repeats, questions = len(estimates), questions + 1
        stacked = torch.stack(list(estimates)).double()
        mean = stacked.mean(dim=0)
        within += float((stacked - mean).square().sum()) / (repeats - 1)
        squares += float(mean.square().sum())
        total = mean if total is None else total + mean
    assert total is not None
    within /= questions
    squared = float((total / questions).square().sum())
    of_means = max(0.0, squares - questions * squared) / (questions - 1)
    return Moments(questions, repeats, within, of_means - within / repeats, squared - of_means / questions)


def selector_gradients(
    model: SelectorGenerator, e_step: EStep, questions: Sequence[Question], *, seed: int, repeats: int = REPEATS
) -> Iterable[list[Tensor]]:
    """Estimates of each question: the ascent direction of the selector, as one vector on the CPU.

    Args:
        model: both models, without dropout. Its gradients are used and left empty.
        e_step: samples and weighs.
        questions: whose estimates.
        seed: of the rollouts.
    """
    parameters = [parameter for parameter in model.selector.parameters() if parameter.requires_grad]
    eos = e_step.prompters["generator"].eos_token_id
    for index, question in enumerate(questions):
        estimates = []
        for repeat in range(repeats):
            seeds = [rollout_seed(seed, "gradients", index, repeat)]
            asked = Asked([0], [question], seeds, e_step.method.sampling.temperature)
            sampled = e_step.sample(asked, 0)
            rollouts = e_step.weigh(asked, sampled)
            group = Group(rollouts, range(len(rollouts)), question, e_step.prompters, e_step.method, ["selector"])
            batch = MicroBatch(
                [group], e_step.method, ["selector"], on_policy=sampled.on_policy, unmoved=True, eos_token_id=eos
            )
            loss = model(batch=batch, scoring=e_step.method.scoring).losses["selector"]
            e_step.clock.count("selector", batch.tokens["selector"], 0.0)
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            estimates.append(
                torch.cat(
                    [
                        -(torch.zeros_like(p) if g is None else g).flatten().cpu()
                        for p, g in zip(parameters, found, strict=True)
                    ]
                )
            )
        yield estimates


def described(found: Moments, m: int, tokens: float) -> dict[str, float | None]:
    """The measurement as `gradients.json` has it.

    Args:
        found: the estimate's moments.
        m: rollouts of an estimate.
        tokens: that go through both models for one.
    """
    by = {"rollouts": m / ROLLOUTS, "tokens": tokens / TOKENS}
    signal = found.squared_norm if found.squared_norm > 0 else math.nan
    values = {
        "gradient_variance": found.variance,
        "gradient_variance_within": found.within,
        "gradient_norm": math.sqrt(signal),
        **{f"gradient_variance@{name}": found.variance * price for name, price in by.items()},
        **{f"gradient_noise@{name}": found.variance * price / signal for name, price in by.items()},
        "tokens": tokens,
    }
    return {name: None if math.isnan(value) else value for name, value in values.items()}


def measure(recipe: Recipe, repeats: int = REPEATS) -> dict[str, Any]:
    """Measure where the recipe's training would start, on the questions of its first iteration.

    Writes `gradients.json` into its `output_dir`. Models are warmed up as the training would do it.

    Raises:
        InputError: as the training would.
    """
    from accelerate import Accelerator
    from transformers import set_seed

    from dro_rl import engines
    from dro_rl.em.method import Method
    from dro_rl.engines.protocol import TrainedSelector
    from dro_rl.job.assembly import load_models, warm_up_models
    from dro_rl.job.preflight import prepare
    from dro_rl.models.saving import export_role

    training, folder = recipe.training, Path(str(recipe.training.output_dir))
    job = prepare(recipe, 1)
    set_seed(training.seed)
    accelerator = Accelerator(cpu=training.use_cpu)
    model = load_models(recipe, warm_up_models(recipe, job.train, job.prompters)).to(accelerator.device).eval()

    @contextmanager
    def opened(role: Role) -> Any:
        with torch.no_grad(), autocast():
            yield getattr(model, role)

    half = torch.float16 if training.fp16 else torch.bfloat16
    mixed = bool(training.bf16 or training.fp16)
    autocast: Callable[[], Any] = partial(torch.autocast, accelerator.device.type, half) if mixed else nullcontext
    selector = TrainedSelector(
        partial(opened, "selector"),
        lambda: model.selector,
        lambda place: export_role(model.selector, job.prompters["selector"].tokenizer, place),
        job.prompters["selector"],
        accelerator,
        folder,
    )
    engine = engines.start(training, selector)
    # Where training starts, the selector is its own reference.
    reference = partial(opened, "selector") if training.beta else None
    answerer = engines.elsewhere(training, job.prompters["generator"])
    e_step = EStep(engine, opened, reference, job.prompters, Method.of(training), answerer=answerer)
    questions = [job.train[index] for index in job.schedule.questions(0)]
    with autocast():
        found = moments(
            tqdm(
                selector_gradients(model, e_step, questions, seed=training.seed, repeats=repeats),
                desc="gradients",
                total=len(questions),
                unit="question",
                disable=training.disable_tqdm,
            )
        )
    engine.close()
    e_step.clock.flush()
    spent = sum(phase.tokens for phase in e_step.clock.total.values()) / (len(questions) * repeats)
    result = {
        **described(found, training.num_generations, spent),
        **{key: recipe.values[key] for key in ("num_generations", "selector_baseline", "seed")},
        "questions": found.questions,
        "repeats": found.repeats,
    }
    recipe.save(folder / "recipe.yaml")
    with written_whole(folder / RESULT) as beside:
        beside.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result
