"""Bringing a selector's weights to vLLM: adapters alone over the base that it holds, against the merged model.

    python -m benchmarks.sync                       # a table, 512 wide and 8 layers, adapters of rank 16
    python -m benchmarks.sync --width 1024 --r 64 --output sync.json

Two engines of vLLM are in this process, one of each kind. Each repeat moves the adapters and does both kinds in turn,
so that what else the machine does falls on both. `in process` is `ColocatedEngine.push`; then the engine samples the
same prompts, and |log q - log p| says whether it holds what was sent. `by folder` is what happens with a server: the
writing as the trainer does it, and the reading as a server does it, here in this process and without HTTP.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from accelerate import Accelerator
from transformers import PreTrainedTokenizerFast

from benchmarks.rollouts import VOCABULARY, _device, _dtype, _vllm_version, build
from dro_rl.config import DROConfig
from dro_rl.engines.protocol import GenerationRequest
from dro_rl.engines.vllm_adapters import Adapters
from dro_rl.engines.vllm_colocate import ColocatedEngine
from dro_rl.likelihood import completion_logps
from dro_rl.models.loading import LoraSettings, add_adapter
from dro_rl.models.saving import export_role, save_adapters
from dro_rl.proposal import SamplingParams

KINDS = ("adapter", "merged")


def measure(width: int, layers: int, r: int, prompt: int, completion: int, m: int, repeats: int) -> dict[str, Any]:
    """Median seconds and bytes of a sync by kind and way, and of sampling; the largest difference a token, nats."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model: Any = add_adapter(build(folder, width, layers, prompt + completion), LoraSettings(r, 2 * r, 0.0, None))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        config = DROConfig(
            output_dir=str(folder / "run"), report_to="none", rollout_engine="vllm", bf16=False,
            max_prompt_length=prompt, max_completion_length=completion,
        )  # fmt: skip
        alone = {"adapter": Adapters(r, str(folder)), "merged": None}
        engines = {
            kind: ColocatedEngine(lambda: model, Accelerator(), tokenizer, config, (), alone[kind]) for kind in KINDS
        }
        generator = torch.Generator().manual_seed(1)
        prompts = torch.randint(2, VOCABULARY, (2, prompt), generator=generator).tolist()
        request = GenerationRequest(prompts, m, SamplingParams(completion), [1, 2])
        seconds: dict[str, list[float]] = defaultdict(list)
        bytes_: dict[str, int] = {}
        difference = dict.fromkeys(KINDS, 0.0)
        for repeat in range(repeats + 1):  # the first is not counted
            _move(model, repeat)
            found: dict[str, float] = {}
            for kind in KINDS if repeat % 2 else KINDS[::-1]:
                engine, written = engines[kind], folder / f"{kind}-{repeat}"
                found[f"{kind} in process"] = _seconds(engine.push)
                started = time.perf_counter()
                groups = engine.generate(request)
                found[f"{kind} sampling"] = time.perf_counter() - started
                difference[kind] = max(difference[kind], _difference(model, prompts, groups))
                found[f"{kind} written"] = _seconds(_writing(kind, model, tokenizer, written))
                found[f"{kind} read"] = _seconds(_reading(kind, engine, written, repeat))
                bytes_[f"{kind} by folder"] = sum(path.stat().st_size for path in written.rglob("*") if path.is_file())
            if repeat:
                for name, value in found.items():
                    seconds[name].append(value)
        base = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if ".lora_" not in n)
        lora = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if ".lora_" in n)
        return {
            "parameters": model.get_base_model().num_parameters(),
            "seconds": {name: statistics.median(values) for name, values in seconds.items()},
            "bytes": {"merged in process": base, "adapter in process": lora, **bytes_},
            "difference": difference,
            "threads": torch.get_num_threads(),
            "load": os.getloadavg()[0],
        }


def _move(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def _writing(kind: str, model: Any, tokenizer: Any, folder: Path) -> Callable[[], None]:
    if kind == "adapter":
        return lambda: save_adapters(model, folder)
    return lambda: export_role(model, tokenizer, folder)


def _reading(kind: str, engine: Any, folder: Path, repeat: int) -> Callable[[], None]:
    if kind == "merged":
        return lambda: engine._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})

    def read() -> None:
        from vllm.lora.request import LoRARequest

        engine._llm.llm_engine.add_lora(LoRARequest(f"read-{repeat}", 10**6 + repeat, str(folder)))

    return read


def _difference(model: Any, prompts: list[list[int]], groups: list[Any]) -> float:
    largest = 0.0
    for prompt, (sample, *_) in zip(prompts, groups, strict=True):
        with torch.no_grad():
            (logps,) = completion_logps(model, prompt, [sample.ids])
        largest = max(largest, (torch.tensor(sample.logps) - logps.float().cpu()).abs().max().item())
    return largest


def _seconds(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def main(
    width: Annotated[int, typer.Option(help="Width of the Llama.")] = 512,
    layers: Annotated[int, typer.Option(help="Its layers.")] = 8,
    r: Annotated[int, typer.Option(help="Rank of the adapters, on every linear layer but the head.")] = 16,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 200,
    completion: Annotated[int, typer.Option(help="Tokens of a selection.")] = 16,
    m: Annotated[int, typer.Option(help="Rollouts of a question, of which there are two.")] = 8,
    repeats: Annotated[int, typer.Option(help="Measurements, of which the median counts.")] = 5,
    output: Annotated[Path | None, typer.Option(help="Also write the JSON here.")] = None,
) -> None:
    """Time both kinds of sync."""
    transformers.utils.logging.disable_progress_bar()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    shape = {"width": width, "layers": layers, "r": r, "prompt": prompt, "completion": completion, "m": m}
    found = measure(**shape, repeats=repeats)
    _print({**shape, "repeats": repeats}, found)
    if output is not None:
        output.write_text(json.dumps({"shape": {**shape, "repeats": repeats}, **found}, indent=2) + "\n")


def _print(shape: dict[str, int], found: dict[str, Any]) -> None:
    print(
        f"Sync to vLLM, Llama of {found['parameters'] / 1e6:.0f} M parameters, {shape['layers']} layers, "
        f"{shape['width']} wide, {_dtype()}, adapters of rank {shape['r']}; medians of {shape['repeats']}; "
        f"{platform.machine()}, {_device()}, {found['threads']} threads, load {found['load']:.1f} at the end; "
        f"vLLM {_vllm_version()}, transformers {transformers.__version__}, torch {torch.__version__}\n"
    )
    print(
        "| what is sent | in process, s | MiB | by folder, s (written + read) | MiB | sampling, s | max nats a token |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")
    seconds, sizes = found["seconds"], found["bytes"]
    for kind in KINDS:
        written, read = seconds[f"{kind} written"], seconds[f"{kind} read"]
        print(
            f"| {kind} | {seconds[f'{kind} in process']:.3f} | {sizes[f'{kind} in process'] / 2**20:.1f} "
            f"| {written + read:.3f} ({written:.3f} + {read:.3f}) | {sizes[f'{kind} by folder'] / 2**20:.1f} "
            f"| {seconds[f'{kind} sampling']:.2f} | {found['difference'][kind]:.1e} |"
        )
    sys.stdout.flush()


if __name__ == "__main__":
    typer.run(main)
