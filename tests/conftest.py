"""What tests share: no network, one thread, tiny random models, a small tokenizer, hand-made questions."""

from __future__ import annotations

import os

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    WANDB_MODE="disabled",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    ACCELERATE_USE_CPU="true",
    DRO_RL_SERVER_KEY="a key that only tests know",
)

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dro_rl import files
from dro_rl.prompts import TEMPLATES
from dro_rl.records import Document, Question

torch.set_num_threads(1)

VOCABULARY = 400
ARCHITECTURES = {
    "llama": (transformers.LlamaConfig, {}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 16}),
    "mistral": (transformers.MistralConfig, {"sliding_window": None, "head_dim": 16}),
    "gemma2": (transformers.Gemma2Config, {"head_dim": 16, "query_pre_attn_scalar": 16}),
}


def build_model(architecture: str = "llama", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random two-layer causal LM whose distributions are far from flat, in evaluation mode."""
    config_class, own = ARCHITECTURES[architecture]
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "initializer_range": 0.4,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    torch.manual_seed(seed)
    config = config_class(**{**settings, **own, **overrides})
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PreTrainedModel]:
    """`make_model("qwen2", seed=1, **config)`: see `build_model`."""
    return build_model


CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def build_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the shipped templates: any text survives encoding and decoding. `<eos>` is id 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<eos>", "<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    names = ("generator", "selector", "toy_generator", "toy_selector")
    texts = [(TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8") for name in names]
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Without a chat template: a base model's."""
    return build_tokenizer()


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """With a chat template: an instruction-tuned model's."""
    return build_tokenizer(chat=True)


def _question(
    number: int, text: str, answers: tuple[str, ...], supporting: int, *documents: tuple[str, str]
) -> Question:
    made = tuple(Document(f"q{number}-d{n}", title, body) for n, (title, body) in enumerate(documents, start=1))
    return Question(f"q{number}", text, answers, made, (made[supporting - 1].id,))


@pytest.fixture(scope="session")
def questions() -> list[Question]:
    """Four questions with four documents each; the first has two accepted answers."""
    return [
        _question(
            1, "Which bird has a red lamp?", ("heron", "the grey heron"), 2,
            ("Owls", "An owl has no lamp."), ("Herons", "The heron has a red lamp."),
            ("Lamps", "Lamps are green or blue."), ("", "Birds fly at night."),
        ),
        _question(
            2, "Where is the tin bridge?", ("Marl",), 4,
            ("Bridges", "Most are of stone."), ("Tin", "Tin bends."),
            ("Orla", "Orla has an iron bridge."), ("Marl", "The tin bridge is in Marl."),
        ),
        _question(
            3, "Who sold the boat?", ("Ines",), 1,
            ("Ines", "Ines sold the boat."), ("Omar", "Omar bought a cart."),
            ("Boats", "Boats leak."), ("Carts", "Carts have two wheels."),
        ),
        _question(
            4, "What grows on Mount Vey?", ("blue grass",), 3,
            ("Hills", "Hills are low."), ("Grass", "Grass is green elsewhere."),
            ("Vey", "On Mount Vey grows blue grass."), ("Trees", "No trees."),
        ),
    ]  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def _no_power_is_lost() -> None:
    """Bytes reach the disk when they like: jobs wait for it at every file, a hundred times each."""
    files._sync = lambda path: None


@pytest.fixture(scope="session")
def imported() -> Iterator[None]:
    """What a job imports is there for good, and no job looks through it for garbage, which takes half a second each."""
    import dro_rl.job.run  # noqa: F401

    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def job(tmp_path: Path, imported: None) -> Callable[..., Path]:
    """Runs the job in this process with some keys changed, in a folder of its own."""
    from training_world import world

    from dro_rl import train

    recipe = world(tmp_path / "world")

    def run(name: str = "run", **keys: Any) -> Path:
        output = tmp_path / name
        values = {**yaml.safe_load(recipe.read_text()), **keys, "output_dir": str(output)}
        changed = tmp_path / f"{name}.yaml"
        changed.write_text(yaml.safe_dump(values))
        train.main([str(changed)])
        return output

    return run
