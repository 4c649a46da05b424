"""What is checked before models load: data against settings, models, prompts, disk, the output folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.trainer_utils import get_last_checkpoint

from dro_rl.errors import InputError
from dro_rl.evaluation.evaluator import METRICS
from dro_rl.models import ROLES, Role, check_model
from dro_rl.prompts import Prompter, load_template
from dro_rl.recipe import Recipe
from dro_rl.records import Question

MAY_CHANGE = frozenset(
    {
        "output_dir", "resume_from_checkpoint", "num_iterations", "max_steps", "early_stopping_patience", "save_steps",
        "save_total_limit", "logging_steps", "report_to", "disable_tqdm", "run_name", "per_device_eval_batch_size",
        "warmup_cache_dir",
    }
)  # fmt: skip
"""Keys that a resumed run may change: how long it runs and what it says, not what it computes."""


def check(recipe: Recipe, train: Sequence[Question], dev: Sequence[Question]) -> None:
    """Settings against data, models and disk. Raises `InputError`."""
    run, training = recipe.run, recipe.training
    training.check_batch(PartialState().num_processes, len(train))
    for question in (*train, *dev):
        training.check_documents(len(question.documents), question.id)
    if training.metric_for_best_model not in METRICS:
        raise InputError(
            "metric_for_best_model", training.metric_for_best_model, f"this is one of {', '.join(METRICS)}", "Use one."
        )
    labelled = any(question.supporting for question in dev)
    if str(training.metric_for_best_model).startswith("recall@") and not labelled:
        raise InputError(
            "metric_for_best_model",
            training.metric_for_best_model,
            "recall by document needs labels, and the dev split has none",
            "Use f1, or answer_recall@5.",
        )
    for role in ROLES:
        load_template(getattr(run, f"{role}_prompt_template"))
        check_model(
            run.model_name(role),
            f"{role}_model_name_or_path",
            revision=getattr(run, f"{role}_model_revision"),
            trust_remote_code=run.trust_remote_code,
        )
    check_disk(recipe)


def check_prompts(questions: Sequence[Question], prompters: Mapping[Role, Prompter], k: int) -> None:
    """Refuse a question that would not fit `max_prompt_length` with every document cut away.

    A token is at least one byte, so only questions with more bytes than tokens allowed are rendered.
    """
    for role, prompter in prompters.items():
        limit = prompter.max_prompt_length
        if limit is None or not questions:
            continue
        overhead = len(prompter.render("", []).encode()) if role == "generator" else 1000
        for question in questions:
            titles = sum(len(document.title.encode()) + 8 for document in question.documents)
            if 2 * len(question.question.encode()) + titles + overhead > limit:
                if role == "selector":
                    prompter.selector_prompt(question, k)
                else:
                    longest = sorted(question.documents, key=lambda document: -len(document.title))[:k]
                    prompter.generator_prompt(question, [question.documents.index(d) + 1 for d in longest])


def check_disk(recipe: Recipe) -> None:
    """Refuse a run whose checkpoints would not fit. Weights, and two moments for what trains, in float32."""
    run, training = recipe.run, recipe.training
    weights = moments = 0
    for role in ROLES:
        config = AutoConfig.from_pretrained(
            run.model_name(role),
            revision=getattr(run, f"{role}_model_revision"),
            trust_remote_code=run.trust_remote_code,
        )
        with torch.device("meta"):
            size = (
                4 * AutoModelForCausalLM.from_config(config, trust_remote_code=run.trust_remote_code).num_parameters()
            )
        weights += size
        adapted = getattr(run, f"{role}_lora_r") > 0
        moments += 0 if adapted or training.role_learning_rate(role) == 0 else 2 * size
    needed = (weights + moments) * ((training.save_total_limit or 5) + 1) + weights
    place = Path(str(training.output_dir)).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise InputError(
            "output_dir",
            f"{free / 2**30:.1f} GiB free at {place}",
            f"checkpoints of both models take about {needed / 2**30:.1f} GiB",
            "Free some, lower save_total_limit, or use another disk.",
        )


def claim_output_dir(recipe: Recipe) -> str | None:
    """Take the output folder for this run and write `recipe.yaml` into it.

    Returns:
        The checkpoint to resume from, or None to start.

    Raises:
        InputError: the folder holds another run, or this one and resuming was not asked for, or is not writable.
    """
    training = recipe.training
    folder = Path(str(training.output_dir))
    wanted = training.resume_from_checkpoint
    checkpoint: str | None = None
    if (folder / "recipe.yaml").exists() or any(folder.glob("checkpoint-*")):
        if not wanted:
            raise InputError(
                "output_dir",
                str(folder),
                "this folder holds a run",
                "Add --resume_from_checkpoint auto, or use another.",
            )
        _same_recipe(recipe, folder / "recipe.yaml")
        checkpoint = get_last_checkpoint(str(folder)) if wanted == "auto" else wanted
    elif folder.is_dir() and any(path for path in folder.iterdir() if not path.name.startswith(".")):
        raise InputError("output_dir", str(folder), "this folder is empty or holds this run", "Use another folder.")
    elif wanted and wanted != "auto":
        checkpoint = wanted
    if checkpoint is not None and not (Path(checkpoint) / "trainer_state.json").is_file():
        raise InputError(
            "resume_from_checkpoint", checkpoint, "this is auto, or a whole checkpoint of this run", "Use auto."
        )
    PartialState().wait_for_everyone()
    if PartialState().is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            recipe.save(folder / "recipe.yaml")
        except OSError as error:
            raise InputError(
                "output_dir", str(folder), f"a run can write there ({error.strerror})", "Use another."
            ) from None
    PartialState().wait_for_everyone()
    return checkpoint


def _same_recipe(recipe: Recipe, path: Path) -> None:
    """Refuse to resume with settings under which the run would not have come to where it is."""
    if not path.is_file():
        return
    before: dict[str, Any] = yaml.safe_load(path.read_text())
    for key in sorted({*before, *recipe.values} - MAY_CHANGE):
        if json.dumps(before.get(key), default=str) != json.dumps(recipe.values.get(key), default=str):
            raise InputError(
                key,
                recipe.values.get(key),
                f"the run in {path.parent}{os.sep} has {before.get(key)!r}, and a resumed run computes what it began",
                "Give it the same value, or use another output_dir.",
            )
