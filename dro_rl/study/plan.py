"""A study's file: a base recipe, variants of it, seeds, and claims; read as strictly as a recipe, before anything runs.

`StudyKeys`, `VariantKeys` and `ClaimKeys` say what the file may hold. What else a variant has are keys of a recipe.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dro_rl.errors import InputError, Phrase, did_you_mean, some
from dro_rl.evaluation.stages import iteration_of
from dro_rl.flat_yaml import read_yaml
from dro_rl.keys import at_least, check_keys, keys_of, option, within
from dro_rl.keys.inherited import REFUSED, WITHOUT_EFFECT
from dro_rl.keys.reference import KEYS, as_options
from dro_rl.keys.run import RunConfig
from dro_rl.keys.training import TrainingKeys
from dro_rl.recipe import read_keys
from dro_rl.recipe.files import recipe_file
from dro_rl.roles import ROLES
from dro_rl.shipped import STUDIES, find, headline
from dro_rl.study.metrics import GRADIENTS, LOGGED, METRICS

OWN = ("seed", "output_dir", "resume_from_checkpoint")
"""Keys of a recipe that a study gives each of its arms."""
MODELS = tuple(f"{role}_model_name_or_path" for role in ROLES)
LEVEL = within("(0, 0.5]", "Use 0.05.")
SHOWN = ("em", "f1", "recall@3")


@dataclass
class StudyKeys:
    """What a study's file holds."""

    base: str = option("", "The recipe that the variants change: a file, or a shipped one's name.")
    output_dir: str | None = option(None, "Folder of the arms; unset: runs/studies/<name of the file>.")
    seeds: list[int] | None = option(None, "Seeds of every variant, two or more to decide anything.")
    level: float = option(0.05, "Level of the claims, all together: corrected by Holm's method.", LEVEL)
    metrics: list[str] | None = option(None, "What the table of means shows beside the claims' own metrics.")
    keys: dict[str, Any] = option({}, "Keys of a recipe that all variants have.")
    variants: dict[str, Any] = option({}, "Keys of a recipe in which each differs, by its name.")
    claims: dict[str, Any] = option({}, "What is claimed, by name.")


@dataclass
class VariantKeys:
    """What a variant may say beside keys of a recipe."""

    starts_from: str | None = option(None, "Train from the models that this variant, with the same seed, has kept.")
    of: str | None = option(None, "Train nothing: look at this variant's runs, by `stage` or with a `control`.")
    stage: str | None = option(None, "An evaluation on the way: base, warmup, iteration-<t>.")
    control: Literal["retriever-order", "random", "gold"] | None = option(
        None, "What selects in place of the trained selector."
    )
    measure: Literal["gradients"] | None = option(
        None, "Train nothing: measure the selector's gradient where the training would start."
    )


@dataclass
class ClaimKeys:
    """What a claim says."""

    says: str = option("", "The claim in words.")
    variant: str = option("", "The variant that it is about.")
    test: Literal["above", "below", "never_falls", "steadier"] = option(
        "above",
        "above or below `against`; never_falls from one iteration to the next; steadier: less variance over seeds.",
    )
    against: str | float | None = option(None, "The variant, or the number, that it is compared with.")
    metric: str = option("", "What is compared.")
    by: float = option(0.0, "How much above or below at least; how far a value may fall.", at_least(0))
    stage: str | None = option(None, "The evaluation, or the iteration, that is compared: final unless said.")
    type: str | None = option(None, "Only questions of this type: 2-hop.")
    level: float | None = option(None, "Its own level.", LEVEL)


@dataclass(frozen=True)
class Variant:
    """A variant.

    Args:
        name: its name.
        keys: keys of a recipe, the study's and its own.
        starts_from, of, stage, control, measure: as in `VariantKeys`.
    """

    name: str
    keys: Mapping[str, Any]
    starts_from: str | None = None
    of: str | None = None
    stage: str | None = None
    control: str | None = None
    measure: str | None = None

    @property
    def trains(self) -> bool:
        """Whether its arms are trainings."""
        return self.of is None and self.measure is None

    @property
    def runs(self) -> bool:
        """Whether it has arms of its own. A stage of another's runs has not."""
        return self.stage is None

    @property
    def metrics(self) -> tuple[str, ...]:
        """What can be read off its arms."""
        if self.measure is not None:
            return GRADIENTS
        return (*METRICS, *LOGGED) if self.trains else METRICS


@dataclass(frozen=True)
class Claim:
    """A claim, as in `ClaimKeys`, with its name; `says` is never empty."""

    name: str
    says: str
    variant: str
    test: str
    against: str | float | None
    metric: str
    by: float
    stage: str | None
    type: str | None
    level: float


@dataclass(frozen=True)
class Study:
    """A checked study.

    Args:
        name: of its file.
        path: its file.
        called: what a command names it by: `joint`, or `mine.yaml --seeds 0,1`.
        about: what the file says of itself first.
        base: the recipe's name, or its file.
        output_dir: folder of its arms.
        seeds: of every variant.
        metrics: what is shown, claims' metrics among them.
        variants, claims: by name.
    """

    name: str
    path: Path
    called: str
    about: str
    base: str
    output_dir: Path
    seeds: Sequence[int]
    metrics: Sequence[str]
    variants: Mapping[str, Variant]
    claims: Mapping[str, Claim]


def read_study(path: str | Path, seeds: Sequence[int] | None = None, over: Mapping[str, Any] | None = None) -> Study:
    """Read a study's file, or the shipped one of that name, and check all that needs neither data nor torch.

    Args:
        path: the file, or the name.
        seeds: in place of the file's.
        over: keys of a recipe that go over the study's `keys`, and under a variant's own; and `output_dir`, in place of
            the file's.

    Raises:
        InputError: naming the file, where in it, the value, the rule and the fix.
    """
    path, over = find(path, STUDIES), over or {}
    output_dir = over.get("output_dir")
    common = {key: value for key, value in over.items() if key != "output_dir"}
    with at("command line"):
        _recipe_keys(common)
        if not isinstance(output_dir, str | None):
            raise InputError("output_dir", output_dir, "this is a folder", "Name one.")
    with at(str(path)):
        given = read_yaml(path)
        _check_names(given, keys_of(StudyKeys))
        keys = StudyKeys(**given)
        check_keys(keys)
        if not keys.base:
            raise InputError("base", Phrase("missing"), "a study changes a recipe", "Set base: quickstart.")
        base = str(beside) if (beside := path.parent / keys.base).is_file() else keys.base
        recipe_file(base)
        asked = keys.seeds if seeds is None else list(seeds)
        if not asked or len(set(asked)) < len(asked):
            raise InputError("seeds", asked, "a study has seeds, each once", "Use seeds: [0, 1, 2].")
        if not keys.variants:
            raise InputError("variants", Phrase("missing"), "a study has at least one variant", "Name one.")
        folder = Path(output_dir or keys.output_dir or f"runs/studies/{path.stem}")
        with at("keys"):
            _recipe_keys(keys.keys)
        common = {**keys.keys, **common}
        variants = {name: _variant(name, value, common) for name, value in keys.variants.items()}
        for variant in variants.values():
            with at(f"variants.{variant.name}"):
                _check_variant(variant, variants, base, folder)
        claims = {name: _claim(name, value, variants, keys.level) for name, value in keys.claims.items()}
        for name, stage, trained in _stages(variants, claims):
            with at(name):
                _check_stage(stage, *read_keys(base, overrides(variants[trained], 0, folder)))
        metrics = keys.metrics if keys.metrics is not None else _usual(variants.values(), claims)
        for metric in metrics:
            _check_metric("metrics", metric, sorted({name for v in variants.values() for name in v.metrics}))
        shown = dict.fromkeys([*metrics, *(claim.metric for claim in claims.values())])
    shipped = path.resolve().parent == STUDIES.resolve()
    words = [path.stem if shipped else str(path)]
    words += [] if seeds is None else ["--seeds", ",".join(map(str, seeds))]
    called = shlex.join([*words, *as_options(over)])
    return Study(path.stem, path, called, headline(path), base, folder, asked, tuple(shown), variants, claims)


@contextmanager
def at(place: str) -> Iterator[None]:
    """Errors of the block say that they are there."""
    try:
        yield
    except InputError as error:
        where = error.place if error.place.startswith(place) else f"{place}: {error.place}"
        raise InputError(where, error.value, error.rule, error.fix) from None


def overrides(variant: Variant, seed: int, folder: Path) -> dict[str, Any]:
    """What goes over the base recipe for one arm."""
    return {**variant.keys, "seed": seed, "output_dir": str(folder)}


def _variant(name: str, value: Any, common: Mapping[str, Any]) -> Variant:
    with at(f"variants.{name}"):
        _check_name_of(name)
        given = _mapping(name, value)
        options = keys_of(VariantKeys)
        own = VariantKeys(**{key: value for key, value in given.items() if key in options})
        check_keys(own)
        changed = {key: value for key, value in given.items() if key not in options}
        _recipe_keys(changed, options)
        if own.of is not None and changed:
            key = next(iter(changed))
            raise InputError(key, changed[key], f"nothing is trained here, of: {own.of} is", "Leave it out.")
        keys = {**common, **changed}
        if own.starts_from is not None:
            keys = {**{key: common[key] for key in common if key not in MODELS}, "warmup": "none", **changed}
        return Variant(name, {} if own.of is not None else keys, **dataclasses.asdict(own))


def _check_variant(variant: Variant, variants: Mapping[str, Variant], base: str, output_dir: Path) -> None:
    """Rules over several keys, and the variants that one names."""
    if (variant.of is None) != (variant.stage is None and variant.control is None):
        raise InputError(
            "of", variant.of, "a stage, or a control, is looked at of a trained variant", "Set both, or neither."
        )
    if variant.stage is not None and variant.control is not None:
        raise InputError("stage", variant.stage, "a control selects for the models kept at the end", "Leave it out.")
    if variant.measure is not None and variant.of is not None:
        raise InputError("measure", variant.measure, "gradients are measured where a training starts", "Leave out of.")
    for key in ("starts_from", "of"):
        named = getattr(variant, key)
        if named is None:
            continue
        trained = [name for name, other in variants.items() if other.trains and name != variant.name]
        if named not in trained:
            raise InputError(
                key,
                named,
                f"this is another variant, which trains{_few(trained)}",
                did_you_mean(named, trained),
            )
    chain = [variant.name]
    while (before := variants[chain[-1]].starts_from) is not None:
        if before in chain:
            raise InputError("starts_from", before, "some variant starts from a recipe's models", "Break the circle.")
        chain.append(before)
    if variant.of is None:
        read_keys(base, overrides(variant, 0, output_dir))


def _stages(variants: Mapping[str, Variant], claims: Mapping[str, Claim]) -> Iterator[tuple[str, str, str]]:
    """Where a stage is named, the stage, and the variant whose training it is of."""
    for variant in variants.values():
        if variant.stage is not None:
            yield f"variants.{variant.name}", variant.stage, str(variant.of)
    for claim in claims.values():
        for name in (claim.variant, claim.against):
            if claim.stage is not None and isinstance(name, str):
                yield f"claims.{claim.name}", claim.stage, name


def _check_stage(stage: str, run: RunConfig, training: TrainingKeys) -> None:
    """Refuse a stage that a training cannot have."""
    if stage in ("base", "final") or (stage == "warmup" and run.warmup != "none"):
        return
    if 1 <= iteration_of(stage) <= training.num_iterations:
        return
    warmed = "" if run.warmup == "none" else "warmup, "
    raise InputError(
        "stage",
        stage,
        f"a stage of this training is base, {warmed}final, or iteration-1 to iteration-{training.num_iterations}",
        did_you_mean(stage, ("base", "warmup", "final", "iteration-1"), "Name one."),
    )


def _claim(name: str, value: Any, variants: Mapping[str, Variant], level: float) -> Claim:
    with at(f"claims.{name}"):
        given = _mapping(name, value)
        _check_names(given, keys_of(ClaimKeys))
        keys = ClaimKeys(**given)
        check_keys(keys)
        _check_is_variant("variant", keys.variant, variants)
        compared = [keys.variant]
        if keys.test == "never_falls":
            if keys.against is not None or keys.stage is not None:
                key = "against" if keys.against is not None else "stage"
                raise InputError(
                    key, getattr(keys, key), "never_falls looks at all iterations of one variant", "Leave it out."
                )
            if not variants[keys.variant].trains:
                raise InputError("variant", keys.variant, "never_falls looks at a training", "Name a trained variant.")
        elif isinstance(keys.against, str):
            _check_is_variant("against", keys.against, variants)
            if keys.against == keys.variant:
                raise InputError("against", keys.against, "a claim compares two variants", "Name another.")
            compared.append(keys.against)
        elif keys.against is None or keys.test == "steadier":
            rule = "this is a variant" if keys.test == "steadier" else "this is a variant, or a number"
            raise InputError("against", keys.against, rule, f"Use one of {', '.join(variants)}.")
        if keys.test == "steadier" and keys.by:
            raise InputError("by", keys.by, "steadier compares variances, one with the other", "Leave it out.")
        for variant in compared:
            _check_metric("metric", keys.metric, variants[variant].metrics, f" of {variant}")
            if keys.stage is not None and not variants[variant].trains:
                raise InputError("stage", keys.stage, f"{variant} is no training", "Leave it out.")
        if keys.type is not None and keys.metric not in METRICS:
            raise InputError("type", keys.type, "types are of the dev split's questions", f"Use {METRICS[0]}.")
        return Claim(
            name,
            keys.says or _in_words(keys),
            keys.variant,
            keys.test,
            keys.against,
            keys.metric,
            keys.by,
            keys.stage,
            keys.type,
            keys.level or level,
        )


def _in_words(keys: ClaimKeys) -> str:
    if keys.test == "never_falls":
        return f"{keys.metric} of {keys.variant} never falls from one iteration to the next"
    what = f"{keys.metric} of {keys.variant}" + (f" on {keys.type}" if keys.type else "")
    what += f" at {keys.stage}" if keys.stage else ""
    if keys.test == "steadier":
        return f"{what} varies less over seeds than that of {keys.against}"
    margin = f" by {keys.by:g} or more" if keys.by else ""
    return f"{what} is {keys.test} {keys.against}{margin}"


def _usual(variants: Iterable[Variant], claims: Mapping[str, Claim]) -> tuple[str, ...]:
    """What is shown unless told: of evaluations, where there are any; else what is claimed, or all of gradients."""
    if any(variant.measure is None for variant in variants):
        return SHOWN
    return () if claims else GRADIENTS


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(name, value, "this is keys with their values, or {} for none", "Write key: value lines.")
    return value


def _recipe_keys(given: Mapping[str, Any], others: Iterable[str] = ()) -> None:
    """Refuse what is no key of a recipe. What transformers has and recipes refuse, `read_keys` says better."""
    _check_names({key: given[key] for key in given if key not in {*WITHOUT_EFFECT, *REFUSED}}, [*others, *KEYS])
    for key in OWN:
        if key in given:
            raise InputError(key, given[key], "the study gives each arm its own", "Leave it out.")


def _check_names(given: Mapping[str, Any], known: Iterable[str]) -> None:
    known = list(known)
    for key, value in given.items():
        if key not in known:
            raise InputError(key, value, "there is no such key", did_you_mean(key, known))


def _check_name_of(variant: str) -> None:
    if not all(part.isalnum() for part in variant.replace("-", "_").split("_")):
        raise InputError(variant, Phrase("a name"), "its folder has it: letters, digits, - and _", "Use these.")


def _check_is_variant(key: str, name: str, variants: Iterable[str]) -> None:
    names = list(variants)
    if name not in names:
        raise InputError(
            key,
            name or Phrase("missing"),
            f"this is one of the study's variants{_few(names)}",
            did_you_mean(name, names),
        )


def _check_metric(place: str, metric: str, known: Sequence[str], of: str = "") -> None:
    if metric not in known:
        raise InputError(
            place,
            metric or Phrase("missing"),
            f"this is a metric{of}{_few(known, 12)}",
            did_you_mean(metric, known),
        )


def _few(names: Sequence[str], most: int = 6) -> str:
    return f" ({some(names, most)})" if names else ", and there is none"
