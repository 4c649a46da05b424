"""What the benchmarks share: models by size, a case in a process of its own, medians, peak memory, tables.

A case runs in a fresh process, so that its peak memory is its own and no case warms another's caches. On a GPU memory
is what torch's allocator held at most; on a CPU it is the resident set, as the kernel counts it.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM

from dro_rl.em.timing import flops_per_token, peak_flops

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL's trainers report themselves unless told not to
HEAD_SIZE = 64
VOCABULARY = 8192
MIB = 2**20

ModelOption = Annotated[str, typer.Option(help="A random Llama: WIDTHxLAYERS (512x6), llama-1b or llama-8b.")]
DeviceOption = Annotated[Literal["cpu", "cuda"], typer.Option(help="Where it runs.")]
DtypeOption = Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the weights and the computation.")]
RepeatsOption = Annotated[int, typer.Option(help="Runs timed, after one that is not.")]
PromptOption = Annotated[int, typer.Option(help="Tokens of the prompt (P).")]
CompletionOption = Annotated[int, typer.Option(help="Tokens of a selection (R).")]
OutputOption = Annotated[Path, typer.Option(help="Folder of the Markdown and JSON files.")]
OUTPUT = Path("runs/bench")


@dataclass(frozen=True)
class ModelSize:
    """The shape of a Llama. Input and output embeddings are not tied."""

    width: int
    layers: int
    heads: int
    key_value_heads: int
    intermediate: int
    vocabulary: int

    @property
    def layer_parameters(self) -> int:
        """Weights of the matrices in one layer: what a token is multiplied with."""
        attention = self.width * (2 * self.heads + 2 * self.key_value_heads) * (self.width // self.heads)
        return attention + 3 * self.width * self.intermediate


LLAMA_3 = {
    "llama-1b": ModelSize(2048, 16, 32, 8, 8192, 128_256),
    "llama-8b": ModelSize(4096, 32, 32, 8, 14_336, 128_256),
}


def check(model: str, device: str) -> None:
    """Refuse what cannot run, before anything does."""
    model_size(model)
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("cuda: torch finds no GPU here; use --device cpu")


def model_size(name: str) -> ModelSize:
    """The size that `--model` names."""
    if name in LLAMA_3:
        return LLAMA_3[name]
    width, _, layers = name.partition("x")
    if not (width.isdigit() and layers.isdigit()) or int(width) % HEAD_SIZE or not int(width) or not int(layers):
        raise typer.BadParameter(f"{name}: WIDTHxLAYERS with a multiple of {HEAD_SIZE} as width, llama-1b or llama-8b")
    heads = int(width) // HEAD_SIZE
    return ModelSize(int(width), int(layers), heads, heads, 4 * int(width), VOCABULARY)


def build_model(name: str, device: str, dtype: str, seed: int = 0) -> LlamaForCausalLM:
    """A random Llama of that size, in training mode."""
    size = model_size(name)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        max_position_embeddings=131_072,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        return LlamaForCausalLM(config).to(getattr(torch, dtype)).train()


# Measuring


def apart(function: Callable[..., Any], **arguments: Any) -> Any:
    """`function(**arguments)` in a process of its own; says on standard error what runs and how long it took."""
    told = ", ".join(f"{name}={value}" for name, value in arguments.items())
    print(f"{function.__name__}({told}) …", end=" ", file=sys.stderr, flush=True)
    started = time.perf_counter()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        result = pool.submit(_silently, function, arguments).result()
    print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)
    return result


def _silently(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Without what a trainer prints at every step."""
    with redirect_stdout(StringIO()):
        return function(**arguments)


class PeakMemory:
    """The most memory held since it was made, above what was held then, in MiB."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = float(torch.cuda.memory_allocated())
        else:
            if Path("/proc/self/clear_refs").exists():
                Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from here
            self.before = _peak_resident()

    def mib(self) -> float:
        """Above what was held at the start."""
        return (self._peak() - self.before) / MIB

    def total_mib(self) -> float:
        """Of the whole process."""
        return self._peak() / MIB

    def _peak(self) -> float:
        return float(torch.cuda.max_memory_allocated()) if self.device == "cuda" else _peak_resident()


def _peak_resident() -> float:
    status = Path("/proc/self/status")
    if status.exists():
        [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return float(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def time_update(
    update: Callable[[], Any], model: torch.nn.Module, repeats: int, device: str, tokens: int = 0
) -> dict[str, Any]:
    """Time a forward and backward pass `repeats` times, after once that is not timed.

    Gradients are allocated beforehand, so that the memory is that of activations.

    Args:
        tokens: that go through the layers, forward and backward; 0 where they are not counted.

    Returns:
        `seconds` of each run, `cpu_seconds` of all threads, which other jobs on the machine disturb less, `mib` at the
        peak above what the model and its gradients take, and, where tokens are counted, `tflops`: operations of the
        layers' weights a second.
    """
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    measured = time_calls(update, repeats, device, between=lambda: model.zero_grad(set_to_none=False))
    if tokens:
        measured["tflops"] = tokens * flops_per_token(model).step / median(measured) / 1e12
    return measured


def time_calls(
    call: Callable[[], Any], repeats: int, device: str, between: Callable[[], Any] = lambda: None
) -> dict[str, Any]:
    """`seconds` and `cpu_seconds` of each of `repeats` calls, after one that is not timed, and the peak's `mib`."""
    memory = PeakMemory(device)
    seconds, cpu_seconds = [], []
    for _ in range(repeats + 1):
        synchronize(device)
        started, cpu_started = time.perf_counter(), time.process_time()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.process_time() - cpu_started)
        between()
    return {"seconds": seconds[1:], "cpu_seconds": cpu_seconds[1:], "mib": memory.mib()}


def median(measured: Mapping[str, Any], what: str = "seconds") -> float:
    """Of the seconds of a measurement, or of another list in it."""
    return statistics.median(measured[what])


# Reporting


def utilisation(measured: Mapping[str, Any], device: str) -> str:
    """Operations a second of the layers' weights, and of a known card the share of its 16-bit peak."""
    peak = peak_flops(torch.device(device))
    share = "" if peak is None else f", {100 * 1e12 * measured['tflops'] / peak:.0f} % of the card's peak"
    return f"{measured['tflops']:.3g} TFLOP/s{share}"


def machine(device: str) -> dict[str, Any]:
    """What ran it."""
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "machine": f"{os.cpu_count()} x {platform.machine()} cores, {gib:.0f} GiB",
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "trl")},
    }


def report(
    name: str,
    context: typer.Context,
    title: str,
    columns: Sequence[str],
    lines: Iterable[Sequence[str]],
    rows: Sequence[Mapping[str, Any]],
    notes: Sequence[str] = (),
) -> None:
    """Print a Markdown table and write it to `<output>/<name>.md`, with every figure in `<name>.json`.

    Args:
        name: of the benchmark's module.
        context: of the command, for its options.
        title: what the table shows.
        columns: its head; the first is on the left, the others on the right.
        lines: its cells.
        rows: what was measured.
        notes: what a reader must know beside the table.
    """
    options = dict(context.params)
    output = Path(options.pop("output"))
    ran = machine(options["device"])
    command = " ".join([f"python -m benchmarks.{name}", *_flags(options)])
    versions = ", ".join(f"{package} {ran[package]}" for package in ("torch", "transformers", "trl"))
    text = [
        f"**{title}**",
        "",
        f"`{command}`",
        "",
        f"{ran['gpu'] or ran['machine']}, {ran['threads']} threads, {versions}. " + " ".join(notes),
        "",
        f"| {' | '.join(columns)} |",
        "|---|" + "---:|" * (len(columns) - 1),
        *(f"| {' | '.join(line)} |" for line in lines),
    ]
    print("\n".join(text))
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{name}.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    whole = {"benchmark": name, "title": title, "command": command, **ran, "options": options}
    whole |= {"notes": list(notes), "rows": rows}
    (output / f"{name}.json").write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


def _flags(options: Mapping[str, Any]) -> list[str]:
    flags = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            flags.append(flag if value else f"--no-{flag[2:]}")
        elif value is not None:
            flags += [f"{flag} {each}" for each in (value if isinstance(value, list | tuple) else [value])]
    return flags


def cell(value: float, digits: int = 2, unit: str = "") -> str:
    """A figure in a table; empty where nothing was measured."""
    return "" if value != value else f"{value:.{digits}f}{unit}"
