"""What is checked before models load: data against settings, models, prompts, disk, the output folder."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Trainer
from transformers.integrations import get_available_reporting_integrations
from transformers.training_args import OptimizerNames
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from dro_rl import engines
from dro_rl.config import DROConfig
from dro_rl.data import dev_beside, load_questions
from dro_rl.data.candidates import shape_candidates
from dro_rl.em.schedule import Schedule
from dro_rl.errors import InputError, Phrase, first_line
from dro_rl.evaluation.results import METRICS
from dro_rl.job.assembly import build_prompters
from dro_rl.job.warmup import selection_order
from dro_rl.models.loading import check_model
from dro_rl.models.sharding import whole_parameters
from dro_rl.prompts import Prompter, load_template
from dro_rl.prompts.templates import PLACE as TEMPLATE
from dro_rl.recipe import Recipe, RunConfig
from dro_rl.records import Document, Question
from dro_rl.roles import ROLES, Role
from dro_rl.selection import format_selection


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
    disk = check(recipe, train, dev, processes)
    prompters = build_prompters(recipe)
    check_prompts([*train, *dev], prompters, recipe.training.num_selected)
    check_constraint(recipe, [*train, *dev], prompters["selector"])
    schedule = Schedule.of(recipe.training, processes, len(train))
    check_max_steps(recipe.training, schedule)
    return Prepared(train, dev, prompters, schedule, disk)


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


def check(recipe: Recipe, train: Sequence[Question], dev: Sequence[Question], processes: int) -> int:
    """Settings against data, models and disk. Returns the bytes that the run takes. Raises `InputError`."""
    run, training = recipe.run, recipe.training
    training.check_batch(processes, len(train))
    for question in (*train, *dev):
        training.check_documents(len(question.documents), question.id)
    if training.metric_for_best_model not in METRICS:
        raise InputError(
            "metric_for_best_model", training.metric_for_best_model, f"this is one of {', '.join(METRICS)}", "Use one."
        )
    check_splits(run, train, dev)
    labelled = any(question.supporting for question in dev)
    if str(training.metric_for_best_model).startswith("recall@") and not labelled:
        raise InputError(
            "metric_for_best_model",
            training.metric_for_best_model,
            "recall by document needs labels, and the dev split has none",
            "Use f1, or answer_recall@5.",
        )
    check_warm_up(recipe, train)
    check_trackers(training.report_to)
    check_optimizer(training)
    engines.check(training)
    models: dict[Role, PreTrainedModel] = {}
    for role in ROLES:
        place = f"{role}_model_name_or_path"
        load_template(run.of(role).prompt_template)
        check_model(
            run.of(role).model,
            place,
            revision=run.of(role).revision,
            trust_remote_code=run.trust_remote_code,
        )
        models[role] = without_weights(run, role)
        if Path(run.of(role).model).is_dir():
            check_weights(Path(run.of(role).model), models[role], place)
        if run.of(role).lora_r > 0:
            check_adapters(run, role, models[role])
        check_positions(recipe, role, models[role])
    return check_disk(recipe, models)


def check_max_steps(training: DROConfig, schedule: Schedule) -> None:
    """Refuse to go on after the last iteration."""
    if training.max_steps > schedule.total_steps:
        raise InputError(
            "max_steps",
            training.max_steps,
            f"num_iterations: {training.num_iterations} is {schedule.total_steps} steps in all",
            "Lower it, leave it out, or raise num_iterations.",
        )


def check_positions(recipe: Recipe, role: Role, model: PreTrainedModel) -> None:
    """Refuse sequences longer than the model has positions for."""
    training = recipe.training
    written = training.max_completion_length if role == "selector" else training.max_answer_length
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and (training.max_prompt_length or 0) + written > positions:
        raise InputError(
            "max_prompt_length",
            training.max_prompt_length,
            f"with {written} tokens to write this is at most the {role}'s {positions} positions",
            "Lower it: documents are cut evenly to fit.",
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
    if run.of("selector").warms:
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


def without_weights(run: RunConfig, role: Role) -> PreTrainedModel:
    """The role's model as its config describes it, on no device: names, shapes and sizes."""
    name, trust = run.of(role).model, run.trust_remote_code
    config = AutoConfig.from_pretrained(name, revision=run.of(role).revision, trust_remote_code=trust)
    # Each architecture has errors of its own for a config that it cannot be built from.
    try:
        with torch.device("meta"), whole_parameters():
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    except Exception as error:
        raise InputError(
            f"{role}_model_name_or_path",
            name,
            f"its config.json describes a model ({first_line(error)})",
            "Copy the folder again.",
        ) from None
    if run.attn_implementation is not None:
        try:
            with torch.device("meta"), whole_parameters():
                AutoModelForCausalLM.from_config(
                    config, trust_remote_code=trust, attn_implementation=run.attn_implementation
                )
        except Exception as error:
            raise InputError(
                "attn_implementation",
                run.attn_implementation,
                f"the {role} has it here ({first_line(error)})",
                "Use sdpa, or leave it unset.",
            ) from None
    return model


def check_weights(folder: Path, model: PreTrainedModel, place: str) -> None:
    """Refuse a folder whose weights are missing, not whole, or of other shapes. Headers are read, not weights."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    names = [SAFE_WEIGHTS_NAME]
    if not (folder / SAFE_WEIGHTS_NAME).is_file():
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise InputError(
                    place, str(index), "this is the index of the folder's weights", "Copy the folder again."
                ) from None
        elif any((folder / name).is_file() for name in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
            return  # pickled weights: nothing can be said without reading them
    shapes = {} if hasattr(model.config, "quantization_config") else model.state_dict()
    for name in names:
        if not (folder / name).is_file():
            raise InputError(
                place, str(folder), f"a model folder holds its weights, and {name} is missing", "Copy the folder again."
            )
        try:
            with safe_open(folder / name, framework="pt") as weights:
                known = shapes.keys() & set(weights.keys())
                found = {key: tuple(weights.get_slice(key).get_shape()) for key in sorted(known)}
        except (SafetensorError, OSError) as error:
            raise InputError(
                place, str(folder / name), f"this is a whole safetensors file ({error})", "Copy the file again."
            ) from None
        for key, shape in found.items():
            if shape != tuple(shapes[key].shape):
                raise InputError(
                    place,
                    str(folder / name),
                    f"weights have the shapes of config.json, and {key} has {shape} for {tuple(shapes[key].shape)}",
                    "Copy the folder again, its config and its weights together.",
                )


def check_adapters(run: RunConfig, role: Role, model: PreTrainedModel) -> None:
    """Refuse adapters without the extra, or on layers that the model does not have."""
    if importlib.util.find_spec("peft") is None:
        raise InputError(
            f"{role}_lora_r",
            run.of(role).lora_r,
            "adapters need the peft extra",
            "pip install 'dro_rl[peft]', or use 0.",
        )
    layers = {name.rpartition(".")[2] for name, part in model.named_modules() if not list(part.children())}
    names = [name for name, _ in model.named_modules()]
    for target in run.lora_target_modules or []:
        if target == "lm_head" or not any(name == target or name.endswith(f".{target}") for name in names):
            raise InputError(
                "lora_target_modules",
                target,
                f"adapters go on layers of the {role} below its head ({', '.join(sorted(layers - {'lm_head'}))})",
                "Take it off the list, or leave the list unset.",
            )


def check_prompts(questions: Sequence[Question], prompters: Mapping[Role, Prompter], k: int) -> None:
    """Refuse a template that does not render, and a question that would not fit `max_prompt_length` with every
    document cut away."""
    for role, prompter in prompters.items():
        try:
            _check_role_prompts(questions, role, prompter, k)
        except InputError as error:
            if error.place != TEMPLATE:
                raise
            raise InputError(f"{role}_prompt_template", error.value, error.rule, error.fix) from None


def _check_role_prompts(questions: Sequence[Question], role: Role, prompter: Prompter, k: int) -> None:
    """A token is at least one byte, so only the first question and those with more bytes than tokens are rendered."""
    variables = {"k": k, "example": format_selection(range(k, 0, -1))} if role == "selector" else {}
    count = max((len(question.documents) for question in questions), default=0) if role == "selector" else k
    overhead = len(prompter.render("", [Document("x", "x", "x")] * count, **variables).encode())
    limit = prompter.max_prompt_length
    for place, question in enumerate(questions):
        titles = sum(len(document.title.encode()) + 8 for document in question.documents)
        if place == 0 or (limit is not None and 2 * len(question.question.encode()) + titles + overhead > limit):
            if role == "selector":
                prompter.selector_prompt(question, k)
            else:
                longest = sorted(question.documents, key=lambda document: -len(document.title))[:k]
                prompter.generator_prompt(question, [question.documents.index(d) + 1 for d in longest])


def check_constraint(recipe: Recipe, questions: Sequence[Question], prompter: Prompter) -> None:
    """Refuse a constraint that the selector's tokenizer cannot follow, or that does not fit `max_completion_length`."""
    training = recipe.training
    if not training.constrain_selection:
        return
    for count in sorted({len(question.documents) for question in questions}):
        longest = prompter.constraint(count, training.num_selected).verify()
        if longest > training.max_completion_length:
            raise InputError(
                "max_completion_length",
                training.max_completion_length,
                f"constrain_selection writes all {training.num_selected} of {count} numbers, in up to {longest} tokens",
                f"Use {longest} or more.",
            )


def check_disk(recipe: Recipe, models: Mapping[Role, PreTrainedModel]) -> int:
    """Refuse a run whose checkpoints would not fit. Weights, and two moments for what trains, in float32.

    Returns:
        The bytes that it takes.
    """
    run, training = recipe.run, recipe.training
    weights = moments = 0
    for role in ROLES:
        size = 4 * models[role].num_parameters()
        weights += size
        adapted = run.of(role).lora_r > 0
        moments += 0 if adapted or training.role_learning_rate(role) == 0 else 2 * size
    needed = (weights + moments) * ((training.save_total_limit or 5) + 1) + weights
    place = _nearest(Path(str(training.output_dir)))
    free = shutil.disk_usage(place).free
    if free < needed:
        raise InputError(
            "output_dir",
            f"{free / 2**30:.1f} GiB free at {place}",
            f"checkpoints of both models take about {needed / 2**30:.1f} GiB",
            "Free some, lower save_total_limit, or use another disk.",
        )
    return needed


def _nearest(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
