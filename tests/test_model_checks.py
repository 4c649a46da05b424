"""Claims about models that cannot be trained as asked: one line before anything is loaded, naming key and fix."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import safetensors.torch
import torch
import yaml
from training_world import questions, save_model, tokenizer, world

from dro_rl.errors import InputError
from dro_rl.evaluation.evaluator import evaluate
from dro_rl.job import preflight
from dro_rl.job.assembly import build_prompters, load_models
from dro_rl.job.model_checks import check_models
from dro_rl.job.prompt_checks import check_prompts
from dro_rl.models.positions import positions_of
from dro_rl.pipeline import PipelineSettings, RAGPipeline, save_settings
from dro_rl.recipe import Recipe, load_recipe
from dro_rl.records import Question

Make = Callable[..., Recipe]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A recipe with some keys changed."""

    def make(**keys: Any) -> Recipe:
        path = world(tmp_path / "world")
        values = {**yaml.safe_load(path.read_text()), "output_dir": str(tmp_path / "run"), **keys}
        path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value != "unset"}))
        return load_recipe(path)

    return make


def folder_of(family: str, folder: Path, **config: Any) -> Path:
    families.build(family, vocab_size=len(tokenizer()), **config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def edited(folder: Path, **keys: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))
    return folder


def refusal(action: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as error:
        action()
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def says(text: str, *parts: str) -> bool:
    """The parts, in that order."""
    place = 0
    for part in parts:
        assert part in text[place:], f"{part!r} is not in {text[place:]!r}"
        place = text.index(part, place) + len(part)
    return True


# Formats ----------------------------------------------------------------------------------------------------

QUANTISED = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "mxfp4": {"quant_method": "mxfp4"},
}


@pytest.mark.parametrize("method", QUANTISED)
def test_a_quantised_folder_is_refused(make: Make, tmp_path: Path, method: str) -> None:
    folder = edited(save_model(tmp_path / "m", 0), quantization_config=QUANTISED[method])
    error = refusal(lambda: check_models(make(selector_model_name_or_path=str(folder))))
    assert says(error, "selector_model_name_or_path", f"({method})", "not quantised", "made from")


@pytest.mark.parametrize(("name", "method"), [("quantize_config.json", "gptq"), ("quant_config.json", "awq")])
def test_a_folder_quantised_the_old_way_is_refused(make: Make, tmp_path: Path, name: str, method: str) -> None:
    folder = save_model(tmp_path / "m", 0)
    (folder / name).write_text("{}")
    error = refusal(lambda: check_models(make(generator_model_name_or_path=str(folder))))
    assert says(error, "generator_model_name_or_path", f"({method}, by its {name})", "not quantised")


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int8])
def test_weights_of_one_byte_are_refused(make: Make, tmp_path: Path, kind: torch.dtype) -> None:
    """A folder that does not say so."""
    folder = save_model(tmp_path / "m", 0)
    path = folder / "model.safetensors"
    state = safetensors.torch.load_file(path)
    layer = next(name for name in state if name.endswith("q_proj.weight"))
    safetensors.torch.save_file({**state, layer: state[layer].to(kind)}, path, {"format": "pt"})
    error = refusal(lambda: check_models(make(selector_model_name_or_path=str(folder))))
    assert says(error, "selector_model_name_or_path", "model.safetensors holds", "two bytes or more", "quantised from")


@pytest.mark.parametrize("what", ["a folder", "a folder with its config", "the file itself"])
def test_llama_cpps_format_is_told_what_to_do(make: Make, tmp_path: Path, what: str) -> None:
    folder = save_model(tmp_path / "m", 0)
    (folder / "model.safetensors").unlink()
    if what == "a folder":
        (folder / "config.json").unlink()
    gguf = folder / "model.Q4_1.gguf"
    gguf.write_bytes(b"GGUF")
    name = str(gguf if what == "the file itself" else folder)
    error = refusal(lambda: check_models(make(selector_model_name_or_path=name)))
    assert says(error, "selector_model_name_or_path", name, "llama.cpp", f"dro-rl model convert {gguf} FOLDER")


def test_adapters_alone_are_no_model(make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    error = refusal(lambda: check_models(make(selector_model_name_or_path=str(folder))))
    assert says(error, "selector_model_name_or_path", str(folder), "these are adapters of one", "Merge them")


@pytest.mark.parametrize("text", ['{"num_return_sequences": 4, "do_sample": false}', '{"max_new_tokens": 0}'])
def test_a_generation_config_that_cannot_be_read_is_refused(make: Make, tmp_path: Path, text: str) -> None:
    folder = save_model(tmp_path / "m", 0)
    (folder / "generation_config.json").write_text(text)
    error = refusal(lambda: check_models(make(selector_model_name_or_path=str(folder))))
    assert says(error, "selector_model_name_or_path", "generation_config.json", "transformers reads it", "Correct it")


# Precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_all_weights_do_not_train_in_half_precision(make: Make, kind: str) -> None:
    """At 1e-5 two in a hundred weights moved, without a word."""
    error = refusal(lambda: check_models(make(dtype=kind)))
    assert says(error, f"dtype: '{kind}'", "selector train", "rounded away", "dtype: float32 with bf16: true", "lora_r")


def test_auto_is_what_the_checkpoint_is(make: Make, tmp_path: Path) -> None:
    folder = edited(save_model(tmp_path / "m", 0), dtype="bfloat16")
    error = refusal(lambda: check_models(make(dtype="auto", generator_model_name_or_path=str(folder))))
    assert says(error, "dtype: auto, and the generator is held in bfloat16", "generator train", "generator_lora_r: 16")
    check_models(make(dtype="auto"))


@pytest.mark.parametrize(
    "keys",
    [
        {"selector_lora_r": 4, "generator_lora_r": 4},
        {"selector_lora_r": 4, "generator_learning_rate": 0},
        {"selector_learning_rate": 0, "generator_lora_r": 4},
    ],
)
def test_what_does_not_train_may_be_in_half_precision(make: Make, keys: dict[str, Any]) -> None:
    check_models(make(dtype="bfloat16", **keys))


def test_a_frozen_role_that_is_warmed_up_trains(make: Make) -> None:
    keys = {"dtype": "bfloat16", "selector_lora_r": 4, "generator_learning_rate": 0}
    error = refusal(lambda: check_models(make(**keys, warmup="generator")))
    assert says(error, "dtype", "all weights of the generator train")


# Positions --------------------------------------------------------------------------------------------------

LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
LONGROPE = {**LONG, "original_max_position_embeddings": 64, "factor": 4.0, "rope_theta": 10000.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("family", "config", "limit"),
    [
        ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}, 64),
        ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 48}, 48),
        ("llama", {"rope_parameters": {**DYNAMIC, "original_max_position_embeddings": 32}}, 32),
    ],
)
def test_rows_stay_before_the_switch_of_rotary_embeddings(
    make: Make, tmp_path: Path, family: str, config: dict[str, Any], limit: int
) -> None:
    """Beyond it a short row's log-probability was off by nats beside a long one."""
    folder = folder_of(family, tmp_path / "m", **config)
    keys = {"generator_model_name_or_path": str(folder), "max_answer_length": 4}
    error = refusal(lambda: check_models(make(**keys, max_prompt_length=limit - 3)))
    assert says(error, "max_prompt_length", "4 tokens to write", f"the generator's {limit} positions", "longest row")
    assert says(error, f"Lower it to {limit - 4}")
    check_models(make(**keys, max_prompt_length=limit - 4))


def test_a_row_before_the_switch_is_worth_what_it_is_worth_alone() -> None:
    """What the refusal leaves: rows of up to the original length, whatever stands beside them."""
    import test_families

    model = families.build("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=64)
    rows = test_families.ROWS
    assert positions_of(model.config)[0] == 64
    for shared in (True, False):
        scored = test_families.score_rows(model, rows, shared_prefix=shared)
        for row, logps in zip(rows, scored, strict=True):
            for completion, found in zip(row.completions, logps, strict=True):
                assert found.tolist() == pytest.approx(test_families.alone(model, row.prompt, completion), abs=1e-4)


def asked(recipe: Recipe, given: list[Question]) -> None:
    check_models(recipe)
    check_prompts(recipe, given, build_prompters(recipe))


def with_answer(count: int) -> list[Question]:
    first, *others = questions(6)
    return [*others, replace(first, answers=(" ".join(["rome"] * count),))]


def test_a_gold_answer_fits_the_positions(make: Make, tmp_path: Path) -> None:
    """It is scored whole, and only max_answer_length was looked at: GPT-2 died in the middle of a run."""
    folder = folder_of("gpt2", tmp_path / "m", max_position_embeddings=96)
    recipe = make(generator_model_name_or_path=str(folder), max_prompt_length=64)
    error = refusal(lambda: asked(recipe, with_answer(32)))
    assert says(error, "max_prompt_length", "33 tokens of the answer of question", "the generator's 96 positions")
    assert says(error, "Use 63, or drop the question")
    asked(recipe, with_answer(31))


def test_an_alias_counts_where_aliases_are_scored(make: Make, tmp_path: Path) -> None:
    folder = folder_of("gpt2", tmp_path / "m", max_position_embeddings=96)
    first, *others = questions(6)
    given = [*others, replace(first, answers=("rome", " ".join(["rome"] * 40)))]
    keys = {"generator_model_name_or_path": str(folder), "max_prompt_length": 64}
    asked(make(**keys), given)
    assert "41 tokens of the answer" in refusal(lambda: asked(make(**keys, answer_aliases="max"), given))


@pytest.mark.parametrize("role", ["selector", "generator"])
def test_a_prompt_that_nothing_cuts_fits_the_positions(make: Make, tmp_path: Path, role: str) -> None:
    folder = folder_of("opt", tmp_path / "m", max_position_embeddings=64)
    recipe = make(**{f"{role}_model_name_or_path": str(folder)}, max_prompt_length=None)
    first, *others = questions(6)
    long = replace(first, documents=tuple(replace(d, text=d.text + " rome" * 40) for d in first.documents))
    error = refusal(lambda: asked(recipe, [*others, long]))
    assert says(error, "max_prompt_length: None", f"question {first.id} has", f"the {role} has 64 positions", "Use ")
    asked(recipe, questions(6))


@pytest.mark.parametrize("longest", [None, 40])
def test_a_served_pair_keeps_to_the_positions(tmp_path: Path, longest: int | None) -> None:
    """`ask` and `evaluate` too: prompts are cut, and gold answers are scored whole behind them."""
    for role in ("selector", "generator"):
        folder = folder_of("gpt2", tmp_path / role, max_position_embeddings=64)
        (folder / "prompt.jinja").write_text("{% for d in documents %}{{ d.text }}\n{% endfor %}{{ question }}\n")
    save_settings(tmp_path, PipelineSettings(2, longest, 6, 4, {}))
    pipeline = RAGPipeline.from_pretrained(tmp_path, device="cpu", dtype=torch.float32)
    long = [
        replace(q, documents=tuple(replace(d, text=d.text + " rome" * 40) for d in q.documents))
        for q in with_answer(19)
    ]
    pipeline.leave_room(long, "first")
    assert len(evaluate(pipeline, long)) == 6
    if longest is not None:
        with pytest.raises(InputError, match="max_prompt_length: 40: with the 26 tokens of the answer of question q0"):
            pipeline.leave_room(with_answer(25), "first")


# What is said, and what dies later --------------------------------------------------------------------------


def test_capped_attention_under_sdpa_is_said_once(make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = str(folder_of("gemma2", tmp_path / "m"))
    with caplog.at_level(logging.WARNING):
        check_models(make(selector_model_name_or_path=folder))
    assert [record.message for record in caplog.records if "capped" in record.message] == [
        "selector: its attention logits are capped at 50.0, which sdpa leaves out; attn_implementation: eager has it, "
        "without shared prefixes"
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        check_models(make(selector_model_name_or_path=folder, attn_implementation="eager"))
    assert "capped" not in caplog.text


def test_a_decoder_whose_cache_is_not_used_says_so(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        check_models(make(selector_model_name_or_path=str(folder_of("bamba", tmp_path / "m"))))
    assert "selector: bamba keeps a state that is not carried" in caplog.text


def test_adapters_on_state_space_layers_are_refused_before_training(make: Make, tmp_path: Path) -> None:
    folder = folder_of("mamba", tmp_path / "m")
    error = refusal(lambda: check_models(make(selector_model_name_or_path=str(folder), selector_lora_r=4)))
    assert says(error, "lora_r", "4, on mamba", "peft adapts the layers", "lora_target_modules")


@pytest.mark.parametrize("metric", ["precision@1", "precision@5", "recall@3"])
def test_a_metric_of_labels_needs_labels(make: Make, metric: str) -> None:
    """It died after the first iteration."""
    bare = [replace(question, supporting=()) for question in questions(4, seed=1)]
    recipe = make(metric_for_best_model=metric)
    error = refusal(lambda: preflight.check(recipe, questions(32), bare))
    assert says(error, f"metric_for_best_model: '{metric}'", "needs labels", "Use f1")


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_a_mixture_gives_no_router_logits(make: Make, tmp_path: Path, family: str) -> None:
    """A supervised warm-up leaves them on in the config, and the next decode died."""
    folder = str(folder_of(family, tmp_path / "m", output_router_logits=True))
    models = load_models(make(), {"selector": folder, "generator": folder})
    assert models.selector.config.output_router_logits is False
    assert models.generator.config.output_router_logits is False


@pytest.mark.parametrize("key", ["hub_token", "push_to_hub_token"])
def test_a_token_is_not_repeated(make: Make, key: str) -> None:
    assert "hf_secret" not in refusal(lambda: make(**{key: "hf_secret"}))
