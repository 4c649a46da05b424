"""What machines the arms of a study have run on: a figure without them is half a figure."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

from dro_rl.files import written_whole

FILE = "machines.json"
"""In a study's folder: a line for each kind of machine, as `study run` noted it."""


def this_machine() -> str:
    """Cores, memory, GPUs and the versions that count, in a line."""
    import torch

    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [f"{os.cpu_count()} {platform.machine()} cores", f"{gib:.0f} GiB"]
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    return ", ".join([*parts, *(f"{name} {version(name)}" for name in ("torch", "transformers"))])


def note_machine(folder: Path) -> None:
    """Add this machine to a study's."""
    known = read_machines(folder)
    if (here := this_machine()) not in known:
        with written_whole(folder / FILE) as beside:
            beside.write_text(json.dumps([*known, here], indent=2) + "\n", encoding="utf-8")


def read_machines(folder: Path) -> list[str]:
    """The machines that `note_machine` was called on."""
    path = folder / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
