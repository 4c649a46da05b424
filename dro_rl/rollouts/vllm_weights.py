"""How the trainer's selector reaches vLLM servers: through a folder that both see, or over NCCL.

All processes of the trainer take part in each push, for sharded weights are gathered together.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedTokenizerBase

from dro_rl.config import DROConfig
from dro_rl.rollouts.vllm_common import check_installed
from dro_rl.rollouts.vllm_server import Publish, Server, load_everywhere


def publisher(
    config: DROConfig,
    folder: Path,
    save: Callable[[Path], None],
    selector: Callable[[], Any],
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
) -> Publish:
    """What pushes the selector's weights, by `vllm_weight_sync`.

    Args:
        folder: where weights are written, when they travel by folder.
        save: writes the selector into a folder, from all processes together.
        selector: the selector as it is now.
    """
    if _sync(config, accelerator) == "folder":
        return by_folder(folder, save, accelerator)
    return by_nccl(config, selector, tokenizer, accelerator)


def _sync(config: DROConfig, accelerator: Accelerator) -> str:
    if config.vllm_weight_sync != "auto":
        return config.vllm_weight_sync
    if accelerator.device.type != "cuda" or len(config.vllm_servers) > 1:
        return "folder"
    answer: list[Any] = [None]
    if accelerator.is_main_process:
        server = Server(config.vllm_servers[0], config.vllm_server_timeout, config.vllm_request_timeout)
        answer[0] = server.settings()["weight_transfer_config"] is not None
    return "nccl" if broadcast_object_list(answer)[0] else "folder"


def by_folder(folder: Path, save: Callable[[Path], None], accelerator: Accelerator) -> Publish:
    """Write the weights to a folder of their own each time, which no server can have cached, and have them read."""
    pushes = 0

    def publish(servers: Sequence[Server]) -> Path:
        nonlocal pushes
        pushes += 1
        place = folder.resolve() / f"push-{pushes}"
        save(place)
        if accelerator.is_main_process:
            load_everywhere(servers, place)
            for older in folder.glob("push-*"):
                if older.name != place.name:
                    shutil.rmtree(older)
        accelerator.wait_for_everyone()
        return place

    return publish


def by_nccl(
    config: DROConfig, selector: Callable[[], Any], tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator
) -> Publish:
    """Send the weights from GPU to GPU, through TRL's client as it is.

    The server runs with `--weight-transfer-config '{"backend": "nccl"}'`, on GPUs that the trainer does not use.
    """
    check_installed("vllm_weight_sync", "nccl")
    from trl.generation.vllm_generation import VLLMGeneration

    generation = VLLMGeneration(
        model=selector(),
        accelerator=accelerator,
        processing_class=tokenizer,
        mode="server",
        server_base_url=config.vllm_servers[0],
        server_timeout=config.vllm_server_timeout,
        group_port=config.vllm_group_port,
    )

    def publish(servers: Sequence[Server]) -> None:
        generation.model = selector()
        generation.sync_weights()

    return publish
