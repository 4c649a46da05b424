"""A selector's step, sampling and update: the prompt read once for both, against once for each.

    python -m benchmarks.sampling_pass
    python -m benchmarks.sampling_pass --device cuda --dtype bfloat16 --model llama-1b --checkpointing

A step draws m selections of each prompt over one cache, and takes prompts and selections forward and backward as packed
rows. "Fewer operations" is what the layers' matrices are spared: a prompt's forward is one of the four passes' worth
that it takes (five with recomputation) when it is read for each. Memory is that of activations and caches, above the
model and its gradients.
"""

from __future__ import annotations

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
    RepeatsOption,
    cell,
    median,
)
from dro_rl.engines.decoding import Decoder
from dro_rl.engines.protocol import GenerationRequest
from dro_rl.likelihood import row_logps
from dro_rl.likelihood.attention import takes_packed_rows
from dro_rl.likelihood.packing import Row
from dro_rl.likelihood.prefill import Prefills
from dro_rl.likelihood.room import Room
from dro_rl.proposal import SamplingParams

SIZES = [1, 8]
NEVER = -1
"""No selection ends early: each has the tokens that were asked for."""


def step(
    once: bool, m: int, questions: int, prompt: int, completion: int, checkpointing: bool,
    model: str, device: str, dtype: str, repeats: int,
) -> dict[str, Any]:  # fmt: skip
    """Measure one way."""
    selector = harness.build_model(model, device, dtype)
    if checkpointing:
        selector.gradient_checkpointing_enable({"use_reentrant": False})
    takes_packed_rows(selector, prompt + completion)
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(2, harness.VOCABULARY, (questions, prompt), generator=draw).tolist()
    request = GenerationRequest(prompts, m, SamplingParams(completion), [1000 * i for i in range(questions)])
    prefills = Prefills(Room(questions * (prompt + m * completion)), wanted=once)

    def sample_and_update() -> None:
        kept = prefills if prefills.begin(prompts) else None
        groups = Decoder(selector.eval(), NEVER).generate(request, kept)
        rows = [Row(ids, [sample.ids for sample in group]) for ids, group in zip(prompts, groups, strict=True)]
        logps = row_logps(selector.train(), rows, prefills=prefills.take(rows))
        (-torch.stack([each.sum() for row in logps for each in row]).mean()).backward()

    return harness.time_update(sample_and_update, selector, repeats, device)


def main(
    context: typer.Context,
    m: Annotated[list[int], typer.Option(help="Selections of a prompt.")] = SIZES,
    questions: Annotated[int, typer.Option(help="Prompts of a step.")] = 1,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt (P).")] = 3000,
    completion: CompletionOption = 30,
    checkpointing: Annotated[bool, typer.Option(help="Recompute layers in the backward pass.")] = False,
    model: ModelOption = "512x4",
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    repeats: RepeatsOption = 5,
    output: OutputOption = OUTPUT,
) -> None:
    """Time sampling and update together, both ways."""
    harness.check(model, device)
    options: dict[str, Any] = {"questions": questions, "prompt": prompt, "completion": completion}
    options |= {"checkpointing": checkpointing, "model": model, "device": device, "dtype": dtype, "repeats": repeats}
    rows: list[dict[str, Any]] = []
    for size in m:
        twice, once = (harness.apart(step, once=way, m=size, **options) for way in (False, True))
        passes, drawn = 5 if checkpointing else 4, (5 if checkpointing else 4) * size * completion
        fewer = (passes * prompt + drawn) / ((passes - 1) * prompt + drawn)
        rows.append({"m": size, "twice": twice, "once": once, "fewer_operations": fewer})
    lines = [
        [
            str(row["m"]),
            cell(median(row["twice"])),
            cell(median(row["once"])),
            cell(median(row["twice"]) / median(row["once"]), 2, "x"),
            cell(median(row["twice"], "cpu_seconds") / median(row["once"], "cpu_seconds"), 2, "x"),
            cell(row["fewer_operations"], 2, "x"),
            cell(row["twice"]["mib"], 0),
            cell(row["once"]["mib"], 0),
            cell(row["once"]["mib"] / row["twice"]["mib"]),
        ]
        for row in rows
    ]
    columns = ["m", "twice s", "once s", "faster", "by processor time", "fewer operations", "twice MiB", "once MiB"]
    title = f"Sampling and update, {questions} of P = {prompt}, R = {completion}, {model}, {dtype}"
    title += ", recomputed" if checkpointing else ""
    notes = [f"Medians of {repeats}."]
    harness.report("sampling_pass", context, title, [*columns, "memory"], lines, rows, notes)


if __name__ == "__main__":
    typer.run(main)
