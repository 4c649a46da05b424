"""A world for tests of the loop: a few questions and random models small enough to train in a second.

The vocabulary holds little but document numbers, so that an untrained selector names valid documents often, and not
always: weights, ties, duplicates and invalid rollouts all occur.
"""

from __future__ import annotations

import copy
import subprocess
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml
from apart import apart, ranks, script
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from dro_rl.records import Document, Question

NAMES = ("ada", "bo", "cy", "dee", "eli", "fay")
PLACES = ("rome", "oslo", "lima", "cairo", "kyoto", "quito")
ROOT = Path(__file__).parent.parent


def tokenizer() -> PreTrainedTokenizerFast:
    words = [
        "<pad>",
        "</s>",
        "<unk>",
        *(f"[{n}]" for n in range(1, 7)),
        ">",
        *NAMES,
        *PLACES,
        "lives",
        "in",
        "where",
        "?",
    ]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def save_model(folder: Path, seed: int, **config: Any) -> Path:
    """A random Llama with the tokenizer."""
    torch.manual_seed(seed)
    fast = tokenizer()
    settings = {
        "vocab_size": len(fast), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256, "initializer_range": 0.15,
        "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**{**settings, **config})).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def questions(count: int, seed: int = 0, documents: int = 5) -> list[Question]:
    random = Random(seed)
    made = []
    for i in range(count):
        people, places = random.sample(NAMES, documents), random.sample(PLACES, documents)
        facts = tuple(
            Document(f"d{n}", "", f"{who} lives in {where}")
            for n, (who, where) in enumerate(zip(people, places, strict=True))
        )
        gold = random.randrange(documents)
        made.append(Question(f"q{i}", f"where lives {people[gold]} ?", (places[gold],), facts, (f"d{gold}",)))
    return made


def write_questions(path: Path, made: list[Question]) -> Path:
    import json
    from dataclasses import asdict

    path.write_text("\n".join(json.dumps(asdict(question)) for question in made) + "\n")
    return path


def world(folder: Path, **overrides: Any) -> Path:
    """A folder with two models, two question files, two templates and `recipe.yaml`, whose path is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "s.jinja").write_text(
        "{% for d in documents %}[{{ loop.index }}] {{ d.text }}\n{% endfor %}{{ question }}\n"
    )
    (folder / "g.jinja").write_text("{% for d in documents %}{{ d.text }}\n{% endfor %}{{ question }}\n")
    write_questions(folder / "train.jsonl", questions(12))
    write_questions(folder / "dev.jsonl", questions(4, seed=1))
    recipe = {
        "dataset_name": str(folder),
        "selector_model_name_or_path": str(save_model(folder / "base-selector", 1)),
        "generator_model_name_or_path": str(save_model(folder / "base-generator", 2)),
        "selector_prompt_template": str(folder / "s.jinja"),
        "generator_prompt_template": str(folder / "g.jinja"),
        "warmup_cache_dir": str(folder / "cache"),
        "output_dir": str(folder / "run"),
        "num_iterations": 2,
        "num_generations": 4,
        "num_selected": 2,
        "questions_per_iteration": 8,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "per_device_eval_batch_size": 4,
        "max_prompt_length": 128,
        "max_completion_length": 6,
        "max_answer_length": 4,
        "selector_baseline": "mean",
        # Plain gradient descent: Adam turns rounding in a gradient that is nearly zero into a whole step.
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "early_stopping_patience": None,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 3,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**recipe, **overrides}))
    return path


def launch(
    recipe: Path,
    output: Path,
    *options: str,
    processes: int = 1,
    config: str = "ddp",
    job: Sequence[str] = (str(ROOT / "dro_rl" / "train.py"),),
) -> subprocess.CompletedProcess[str]:
    """Run the job, or a script of the tests that runs it, with the environment that a launcher gives its processes."""
    told = ranks(ROOT / "recipes" / "accelerate" / f"{config}.yaml", processes) if processes > 1 else [{}]
    path, *before = job
    return apart(script, path, [*before, str(recipe), "--output_dir", str(output), *options], environments=told)


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Both exported models' tensors."""
    return {
        f"{role}.{name}": tensor
        for role in ("selector", "generator")
        for name, tensor in load_file(run / role / "model.safetensors").items()
    }


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert set(one) == set(other)
    return max((one[name] - other[name]).abs().max().item() for name in one)


def changed(model: PreTrainedModel) -> PreTrainedModel:
    """A copy after a large update."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return other
