"""The attention of one layer over m selections of one prompt: packed rows' own, and three others.

    python -m benchmarks.attention
    python -m benchmarks.attention --device cuda --dtype bfloat16 --model llama-1b

`packed` is `dro_rl.likelihood.attention`: the prompt by the causal kernel, the completions by a small masked one.
`flex` is FlexAttention, compiled, over the same tokens with the same mask. In `rows` every selection stands after a
prompt of its own, m(P+R) tokens, by the causal kernel, and `varlen` does that by FlashAttention of variable length.
The time is that of attention alone: what else a layer does with m(P+R) tokens in place of P+mR is in
`benchmarks.selector_update`. All are held against one dense mask in float32, values and gradients. For a CPU torch has
no varlen, and no FlexAttention with a backward pass: there these two are left out.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import harness
from benchmarks.harness import (
    OUTPUT,
    CompletionOption,
    DeviceOption,
    DtypeOption,
    ModelOption,
    OutputOption,
    PromptOption,
    RepeatsOption,
    cell,
    median,
)
from dro_rl.likelihood.attention import packed_attention
from dro_rl.likelihood.packing import Row, lay_out

States = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values, (batch, heads, tokens, head size)."""
WAYS = ("packed", "flex", "varlen", "rows")
ON_A_CPU = ("packed", "rows")
SIZES = [4, 16]


@dataclass(frozen=True)
class Shape:
    """What is attended: m completions of R tokens after a prompt of P."""

    m: int
    prompt: int
    completion: int

    @property
    def tokens(self) -> int:
        return self.prompt + self.m * self.completion

    @property
    def row(self) -> int:
        return self.prompt + self.completion

    def owner(self, device: str) -> Tensor:
        """Of each token the completion that it is in; -1 for the prompt. One sees its own and the prompt before it."""
        written = torch.arange(self.m, device=device).repeat_interleave(self.completion)
        return torch.cat([torch.full((self.prompt,), -1, device=device), written])

    def apart(self, states: Tensor) -> Tensor:
        """(1, heads, tokens, size) as (m, heads, row, size): each completion after a prompt of its own."""
        prompt, written = states.split([self.prompt, self.m * self.completion], dim=2)
        rows = written.unflatten(2, (self.m, self.completion))[0].movedim(1, 0)
        return torch.cat([prompt.expand(self.m, -1, -1, -1), rows], dim=2)

    def together(self, rows: Tensor) -> Tensor:
        """The way back, of what the first row's prompt has: (m, heads, row, size) as (1, heads, tokens, size)."""
        prompt, written = rows.split([self.prompt, self.completion], dim=2)
        return torch.cat([prompt[:1], written.movedim(0, 1).flatten(1, 2)[None]], dim=2)


@dataclass(frozen=True)
class Way:
    """One way to attend.

    Args:
        lay: queries, keys or values of all tokens, (1, heads, tokens, head size), as it wants them.
        attend: these three to its output.
        read: its output as (1, heads, tokens, head size).
    """

    lay: Callable[[Tensor], Tensor]
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    read: Callable[[Tensor], Tensor]

    def __call__(self, states: States) -> Tensor:
        query, key, value = (self.lay(each) for each in states)
        return self.read(self.attend(query, key, value))


def way_of(name: str, shape: Shape, groups: int, device: str) -> Way:
    """The way of a name.

    Args:
        groups: heads of queries for each of keys and values.
    """
    if name == "packed":
        return _packed(shape, groups, device)
    if name == "rows":
        attend = partial(scaled_dot_product_attention, is_causal=True, enable_gqa=True)
        return Way(shape.apart, attend, shape.together)
    return _flex(shape, device) if name == "flex" else _varlen(shape, device)


def _packed(shape: Shape, groups: int, device: str) -> Way:
    row = Row([0] * shape.prompt, [[0] * shape.completion] * shape.m)
    segments = [segment.to(device) for segment in lay_out([row]).segments]
    layer: Any = SimpleNamespace(layer_idx=0, is_causal=True, num_key_value_groups=groups)
    return Way(
        lambda states: states,
        lambda *states: packed_attention(layer, *states, None, packing=segments)[0],
        lambda out: out.movedim(1, 2),
    )


def _flex(shape: Shape, device: str) -> Way:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    owner = shape.owner(device)

    def looks(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & ((owner[key] == -1) | (owner[key] == owner[query]))

    blocks = create_block_mask(looks, None, None, shape.tokens, shape.tokens, device=device)
    attend: Any = partial(torch.compile(flex_attention), block_mask=blocks, enable_gqa=True)
    return Way(lambda states: states, attend, lambda out: out)


def _varlen(shape: Shape, device: str) -> Way:
    from torch.nn.attention.varlen import varlen_attn

    starts = torch.arange(0, shape.m * shape.row + 1, shape.row, dtype=torch.int32, device=device)
    known = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:
        causal["enable_gqa"] = True
    return Way(
        lambda states: shape.apart(states).movedim(1, 2).flatten(0, 1).contiguous(),
        lambda *states: varlen_attn(*states, starts, starts, shape.row, shape.row, **causal),
        lambda out: shape.together(out.unflatten(0, (shape.m, shape.row)).movedim(1, 2)),
    )


def dense(states: States, shape: Shape) -> Tensor:
    """The plain twin: one mask of (tokens, tokens)."""
    owner = shape.owner(states[0].device.type)
    mask = ((owner == owner[:, None]) | (owner == -1)).tril()
    return scaled_dot_product_attention(*states, attn_mask=mask, enable_gqa=True)


def measure(name: str, shape: Shape, model: str, device: str, dtype: str, repeats: int) -> dict[str, Any]:
    """Seconds and memory of one way, forward and backward, and how far it is from the dense mask in float32."""
    size = harness.model_size(model)
    way = way_of(name, shape, size.heads // size.key_value_heads, device)
    torch.manual_seed(0)
    heads = (size.heads, size.key_value_heads, size.key_value_heads)
    wide = [torch.randn(1, each, shape.tokens, size.width // size.heads, device=device) for each in heads]
    upstream = torch.randn(1, size.heads, shape.tokens, size.width // size.heads, device=device)
    narrow = getattr(torch, dtype)
    leaves: Any = tuple(each.to(narrow).requires_grad_() for each in wide)
    exact: Any = tuple(each.detach().float().requires_grad_() for each in leaves)
    expected, found = dense(exact, shape), way(leaves)
    (expected * upstream).sum().backward()
    (found.float() * upstream).sum().backward()
    differs = {
        "values": _share([found], [expected]),
        "gradients": _share([each.grad for each in leaves], [each.grad for each in exact]),
    }

    laid = [way.lay(each.detach()).clone().requires_grad_() for each in leaves]
    given = torch.randn_like(way.attend(*laid))

    def forward_and_backward() -> None:
        torch.autograd.grad(way.attend(*laid), laid, given)

    return {**differs, **harness.time_calls(forward_and_backward, repeats, device)}


def _share(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The norm of what differs, over the norm of what is expected."""
    pairs = list(zip(found, expected, strict=True))
    wrong = sum((one.float() - other).square().sum().item() for one, other in pairs)
    return math.sqrt(wrong / sum(other.square().sum().item() for _, other in pairs))


def main(
    context: typer.Context,
    m: Annotated[list[int], typer.Option(help="Selections of the prompt.")] = SIZES,
    prompt: PromptOption = 3000,
    completion: CompletionOption = 30,
    model: ModelOption = "512x4",
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    repeats: RepeatsOption = 5,
    output: OutputOption = OUTPUT,
) -> None:
    """Time one layer's attention in each way."""
    harness.check(model, device)
    options: dict[str, Any] = {"model": model, "device": device, "dtype": dtype, "repeats": repeats}
    rows = [
        {"m": size, "way": name, "measured": harness.apart(measure, name=name, shape=shape, **options)}
        for size in m
        for shape in [Shape(size, prompt, completion)]
        for name in (ON_A_CPU if device == "cpu" else WAYS)
    ]
    lines = []
    for row in rows:
        measured = row["measured"]
        packed = next(each["measured"] for each in rows if each["m"] == row["m"] and each["way"] == "packed")
        lines.append(
            [
                str(row["m"]),
                row["way"],
                cell(1000 * median(measured)),
                cell(median(measured) / median(packed), 2, "x"),
                cell(measured["mib"], 0),
                f"{measured['values']:.1e}",
                f"{measured['gradients']:.1e}",
            ]
        )
    harness.report(
        "attention",
        context,
        f"Attention of one layer, P = {prompt}, R = {completion}, heads of {model}, {dtype}",
        ["m", "way", "ms", "over packed", "MiB", "values differ", "gradients differ"],
        lines,
        rows,
        [f"Medians of {repeats}, forward and backward. Differences are shares of the norm in float32."],
    )


if __name__ == "__main__":
    typer.run(main)
