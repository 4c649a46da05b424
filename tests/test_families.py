"""Claims about the decoders that people bring: each is saved, read back, scored and sampled as it stands alone."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from families import ATTENTION, FAMILIES, STATEFUL, VOCABULARY, build
from training_world import tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from dro_rl.engines.decoding import CACHED, Decoder
from dro_rl.engines.protocol import GenerationRequest
from dro_rl.errors import InputError
from dro_rl.likelihood import row_logps, score_rows
from dro_rl.likelihood.attention import keeps_state
from dro_rl.likelihood.packing import Row
from dro_rl.models.loading import LoraSettings, add_adapter, declared_ends, load_model
from dro_rl.models.saving import export_role, load_role, save_role
from dro_rl.proposal import SamplingParams

LORA = LoraSettings(r=4, alpha=8, dropout=0.0, target_modules=None)
NOT_ADAPTED = ("falcon_h1", "falcon_mamba", "jamba", "mamba", "mamba2", "nemotron_h")


def words(count: int, *names: int) -> list[int]:
    return [random.Random(f"{names}/{i}").randrange(2, VOCABULARY) for i in range(count)]


PROMPTS = [words(n, i) for i, n in enumerate((21, 4, 13))]
ROWS = [Row(prompt, [words(3 * j + 1, i, j) for j in range(3)]) for i, prompt in enumerate(PROMPTS)]


def equal(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model.eval()(input_ids=torch.tensor([PROMPTS[0]]), use_cache=False).logits


@torch.no_grad()
def alone(model: PreTrainedModel, prompt: list[int], completion: list[int]) -> list[float]:
    """log p of a completion's tokens, from one pass over prompt and completion and nothing else."""
    found = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0].log_softmax(-1)
    return [found[len(prompt) - 1 + i, token].item() for i, token in enumerate(completion)]


# Files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_is_read_back_bit_for_bit(tmp_path: Path, family: str) -> None:
    """Pythia and mixtures finished training, and then ended without `selector/` and `generator/`."""
    model, other = build(family), build(family, seed=1)
    assert not equal(model, other)
    save_role(model, tokenizer(), tmp_path)
    load_role(other, tmp_path)
    assert equal(model, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_is_the_model(tmp_path: Path, family: str) -> None:
    model = build(family)
    export_role(model, tokenizer(), tmp_path / "role")
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "role", dtype=torch.float32)
    torch.testing.assert_close(logits(served), logits(model), atol=1e-5, rtol=1e-5)


SAMPLING = {
    "a temperature for greedy": {"temperature": 0.5, "top_p": 0.9, "do_sample": False},
    "beams of one": {"length_penalty": 2.0, "num_beams": 1, "early_stopping": True},
}


@pytest.mark.parametrize("case", SAMPLING)
def test_a_generation_config_that_contradicts_itself_ends_no_run(tmp_path: Path, case: str) -> None:
    """transformers reads it and refuses to save it: at the first checkpoint."""
    build("llama").save_pretrained(tmp_path / "given")
    path = tmp_path / "given" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **SAMPLING[case], "eos_token_id": [1, 5]}))
    model = load_model(str(tmp_path / "given"))
    save_role(model, tokenizer(), tmp_path / "checkpoint")
    export_role(model, tokenizer(), tmp_path / "role")
    assert declared_ends(str(tmp_path / "role")) == (1, 5)


def adapted(family: str, seed: int) -> PreTrainedModel:
    model = add_adapter(build(family), LORA)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in NOT_ADAPTED])
def test_adapters_are_read_back_and_merged(tmp_path: Path, family: str) -> None:
    model, other = adapted(family, 0), adapted(family, 1)
    save_role(model, tokenizer(), tmp_path / "checkpoint")
    load_role(other, tmp_path / "checkpoint")
    assert equal(model, other)
    export_role(model, tokenizer(), tmp_path / "role")
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "role", dtype=torch.float32)
    torch.testing.assert_close(logits(served), logits(model), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", NOT_ADAPTED)
def test_adapters_that_cannot_be_merged_are_refused(family: str) -> None:
    with pytest.raises(InputError, match=r"selector_lora_r / generator_lora_r: 4, on .*: peft adapts the layers"):
        add_adapter(build(family), LORA)


# Scoring and sampling ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_is_worth_what_it_is_worth_alone(family: str) -> None:
    """Left padding went through the states of hybrid decoders: −15.9 beside a longer row, −11.3 alone."""
    model = build(family)
    for row, scored in zip(ROWS, score_rows(model, ROWS, shared_prefix=False), strict=True):
        for completion, logps in zip(row.completions, scored, strict=True):
            assert logps.tolist() == pytest.approx(alone(model, row.prompt, completion), abs=1e-4)


@pytest.mark.parametrize("family", STATEFUL)
def test_padding_gets_no_gradient(family: str) -> None:
    """The loss of three rows together moves the weights as the three losses do."""
    model = build(family)

    def gradient(*batches: list[Row]) -> torch.Tensor:
        model.zero_grad()
        for rows in batches:
            logps = row_logps(model, rows, shared_prefix=False)
            torch.stack([each.sum() for row in logps for each in row]).sum().backward()
        found = [p.grad.flatten() for p in model.parameters() if p.grad is not None and p.shape[0] != VOCABULARY]
        return torch.cat(found)

    together, apart = gradient(ROWS), gradient(*[[row] for row in ROWS])
    assert (together - apart).norm() <= 1e-3 * apart.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_log_q_of_a_sample_is_its_log_p_alone(family: str) -> None:
    """Hybrid decoders died at the first rollout, after the warm-up: their caches cannot be expanded."""
    model = build(family)
    request = GenerationRequest(PROMPTS, 3, SamplingParams(6), [1, 2, 3])
    for prompt, samples in zip(PROMPTS, Decoder(model, 1, shared_prefix=False).generate(request), strict=True):
        assert len({sample.ids for sample in samples}) > 1
        for sample in samples:
            rounding = 3e-4 if family == "qwen3_next" else 1e-4  # its recurrence in chunks, and token by token
            assert sample.logps == pytest.approx(alone(model, prompt, list(sample.ids)), abs=rounding)


@pytest.mark.parametrize("family", FAMILIES)
def test_which_decoders_keep_a_state(family: str) -> None:
    assert keeps_state(build(family).config) == (family in STATEFUL)


def test_every_decoder_whose_cache_is_used_is_tested() -> None:
    assert {build(family).config.model_type for family in STATEFUL} >= CACHED
    assert not {build(family).config.model_type for family in ATTENTION} & CACHED
