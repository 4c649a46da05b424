"""Packed rows against the plain path, values and gradients, and what the device can do at best.

    python -m benchmarks.exactness
    python -m benchmarks.exactness --device cuda --model llama-1b --prompt 3000

Differences are of token log-probabilities, nats, and of the gradient of all weights, over its norm. In float32 they are
rounding; in bfloat16 each path is also compared with float32, so that one sees whose rounding it is. The ceilings are a
product of two square matrices and a copy, as this device does them now: what a speed is to be held against.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import (
    OUTPUT,
    CompletionOption,
    DeviceOption,
    ModelOption,
    OutputOption,
    PromptOption,
)
from dro_rl.likelihood import completion_logps

Paths = dict[tuple[str, bool], tuple[Tensor, Tensor]]


def differences(m: int, prompt: int, completion: int, model: str, device: str) -> list[dict[str, Any]]:
    """Both paths in float32 and bfloat16, on the same weights and tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, harness.VOCABULARY, (prompt,), generator=generator).tolist()
    written = torch.randint(2, harness.VOCABULARY, (m, completion), generator=generator).tolist()
    found: Paths = {}
    for dtype in ("float32", "bfloat16"):
        for packed in (True, False):
            found[dtype, packed] = _scored(model, device, dtype, ids, written, packed)
    return [
        {"what": what, "logps": _largest(found[one][0], found[other][0]), "gradient": _share(found[one], found[other])}
        for what, one, other in (
            ("packed against plain, float32", ("float32", True), ("float32", False)),
            ("packed against plain, bfloat16", ("bfloat16", True), ("bfloat16", False)),
            ("packed bfloat16 against plain float32", ("bfloat16", True), ("float32", False)),
            ("plain bfloat16 against plain float32", ("bfloat16", False), ("float32", False)),
        )
    ]


def _scored(
    name: str, device: str, dtype: str, ids: Sequence[int], written: Sequence[Sequence[int]], packed: bool
) -> tuple[Tensor, Tensor]:
    """Token log-probabilities, and a sample of the gradient: every 97th number of each weight, float32, on the CPU."""
    model = harness.build_model(name, device, "float32").to(getattr(torch, dtype))
    logps = torch.cat(completion_logps(model, ids, written, shared_prefix=packed))
    (logps * torch.linspace(-1, 2, len(logps), device=device)).sum().backward()
    gradient = torch.cat([p.grad.flatten()[::97].float().cpu() for p in model.parameters() if p.grad is not None])
    return logps.detach().float().cpu(), gradient


def _largest(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


def _share(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    return ((one[1] - other[1]).norm() / other[1].norm().clamp(min=1e-30)).item()


def ceilings(device: str, size: int, repeats: int) -> dict[str, float]:
    """TFLOP/s of a bfloat16 product of matrices of `size`, TB/s of a copy: the best of some runs."""
    one, other = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    product = min(_seconds(lambda: one @ other, device) for _ in range(repeats + 1))
    copied = min(_seconds(lambda: one.clone(), device) for _ in range(repeats + 1))
    return {"tflops": 2 * size**3 / product / 1e12, "tb_per_second": 2 * one.numel() * 2 / copied / 1e12}


def _seconds(action: Any, device: str) -> float:
    import time

    harness.synchronize(device)
    started = time.perf_counter()
    action()
    harness.synchronize(device)
    return time.perf_counter() - started


def main(
    context: typer.Context,
    m: Annotated[int, typer.Option(help="Selections of the prompt.")] = 8,
    prompt: PromptOption = 1000,
    completion: CompletionOption = 30,
    matrix: Annotated[int, typer.Option(help="Rows and columns of the matrices of the ceilings.")] = 2048,
    model: ModelOption = "256x4",
    device: DeviceOption = "cpu",
    output: OutputOption = OUTPUT,
) -> None:
    """Compare the two paths, and measure the device's ceilings."""
    harness.check(model, device)
    rows = harness.apart(differences, m=m, prompt=prompt, completion=completion, model=model, device=device)
    most = harness.apart(ceilings, device=device, size=matrix, repeats=5)
    harness.report(
        "exactness",
        context,
        f"Packed rows against the plain path, m = {m}, P = {prompt}, R = {completion}, {model}",
        ["paths", "nats a token, at most", "gradient, share of its norm"],
        [[row["what"], f"{row['logps']:.1e}", f"{row['gradient']:.1e}"] for row in rows],
        [*rows, most],
        [f"Ceilings: {most['tflops']:.3g} TFLOP/s in bfloat16, {most['tb_per_second']:.3g} TB/s copied."],
    )


if __name__ == "__main__":
    typer.run(main)
