"""One selector update (forward and backward over m selections of one long prompt): packed rows against the plain path.

    python -m benchmarks.selector_update                    # both paths, a table and JSON
    python -m benchmarks.selector_update --case plain --m 8 # one measurement, as JSON, in this process

Both paths make completion-only logits; the plain one runs the prompt once for each selection. Each case has a process
of its own, so that its peak memory is its own. Ratios are of medians within one run of this script.
"""

from __future__ import annotations

import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from transformers import LlamaConfig, LlamaForCausalLM

from dro_rl.likelihood import completion_logps

CASES = ("packed", "plain")


def measure(case: str, m: int, prompt: int, completion: int, width: int, layers: int, repeats: int) -> dict[str, float]:
    """Median seconds of an update, and the process's peak memory in MiB above what it held before the first one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=2 * prompt,
    )
    model = LlamaForCausalLM(config)
    ids = torch.randint(0, 8192, (prompt,)).tolist()
    selections = [torch.randint(0, 8192, (completion,)).tolist() for _ in range(m)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        logps = completion_logps(model, ids, selections, shared_prefix=case == "packed")
        (-torch.stack([each.sum() for each in logps]).mean()).backward()
        seconds.append(time.perf_counter() - started)
        model.zero_grad(set_to_none=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": statistics.median(seconds[1:]), "mib": (peak - before) / 1024}


def main(
    case: Annotated[str | None, typer.Option(help="packed or plain: one measurement in this process.")] = None,
    m: Annotated[list[int] | None, typer.Option(help="Selections of the prompt.")] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 3000,
    completion: Annotated[int, typer.Option(help="Tokens of a selection.")] = 30,
    width: Annotated[int, typer.Option(help="Width of the Llama.")] = 512,
    layers: Annotated[int, typer.Option(help="Its layers.")] = 6,
    repeats: Annotated[int, typer.Option(help="Updates timed, after one that is not.")] = 5,
    output: Annotated[Path | None, typer.Option(help="Also write the JSON here.")] = None,
) -> None:
    """Time the selector's update on both paths."""
    sizes = m or [1, 4, 8]
    if case is not None:
        print(json.dumps(measure(case, sizes[0], prompt, completion, width, layers, repeats)))
        return
    rows = []
    for size in sizes:
        figures = {}
        for name in CASES:
            options = {"case": name, "m": size, "prompt": prompt, "completion": completion, "width": width}
            options |= {"layers": layers, "repeats": repeats}
            arguments = [str(part) for key, value in options.items() for part in (f"--{key}", value)]
            command = [sys.executable, "-m", "benchmarks.selector_update", *arguments]
            figures[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rows.append({"m": size, **figures, "tokens": size * (prompt + completion) / (prompt + size * completion)})
    result = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "prompt": prompt,
        "completion": completion,
        "model": f"Llama, {layers} layers, {width} wide, float32",
        "rows": rows,
    }
    print(
        f"Selector update, {result['model']}, P={prompt}, R={completion}; "
        f"{result['machine']}, torch {torch.__version__}\n"
    )
    print("| m | plain s | packed s | faster | fewer tokens | plain MiB | packed MiB | memory |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        plain, packed = row["plain"], row["packed"]
        faster = plain["seconds"] / packed["seconds"]
        print(
            f"| {row['m']} | {plain['seconds']:.2f} | {packed['seconds']:.2f} | {faster:.1f}x "
            f"| {row['tokens']:.1f}x | {plain['mib']:.0f} | {packed['mib']:.0f} | {packed['mib'] / plain['mib']:.2f} |"
        )
    if output is not None:
        output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
