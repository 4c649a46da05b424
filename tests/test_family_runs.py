"""Claims about runs with decoders that people bring: they finish, resume, and leave pairs that answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from training_world import largest_difference, questions, tokenizer, weights

from dro_rl.pipeline import RAGPipeline

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "names that differ on the hub": ("gpt_neox", {}),
    "a mixture, warmed up": ("qwen3_moe", {"warmup": "both"}),
    "a mixture with adapters": ("mixtral", {"selector_lora_r": 4, "generator_lora_r": 4}),
    "convolutions, warmed up": ("lfm2", {"warmup": "both"}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_ends_with_a_pair_and_resumes_to_the_same_one(
    case: str, job: Callable[..., Path], tmp_path: Path
) -> None:
    """Pythia and mixtures trained, and exited without `selector/` and `generator/`; hybrids died after the warm-up."""
    family, keys = CASES[case]
    folder = tmp_path / "model"
    families.build(family, vocab_size=len(tokenizer()), initializer_range=0.1).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    names = {f"{role}_model_name_or_path": str(folder) for role in ("selector", "generator")}
    keys = {
        **names, **keys, "num_iterations": 2, "warmup_selector_steps": 1, "warmup_generator_steps": 1,
        "warmup_cache_dir": str(tmp_path / "cache"), "save_total_limit": 5, "max_eval_samples": 2,
        "max_train_samples": 8,
    }  # fmt: skip
    run = job("run", **keys)
    whole = weights(run)
    assert all(tensor.isfinite().all() for tensor in whole.values())
    answers = RAGPipeline.from_pretrained(run, device="cpu", dtype=torch.float32).answer_all(questions(3))
    assert all(answer.logp < 0 for answer in answers)

    first = min(run.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    job("run", **keys, resume_from_checkpoint=str(first))
    assert largest_difference(whole, weights(run)) < 1e-6
