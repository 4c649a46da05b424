"""How the trainer's selector reaches vLLM servers: through a folder that both see, or over NCCL.

All processes of the trainer take part in each push, for sharded weights are gathered together.
"""

from __future__ import annotations

import importlib.util
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedTokenizerBase

from dro_rl.config import DROConfig
from dro_rl.engines.vllm_adapters import Adapters
from dro_rl.engines.vllm_colocate import take_weights_from
from dro_rl.engines.vllm_common import check_installed
from dro_rl.engines.vllm_server import Publish, Server, load_everywhere, servers_of, unload_everywhere
from dro_rl.errors import InputError, first_line
from dro_rl.files import folder_written_whole
from dro_rl.models.saving import is_adapted, save_adapters
from dro_rl.models.sharding import is_sharded


def publisher(
    config: DROConfig,
    folder: Path,
    save: Callable[[Path], None],
    selector: Callable[[], Any],
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    adapters: Adapters | None = None,
) -> Publish:
    """What pushes the selector's weights, by `vllm_weight_sync`, or its adapters alone, by folder.

    Args:
        folder: where weights are written, when they travel by folder.
        save: writes the selector into a folder, from all processes together.
        selector: the selector as it is now.
        adapters: where they are sent alone.
    """
    if adapters is not None or _sync(config, is_adapted(selector()), accelerator) == "folder":
        if config.vllm_weights_dir is None and accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)  # in the run's own folder: what it left when it was killed
        if adapters is None:
            return by_folder(folder, save, accelerator)
        return by_folder(folder, partial(_save_adapters, selector, accelerator), accelerator, alone=True)
    return by_nccl(config, selector, tokenizer, accelerator)


def _sync(config: DROConfig, adapted: bool, accelerator: Accelerator) -> str:
    mergeable = not (adapted and is_sharded(accelerator))
    if config.vllm_weight_sync == "nccl" and not mergeable:
        raise InputError(
            "vllm_weight_sync",
            "nccl",
            "adapters of a sharded selector are merged in a copy that goes by folder",
            "Use folder, or train without FSDP and DeepSpeed.",
        )
    if config.vllm_weight_sync != "auto":
        return config.vllm_weight_sync
    if accelerator.device.type != "cuda" or len(config.vllm_servers) > 1 or not mergeable:
        return "folder"
    answer: list[Any] = [False]
    if accelerator.is_main_process and importlib.util.find_spec("vllm") is not None:
        answer[0] = servers_of(config)[0].settings()["weight_transfer_config"] is not None
    return "nccl" if broadcast_object_list(answer)[0] else "folder"


def _save_adapters(selector: Callable[[], Any], accelerator: Accelerator, place: Path) -> None:
    if accelerator.is_main_process:
        with folder_written_whole(place) as beside:
            save_adapters(selector(), beside)


def by_folder(folder: Path, save: Callable[[Path], None], accelerator: Accelerator, *, alone: bool = False) -> Publish:
    """Write the weights to a folder of their own each time, which no server can have cached, and have them read.

    A run's pushes are in a folder with a name of its own: runs may share a `vllm_weights_dir`.

    Args:
        alone: what is written are adapters, and servers have their base.
    """
    pushes, run = 0, broadcast_object_list([f"run-{secrets.token_hex(4)}"])[0]

    def publish(servers: Sequence[Server]) -> Path:
        nonlocal pushes
        pushes += 1
        place = folder.resolve() / run / f"push-{pushes}"
        save(place)
        if accelerator.is_main_process:
            load_everywhere(servers, place, alone=alone)
            for older in place.parent.iterdir():
                if older != place:
                    if alone:
                        unload_everywhere(servers, older)
                    shutil.rmtree(older, ignore_errors=True)
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
    from trl.generation import vllm_generation

    server = servers_of(config)[0]
    instance = server.settings()["instance_id"] if accelerator.is_main_process else None
    with _away_said(server):
        generation = vllm_generation.VLLMGeneration(
            model=selector(),
            accelerator=accelerator,
            processing_class=tokenizer,
            mode="server",
            server_base_url=server.url.replace("://", f"://dro_rl:{quote(server.key, safe='')}@"),
            server_timeout=config.vllm_server_timeout,
            group_port=config.vllm_group_port,
        )

    def publish(servers: Sequence[Server]) -> None:
        if accelerator.is_main_process and server.settings()["instance_id"] != instance:
            raise server.away("it was started again, and the group that weights travel in ended with it")
        take_weights_from(generation, selector(), sharded=is_sharded(accelerator))
        with _away_said(server):
            generation.sync_weights()

    return publish


@contextmanager
def _away_said(server: Server) -> Iterator[None]:
    """Turn what TRL's client raises when the server cannot be reached, or its engine has died, into our error."""
    try:
        yield
    except Exception as error:  # for an answer that is not 200 it has no type of its own
        if isinstance(error, OSError) or server.problem() is not None:
            raise server.away(first_line(error).replace(quote(server.key, safe=""), "…")) from None
        raise
