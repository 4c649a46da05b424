"""What a run is: hashes of all that it reads, and what computes it. A resumed run computes what it began."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers.utils.hub import cached_file, extract_commit_hash

import dro_rl
from dro_rl.files import file_sha256
from dro_rl.prompts import Prompter
from dro_rl.recipe import Recipe
from dro_rl.records import Question
from dro_rl.roles import ROLES, Role

Inputs = dict[str, dict[str, str]]
"""By recipe key: hashes of the parts of what it names."""

PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "bitsandbytes", "vllm")
MODEL_FILES = (".safetensors", ".bin", ".gguf", ".json", ".jinja", ".model", ".txt", ".py")

PARTS: dict[str, Callable[[Question], Any]] = {
    "questions": lambda question: (question.id, question.type, question.question),
    "answers": lambda question: question.answers,
    "documents": lambda question: [(each.id, each.title, each.text) for each in question.documents],
    "labels": lambda question: (question.supporting, question.missed),
}
"""What a question file holds, as errors call it."""


def inputs_of(
    recipe: Recipe, train: Sequence[Question], dev: Sequence[Question], prompters: Mapping[Role, Prompter]
) -> Inputs:
    """Hashes of the questions as the run sees them, of the templates, and of the models it starts from."""
    run = recipe.run
    dev_key = "eval_dataset_name" if run.eval_dataset_name else "dataset_eval_split"
    found = {"dataset_name": question_hashes(train), dev_key: question_hashes(dev)}
    for role in ROLES:
        template = hashlib.sha256(prompters[role].source.encode()).hexdigest()
        found[f"{role}_prompt_template"] = {"template": template}
        found[f"{role}_model_name_or_path"] = model_hashes(run.of(role).model, run.of(role).revision)
    return found


def question_hashes(questions: Iterable[Question]) -> dict[str, str]:
    """A hash of each part of some questions, in order."""
    digests = {part: hashlib.sha256() for part in PARTS}
    for question in questions:
        for part, of in PARTS.items():
            digests[part].update(json.dumps(of(question), ensure_ascii=False).encode() + b"\n")
    return {part: digest.hexdigest() for part, digest in digests.items()}


def model_hashes(name: str, revision: str | None = None) -> dict[str, str]:
    """A hash of each file of a model folder; of a hub model the commit that its config comes from."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in MODEL_FILES)
        return {path.name: file_sha256(path) for path in files}
    config = cached_file(name, "config.json", revision=revision)
    return {"commit": str(extract_commit_hash(config, None))}


def this_session() -> dict[str, Any]:
    """What computes: machine and versions, with the state of the code, the command, and when it was given."""
    known = {"dro_rl": dro_rl.__version__, "git": git_state(Path(dro_rl.__file__).parent.parent)}
    known |= {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": re.sub(r"(--\w+_token[ =])\S+", r"\1…", shlex.join(sys.argv)),
        "machine": this_machine(),
        "versions": {name: version for name, version in known.items() if version is not None},
    }


def this_machine() -> str:
    """Cores, memory, GPUs and the versions that count, in a line: a figure without them is half a figure."""
    parts = [f"{os.cpu_count()} {platform.machine()} cores", f"{psutil.virtual_memory().total / 2**30:.0f} GiB"]
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    return ", ".join([*parts, *(f"{name} {_version(name)}" for name in ("torch", "transformers"))])


def git_state(checkout: Path) -> str | None:
    """The commit of a checkout, with `-dirty` where files differ from it; None where there is none to ask."""
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
