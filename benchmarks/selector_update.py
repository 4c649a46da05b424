"""One selector update, forward and backward over m selections of one long prompt: packed rows against the plain path.

    python -m benchmarks.selector_update
    python -m benchmarks.selector_update --device cuda --dtype bfloat16 --model llama-1b --plain-m 1 --plain-m 8

Both paths make completion-only logits; the plain one runs the prompt once for each selection, all in one padded batch.
"Fewer tokens" is m(P+R)/(P+mR): what sharing the prompt can save at best in the layers' matrices. Memory is that of
activations, above the model and its gradients.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
import typer

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
from dro_rl.likelihood import completion_logps

SIZES, PLAIN_SIZES = [1, 2, 4, 8, 16], [1, 8]


def update(
    packed: bool, m: int, prompt: int, completion: int, model: str, device: str, dtype: str, repeats: int
) -> dict[str, Any]:
    """Measure one path."""
    selector = harness.build_model(model, device, dtype)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, harness.VOCABULARY, (prompt,), generator=generator).tolist()
    selections = torch.randint(2, harness.VOCABULARY, (m, completion), generator=generator).tolist()

    def forward_and_backward() -> None:
        logps = completion_logps(selector, ids, selections, shared_prefix=packed)
        (-torch.stack([each.sum() for each in logps]).mean()).backward()

    tokens = prompt + m * completion if packed else m * (prompt + completion)
    return harness.time_update(forward_and_backward, selector, repeats, device, tokens)


def main(
    context: typer.Context,
    m: Annotated[list[int], typer.Option(help="Selections of the prompt.")] = SIZES,
    plain_m: Annotated[list[int], typer.Option(help="Where the plain path is measured too.")] = PLAIN_SIZES,
    prompt: PromptOption = 3000,
    completion: CompletionOption = 30,
    model: ModelOption = "512x4",
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    repeats: RepeatsOption = 5,
    output: OutputOption = OUTPUT,
) -> None:
    """Time the selector's update on both paths."""
    harness.check(model, device)
    options: dict[str, Any] = {"prompt": prompt, "completion": completion, "model": model}
    options |= {"device": device, "dtype": dtype, "repeats": repeats}
    rows: list[dict[str, Any]] = []
    for size in sorted({*m, *plain_m}):
        plain = harness.apart(update, packed=False, m=size, **options) if size in plain_m else None
        packed = harness.apart(update, packed=True, m=size, **options)
        tokens = size * (prompt + completion) / (prompt + size * completion)
        rows.append({"m": size, "plain": plain, "packed": packed, "fewer_tokens": tokens})
    nothing: dict[str, Any] = {"seconds": [math.nan], "mib": math.nan}
    lines = []
    for row in rows:
        plain, packed = row["plain"] or nothing, row["packed"]
        lines.append(
            [
                str(row["m"]),
                cell(median(plain)),
                cell(median(packed)),
                cell(median(plain) / median(packed), 1, "x"),
                cell(row["fewer_tokens"], 1, "x"),
                cell(median(packed) / median(rows[0]["packed"]), 2, "x"),
                cell(plain["mib"], 0),
                cell(packed["mib"], 0),
                cell(packed["mib"] / plain["mib"], 2),
            ]
        )
    harness.report(
        "selector_update",
        context,
        f"Selector update, P = {prompt}, R = {completion}, {model}, {dtype}",
        [
            "m",
            "plain s",
            "packed s",
            "faster",
            "fewer tokens",
            f"packed over m={rows[0]['m']}",
            "plain MiB",
            "packed MiB",
            "memory",
        ],
        lines,
        rows,
        [f"Medians of {repeats}. Packed at m = {rows[-1]['m']}: {harness.utilisation(rows[-1]['packed'], device)}."],
    )


if __name__ == "__main__":
    typer.run(main)
