"""Claims about recipes: what is accepted, what is refused, and that a refusal names key, value, rule, fix."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from trl.trainer.base_config import _BaseConfig

from dro_rl.config import DROConfig
from dro_rl.errors import InputError
from dro_rl.keys.inherited import REFUSED, WITHOUT_EFFECT
from dro_rl.keys.reference import KEYS, keys_page, keys_text
from dro_rl.recipe import RunConfig, load_recipe, parse_command_line

ROOT = Path(__file__).parent.parent / "recipes"
OTHER = {"accelerate", "studies"}
SHIPPED = sorted(path for path in ROOT.rglob("*.y*ml") if not OTHER & set(path.relative_to(ROOT).parts))
ACCELERATE = sorted((ROOT / "accelerate").glob("*.yaml"))
LEAST = {
    "dataset_name": "toy",
    "selector_model_name_or_path": "toy",
    "generator_model_name_or_path": "toy",
    "output_dir": "runs/x",
}


@pytest.fixture
def recipe_file(tmp_path):
    """Writes a recipe with the least keys and the text given, and returns its path."""

    def write(text: str = "") -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(LEAST) + text)
        return path

    return write


def refusal(**values: Any) -> InputError:
    """The error for the least recipe with these values over it."""
    with pytest.raises(InputError) as caught:
        load_recipe(None, {**LEAST, **values})
    return caught.value


# Command line -----------------------------------------------------------------------------------------------


def test_the_recipe_is_the_first_argument_or_config() -> None:
    rest = ["--seed", "1"]
    assert parse_command_line(["a.yaml", *rest]) == parse_command_line(["--config", "a.yaml", *rest])
    assert parse_command_line(["a.yaml", *rest]) == parse_command_line([*rest, "--config=a.yaml"])
    assert parse_command_line(["a.yaml", *rest]) == ("a.yaml", {"seed": 1})


def test_two_recipes_are_refused() -> None:
    for arguments in (
        ["a.yaml", "b.yaml"],
        ["a.yaml", "--config", "b.yaml"],
        ["--config", "a.yaml", "b.yaml"],
    ):
        with pytest.raises(InputError, match="one recipe"):
            parse_command_line(arguments)


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        (["--target_ess", "null"], {"target_ess": None}),
        (["--bf16"], {"bf16": True}),
        (["--bf16", "false"], {"bf16": False}),
        (["--warmup_selector_steps", "-1"], {"warmup_selector_steps": -1}),
        (["--lora_target_modules", "[q_proj, v_proj]"], {"lora_target_modules": ["q_proj", "v_proj"]}),
        (["--lora_target_modules", "q_proj", "v_proj"], {"lora_target_modules": ["q_proj", "v_proj"]}),
        (["--num-generations=4"], {"num_generations": 4}),
        (["--output_dir", "a b"], {"output_dir": "a b"}),
        (["--dataset_config", "12"], {"dataset_config": "12"}),
        (["--dataset_config", "'012'"], {"dataset_config": "012"}),
        (["--dataset_config", "null"], {"dataset_config": None}),
        (["--output_dir=2026-01-02"], {"output_dir": "2026-01-02"}),
        (["--output_dir", "null"], {"output_dir": None}),
        (["--output_dir", "true"], {"output_dir": "true"}),
        (["--output_dir"], {"output_dir": True}),
        (
            ["--chat_template_kwargs", "{enable_thinking: false}"],
            {"chat_template_kwargs": {"enable_thinking": False}},
        ),
    ],
    ids=str,
)
def test_values_on_the_command_line_are_yaml(arguments: list[str], values: dict[str, Any]) -> None:
    """Defect B8: `--bf16 False` was true."""
    assert parse_command_line(arguments) == (None, values)


def test_a_value_that_is_not_yaml_is_refused() -> None:
    with pytest.raises(InputError, match=r"--seed.*\[1"):
        parse_command_line(["--seed", "[1"])


def test_the_command_line_beats_the_file(recipe_file) -> None:
    path, overrides = parse_command_line([str(recipe_file("seed: 1\nbeta: 0.5\n")), "--seed", "2"])
    recipe = load_recipe(path, overrides)
    assert (recipe.training.seed, recipe.training.beta) == (2, 0.5)


def test_the_command_line_is_checked_like_the_file() -> None:
    path, overrides = parse_command_line(["--num_generations", "many"])
    with pytest.raises(InputError, match=r"num_generations: 'many': this is a whole number"):
        load_recipe(path, {**LEAST, **overrides})


# Keys and types ---------------------------------------------------------------------------------------------


def test_an_unknown_key_is_refused_with_the_nearest_known_one() -> None:
    error = refusal(num_generation=4)
    assert str(error) == "num_generation: 4: there is no such key. Did you mean num_generations?"


def test_a_key_like_no_other_is_refused_too() -> None:
    assert "`dro-rl recipe keys` lists them" in str(refusal(zzzz=1))


@pytest.mark.parametrize("key", WITHOUT_EFFECT)
def test_a_key_without_effect_is_refused_with_what_to_use(key: str) -> None:
    error = refusal(**{key: 1})
    shown = "given" if key == "hub_token" else 1  # a secret is not repeated
    assert str(error).startswith(f"{key}: {shown}: this key has no effect in dro_rl. Use ")


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("num_generations", "eight", "a whole number"),
        ("num_generations", 8.0, "a whole number"),
        ("num_generations", True, "a whole number"),
        ("learning_rate", "fast", "a number"),
        ("learning_rate", "nan", "a number"),
        ("learning_rate", True, "a number"),
        ("learning_rate", [1e-5], "a number"),
        ("output_dir", 7, "text"),
        ("trust_remote_code", "yes please", "true or false"),
        ("trust_remote_code", 1, "true or false"),
        ("target_ess", "half", "a number or null"),
        ("dtype", "int8", "one of float32, bfloat16, float16, auto"),
        ("warmup", "all", "one of none, selector, generator, both"),
        ("interleave", "sometimes", "one of joint, alternate"),
        ("answer_likelihood", "median", "one of sum, mean"),
        ("answer_aliases", "last", "one of first, max, logsumexp"),
        ("selector_baseline", "median", "one of none, mean"),
        ("lora_target_modules", [1], "null"),
        ("chat_template_kwargs", "x", "dict"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(key: str, value: Any, rule: str) -> None:
    error = refusal(**{key: value})
    assert error.place == key
    assert repr(value) in str(error)
    assert rule in error.rule


def test_numbers_that_yaml_reads_as_text_are_numbers(recipe_file) -> None:
    """YAML 1.1 wants `1.0e-5`; everyone writes `1e-5`."""
    assert yaml.safe_load("1e-5") == "1e-5"
    assert load_recipe(recipe_file("learning_rate: 1e-5\n")).training.learning_rate == 1e-5


def test_a_whole_number_is_a_number(recipe_file) -> None:
    assert load_recipe(recipe_file("weight_decay: 0\ntemperature: 1\n")).training.temperature == 1.0


@pytest.mark.parametrize(("key", "value"), [("shared_prefix", "on"), ("shared_prefix", "off"), ("fused_e_step", "off")])
def test_on_and_off_may_be_written_without_quotes(recipe_file, key: str, value: str) -> None:
    """YAML 1.1 reads them as true and false."""
    recipe = load_recipe(recipe_file(f"{key}: {value}\n"))
    assert getattr(recipe.training, key) == value
    assert getattr(load_recipe(recipe_file(""), {key: yaml.safe_load(value)}).training, key) == value


# Values that cannot be --------------------------------------------------------------------------------------


IMPOSSIBLE = [
    *[
        (key, 0)
        for key in (
            "num_iterations", "m_step_epochs", "num_generations", "num_selected", "max_completion_length",
            "max_answer_length", "selector_steps", "generator_steps", "eval_iterations",
            "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
            "questions_per_iteration", "max_prompt_length", "early_stopping_patience",
            "max_train_samples", "max_eval_samples", "warmup_batch_size", "warmup_gradient_accumulation_steps",
            "temperature", "top_p",
            "weight_temperature", "target_ess", "warmup_selector_steps", "warmup_generator_steps",
            "warmup_selector_learning_rate", "warmup_generator_learning_rate",
        )
    ],
    *[
        (key, -1)
        for key in (
            "beta", "entropy_coef", "max_log_ratio", "max_grad_norm", "weight_decay", "learning_rate",
            "selector_learning_rate", "generator_learning_rate", "top_k", "min_p", "selector_lora_r",
            "generator_lora_r", "lora_alpha", "lora_dropout", "num_generations",
        )
    ],
    ("num_generations", 1),
    ("top_p", 1.5),
    ("min_p", 1.0),
    ("weight_temperature", 0.5),
    ("target_ess", 1.0),
    ("temperature", float("nan")),
    ("lora_dropout", 1.0),
    ("warmup_selector_steps", -2),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), IMPOSSIBLE, ids=str)
def test_an_impossible_value_is_refused_with_key_value_rule_and_fix(key: str, value: Any) -> None:
    error = refusal(**{key: value})
    assert error.place == key
    assert str(error).startswith(f"{key}: {value}: ")
    assert len(error.rule) > 8
    assert re.match(r"[A-Z].*\.$", error.fix)


def test_one_rollout_is_accepted_as_a_control() -> None:
    """m = 1: every weight is one. Refused unless asked for."""
    assert "allow_single_generation" in refusal(num_generations=1).fix
    recipe = load_recipe(None, {**LEAST, "num_generations": 1, "allow_single_generation": True})
    assert recipe.training.num_generations == 1


def test_two_frozen_models_are_refused_and_one_is_not() -> None:
    frozen = {"selector_learning_rate": 0, "generator_learning_rate": 0}
    assert "one of the two models trains" in str(refusal(**frozen))
    assert "one of the two models trains" in str(refusal(learning_rate=0))
    recipe = load_recipe(None, {**LEAST, "selector_learning_rate": 0})
    assert recipe.training.role_learning_rate("selector") == 0
    assert recipe.training.role_learning_rate("generator") == 1e-5


def test_uniform_weights_are_accepted_as_a_control_and_have_no_temperature() -> None:
    assert load_recipe(None, {**LEAST, "weighting": "uniform"}).training.weighting == "uniform"
    for setting in ({"target_ess": 0.5}, {"weight_temperature": 2.0}):
        assert refusal(weighting="uniform", **setting).place == "weighting"


def test_turns_need_two_models_that_train() -> None:
    assert refusal(interleave="alternate", selector_learning_rate=0).place == "interleave"


def test_a_temperature_and_a_target_for_it_are_refused() -> None:
    assert refusal(target_ess=0.5, weight_temperature=2.0).place == "target_ess"


@pytest.mark.parametrize(
    "values", [{"warmup_selector_order": "ranking"}, {"warmup_selector_ranking": "r.jsonl"}], ids=str
)
def test_a_ranking_goes_with_its_file(values: dict[str, str]) -> None:
    assert refusal(**values).place == "warmup_selector_ranking"


@pytest.mark.parametrize("key", LEAST)
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(None, {k: v for k, v in LEAST.items() if k != key})
    assert str(caught.value).startswith(f"{key}: missing: ")


def test_what_transformers_refuses_is_an_input_error() -> None:
    assert "lr_scheduler_type" in str(refusal(lr_scheduler_type="sideways")) or "sideways" in str(
        refusal(lr_scheduler_type="sideways")
    )


def config(**values: Any) -> DROConfig:
    return load_recipe(None, {**LEAST, **values}).training


def test_more_documents_selected_than_there_are_is_refused() -> None:
    training = config(num_selected=5)
    training.check_documents(5, "q1")
    with pytest.raises(InputError, match=r"num_selected: 5: question q1 has 4 documents.*Lower num_selected"):
        training.check_documents(4, "q1")


def test_a_batch_that_splits_a_group_is_refused_with_the_sum() -> None:
    training = config(per_device_train_batch_size=6, gradient_accumulation_steps=2, num_generations=8)
    with pytest.raises(InputError, match=r"per_device_train_batch_size: 6: .*12 rollouts.*num_generations = 8"):
        training.check_batch(1, 100)
    training.check_batch(2, 100)


def test_a_group_may_be_split_over_micro_batches_and_processes() -> None:
    config(per_device_train_batch_size=1, gradient_accumulation_steps=2, num_generations=8).check_batch(4, 100)


def test_an_iteration_of_broken_steps_is_refused() -> None:
    training = config(per_device_train_batch_size=16, questions_per_iteration=3)
    with pytest.raises(InputError, match=r"questions_per_iteration: 3: .*whole steps of 2.*multiple of 2"):
        training.check_batch(1, 100)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"per_device_train_batch_size": 8, "questions_per_iteration": 10}, "questions_per_iteration"),
        ({"per_device_train_batch_size": 80}, "per_device_train_batch_size"),
    ],
)
def test_more_questions_than_there_are_is_refused(values: dict[str, int], key: str) -> None:
    with pytest.raises(InputError, match=rf"^{key}: 10: the training set has 9 questions"):
        config(**values).check_batch(1, 9)
    config(**values).check_batch(1, 10)


# Files ------------------------------------------------------------------------------------------------------


def test_a_key_that_stands_twice_is_refused_with_both_lines(recipe_file) -> None:
    """PyYAML would take the last one silently."""
    with pytest.raises(InputError, match=r"line 6: 'seed': a key stands once, and line 5 has it too"):
        load_recipe(recipe_file("seed: 1\nseed: 2\n"))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "`key: value` lines"),
        ("# nothing\n", "`key: value` lines"),
        ("- a\n- b\n", "`key: value` lines"),
        ("1: 2\n", "a key is a name"),
        ("seed: [1\n", "line 2"),
        ("seed: 1\n\tbeta: 2\n", "line 2"),
    ],
    ids=repr,
)
def test_a_file_that_is_not_a_recipe_is_refused(tmp_path, text: str, match: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=match) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.yaml: no such file"):
        load_recipe(tmp_path / "nowhere.yaml")


def test_the_resolved_recipe_loads_again_as_the_same(recipe_file, tmp_path) -> None:
    extra = (
        "learning_rate: 1e-5\nshared_prefix: 'off'\ntarget_ess: 0.5\nrun_name: größe\n"
        "lora_target_modules: [q_proj]\nchat_template_kwargs: {enable_thinking: false}\n"
        "early_stopping_patience: null\n"
    )
    recipe = load_recipe(recipe_file(extra))
    saved = tmp_path / "resolved.yaml"
    recipe.save(saved)
    again = load_recipe(saved)
    assert again.values == recipe.values
    assert again.run == recipe.run
    for field in dataclasses.fields(DROConfig):
        assert getattr(again.training, field.name) == getattr(recipe.training, field.name), field.name


def test_the_resolved_recipe_holds_every_key_of_ours(recipe_file) -> None:
    """Another release with other defaults repeats the run."""
    values = load_recipe(recipe_file()).values
    assert set(values) == set(KEYS)
    assert values["num_generations"] == 8
    assert values["warmup"] == "none"


def test_every_key_stands_under_a_heading_and_is_described_in_a_sentence() -> None:
    for key in KEYS.values():
        assert key.group
        assert re.match(r".{10,}[.…]$", key.help), key.name


def test_the_reference_page_is_what_the_keys_say() -> None:
    """`dro-rl recipe keys --markdown > docs/keys.md`."""
    assert (ROOT.parent / "docs" / "keys.md").read_text() == keys_page()


def test_help_lists_every_key_with_its_values_in_80_columns_and_breaks_no_name() -> None:
    lines = keys_text().splitlines()
    assert max(map(len, lines)) <= 80
    for key in KEYS.values():
        assert any(line.startswith(f"  {key.name}: ") for line in lines)
    assert "one of joint, alternate [joint]" in keys_text()


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(_BaseConfig)])
def test_every_inherited_key_is_taken_or_refused_or_said_to_have_no_effect(name: str) -> None:
    assert [name in KEYS, name in WITHOUT_EFFECT, name in REFUSED].count(True) == 1


def test_a_key_that_is_taken_over_keeps_its_default_but_for_these() -> None:
    """What a user of the stock Trainer expects of a key holds here too."""
    differ = {
        "learning_rate", "weight_decay", "logging_steps", "metric_for_best_model", "greater_is_better",
        "load_best_model_at_end", "save_total_limit", "report_to",
    }  # fmt: skip
    stock = {f.name: f.default for f in dataclasses.fields(_BaseConfig)}
    taken = {name for name in stock if name in KEYS}
    assert {name for name in taken if KEYS[name].default != stock[name]} == differ


def test_every_default_obeys_its_own_rule() -> None:
    assert all(key.check(key.default) == key.default for key in KEYS.values())


def test_no_key_belongs_to_both_configs() -> None:
    """A shared name would reach one of them only."""
    assert not set(RunConfig.__dataclass_fields__) & set(DROConfig.__dataclass_fields__)


# What is shipped --------------------------------------------------------------------------------------------


def test_there_are_recipes() -> None:
    assert SHIPPED
    assert ACCELERATE


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_recipe_parses(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.training.num_generations > 1


FULL = sorted(path for path in SHIPPED if path.with_name(f"{path.stem}_smoke.yaml").is_file())


def test_each_dataset_has_a_full_recipe_and_a_small_one() -> None:
    assert {path.stem for path in FULL} == {"nq", "hotpotqa", "musique", "2wikimultihopqa", "wow"}


SIZES = {
    "dataset_name", "dataset_config", "max_train_samples", "max_eval_samples", "output_dir", "questions_per_iteration",
    "selector_model_name_or_path", "generator_model_name_or_path", "num_iterations", "early_stopping_patience",
    "max_prompt_length", "learning_rate", "lr_scheduler_type", "warmup_steps", "gradient_checkpointing", "bf16",
    "gradient_accumulation_steps", "warmup_batch_size", "warmup_gradient_accumulation_steps", "warmup_selector_steps",
    "warmup_generator_steps", "warmup_selector_learning_rate", "warmup_generator_learning_rate",
}  # fmt: skip
"""What makes a recipe small; everything else is what it does."""


@pytest.mark.parametrize("path", FULL, ids=lambda path: path.stem)
def test_a_small_recipe_does_what_its_full_one_does(path: Path) -> None:
    """Else it would show that something else runs."""
    full, small = (load_recipe(file).values for file in (path, path.with_name(f"{path.stem}_smoke.yaml")))
    assert {key for key in {*full, *small} if full.get(key) != small.get(key)} <= SIZES


def test_a_recipe_for_data_without_labels_asks_for_none() -> None:
    """Defect: `mixed` among documents without labels is K by chance. docs/reproduce.md says which data have none."""
    prepared = re.findall(
        r"dro-rl data prepare (\w+) (.*?)--output", (ROOT.parent / "docs" / "reproduce.md").read_text(), re.DOTALL
    )
    without = {name for name, options in prepared if "--no-documents" in options}
    labelled = {name: name not in without for name, _ in prepared if name != "$1"}
    assert labelled == {path.stem: path.stem == "nq" for path in FULL}
    for path in FULL:
        recipe = load_recipe(path).run
        asks = recipe.warmup_selector_order == "labels" or recipe.warmup_generator_documents in ("gold", "mixed")
        assert asks <= labelled[path.stem], path.name


@pytest.mark.parametrize("path", FULL, ids=lambda path: path.stem)
def test_a_full_recipe_has_the_papers_settings(path: Path) -> None:
    """Section 6.4 and the README of the first implementation: m, K, N, rates, 128 questions a step on 8 GPUs."""
    training = load_recipe(path).training
    assert (training.num_generations, training.num_selected, training.num_iterations) == (8, 5, 5)
    assert (training.learning_rate, training.weight_decay) == (1e-5, 0.01)
    assert 8 * training.per_device_train_batch_size * training.gradient_accumulation_steps // 8 == 128
    training.check_batch(processes=8, num_questions=20_000)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_recipe_begins_with_its_command_hardware_time_and_what_to_expect(path: Path) -> None:
    head = path.read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert f"dro_rl/train.py recipes/{path.name}" in head or f"dro-rl train {path.stem}" in head
    for word in ("Hardware: ", "Expected"):
        assert word in head
    assert re.search(r"\d+ (min|s\b|hours)", head)
    if path in FULL:
        assert "the paper's figures, not measured by this project" in head


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.name)
def test_every_accelerate_config_is_one_that_accelerate_loads(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text()), dict)
    loaded = load_config_from_file(str(path))
    assert loaded.to_dict()["distributed_type"]
