"""What a role's model weighs, and what autograd keeps of a token: counted on fake tensors, without its weights.

A fake tensor has a shape and a type and computes nothing. A forward pass of them tells which tensors the backward pass
will need, for whatever architecture, adapters and precision the recipe names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dro_rl.config import DROConfig
from dro_rl.em.timing import flops_per_token
from dro_rl.engines.vllm_common import token_cache_bytes
from dro_rl.job.assembly import lora_settings
from dro_rl.job.model_checks import without_weights
from dro_rl.likelihood import depth, unshared, without_adapters
from dro_rl.likelihood.attention import NO_MASK, drops_out, takes_packed_rows
from dro_rl.likelihood.packing import Row, lay_out
from dro_rl.models.loading import add_adapter
from dro_rl.recipe import Recipe
from dro_rl.roles import Role

TOKENS = 4096
"""Of rows that a fake pass reads, or of one question where that has more: memory grows with tokens in proportion."""

CODES = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
"""Bytes a weight in codes. Under nf4 64 have a scale of a byte, and 256 of those one of four (Dettmers et al. 2023);
under int8 each output has one of four, counted beside them."""


@dataclass(frozen=True, slots=True)
class RoleSize:
    """One role's model.

    Args:
        parameters, trained: its weights, and those that train.
        weight_bytes, trained_bytes: of the same, in the types they are held in.
        forward, step: operations a token of the weights, without attention (`flops_per_token`).
        layers, width, vocabulary: its shape.
        attention: width of all query heads together.
        cache_bytes: keys and values of a token in the type of the computation.
        packed: whether it takes each prompt once for all its completions.
        kept: bytes a token that autograd keeps, if the model trains.
        kept_recomputing: the same, where layers are computed again in the backward pass.
        casts: bytes of the weights in the type of the computation, where that is another.
        adapted: whether it trains by adapters.
        drops_out: whether dropout is in it while it trains.
    """

    parameters: int
    trained: int
    weight_bytes: int
    trained_bytes: int
    forward: float
    step: float
    layers: int
    width: int
    vocabulary: int
    attention: int
    cache_bytes: int
    packed: bool
    kept: float
    kept_recomputing: float
    casts: int
    adapted: bool
    drops_out: bool


def size_of(recipe: Recipe, role: Role, half: torch.dtype | None, questions: Sequence[Sequence[Row]]) -> RoleSize:
    """Measure a role's model, and what autograd keeps of a token of these rows.

    Args:
        half: the 16-bit type that is computed in, if one is.
        questions: the rows of the role, by question.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = _model(recipe, role)
        plain = without_adapters(model)
        config = plain.config.get_text_config()
        training = recipe.training
        packed = training.shared_prefix != "off" and takes_packed_rows(model, max(_depths(questions), default=1))
        weights = list(model.parameters())
        codes = _in_codes(model, recipe.run.quantization)
        frozen = training.role_learning_rate(role) == 0
        trained = [weight for weight in weights if weight.requires_grad and not frozen]
        half = None if half == weights[0].dtype else half
        rows = _some(questions)
        kept = _kept(model, rows, half, packed, training)
        every = (training.gradient_checkpointing_kwargs or {}).get("every_n_layers", 1)
        model.gradient_checkpointing_enable(every_n_layers=every)
        model.enable_input_require_grads()
        recomputing = _kept(model, rows, half, packed, training)
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        flops = flops_per_token(model)
        return RoleSize(
            parameters=sum(weight.numel() for weight in weights),
            trained=sum(weight.numel() for weight in trained),
            weight_bytes=int(sum(codes.get(id(weight), weight.nbytes) for weight in weights)),
            trained_bytes=sum(weight.nbytes for weight in trained),
            forward=flops.forward,
            step=flops.step,
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            vocabulary=config.vocab_size,
            attention=head_size * config.num_attention_heads,
            cache_bytes=token_cache_bytes(config, half or weights[0].dtype) or 0,
            packed=packed,
            kept=kept,
            kept_recomputing=recomputing,
            casts=0
            if half is None
            else half.itemsize
            * sum(w.numel() for w in weights if w.dtype != half and w.dim() > 1 and id(w) not in codes),
            adapted=recipe.run.of(role).lora_r > 0,
            drops_out=drops_out(model),
        )


def _model(recipe: Recipe, role: Role) -> Any:
    """The role's model as the run loads it, its type and its adapters, on fake tensors."""
    with torch.device("meta"):
        model = without_weights(recipe.run, role)
        asked = recipe.run.dtype
        held: Any = model.config.dtype or torch.float32 if asked == "auto" else getattr(torch, asked)
        lora = lora_settings(recipe.run, role)
        adapted: Any = model if lora is None else add_adapter(model, lora)
    fakes: dict[int, nn.Parameter] = {}  # tied weights stay one
    for module in adapted.train().modules():
        for name, weight in module.named_parameters(recurse=False):
            kind = torch.float32 if lora is not None and weight.requires_grad else held
            fake = fakes.setdefault(
                id(weight), nn.Parameter(torch.empty(weight.shape, dtype=kind), weight.requires_grad)
            )
            setattr(module, name, fake)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    return adapted


def _in_codes(model: Any, quantization: str) -> dict[int, float]:
    """By their ids, bytes of the weights that bitsandbytes holds in codes: frozen linear layers, but not the head."""
    if quantization not in CODES:
        return {}
    head = without_adapters(model).get_output_embeddings()
    layers = [each for each in model.modules() if isinstance(each, nn.Linear) and each is not head]
    return {
        id(layer.weight): layer.weight.numel() * CODES[quantization]
        + (4 * layer.out_features if quantization == "int8" else 0)
        for layer in layers
        if not layer.weight.requires_grad
    }


def _depths(questions: Sequence[Sequence[Row]]) -> list[int]:
    return [depth(row) for rows in questions for row in rows]


def _some(questions: Sequence[Sequence[Row]]) -> list[Row]:
    """Rows of whole questions, up to `TOKENS`."""
    rows: list[Row] = []
    for own in questions:
        if rows and sum(map(len, [*rows, *own])) > TOKENS:
            break
        rows += own
    return rows


def _kept(model: Any, rows: Sequence[Row], half: torch.dtype | None, packed: bool, training: DROConfig) -> float:
    """Bytes a token, of `len(row)` or `unshared(row)` each, that autograd keeps of a forward pass of the decoder."""
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # held, so that no other takes its address
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None),
    ):
        without_adapters(model).base_model(**_inputs(rows, packed, training), use_cache=False)
    weights = {weight.untyped_storage()._cdata for weight in model.parameters()}
    sizes = {weight.numel() * half.itemsize for weight in model.parameters()} if half else set()
    held = [each.nbytes() for place, each in kept.items() if place not in weights and each.nbytes() not in sizes]
    return sum(held) / sum(len(row) if packed else unshared(row) for row in rows)


def _inputs(rows: Sequence[Row], packed: bool, training: DROConfig) -> dict[str, Any]:
    if not packed:
        completions = sum(len(row.completions) for row in rows)
        return {"input_ids": torch.zeros(completions, max(map(depth, rows)), dtype=torch.long)}
    layout = lay_out(rows, prefix_tree=training.prefix_tree and len(rows) > 1)
    return {
        "input_ids": torch.tensor([layout.ids]),
        "position_ids": torch.tensor([layout.positions]),
        "attention_mask": NO_MASK,
        "packing": layout.segments,
    }
