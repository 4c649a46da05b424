"""What is checked of a study before its first arm starts: every variant, as its training would be."""

from __future__ import annotations

from collections.abc import Sequence

from dro_rl.progress import Progress
from dro_rl.recipe import read_keys
from dro_rl.study.arms import Arm, arm_folder, check_unchanged
from dro_rl.study.plan import MODELS, Study, Variant, at, overrides


def check_arms(study: Study, arms: Sequence[Arm], processes: int = 1) -> None:
    """Check arms that are to be run: one of each variant by all that a training checks before it loads a model.

    Raises:
        InputError: naming the study's file, the variant and the key.
    """
    from dro_rl.job.preflight import prepare
    from dro_rl.recipe import load_recipe

    check_unchanged(study, arms)
    first = {arm.variant.name: arm for arm in reversed(arms) if arm.keys}
    with Progress(len(first), "checks", "variants") as progress:
        for name, arm in first.items():
            with at(f"{study.path}: variants.{name}"):
                prepare(load_recipe(study.base, {**arm.keys, **_first_models(study, arm.variant)}), processes)
            progress.update(1)


def _first_models(study: Study, variant: Variant) -> dict[str, str]:
    """For a variant that starts from another's models, which may not be there yet: those that the other starts from.

    They are of one kind, so what fits them fits what becomes of them.
    """
    if variant.starts_from is None:
        return {}
    before, seed = study.variants[variant.starts_from], study.seeds[0]
    keys = {**overrides(before, seed, arm_folder(study, before.name, seed)), **_first_models(study, before)}
    run, _ = read_keys(study.base, keys)
    return {key: getattr(run, key) for key in MODELS if key not in variant.keys}
