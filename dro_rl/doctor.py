"""Whether this machine can do what the package does: versions, devices, extras, disk, and one whole step of training.

Every check imports what it looks at itself: a broken installation is what it is there to find.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dro_rl import shipped
from dro_rl.errors import InputError, first_line

ROOM = 2 * 2**30
"""Bytes of free disk that a run of small models wants."""
SELF_TEST_SECONDS = 600
"""After which the whole step is given up: on a quiet machine it takes less than one."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found.

    Args:
        check: what was looked at.
        state: `ok`; `note`, where something may matter to some; `broken`, where the package cannot work.
        says: what is there.
        fix: what to do about it; empty where there is nothing to do.
    """

    check: str
    state: Literal["ok", "note", "broken"]
    says: str
    fix: str = ""


def examine(*, self_test: bool = True) -> Iterator[Finding]:
    """Every finding, as it comes.

    Args:
        self_test: train the toy world for a step, in a folder that is deleted.
    """
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("python", _python),
        ("packages", _packages),
        ("devices", _devices),
        ("vllm", _vllm),
        ("colbert", _colbert),
        ("dense", _dense),
        ("serve", _serve),
        ("disk", _disk),
    ]
    for name, check in checks + ([("self-test", _self_test)] if self_test else []):
        try:
            yield from check()
        except Exception as error:  # a broken installation has errors of its own
            yield Finding(name, "broken", f"{type(error).__name__}: {first_line(error)}", "Install it again.")


def _python() -> Iterator[Finding]:
    version = platform.python_version()
    yield Finding("python", "ok", f"{version} at {sys.executable}")


def _packages() -> Iterator[Finding]:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    required = [Requirement(line) for line in importlib.metadata.requires("dro-rl") or []]
    tested = tested_versions()
    others = []
    for requirement in required:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(requirement.name, "broken", "not installed", f"pip install '{requirement}'")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            rule = f"{found}, and dro_rl wants {requirement.specifier}"
            yield Finding(requirement.name, "broken", rule, f"pip install '{requirement}'")
        elif (known := tested.get(canonicalize_name(requirement.name))) and known != found.partition("+")[0]:
            others.append(f"{requirement.name} {found} ({known})")
    if others:
        yield Finding("versions", "note", f"other than tested: {', '.join(others)}", "Fine, unless something fails.")
    else:
        yield Finding("versions", "ok", "those that were tested together" if tested else "within their ranges")


def tested_versions() -> dict[str, str]:
    """Of each package the version that was tested, by its normalised name."""
    from packaging.utils import canonicalize_name

    if shipped.TESTED is None:
        return {}
    lines = (line.partition("#")[0].strip() for line in shipped.TESTED.read_text(encoding="utf-8").splitlines())
    pins = (line.partition("==") for line in lines if "==" in line)
    return {canonicalize_name(name): version.partition("+")[0] for name, _, version in pins}


def _devices() -> Iterator[Finding]:
    import psutil
    import torch

    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    says = f"{cores} cores, {memory.total / 2**30:.0f} GiB, of which {memory.available / 2**30:.0f} are free"
    yield Finding("cpu", "ok", says)
    if not torch.cuda.is_available():
        built = f"torch {torch.__version__}"
        fix = "" if torch.version.cuda is None else "If there is one: nvidia-smi, and the driver's version."
        yield Finding("gpu", "note", f"none that {built} sees: models train on the CPU", fix)
        return
    for index in range(torch.cuda.device_count()):
        there = torch.cuda.get_device_properties(index)
        weight = torch.ones(8, 8, device=f"cuda:{index}")
        assert float((weight @ weight).sum()) == 512.0, "it multiplies wrongly"
        half = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16: use fp16"
        yield Finding("gpu", "ok", f"{there.name}, {there.total_memory / 2**30:.0f} GiB, {half}")


def _vllm() -> Iterator[Finding]:
    from dro_rl.engines.vllm_common import check_installed, vllm_version

    if importlib.util.find_spec("vllm") is None:
        yield Finding("vllm", "note", "not installed: transformers samples", "pip install 'dro_rl[vllm]' to have it.")
        return
    try:
        check_installed("vllm", vllm_version())
    except InputError as error:
        yield Finding("vllm", "note", f"{error.value}: {error.rule}", error.fix)
    else:
        yield Finding("vllm", "ok", vllm_version())


def _colbert() -> Iterator[Finding]:
    from dro_rl.retrieval.colbert_runtime import EXTENSIONS, build_folder, check_runtime

    if importlib.util.find_spec("colbert") is None:
        yield Finding("colbert", "note", "not installed: bm25 retrieves", "pip install 'dro_rl[colbert]' to have it.")
        return
    try:
        check_runtime()
    except InputError as error:
        yield Finding("colbert", "note", f"{error.value}: {error.rule}", error.fix)
        return
    locked = [lock for name in EXTENSIONS if (lock := build_folder(name) / "lock").exists()]
    if locked:
        fix = "Delete it if nothing compiles."
        yield Finding("colbert", "note", f"{locked[0]} is there, and a compile waits for it", fix)
        return
    compiled = sum((build_folder(name) / f"{name}.so").is_file() for name in EXTENSIONS)
    later = "" if compiled == len(EXTENSIONS) else ", the rest at first use, in minutes"
    yield Finding("colbert", "ok", f"{compiled} of {len(EXTENSIONS)} extensions are compiled{later}")


def _dense() -> Iterator[Finding]:
    lacking = [name for name in ("sentence_transformers", "faiss") if importlib.util.find_spec(name) is None]
    if lacking:
        says = f"not installed: {', '.join(lacking)}; bm25 retrieves"
        yield Finding("dense", "note", says, "pip install 'dro_rl[dense]' to have it.")
        return
    yield Finding("dense", "ok", f"sentence-transformers {importlib.metadata.version('sentence-transformers')}")


def _serve() -> Iterator[Finding]:
    lacking = [name for name in ("fastapi", "uvicorn", "prometheus_client") if importlib.util.find_spec(name) is None]
    if lacking:
        yield Finding(
            "serve", "note", f"not installed: {', '.join(lacking)}", "pip install 'dro_rl[serve]' to have it."
        )
        return
    yield Finding("serve", "ok", f"fastapi {importlib.metadata.version('fastapi')}")


def _disk() -> Iterator[Finding]:
    for place in dict.fromkeys([Path.cwd(), Path.home(), Path(tempfile.gettempdir())]):
        if not os.access(place, os.W_OK):
            yield Finding("disk", "note", f"{place} cannot be written", "Name other folders in the recipe.")
            continue
        free = shutil.disk_usage(place).free
        says = f"{free / 2**30:.1f} GiB free at {place}"
        yield Finding("disk", "ok" if free >= ROOM else "note", says, "" if free >= ROOM else "Free some.")


def _self_test() -> Iterator[Finding]:
    """One step of the quick start, from a recipe to two exported models, as a user would start it."""
    keys: dict[str, object] = {
        "num_iterations": 1,
        "max_eval_samples": 4,
        "questions_per_iteration": 2,
        "per_device_train_batch_size": 16,
    }
    keys |= {"eval_iterations": 1, "warmup_steps": 0, "lr_scheduler_type": "constant", "report_to": "none"}
    with tempfile.TemporaryDirectory(prefix="dro-rl-doctor-") as folder:
        run = Path(folder) / "run"
        options = [word for name, value in keys.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, "-m", "dro_rl.train", "quickstart", *options, "--output_dir", str(run)]
        started = time.perf_counter()
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SELF_TEST_SECONDS)
        except subprocess.TimeoutExpired:
            yield Finding("self-test", "broken", f"a step took more than {SELF_TEST_SECONDS} s", "Look at the load.")
            return
        left = [name for name in ("selector", "generator", "rollouts", "evaluation") if not (run / name).is_dir()]
        if done.returncode or left:
            said = done.stderr.strip().splitlines() or ["nothing"]
            fix = f"Try it: {' '.join(command[1:5])} --output_dir FOLDER"
            yield Finding("self-test", "broken", f"exit status {done.returncode}: {said[-1]}", fix)
            return
        yield Finding("self-test", "ok", f"a whole step of the quick start in {time.perf_counter() - started:.0f} s")
