"""Claims about the check of the first step: it lets what is exact pass, and stops what is not, with the numbers."""

from __future__ import annotations

import pytest
import torch
import transformers

from dro_rl import likelihood
from dro_rl.errors import InputError
from dro_rl.likelihood import Scoring, verify
from dro_rl.likelihood.packing import Row

ROWS = [
    Row(list(range(2, 90)), [[5, 6, 7], [8, 4], [9, 9]]),
    Row([*range(2, 70), 4, 4, 4], [[3, 3]]),
    Row([2], [[3]]),
]


@pytest.mark.parametrize("tree", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_what_is_exact_passes(make_model, architecture: str, tree: bool) -> None:
    model = make_model(architecture, vocab_size=100)
    found = verify.difference(model, ROWS, Scoring(prefix_tree=tree), gradients=True)
    assert found is not None
    assert 0 < found.logps < 1e-4
    assert found.gradients is not None
    assert 0 < found.gradients < 1e-3
    verify.check("selector", found, torch.float32)


def test_a_multimodal_models_text_decoder_is_compared() -> None:
    """What the hub calls Gemma 3 from 4B up: its layers stand deeper."""
    text = {
        "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 512,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 28,
    }  # fmt: skip
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert "ConditionalGeneration" in type(model).__name__
    found = verify.difference(model, ROWS, Scoring(), gradients=True)
    assert found is not None
    verify.check("selector", found, torch.float32)


def test_there_is_nothing_to_compare_on_the_plain_path(make_model) -> None:
    model = make_model(vocab_size=100)
    assert verify.difference(model, ROWS, Scoring(shared_prefix=False), gradients=True) is None
    model.set_attn_implementation("eager")
    assert verify.difference(model, ROWS, Scoring(), gradients=True) is None


def test_wrong_values_stop_the_run(make_model, monkeypatch) -> None:
    """A completion that sees its siblings, as it would under a mask that is merely causal."""
    model = make_model(vocab_size=100)
    lay_out = likelihood.lay_out

    def leaky(rows, **options):
        layout = lay_out(rows, **options)
        for segment in layout.segments:
            if segment.mask is not None:
                count = len(segment.mask)
                segment.mask[:, -count:] = torch.ones(count, count).tril().bool()
        return layout

    monkeypatch.setattr(likelihood, "lay_out", leaky)
    found = verify.difference(model, ROWS, Scoring(), gradients=False)
    assert found is not None
    with pytest.raises(InputError, match=r"the generator's log-probabilities differ by [\d.]+ nats"):
        verify.check("generator", found, torch.float32)


def test_wrong_gradients_stop_the_run(make_model, monkeypatch) -> None:
    """Values that agree are not enough: here the second completion's gradient is lost."""
    model = make_model(vocab_size=100)
    packed = likelihood._packed

    def forgetful(*arguments):
        first, second, *rest = packed(*arguments)
        return [first, second.detach(), *rest]

    monkeypatch.setattr(likelihood, "_packed", forgetful)
    found = verify.difference(model, ROWS, Scoring(), gradients=True)
    assert found is not None
    assert found.logps < 1e-4
    with pytest.raises(InputError, match="gradients by 0"):
        verify.check("selector", found, torch.float32)


def test_dropout_does_not_pass_for_a_difference(make_model) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5)
    model = peft.get_peft_model(make_model(vocab_size=100), config).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # as after some steps; a fresh adapter adds nothing, whatever is dropped
            torch.nn.init.normal_(parameter, std=0.3)
    found = verify.difference(model, ROWS, Scoring(), gradients=True)
    assert found is not None
    verify.check("selector", found, torch.float32)
    dropouts = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert dropouts
    assert all(module.training for module in dropouts)


@pytest.mark.parametrize(("at", "passes"), [(-20.0, True), (-0.1, False)])
def test_rounding_grows_with_what_is_rounded(monkeypatch, make_model, at: float, passes: bool) -> None:
    """0.4 nats in bfloat16: of an answer at -20 a token, as a pre-trained model's before its warm-up, or at hand."""
    monkeypatch.setattr(verify, "_logps", lambda model, rows, scoring, shared: torch.tensor([at - 0.4 * shared, 0.0]))
    found = verify.difference(make_model(vocab_size=100), ROWS, Scoring(), gradients=False)
    assert found is not None
    if passes:
        verify.check("generator", found, torch.bfloat16)
    else:
        with pytest.raises(InputError, match="the generator's log-probabilities differ by"):
            verify.check("generator", found, torch.bfloat16)
