"""The arms of a study: a run's folder for each variant and seed, the command that fills it, whether it is full."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dro_rl.data import dev_beside
from dro_rl.errors import InputError
from dro_rl.evaluation.stages import FINAL, read_stages
from dro_rl.flat_yaml import read_yaml
from dro_rl.keys.reference import KEYS, as_options
from dro_rl.recipe import read_keys
from dro_rl.study.metrics import RESULT
from dro_rl.study.plan import MODELS, Study, Variant, overrides

LENGTH = ("num_iterations", "max_steps", "early_stopping_patience")
"""Keys that a resumed run may change and that say how long it goes: an arm that has others is not done."""


@dataclass(frozen=True)
class Arm:
    """A variant with a seed.

    Args:
        variant: the variant.
        seed: the seed.
        folder: the run's folder, or that of the control's results.
        command: what fills it, after `dro-rl`.
        base: the recipe.
        keys: what goes over the base recipe; none for a control.
        needs: the folder of the arm that must be done before; None where none.
    """

    variant: Variant
    seed: int
    folder: Path
    command: Sequence[str]
    base: str
    keys: Mapping[str, Any]
    needs: Path | None

    @property
    def name(self) -> str:
        return f"{self.variant.name}/seed-{self.seed}"

    @property
    def log(self) -> Path:
        """What the command prints. It lies beside the folder, which is the run's own."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def done(self) -> bool:
        """Whether all that it leaves is there."""
        if self.variant.control is not None:
            return (self.folder / "report.json").is_file()
        if self.variant.measure is not None:
            return (self.folder / RESULT).is_file()
        ended = (self.folder / "trainer_state.json").is_file()
        if not ended or all(stage["stage"] != FINAL for stage in read_stages(self.folder)):
            return False
        return not set(LENGTH) & set(changed_keys(self))


def arm_folder(study: Study, variant: str, seed: int) -> Path:
    """Where a variant's arm with this seed is: a stage's, where the training is whose stage it is."""
    named = study.variants[variant]
    name = variant if named.stage is None else str(named.of)
    return study.output_dir / name / f"seed-{seed}"


def arms_of(study: Study) -> list[Arm]:
    """Every arm, seed by seed: with the first seed alone there is something to see of every variant."""
    return [_arm(study, variant, seed) for seed in study.seeds for variant in study.variants.values() if variant.runs]


def _arm(study: Study, variant: Variant, seed: int) -> Arm:
    folder = arm_folder(study, variant.name, seed)
    before = variant.of or variant.starts_from
    needs = None if before is None else arm_folder(study, before, seed)
    if variant.control is not None:
        assert needs is not None
        return Arm(variant, seed, folder, _evaluation(study, variant, seed, needs, folder), study.base, {}, needs)
    keys = overrides(variant, seed, folder)
    if variant.starts_from is not None:
        assert needs is not None
        keys = {**{key: str(needs / key.partition("_")[0]) for key in MODELS}, **keys}
    words = [study.base, *as_options(keys)]
    if variant.measure is not None:
        return Arm(variant, seed, folder, ["study", "gradients", *words], study.base, keys, needs)
    return Arm(variant, seed, folder, ["train", *words, "--resume_from_checkpoint", "auto"], study.base, keys, needs)


def _evaluation(study: Study, variant: Variant, seed: int, run: Path, folder: Path) -> list[str]:
    """A control on the dev split of a training, whose recipe says how candidates are shaped."""
    assert variant.of is not None
    data, _ = read_keys(study.base, overrides(study.variants[variant.of], seed, run))
    beside = dev_beside(data.dataset_name, data.dataset_train_split, data.dataset_eval_split)
    source = data.eval_dataset_name or beside or data.dataset_name
    words = ["evaluate", str(run), "--data", source, "--split", data.dataset_eval_split]
    words += ["--config", data.dataset_config] if data.dataset_config is not None else []
    words += ["--limit", str(data.max_eval_samples)] if data.max_eval_samples is not None else []
    for field, column in data.dataset_columns.items():
        words += ["--column", f"{field}={column}"]
    return [*words, "--control", str(variant.control), "--seed", str(seed), "--output", str(folder)]


def changed_keys(arm: Arm) -> dict[str, tuple[Any, Any]]:
    """Keys in which an arm's run is another than the study asks for: what it has, and what is asked for."""
    path = arm.folder / "recipe.yaml"
    if not arm.keys or not path.is_file():
        return {}
    before, asked = read_yaml(path), read_keys(arm.base, arm.keys)
    found = {}
    for key, value in {**vars(asked[0]), **vars(asked[1])}.items():
        was = before.get(key, KEYS[key].default)
        if json.dumps(was) != json.dumps(value) and (not KEYS[key].resumes or key in LENGTH):
            found[key] = (was, value)
    return found


def check_unchanged(study: Study, arms: Iterable[Arm]) -> None:
    """Raise `InputError` where an arm's folder holds a run with other keys, which cannot become this one."""
    for arm in arms:
        for key, (was, value) in changed_keys(arm).items():
            if key not in LENGTH:
                raise InputError(
                    f"{study.path}: variants.{arm.variant.name}: {key}",
                    value,
                    f"the arm in {arm.folder} has {was!r}, and is not trained again",
                    "Give it the same value, move the folder away, or set another output_dir.",
                )
