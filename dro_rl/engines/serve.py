"""The command that starts a vLLM server for a recipe, with the flags that rollouts need."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import torch
from transformers import AutoConfig

from dro_rl.engines.answers import settings_for_answers
from dro_rl.engines.guard import KEY_FILE, MIDDLEWARE, server_key
from dro_rl.engines.vllm_adapters import of_recipe, runs_adapters
from dro_rl.engines.vllm_common import (
    LOGITS_PROCESSOR,
    check_installed,
    cpu_cache_bytes,
    engine_dtype,
    engine_length,
    token_cache_bytes,
)
from dro_rl.engines.vllm_server import LORA_ROUTES
from dro_rl.errors import InputError
from dro_rl.recipe import Recipe
from dro_rl.roles import Role

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class ServerCommand:
    """What to run, with what to add to the environment."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str]


def server_command(
    recipe: Recipe,
    *,
    role: Role = "selector",
    replica: int = 1,
    host: str = LOOPBACK,
    gpu_memory_utilization: float = 0.9,
    extra: Sequence[str] = (),
) -> ServerCommand:
    """The server at the recipe's `vllm_server_base_url`, or at one of them; the generator's at its own addresses.

    Args:
        recipe: names the model, lengths, type and port.
        role: whose model it holds.
        replica: which of the addresses, from 1.
        host: the interface to listen on. Development mode, which new weights need, lets whoever has the key steer the
            server: leave it at loopback, or name an address of a private network.
        gpu_memory_utilization: share of a GPU's memory that the server takes.
        extra: more of vLLM's own flags, which go last and so win.

    Raises:
        InputError: vLLM is not installed, there is no such replica, or no key that is its owner's alone.
    """
    run, training = recipe.run, recipe.training
    model, revision, key = run.of(role).model, run.of(role).revision, "vllm_server_base_url"
    check_installed("serve-rollouts", model)
    if role == "generator":
        key, training = "vllm_answer_server_base_url", settings_for_answers(training)
    urls = training.vllm_servers
    if not 1 <= replica <= len(urls):
        raise InputError("--replica", replica, f"{key} names {len(urls)}", "Choose one, from 1, that the recipe names.")
    address = urlsplit(urls[replica - 1])
    config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=run.trust_remote_code)
    length = engine_length(training, getattr(config.get_text_config(), "max_position_embeddings", None))
    options: dict[str, object] = {
        "--model": model,
        "--revision": revision,
        "--host": host,
        "--port": address.port or (443 if address.scheme == "https" else 80),
        "--dtype": engine_dtype(training, run.dtype),
        "--model-impl": training.vllm_model_impl,
        "--max-model-len": length,
        "--tensor-parallel-size": training.vllm_tensor_parallel_size,
        "--logprobs-mode": "processed_logprobs",
        "--generation-config": "vllm",
        "--middleware": MIDDLEWARE,
    }
    if training.constrain_selection:
        options["--logits-processors"] = LOGITS_PROCESSOR
    flags = ["--trust-remote-code"] if run.trust_remote_code else []
    adapters = of_recipe(recipe, training, role, on_cpu=False)
    slow = training.vllm_lora_sync == "auto" and not torch.cuda.is_available()  # see `vllm_adapters.SLOW`
    if adapters is not None and (slow or not runs_adapters(config, training.vllm_model_impl)):
        adapters = None
    if adapters is not None:
        flags.append("--enable-lora")
        options["--max-lora-rank"] = adapters.max_rank
    server_key(training.vllm_server_key_file)
    environment = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        KEY_FILE: str(Path(training.vllm_server_key_file).expanduser().resolve()),
    }
    if adapters is not None:
        environment[LORA_ROUTES] = "1"
    if torch.cuda.is_available():
        options["--gpu-memory-utilization"] = gpu_memory_utilization
        if adapters is None and training.vllm_weight_sync != "folder" and len(urls) == 1:
            options["--weight-transfer-config"] = '{"backend": "nccl"}'
    else:
        # Why prompts are not split: see `vllm_colocate.cpu_options`.
        options["--max-num-batched-tokens"] = max(4096, length or 4096)
        flags += ["--enforce-eager", "--no-enable-chunked-prefill"]
        # "auto" is the type of the weights, which may be the widest.
        held = getattr(torch, str(options["--dtype"]), torch.float32)
        options["--kv-cache-memory-bytes"] = cpu_cache_bytes(token_cache_bytes(config.get_text_config(), held), length)
    # `vllm serve` asks for a distribution by the name of vllm, which the CPU build has not. This is what it runs.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    for name, value in options.items():
        if value is not None:
            command += [name, str(value)]
    return ServerCommand((*command, *flags, *extra), environment)
