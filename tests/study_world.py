"""A study on the little world of the tests, and arms as trainings would have left them, without training any."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from training_world import world

from dro_rl.evaluation.results import METRICS, Conditions, QuestionResult, write_results
from dro_rl.evaluation.stages import write_stages
from dro_rl.recipe import read_keys
from dro_rl.study.arms import Arm, arms_of
from dro_rl.study.plan import Study, read_study

CONDITIONS = Conditions("final", "dev", 4, "hash", "candidates", 5, 2)


def study_file(folder: Path, **changes: Any) -> Path:
    """A study of two trainings, a control and a stage, with one claim; `changes` go over its keys."""
    base = world(folder / "world")
    study = {
        "base": str(base),
        "output_dir": str(folder / "study"),
        "seeds": [0, 1, 2],
        "variants": {
            "joint": {},
            "frozen": {"selector_learning_rate": 0},
            "random": {"of": "joint", "control": "random"},
            "start": {"of": "joint", "stage": "base"},
        },
        "claims": {"learns": {"variant": "joint", "against": "frozen", "metric": "em"}},
    }
    path = folder / "mine.yaml"
    path.write_text("# What is claimed.\n#\n" + yaml.safe_dump({**study, **changes}, sort_keys=False))
    return path


def leave(study: Study, ems: Mapping[str, Sequence[Sequence[float]]], stage: str = "final") -> None:
    """Make arms as they are when they are done.

    Args:
        ems: by variant, for each seed the EM of each question, 0..1.
    """
    for arm in arms_of(study):
        if arm.variant.name in ems and arm.seed < len(ems[arm.variant.name]):
            leave_arm(arm, ems[arm.variant.name][arm.seed], stage)


def leave_arm(arm: Arm, em: Sequence[float], stage: str = "final") -> None:
    """One arm, with an evaluation of so many questions."""
    rows = [
        QuestionResult(
            f"q{i}", f"{1 + i % 2}-hop", "?", ["a"], "a", 0.0, [1], {**dict.fromkeys(METRICS, value), "em": value}
        )
        for i, value in enumerate(em)
    ]
    if arm.variant.control is not None:
        write_results(arm.folder / "questions.parquet", rows, CONDITIONS)
        (arm.folder / "report.json").write_text("{}")
        return
    for name in {stage, "final", "base"} - {path.stem for path in (arm.folder / "evaluation").glob("*.parquet")} | {
        stage
    }:
        write_results(arm.folder / "evaluation" / f"{name}.parquet", rows, CONDITIONS)
    mean = 100 * sum(em) / len(em)
    write_stages(arm.folder, [{"stage": name, "em": mean} for name in ("base", "final")])
    write_recipe(arm)
    (arm.folder / "trainer_state.json").write_text(json.dumps({"log_history": []}))


def write_recipe(arm: Arm) -> None:
    """The recipe that the arm's training would have left."""
    values = {key: value for part in read_keys(arm.base, arm.keys) for key, value in vars(part).items()}
    (arm.folder / "recipe.yaml").write_text(yaml.safe_dump(values))


def made(folder: Path, **changes: Any) -> Study:
    """`study_file`, read."""
    return read_study(study_file(folder, **changes))
