"""The recipe: flat YAML, with the command line over it, checked loudly before anything slow begins.

One path for both: a command-line value is read as YAML and goes through the same checks. Keys are the fields of
`RunConfig` (data, models, warm-up) and of `DROConfig` (training).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union

import yaml

from dro_rl.config import DROConfig
from dro_rl.errors import InputError, Phrase, first_line
from dro_rl.files import written_whole
from dro_rl.toy.world import TOY_BASE


def _option(default: Any, help: str) -> Any:
    if isinstance(default, dict):
        return field(default_factory=dict, metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class RunConfig:
    """Data, models and warm-up: what `DROTrainer` is given."""

    # > Data
    dataset_name: str = _option("", "Questions: a file, a folder with a file for each split, a hub name, or toy.")
    dataset_config: str | None = _option(
        None, "Configuration of a hub dataset, or a dataset of a folder that holds several."
    )
    dataset_columns: dict[str, Any] = _option(
        {}, "Columns of the data by the fields they are, where they have other names: {question: query, id: qid}."
    )
    dataset_train_split: str = _option("train", "Split to train on: a hub split, or a file's stem in a folder.")
    dataset_eval_split: str = _option("dev", "Split to evaluate on: early stopping looks at it, so never report it.")
    eval_dataset_name: str | None = _option(
        None, "Where the dev split is, when dataset_name is a single file with no dev file beside it."
    )
    max_train_samples: int | None = _option(None, "Use the first so many training questions.")
    max_eval_samples: int | None = _option(None, "Use the first so many dev questions.")

    # > Candidates
    num_documents: int | None = _option(None, "Cut each question's candidates to the first so many; unset: all.")
    keep_gold: bool = _option(
        False, "When cutting, keep labelled documents of training questions in place of the last others. Never of dev."
    )
    shuffle_documents: bool = _option(False, "Shuffle each question's candidates, by the seed and the question's id.")

    # > Models
    selector_model_name_or_path: str = _option("", "The selector: a folder or a hub name, or toy for the shipped one.")
    generator_model_name_or_path: str = _option("", "The generator: a folder or a hub name, or toy.")
    selector_model_revision: str | None = _option(None, "Hub revision of the selector.")
    generator_model_revision: str | None = _option(None, "Hub revision of the generator.")
    selector_prompt_template: str = _option(
        "selector", "The selector's prompt: a shipped template's name or a .jinja file."
    )
    generator_prompt_template: str = _option(
        "generator", "The generator's prompt: a shipped template's name or a file."
    )
    chat_template_kwargs: dict[str, Any] = _option({}, "Passed to chat templates, such as {enable_thinking: false}.")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = _option(
        "float32", "Type the weights are held in; bf16: true computes in bfloat16 over float32 weights."
    )
    attn_implementation: str | None = _option(None, "Attention: sdpa, eager, flash_attention_2, …")
    trust_remote_code: bool = _option(False, "Run code that comes with a model. Only for models you trust.")
    selector_lora_r: int = _option(0, "Rank of the selector's adapters; 0 trains all weights.")
    generator_lora_r: int = _option(0, "Rank of the generator's adapters; 0 trains all weights.")
    lora_alpha: int = _option(32, "Scale of the adapters.")
    lora_dropout: float = _option(0.0, "Dropout of the adapters.")
    lora_target_modules: list[str] | None = _option(
        None, "Layers with adapters; unset: every linear layer but the head."
    )

    # > Warm-up
    warmup: Literal["none", "selector", "generator", "both"] = _option(
        "none", "Supervised training before the first iteration, kept in a cache by the hash of what it depends on."
    )
    warmup_selector_order: Literal["labels", "ranking", "retriever", "random"] = _option(
        "labels",
        "What the selector imitates: labelled documents first, a given ranking, the retriever's order, or chance.",
    )
    warmup_selector_ranking: str | None = _option(
        None, "For warmup_selector_order: ranking. JSONL with {id, ranking: [document ids]}."
    )
    warmup_generator_documents: Literal["gold", "retrieved", "mixed", "random"] = _option(
        "mixed",
        "What the generator reads: labelled documents, the retriever's first K, labelled among others, or chance.",
    )
    warmup_selector_steps: int = _option(-1, "Optimizer steps of the selector's warm-up; -1: one epoch.")
    warmup_generator_steps: int = _option(-1, "Optimizer steps of the generator's warm-up; -1: one epoch.")
    warmup_selector_learning_rate: float = _option(1e-5, "Learning rate of the selector's warm-up.")
    warmup_generator_learning_rate: float = _option(1e-5, "Learning rate of the generator's warm-up.")
    warmup_batch_size: int = _option(8, "Questions a device and step of the warm-up.")
    warmup_cache_dir: str = _option(
        "~/.cache/dro_rl/warmup", "Where warmed-up models are kept: a folder that all nodes of a run share."
    )

    def check(self) -> None:
        """Raise `InputError` for the first value that breaks a rule."""
        for name in ("dataset_name", "selector_model_name_or_path", "generator_model_name_or_path"):
            if not getattr(self, name):
                raise InputError(name, Phrase("missing"), "a recipe names its data and both models", f"Set {name}.")
        for name in ("max_train_samples", "max_eval_samples", "num_documents", "warmup_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(name, value, "this is at least 1", "Use a positive number.")
        if self.keep_gold and self.num_documents is None:
            raise InputError(
                "keep_gold", True, "gold is kept where candidates are cut", "Set num_documents, or leave it out."
            )
        for name in ("selector_lora_r", "generator_lora_r", "lora_dropout", "lora_alpha"):
            if getattr(self, name) < 0:
                raise InputError(name, getattr(self, name), "this is not negative", "Use 0 or more.")
        if self.lora_dropout >= 1:
            raise InputError("lora_dropout", self.lora_dropout, "this is a share below 1", "Use 0.05, or 0 for none.")
        for name in ("warmup_selector_steps", "warmup_generator_steps"):
            if getattr(self, name) < 1 and getattr(self, name) != -1:
                raise InputError(name, getattr(self, name), "this is positive, or -1 for one epoch", "Use one of them.")
        for name in ("warmup_selector_learning_rate", "warmup_generator_learning_rate"):
            if getattr(self, name) <= 0:
                raise InputError(
                    name, getattr(self, name), "a warm-up moves the model", "Use a rate above 0, or warmup: none."
                )
        if (self.warmup_selector_order == "ranking") != (self.warmup_selector_ranking is not None):
            raise InputError(
                "warmup_selector_ranking",
                self.warmup_selector_ranking,
                "a ranking file goes with warmup_selector_order: ranking",
                "Set both or neither.",
            )

    def model_name(self, role: str) -> str:
        """Where a role's model comes from: a folder or a hub name."""
        name = getattr(self, f"{role}_model_name_or_path")
        return str(TOY_BASE) if name == "toy" else name

    def warms(self, role: str) -> bool:
        """Whether a role is warmed up."""
        return self.warmup in (role, "both")


@dataclass(frozen=True)
class Recipe:
    """A checked recipe.

    Args:
        run: data, models, warm-up.
        training: the trainer's settings.
        values: every key that was given, and every key of ours that was not with its default: what `recipe.yaml` holds.
    """

    run: RunConfig
    training: DROConfig
    values: Mapping[str, Any]

    def save(self, path: Path) -> None:
        """Write the resolved recipe, whole. It loads again as a recipe."""
        with written_whole(path) as beside:
            beside.write_text(yaml.safe_dump(dict(self.values), sort_keys=False, allow_unicode=True))


NOT_OURS = {
    "num_train_epochs": "num_iterations (E-steps) and m_step_epochs (passes over their rollouts)",
    "eval_strategy": "eval_iterations",
    "eval_steps": "eval_iterations",
    "eval_on_start": "nothing: the models are always evaluated before the first iteration",
    "auto_find_batch_size": "a smaller per_device_train_batch_size and a larger gradient_accumulation_steps",
    "label_smoothing_factor": "nothing: the likelihood is exact",
    "data_seed": "seed, from which the order of questions follows too",
    "ignore_data_skip": "nothing: a resumed run finds its place without reading data",
    "save_only_model": "nothing: a checkpoint is there to go on from",
    "push_to_hub": "`hf upload` on selector/ and generator/ when the run is done",
    "use_vllm": "rollout_engine: vllm",
    "vllm_server_host": "vllm_server_base_url: http://host:port",
    "vllm_server_port": "vllm_server_base_url: http://host:port",
    "vllm_importance_sampling_correction": "max_log_ratio: rollouts are always corrected by p/q",
    "ddp_find_unused_parameters": "nothing: it follows from interleave",
}
"""Keys of the stock Trainer and of TRL that have no effect here, with what to use instead."""

REFUSED = {
    "repetition_penalty": (
        "a penalty on what was written before falls on the brackets and arrows of the format itself",
        "Leave it out; constrain_selection: true keeps numbers from repeating.",
    ),
    "generation_kwargs": (
        "what is handed to an engine alone makes it sample from something that the weights do not know",
        "Use temperature, top_p, top_k, min_p or constrain_selection, which they do.",
    ),
    "vllm_structured_outputs_regex": (
        "a pattern that the engine keeps and the trainer does not score makes every ratio p/q wrong",
        "Use constrain_selection: true, which both keep.",
    ),
    "vllm_importance_sampling_mode": (
        "the correction is a factor p/q of each rollout's weight, truncated from above",
        "Leave it out; max_log_ratio bounds the correction.",
    ),
    "vllm_importance_sampling_clip_max": (
        "the correction is bounded in nats",
        "Use max_log_ratio, the logarithm of this.",
    ),
    "vllm_importance_sampling_cap": ("the correction is bounded in nats", "Use max_log_ratio, the logarithm of this."),
    "vllm_importance_sampling_clip_min": (
        "a ratio near zero is a rollout that p would hardly write, and stays near zero",
        "Leave it out.",
    ),
    "epsilon": (
        "weights are fixed in the E-step, so that no ratio to an older policy is there to clip",
        "Leave it out; max_log_ratio bounds p/q where the proposal is not p.",
    ),
}
"""Keys of TRL that would make the proposal dishonest, or that correct it in another way: the rule and the fix."""


def load_recipe(path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe file, put `overrides` over it, and check everything that can be checked without data or models.

    Raises:
        InputError: naming the key, its value, the rule and the fix.
    """
    given = {**(read_yaml(Path(path)) if path is not None else {}), **(overrides or {})}
    fields = known_fields()
    for key in given:
        if key in NOT_OURS:
            raise InputError(key, given[key], "this key has no effect in dro_rl", f"Use {NOT_OURS[key]}.")
        if key in REFUSED:
            raise InputError(key, given[key], *REFUSED[key])
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f"Did you mean {close[0]}?" if close else "`dro_rl/train.py --help` lists the keys."
            raise InputError(key, given[key], "there is no such key", hint)
    values = {key: _typed(key, value, fields[key]) for key, value in given.items()}
    own = {f.name for f in dataclasses.fields(RunConfig)}
    run = RunConfig(**{key: value for key, value in values.items() if key in own})
    run.check()
    if not values.get("output_dir"):
        raise InputError(
            "output_dir", Phrase("missing"), "a run has a folder of its own", "Set output_dir: runs/<name>."
        )
    settings = {key: value for key, value in values.items() if key not in own}
    try:
        training = DROConfig(**settings)
    except InputError:
        raise
    except (ValueError, TypeError) as error:
        raise InputError(
            "recipe", Phrase(first_line(error)), "transformers accepts the settings", "Correct it."
        ) from None
    defaults = {f.name: getattr(run, f.name) for f in dataclasses.fields(RunConfig)}
    defaults |= {name: DROConfig.__dataclass_fields__[name].default for name in DROConfig.__annotations__}
    return Recipe(run, training, {**defaults, **values})


def parse_command_line(arguments: Sequence[str]) -> tuple[str | None, dict[str, Any]]:
    """Split `RECIPE [--key value …]` into the recipe's path and its overrides.

    The recipe is the first positional argument or `--config`. Values are YAML: `--target_ess null`, `--bf16 true`,
    `--lora_target_modules [q_proj, v_proj]`. A key without a value is true.
    """
    path: str | None = None
    values: dict[str, list[str]] = {}
    key: str | None = None
    for argument in arguments:
        if argument.startswith("--"):
            name, _, value = argument[2:].partition("=")
            key = name.replace("-", "_")
            if key in values:
                raise InputError("command line", argument, "a key is given once", "Remove one of the two.")
            values[key] = [value] if value else []
        elif key is None or (key == "config" and values["config"]):
            if path is not None:
                raise InputError(
                    "command line", argument, "one recipe, then --key value", "Remove it, or name its key."
                )
            path = argument
        else:
            values[key].append(argument)
    if "config" in values:
        if path is not None or len(values["config"]) != 1:
            raise InputError("--config", " ".join(values["config"]), "one recipe is named once", "Name it once.")
        path = values.pop("config")[0]
    return path, {key: _command_line_value(key, items) for key, items in values.items()}


def _command_line_value(key: str, items: list[str]) -> Any:
    if not items:
        return True
    try:
        parsed = [yaml.safe_load(item) for item in items]
    except yaml.YAMLError:
        raise InputError(f"--{key}", " ".join(items), "a value is YAML", "Put quotes around it.") from None
    return parsed[0] if len(parsed) == 1 else parsed


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key stands once."""


def _unique_keys(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        line = key_node.start_mark.line + 1
        if key in seen:
            raise InputError(
                f"{loader.name}: line {line}", key, f"a key stands once, and line {seen[key]} has it too", "Remove one."
            )
        seen[key] = line
    return loader.construct_mapping(node)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_keys)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a flat YAML file. Raises `InputError` for one that is missing, broken, empty, or repeats a key."""
    if not path.is_file():
        raise InputError(str(path), Phrase("no such file"), "a recipe is a YAML file", "Check the path.")
    with path.open(encoding="utf-8") as stream:
        loader: _StrictLoader | None = None
        try:
            loader = _StrictLoader(stream)
            loader.name = str(path)
            values = loader.get_single_data()
        except (UnicodeDecodeError, yaml.reader.ReaderError) as error:
            raise InputError(
                str(path), Phrase(first_line(error)), "a recipe is UTF-8 text", "Convert the file."
            ) from None
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else "?"
            raise InputError(
                f"{path}: line {line}", Phrase(str(error.problem)), "a recipe is YAML", "Correct it."
            ) from None
        finally:
            if loader is not None:
                loader.dispose()
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(str(path), Phrase(type(values).__name__), "a recipe is `key: value` lines", "Write some.")
    return values


def known_fields() -> dict[str, Any]:
    """Every key with its type."""
    hints = {**typing.get_type_hints(DROConfig), **typing.get_type_hints(RunConfig)}
    names = [f.name for cls in (RunConfig, DROConfig) for f in dataclasses.fields(cls) if f.init]
    return {name: hints[name] for name in names}


def _typed(key: str, value: Any, kind: Any) -> Any:
    """The value as the key's type, or an error that says what the type is."""
    options = typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,)
    for option in options:
        matches, converted = _matches(value, option)
        if matches:
            return converted
    raise InputError(
        key, value, f"this is {' or '.join(_describe(option) for option in options)}", "Correct the value."
    )


def _matches(value: Any, kind: Any) -> tuple[bool, Any]:
    origin = typing.get_origin(kind)
    if kind is type(None):
        return value is None, value
    if kind is Any:
        return True, value
    if origin is Literal:
        if isinstance(value, bool) and "off" in typing.get_args(kind):  # YAML reads on and off as booleans
            value = "on" if value else "off"
        return value in typing.get_args(kind), value
    if origin is list:
        inner = typing.get_args(kind)[0]
        value = [value] if isinstance(value, str) else value  # a list of one, as the command line gives it
        return isinstance(value, list) and all(_matches(item, inner)[0] for item in value), value
    if kind is dict or origin is dict:
        return isinstance(value, dict), value
    if kind is bool:
        return isinstance(value, bool), value
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if kind is float:
        if isinstance(value, str):  # YAML reads 1e-5 as text
            try:
                value = float(value)
            except ValueError:
                return False, value
        return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value), value
    return isinstance(value, str), value


def _describe(kind: Any) -> str:
    if kind is type(None):
        return "null"
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    return {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false"}.get(
        getattr(kind, "__name__", ""), getattr(kind, "__name__", str(kind))
    )


def describe_keys() -> list[tuple[str, str, str]]:
    """Each key of ours with its default and what it is, for `--help`."""
    return [
        (f.name, "" if f.default in (dataclasses.MISSING, "") else str(f.default), f.metadata["help"])
        for cls in (RunConfig, DROConfig)
        for f in dataclasses.fields(cls)
        if f.name in cls.__annotations__
    ]
