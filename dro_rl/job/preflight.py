"""What is checked before models load: data against settings, what `model_checks` and `prompt_checks` say, and disk."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, Trainer
from transformers.integrations import get_available_reporting_integrations
from transformers.training_args import OptimizerNames

from dro_rl import engines
from dro_rl.config import DROConfig
from dro_rl.data import dev_beside, load_questions
from dro_rl.data.candidates import shape_candidates
from dro_rl.em.optimizer import role_factors
from dro_rl.em.schedule import Schedule
from dro_rl.errors import InputError, Phrase, as_size, first_line
from dro_rl.evaluation.results import METRICS
from dro_rl.job.assembly import build_prompters
from dro_rl.job.examples import selection_order
from dro_rl.job.model_checks import check_models, check_positions
from dro_rl.job.prompt_checks import check_lengths, check_prompts
from dro_rl.job.quotes import check_quotes
from dro_rl.keys.run import RunConfig
from dro_rl.prompts import Prompter
from dro_rl.prompts.rows import answer_row
from dro_rl.recipe import Recipe
from dro_rl.records import Question
from dro_rl.rewards import check_functions
from dro_rl.roles import ROLES, Role
from dro_rl.runs import checkpoints_of


@dataclass(frozen=True)
class Prepared:
    """What a job reads, with nothing found wrong in it.

    Args:
        train, dev: its questions, with their candidates as the recipe shapes them.
        prompters: each role's prompts.
        schedule: its iterations and steps.
        disk: bytes that its checkpoints and models take.
    """

    train: Sequence[Question]
    dev: Sequence[Question]
    prompters: dict[Role, Prompter]
    schedule: Schedule
    disk: int


def prepare(recipe: Recipe, processes: int) -> Prepared:
    """Read what a job reads, and check all that can be checked before a model is loaded: for training and for
    `dro-rl recipe validate` alike. Raises `InputError`."""
    train, dev = read_splits(recipe)
    recipe.training.check_batch(processes, len(train))
    schedule = Schedule.of(recipe.training, processes, len(train))
    check_steps(recipe.training, schedule)
    disk = check(recipe, train, dev)
    prompters = build_prompters(recipe)
    check_prompts(recipe, [*train, *dev], prompters)
    if recipe.run.of("selector").warms and recipe.run.warmup_selector_order == "quotes":
        check_quotes(train, prompters["selector"], recipe.training)
    check_endpoint(recipe, [*train, *dev], prompters["generator"])
    return Prepared(train, dev, prompters, schedule, disk)


def check_endpoint(recipe: Recipe, questions: Sequence[Question], prompter: Prompter) -> None:
    """Refuse a generator elsewhere that does not answer, or not as the recipe needs it, or not so many tokens."""
    training = recipe.training
    answerer = engines.elsewhere(training, prompter)
    if answerer is None:
        return
    numbers = range(1, min(training.spec.most, len(questions[0].documents)) + 1)
    answerer.check(answer_row(prompter, questions[0], numbers, training.answer_aliases))
    positions, what = answerer.positions()
    if positions is not None:
        check_lengths(recipe, questions, "generator", prompter, positions, what)
        check_positions(recipe, "generator", positions, what)


def read_splits(recipe: Recipe) -> tuple[list[Question], list[Question]]:
    """The training and the dev questions, with their candidates cut and shuffled as the recipe says."""
    run = recipe.run
    beside = dev_beside(run.dataset_name, run.dataset_train_split, run.dataset_eval_split)
    train = load_questions(
        run.dataset_name,
        run.dataset_train_split,
        config=run.dataset_config,
        limit=run.max_train_samples,
        columns=run.dataset_columns,
    )
    dev = load_questions(
        run.eval_dataset_name or beside or run.dataset_name,
        run.dataset_eval_split,
        config=run.dataset_config,
        limit=run.max_eval_samples,
        columns=run.dataset_columns,
        key="eval_dataset_name" if run.eval_dataset_name else "dataset_name",
    )
    seed = recipe.training.seed if run.shuffle_documents else None
    return (
        shape_candidates(train, run.num_documents, keep_gold=run.keep_gold, shuffle_seed=seed),
        shape_candidates(dev, run.num_documents, shuffle_seed=seed),
    )


def check(recipe: Recipe, train: Sequence[Question], dev: Sequence[Question]) -> int:
    """Settings against data, models and disk. Returns the bytes that the run takes. Raises `InputError`."""
    training = recipe.training
    engines.check(training, recipe)
    check_questions(recipe, train, dev)
    check_warm_up(recipe, train)
    check_trackers(training.report_to)
    check_optimizer(training)
    check_functions(training.reward_rule)
    return check_disk(recipe, check_models(recipe))


def check_questions(recipe: Recipe, train: Sequence[Question], dev: Sequence[Question]) -> None:
    """Settings against questions, whatever machine a run is for. Raises `InputError`."""
    training = recipe.training
    for question in (*train, *dev):
        training.check_documents(len(question.documents), question.id)
    for size, first in {len(question.documents): question.id for question in reversed(train)}.items():
        engines.check_candidates(training, size, first)
    training.check_windows(max(len(question.documents) for question in (*train, *dev)))
    if training.metric_for_best_model not in METRICS:
        raise InputError(
            "metric_for_best_model", training.metric_for_best_model, f"this is one of {', '.join(METRICS)}", "Use one."
        )
    check_splits(recipe.run, train, dev)
    labelled = any(question.supporting for question in dev)
    if str(training.metric_for_best_model).startswith(("recall@", "precision@")) and not labelled:
        raise InputError(
            "metric_for_best_model",
            training.metric_for_best_model,
            "recall and precision by document: either needs labels, and the dev split has none",
            "Use f1, or answer_recall@5.",
        )


def check_steps(training: DROConfig, schedule: Schedule) -> None:
    """Refuse to go on after the last iteration, and learning rates that do not come to numbers on the way there."""
    steps = schedule.total_steps
    if training.max_steps > steps:
        raise InputError(
            "max_steps",
            training.max_steps,
            f"num_iterations: {training.num_iterations} is {steps} steps in all",
            "Lower it, leave it out, or raise num_iterations.",
        )
    rates = [rate for rate in map(training.role_learning_rate, ROLES) if rate > 0]
    try:
        factors = role_factors(training, rates, steps)
        values = [float(factor(step)) for factor in factors for step in {0, 1, steps // 2, steps - 1}]
        problem = "" if all(0 <= value < math.inf for value in values) else "they come to numbers below 0, or none"
    except InputError:
        raise
    except Exception as error:  # each schedule has errors of its own
        problem = first_line(error)
    if problem:
        raise InputError(
            "lr_scheduler_kwargs",
            training.lr_scheduler_kwargs,
            f"learning rates are made of it ({problem})",
            "Correct it, or leave it out.",
        )


def check_splits(run: RunConfig, train: Sequence[Question], dev: Sequence[Question]) -> None:
    """Refuse to evaluate on training questions: early stopping would follow what was learned by heart.

    The same id with another text is another question: row numbers serve as ids in some datasets.
    """
    key = "eval_dataset_name" if run.eval_dataset_name else "dataset_eval_split"
    trained = {(question.id, question.question) for question in train}
    both = [question.id for question in dev if (question.id, question.question) in trained]
    if both:
        name = Path(run.dataset_name).expanduser()
        if not run.eval_dataset_name and name.is_file():
            key = "eval_dataset_name"  # a single file is all splits at once
        raise InputError(
            key,
            Phrase(f"{len(both)} of {len(dev)} dev questions are training questions, the first is {both[0]!r}"),
            "early stopping and the choice of the best iteration look at questions that were not trained on",
            "Name another file or split, or take them out of one of the two.",
        )


def check_warm_up(recipe: Recipe, train: Sequence[Question]) -> None:
    """Refuse a warm-up that has no labels or no ranking to imitate, or nowhere to be kept."""
    run = recipe.run
    labelled = any(question.supporting for question in train)
    if run.of("selector").warms and run.warmup_selector_order == "labels" and not labelled:
        raise InputError(
            "warmup_selector_order",
            "labels",
            "labels are read from `supporting`, and no training question has any",
            "Use retriever or a ranking, or leave the selector's warm-up out.",
        )
    if run.of("generator").warms and run.warmup_generator_documents in ("gold", "mixed") and not labelled:
        raise InputError(
            "warmup_generator_documents",
            run.warmup_generator_documents,
            "labels are read from `supporting`, and no training question has any",
            "Use retrieved or random, or leave the generator's warm-up out.",
        )
    if run.of("selector").warms and run.warmup_selector_order != "quotes":
        order = selection_order(run, recipe.training.seed)
        for question in train:
            order(question)
    place = _nearest(Path(run.warmup_cache_dir).expanduser())
    if run.warmup != "none" and not (place.is_dir() and os.access(place, os.W_OK)):
        raise InputError("warmup_cache_dir", run.warmup_cache_dir, "warmed-up models are kept there", "Use another.")


def check_trackers(report_to: str | list[str] | None) -> None:
    """Refuse a tracker that is not installed."""
    known = [*get_available_reporting_integrations(), "none", "all"]
    for name in [report_to] if isinstance(report_to, str) else report_to or []:
        if name not in known:
            raise InputError(
                "report_to",
                name,
                f"this is a tracker that is installed, of which there are {', '.join(known)}",
                "Use one of them, or pip install 'dro_rl[report]'.",
            )


def check_optimizer(training: DROConfig) -> None:
    """Refuse an optimizer that is not installed or cannot be made of its settings, by a step with one weight."""
    weight = torch.nn.Parameter(torch.zeros(1, 1, device=training.device))
    weight.grad = torch.ones_like(weight)
    try:
        optimizer, options = Trainer.get_optimizer_cls_and_kwargs(training)
        optimizer([weight], **options).step()
    except Exception as error:  # each optimizer has errors of its own
        raise InputError(
            "optim_args" if training.optim_args else "optim",
            training.optim_args or OptimizerNames(training.optim).value,
            f"the optimizer can be made of this ({first_line(error)})",
            "Correct it, install what is missing, or use adamw_torch.",
        ) from None


def check_disk(recipe: Recipe, models: Mapping[Role, PreTrainedModel]) -> int:
    """Refuse a run whose checkpoints would not fit.

    Checkpoints that are there have their room already: those of the run that is gone on in.

    Returns:
        The bytes that it takes.
    """
    needed = disk_of(recipe, models)
    folder = Path(str(recipe.training.output_dir))
    there = [path for place in checkpoints_of(folder) for path in place.rglob("*") if path.is_file()]
    there += [path for role in ROLES for path in (folder / role).rglob("*") if path.is_file()]
    more = needed - sum(path.stat().st_size for path in there)
    place = _nearest(folder)
    free = shutil.disk_usage(place).free
    if free < more:
        raise InputError(
            "output_dir",
            Phrase(f"{as_size(free)} free at {place}"),
            f"checkpoints of both models take about {as_size(more)} more",
            "Free some, lower save_total_limit, or use another disk.",
        )
    return needed


def disk_of(recipe: Recipe, models: Mapping[Role, PreTrainedModel]) -> int:
    """Bytes of a run's checkpoints and models. Weights, and two moments for what trains, in float32.

    Args:
        models: those that are here, by their roles, on any device or none.
    """
    run, training = recipe.run, recipe.training
    checkpoint = exported = 0
    for role, model in models.items():
        size, r = 4 * model.num_parameters(), run.of(role).lora_r
        linear = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)] if r else []
        adapters = 4 * r * sum(layer.in_features + layer.out_features for layer in linear)
        trains = training.role_learning_rate(role) > 0
        checkpoint += (adapters if r else size) * (3 if trains else 1)
        exported += adapters + (0 if r and not training.save_merged else size)
    return checkpoint * ((training.save_total_limit or 5) + 1) + exported


def _nearest(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
