"""One role of a model whose parameters may be sharded: called by each process as often as it likes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import PreTrainedModel

from dro_rl.models.module import SelectorGenerator
from dro_rl.roles import Role


def launched_to_shard() -> str | None:
    """Which launcher's layout this process was started under, where it is one that may shard parameters.

    Read off what `accelerate launch` tells its processes: models are not loaded, and nothing is prepared yet.
    """
    layouts = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}
    return next((name for key, name in layouts.items() if os.environ.get(key, "false") == "true"), None)


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether a process may hold a part of each weight alone."""
    return accelerator.distributed_type.value in ("FSDP", "DEEPSPEED")


@contextmanager
def whole_parameters() -> Iterator[None]:
    """Build or load models whole, also where ZeRO-3 would shard them on the way."""
    from transformers.integrations import deepspeed

    sharding = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = sharding


class _Routed:
    """One role of a sharded model, called through the module that was wrapped."""

    def __init__(self, wrapped: nn.Module, role: Role, plain: PreTrainedModel, device: torch.device) -> None:
        self.wrapped, self.role, self._plain = wrapped, role, plain
        self.config, self.device = plain.config, device
        self._pulse = torch.zeros(1, device=device)

    def set_attn_implementation(self, name: str) -> None:
        self._plain.set_attn_implementation(name)

    def __call__(self, **inputs: Any) -> Any:
        return self.within(lambda model: model(**inputs))

    def within(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call `function` with the role itself, while its parameters are there."""
        self._anyone_busy(True)
        return self.wrapped(call=(self.role, lambda model: function(model, *arguments)))

    def drain(self) -> None:
        """Keep calling, with one token, while another process still has work: each call gathers parameters together."""
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        while self._anyone_busy(False):
            self.wrapped(call=(self.role, lambda model: model(input_ids=token, logits_to_keep=1, use_cache=False)))

    def _anyone_busy(self, busy: bool) -> bool:
        self._pulse.fill_(float(busy))
        torch.distributed.all_reduce(self._pulse)
        return bool(self._pulse.item() > 0)


@contextmanager
def inference(model: SelectorGenerator, wrapped: nn.Module, role: Role, accelerator: Accelerator) -> Iterator[Any]:
    """One role, ready to be called without gradient as often as each process likes.

    Where parameters are sharded (FSDP, ZeRO-3) every process must take part in each call, so one that has finished
    stands by until all have.
    """
    plain = getattr(model, role)
    was_training = model.training
    model.eval()
    sharded = accelerator.distributed_type == DistributedType.FSDP or is_zero3(accelerator)
    target = _Routed(wrapped, role, plain, accelerator.device) if sharded else plain
    try:
        with torch.no_grad(), accelerator.autocast():
            yield target
            if isinstance(target, _Routed):
                target.drain()
    finally:
        model.train(was_training)


def is_zero3(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed shards the parameters themselves."""
    plugin = accelerator.state.deepspeed_plugin if accelerator.distributed_type == DistributedType.DEEPSPEED else None
    return plugin is not None and plugin.zero_stage == 3
