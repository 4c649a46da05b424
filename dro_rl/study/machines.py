"""What machines the arms of a study have run on: a figure without them is half a figure."""

from __future__ import annotations

import json
from pathlib import Path

from dro_rl.files import written_whole
from dro_rl.rows.small import read_object
from dro_rl.runs import RECORD

FILE = "machines.json"
"""In a study's folder: a line for each kind of machine that `study run` ran on."""


def note_machine(folder: Path) -> None:
    """Add this machine to a study's."""
    from dro_rl.job.identity import this_machine  # it imports torch, which showing a study does not need

    known = _noted(folder)
    if (here := this_machine()) not in known:
        with written_whole(folder / FILE) as beside:
            beside.write_text(json.dumps([*known, here], indent=2) + "\n", encoding="utf-8")


def read_machines(folder: Path) -> list[str]:
    """The machines that a study ran on, and those of its trainings, which `--print` may have sent elsewhere."""
    records = [read_object(path, "the record of a run", "Run the arm again.") for path in folder.glob(f"*/*/{RECORD}")]
    of_runs = [session.get("machine") for record in records for session in record.get("sessions", [])]
    return list(dict.fromkeys([*_noted(folder), *sorted({each for each in of_runs if isinstance(each, str)})]))


def _noted(folder: Path) -> list[str]:
    path = folder / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
