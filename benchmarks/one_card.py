"""Memory and time of a training pass with one base under two adapters, against two bases.

    python -m benchmarks.one_card
    python -m benchmarks.one_card --device cuda --dtype bfloat16 --model llama-8b --held none --held nf4

A pass is forward and backward of both roles over one question: a selector's prompt with m selections, and m prompts of
the generator. Each case runs in a process of its own; memory is that of all that the process came to hold from before
the models were made: weights, adapters, gradients, activations.
"""

from __future__ import annotations

import tempfile
from typing import Annotated, Any

import torch
import typer

from benchmarks import harness
from benchmarks.harness import OUTPUT, DeviceOption, DtypeOption, ModelOption, OutputOption, RepeatsOption, cell, median
from dro_rl.likelihood import row_logps
from dro_rl.likelihood.packing import Row
from dro_rl.models import quantization
from dro_rl.models.loading import LoraSettings, add_adapter, load_model
from dro_rl.models.sharing import twin

CASES = ["none"]


def write_base(folder: str, model: str, device: str, dtype: str) -> None:
    """A random base, to be read by each case as a run reads its own."""
    harness.build_model(model, device, dtype).save_pretrained(folder)


def update(
    folder: str, shared: bool, held: str, m: int, prompt: int, read: int, device: str, dtype: str, repeats: int
) -> dict[str, Any]:
    """Measure one case."""
    memory = harness.PeakMemory(device)
    kind = getattr(torch, dtype)

    def base() -> Any:
        loaded: Any = load_model(folder, dtype=kind, **quantization.settings_of(held, kind))
        return loaded.to(device).requires_grad_(False)

    first = base()
    bases = [first, twin(first) if shared else base()]
    lora = LoraSettings(16, 32, 0.0, None)
    selector, generator = (add_adapter(each, lora).train() for each in bases)
    draw = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(2, harness.VOCABULARY, (count,), generator=draw).tolist()

    selections = [Row(tokens(prompt), [tokens(25) for _ in range(m)])]
    answers = [Row(tokens(read), [tokens(15)]) for _ in range(m)]

    def forward_and_backward() -> None:
        logps = [each for model, rows in ((selector, selections), (generator, answers))
                 for row in row_logps(model, rows) for each in row]  # fmt: skip
        (-torch.cat(logps).mean()).backward()

    weights = memory.mib()
    trained = torch.nn.ParameterList(p for each in (selector, generator) for p in each.parameters() if p.requires_grad)
    timed = harness.time_update(forward_and_backward, trained, repeats, device)
    return {**timed, "weights": weights, "peak": max(weights, memory.mib())}


def main(
    context: typer.Context,
    held: Annotated[list[str], typer.Option(help="How bases are held: none, nf4, int8.")] = CASES,
    m: Annotated[int, typer.Option(help="Selections of the question.")] = 8,
    prompt: Annotated[int, typer.Option(help="Tokens of the selector's prompt.")] = 600,
    read: Annotated[int, typer.Option(help="Tokens of a generator's prompt.")] = 160,
    model: ModelOption = "512x6",
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    repeats: RepeatsOption = 5,
    output: OutputOption = OUTPUT,
) -> None:
    """Measure two bases and one, in each way that bases are held."""
    harness.check(model, device)
    options: dict[str, Any] = {"m": m, "prompt": prompt, "read": read, "device": device}
    options |= {"dtype": dtype, "repeats": repeats}
    with tempfile.TemporaryDirectory(prefix="one_card") as folder:
        options["folder"] = folder
        harness.apart(write_base, folder=folder, model=model, device="cpu", dtype=dtype)
        rows = [
            {"held": each, "shared": shared, **harness.apart(update, shared=shared, held=each, **options)}
            for each in held
            for shared in (False, True)
        ]
    plain = rows[0]
    lines = [
        [
            f"{'one base' if row['shared'] else 'two bases'}, {row['held']}",
            cell(row["weights"], 0),
            cell(row["peak"], 0),
            cell(row["peak"] / plain["peak"]),
            cell(median(row)),
            cell(median(row) / median(plain)),
        ]
        for row in rows
    ]
    columns = ["", "weights MiB", "peak MiB", "of the first", "s", "of the first"]
    title = f"Adapters of rank 16 on {model}, {dtype}: one question, P = {prompt}, m = {m}"
    harness.report("one_card", context, title, columns, lines, rows, [f"Medians of {repeats}."])


if __name__ == "__main__":
    typer.run(main)
