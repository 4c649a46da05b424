"""The stages of a run that were evaluated on dev: `evaluation/summary.json`, in order, with the means of each.

The start is `base`, or `warmup` after it; then come `iteration-<t>`, and `final`, which is what the run keeps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dro_rl.errors import InputError, Phrase
from dro_rl.evaluation.results import KS
from dro_rl.files import written_whole
from dro_rl.rows.small import read_object

STARTS = ("base", "warmup")
SHOWN = ("em", "f1", "recall@1", "recall@3", "recall@5", "answer_logp", "valid")
"""Of a stage's metrics, those that a line or a table of runs has."""
FINAL = "final"
"""The last stage: the weights that are kept."""


def recalls(most: int) -> list[str]:
    """The metrics of recall that a selector of `most` documents at most has: at so many of them, and at fewer."""
    return [f"recall@{k}" for k in KS if k <= most]


def summary_path(output_dir: str | Path) -> Path:
    """Where the stages are."""
    return Path(output_dir) / "evaluation" / "summary.json"


def read_stages(output_dir: str | Path) -> list[dict[str, Any]]:
    """The stages evaluated so far, in order."""
    path = summary_path(output_dir)
    if not path.is_file():
        return []
    fix = "Delete it: a resumed run puts its checkpoint's in its place."
    match read_object(path, "the summary of a run", fix):
        case {"stages": [*stages]} if all(isinstance(stage, dict) and "stage" in stage for stage in stages):
            return stages
    raise InputError(str(path), Phrase("other fields"), "this is as a run wrote it", fix)


def iteration_of(stage: str) -> int:
    """The number of `iteration-<t>`; 0 for another stage."""
    number = stage.removeprefix("iteration-")
    return int(number) if number != stage and number.isdecimal() else 0


def with_stage(stages: Sequence[dict[str, Any]], summary: dict[str, Any]) -> list[dict[str, Any]]:
    """The stages with one more, in place of an earlier one of the same name."""
    return [*(known for known in stages if known["stage"] != summary["stage"]), summary]


def means_of(summary: Mapping[str, Any]) -> dict[str, float]:
    """A stage's means as a trainer logs them: `eval_<metric>`, percent, and nats for log-probabilities."""
    return {f"eval_{name}": value for name, value in summary.items() if isinstance(value, int | float)}


def write_stages(output_dir: str | Path, stages: Sequence[dict[str, Any]]) -> None:
    """Write `summary.json`, whole."""
    with written_whole(summary_path(output_dir)) as beside:
        beside.write_text(json.dumps({"stages": list(stages)}, indent=2) + "\n")


def start_of(stages: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """What joint training began from: the warm-up where there was one, else the base."""
    return [stages[0], *(stage for stage in stages if stage["stage"] in STARTS)][-1]


def best_stage(stages: Sequence[Mapping[str, Any]], metric: str, greater_is_better: bool) -> str | None:
    """The best so far of the start and the iterations: of equals the earliest, and the start only after them."""
    sign = 1 if greater_is_better else -1
    known = [stage for stage in stages if stage["stage"] != FINAL and stage.get(metric) is not None]
    later = [stage for stage in known if stage["stage"] not in STARTS]
    candidates = [*later, *[stage for stage in known if stage["stage"] in STARTS][-1:]]
    return max(candidates, key=lambda stage: sign * stage[metric])["stage"] if candidates else None
