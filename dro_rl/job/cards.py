"""Model cards: `README.md` in the folder of each trained model, of what the run's folder says. Files alone are read.

Whatever comes from a recipe, a question file or a name is text there, and nothing more. Paths of this machine are
shown by their last part.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from dro_rl import __version__
from dro_rl.errors import InputError, Phrase
from dro_rl.evaluation.report import interval, label, number
from dro_rl.evaluation.results import Conditions, metric_values, read_results
from dro_rl.evaluation.stages import FINAL, STARTS, summary_path
from dro_rl.evaluation.statistics import CONFIDENCE, Estimate, estimate
from dro_rl.files import written_whole
from dro_rl.keys.reference import KEYS
from dro_rl.roles import ROLES, Role
from dro_rl.runs import Run, read_run, record_of
from dro_rl.shown import markdown, visible

CARD = "README.md"
METRICS = ("em", "f1", "rouge_l", "recall@5", "answer_recall@5", "answer_logp", "valid")
"""What the tables show; result files have every metric."""
WORK: Mapping[Role, str] = {
    "selector": "reads a question with its candidate documents, and writes the numbers of those to read: `[5] > [2]`",
    "generator": "reads a question with the documents that were selected, and writes the answer",
}
LOADING = {
    False: """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER_OR_REPOSITORY")
tokenizer = AutoTokenizer.from_pretrained("FOLDER_OR_REPOSITORY")""",
    True: """\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("FOLDER_OR_REPOSITORY")  # over the base that adapter_config.json names
tokenizer = AutoTokenizer.from_pretrained("FOLDER_OR_REPOSITORY")""",
}
"""By whether the folder holds adapters alone."""


def write_cards(folder: Path) -> list[Path]:
    """Write the card of each model that a run has exported.

    Returns:
        The cards, in the order of the roles.

    Raises:
        InputError: it is no run, or one that has exported nothing.
    """
    run = read_run(folder)
    roles = [role for role in ROLES if (folder / role / "config.json").is_file() or _is_adapter(folder / role)]
    if not roles:
        raise InputError(
            str(folder),
            Phrase("no model was exported"),
            "a run writes selector/ and generator/ at its end",
            "Let it come to its end: --resume_from_checkpoint auto.",
        )
    results = list(_results(folder, run))
    cards = []
    for role in roles:
        path = folder / role / CARD
        with written_whole(path) as beside:
            beside.write_text(card_of(run, role, results), encoding="utf-8")
        cards.append(path)
    return cards


def card_of(run: Run, role: Role, results: Sequence[tuple[Conditions, Mapping[str, Estimate]]]) -> str:
    """The card of one model of a run: metadata, what it does, how to load it, results, inputs, recipe."""
    inputs, versions = record_of(run.path)
    base = str(run.recipe[f"{role}_model_name_or_path"])
    adapters = _is_adapter(run.path / role)
    data = ModelCardData(
        base_model=None if _is_path(base) else base,
        library_name="peft" if adapters else "transformers",
        pipeline_tag="text-generation",
        tags=["dro-rl", "retrieval-augmented-generation", role],
    )
    other = next(each for each in ROLES if each != role)
    rate = run.recipe.get(f"{role}_learning_rate")
    frozen = (run.recipe.get("learning_rate") if rate is None else rate) == 0
    weights = "Adapters over" if adapters else "Kept as it was while the other moved:" if frozen else "Trained from"
    lines = [
        f"---\n{data.to_yaml()}\n---",
        f"# {role.capitalize()} of {markdown(run.path.name)}",
        f"It {WORK[role]}. It is one of a pair: the {other} was trained with it, from questions and answers, by "
        f"dro_rl {markdown(versions.get('dro_rl', __version__))}, and what is "
        f"measured below is the pair's work. {weights} {markdown(_shown(base))}"
        f"{', ' + _revision(run, role) if _revision(run, role) else ''}.",
        "## Loading",
        f"```python\n{LOADING[adapters]}\n```",
        "Its prompt is `prompt.jinja`, beside it: it was trained on no other. With both models and `pipeline.json` of "
        "the run in a folder, `dro_rl.RAGPipeline.from_pretrained(FOLDER)` answers as it was measured.",
        "## Results",
        *_tables(run, results),
        "## What it was trained on",
        *_bullets(
            ("data", _shown(str(run.recipe["dataset_name"]))),
            ("kept", f"the weights of {run.kept}" if run.kept else "nothing as yet"),
            *((f"{name} {version}", "") for name, version in versions.items()),
        ),
        "Hashes of what it read: sha256, of a model of the hub its commit.",
        _table(
            ("what", "part", "hash"), [(key, part, sha) for key, parts in inputs.items() for part, sha in parts.items()]
        ),
        "## Recipe",
        "Every key that is not at its default:",
        _indented(recipe_text(run.recipe)),
        "## What it is not",
        "Not a model for talk: it knows one prompt. Nothing says how it does on questions or documents unlike those "
        "above; documents that lie are believed. What its base has learned, and the licences of base and data, stay: "
        "this card grants none.",
    ]
    return "\n\n".join(lines) + "\n"


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """The keys of a recipe that are not at their defaults, as YAML, paths by their last part."""
    changed = {
        name: _shown(value) if isinstance(value, str) else value
        for name, value in recipe.items()
        if name in KEYS and value != KEYS[name].default and not name.endswith("_token")
    }
    return yaml.safe_dump(changed, sort_keys=False, allow_unicode=True, width=10_000).rstrip()


def _results(folder: Path, run: Run) -> Iterator[tuple[Conditions, Mapping[str, Estimate]]]:
    """What was measured: where training began, what was kept, then every evaluation by `dro-rl evaluate`."""
    known = [stage["stage"] for stage in run.stages]
    begun = [stage for stage in known if stage in STARTS][-1:]
    places = [summary_path(folder).with_name(f"{stage}.parquet") for stage in (*begun, FINAL) if stage in known]
    places += sorted((folder / "evaluation").glob("*/questions.parquet"))
    for place in places:
        if place.is_file():
            results, conditions = read_results(place)
            yield conditions, {name: estimate(metric_values(results, name)) for name in METRICS}


def _tables(run: Run, results: Sequence[tuple[Conditions, Mapping[str, Estimate]]]) -> Iterator[str]:
    """A table for each split, in the order in which it was first measured."""
    if not results:
        yield "None were measured."
        return
    splits = list(dict.fromkeys((each.split, each.questions_hash) for each, _ in results))
    for split, questions_hash in splits:
        of_split = [found for found in results if (found[0].split, found[0].questions_hash) == (split, questions_hash)]
        conditions = of_split[0][0]
        yield (
            f"On {markdown(split)}: {conditions.num_questions:,} questions, of hash {markdown(questions_hash)}, "
            f"with up to {conditions.num_documents} documents each."
        )
        head = ("", *(label(name) for name in METRICS))
        yield _table(head, [(_who(run, each), *map(_cell, means.values())) for each, means in of_split])
    yield (
        f"Percent, but for what names its unit, with {CONFIDENCE:.0%} intervals by the bootstrap over questions. "
        "They say nothing of other seeds."
    )


def _who(run: Run, conditions: Conditions) -> str:
    """What a row of the table measures."""
    if conditions.control != "none":
        return f"control: {conditions.control}"
    if conditions.stage in STARTS:
        return "before joint training"
    return f"this pair ({run.kept})" if conditions.stage == FINAL and run.kept else "this pair"


def _cell(found: Estimate) -> str:
    return f"{number(found.mean)} [{interval(found.low, found.high)}]" if found.n else "–"


def _revision(run: Run, role: Role) -> str:
    revision = run.recipe.get(f"{role}_model_revision")
    return f"revision {markdown(revision)}" if revision else ""


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def _is_path(name: str) -> bool:
    """Whether a name is a path of this machine, and no hub name."""
    return name.startswith((".", "~")) or os.path.isabs(name) or name.count("/") != 1 or os.path.exists(name)


def _shown(value: str) -> str:
    return Path(value).name if value.startswith("~") or Path(value).is_absolute() else value


def _bullets(*pairs: tuple[str, object]) -> list[str]:
    return ["\n".join(f"- {markdown(name)}{f': {markdown(value)}' if value else ''}" for name, value in pairs)]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(map(markdown, row))} |" for row in (head, ["---"] * len(head), *rows))


def _indented(text: str) -> str:
    """As code: nothing in it is markup, whatever it holds."""
    return "\n".join(f"    {visible(line)}" for line in text.splitlines())
