"""Claims about models in llama.cpp's format: a folder that trains is made of one, with the ends that the file names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import CHAT_TEMPLATE
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from dro_rl.cli import app
from dro_rl.errors import InputError
from dro_rl.models.gguf import convert_gguf
from dro_rl.models.loading import check_model, declared_ends
from dro_rl.prompts import Prompter

gguf = pytest.importorskip("gguf", reason="gguf is not installed")

SPECIAL = ["<unk>", "<|start|>", "<|end|>", "<pad>"]
LETTERS = [chr(c) for c in range(33, 127)] + ["Ġ", "Ċ"]
WORDS = [*SPECIAL, *LETTERS, "he", "ro"]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3, rms_norm_eps=1e-5,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection in llama.cpp's order of a rotary pair."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write(path: Path, model: LlamaForCausalLM, **said: int) -> Path:
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(WORDS) - len(SPECIAL)))
    writer.add_token_merges(["h e", "r o"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, number in said.items():
        writer.add_uint32(f"tokenizer.ggml.{name}", number)
    writer.add_chat_template(CHAT_TEMPLATE)
    names = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"].numpy())
    for i in range(config.num_hidden_layers):
        for own, other in names.items():
            weight = state[f"model.layers.{i}.{own}.weight"]
            weight = permuted(weight, heads[other]) if other in heads else weight
            writer.add_tensor(f"blk.{i}.{other}.weight", weight.contiguous().numpy())
    writer.add_tensor("output_norm.weight", state["model.norm.weight"].numpy())
    writer.add_tensor("output.weight", state["lm_head.weight"].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    convert_gguf(write(folder / "m.gguf", llama(), padding_token_id=3), folder / "model")
    return folder / "model"


def test_the_folder_is_the_model(made: Path) -> None:
    served = AutoModelForCausalLM.from_pretrained(made).eval()
    ids = torch.arange(5, 30).unsqueeze(0)
    assert served.dtype == torch.float32
    assert not hasattr(served.config, "quantization_config")
    with torch.no_grad():
        torch.testing.assert_close(served(ids).logits, llama()(ids).logits, atol=1e-4, rtol=1e-4)


def test_its_ends_are_those_that_the_file_names(made: Path) -> None:
    """The tokenizer that transformers reads ends in the token that begins a turn, and answers never end."""
    tokenizer = AutoTokenizer.from_pretrained(made)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|start|>", "<|end|>", "<pad>")
    assert declared_ends(str(made)) == (2,)
    prompter = Prompter(tokenizer, "generator", declared_ends=declared_ends(str(made)))
    assert prompter.ends.stops == (2,)
    assert prompter.render("hero?", []).startswith("<|start|>user\n")


def test_it_trains(made: Path) -> None:
    check_model(str(made), "selector_model_name_or_path")


def test_a_turn_that_ends_in_another_token_ends_there_too(tmp_path: Path) -> None:
    convert_gguf(write(tmp_path / "m.gguf", llama(), eot_token_id=3), tmp_path / "model")
    assert declared_ends(str(tmp_path / "model")) == (2, 3)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").pad_token == "<|end|>"


def bad(folder: Path, what: str) -> tuple[Path, Path]:
    file, output = folder / "m.gguf", folder / "model"
    if what == "not GGUF":
        file.write_bytes(b"PK\3\4")
    elif what == "cut off":
        write(file, llama())
        file.write_bytes(file.read_bytes()[:2000])
    elif what == "a folder in its place":
        write(file, llama())
        output.mkdir()
        (output / "config.json").write_text("{}")
    return file, output


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("not there", "no such file"),
        ("not GGUF", "begins with"),
        ("cut off", "transformers reads the file"),
        ("a folder in its place", "a model gets a folder of its own"),
    ],
)
def test_what_cannot_be_converted_is_one_line_and_leaves_nothing(tmp_path: Path, what: str, said: str) -> None:
    file, output = bad(tmp_path, what)
    before = sorted(tmp_path.rglob("*"))
    result = CliRunner().invoke(app, ["model", "convert", str(file), str(output)])
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs the gguf extra. pip install 'dro_rl\[gguf\]'"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "model")
