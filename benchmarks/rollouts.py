"""Sampling selections: vLLM against the transformers engine and plain `generate`; and pushing weights to vLLM.

    python -m benchmarks.rollouts                            # all, as tables and JSON
    python -m benchmarks.rollouts --case vllm --m 1 --m 16   # one engine, as JSON, in this process
    python -m benchmarks.rollouts --case sync --width 1024   # pushing weights, as JSON, in this process

Each engine has a process of its own and measures m in ascending order, so that its peak memory after each is that of
the largest so far. Prompts are new in every repeat: what one left in a cache helps no other. `generate` is called as
TRL does without vLLM: each prompt repeated m times, padded on the left, in one batch; it gives no log q.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from accelerate import Accelerator
from tokenizers import Tokenizer, models
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dro_rl.config import DROConfig
from dro_rl.engines.decoding import Decoder
from dro_rl.engines.protocol import GenerationRequest
from dro_rl.proposal import SamplingParams

CASES = ("vllm", "transformers", "generate")
VOCABULARY, EOS = 8192, 1
Sample = Callable[[list[list[int]], int], int]


def build(folder: Path, width: int, layers: int, positions: int) -> Any:
    """A random Llama with heads of 64, saved for vLLM to load, on the device that there is."""
    torch.manual_seed(0)
    heads = width // 64
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=positions,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    LlamaForCausalLM(config).to(_dtype()).save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCABULARY)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), pad_token="w0", eos_token="w1"
    ).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, dtype=_dtype()).to(_device()).eval()


def measure(
    case: str, sizes: Sequence[int], questions: int, prompt: int, completion: int, width: int, layers: int, repeats: int
) -> dict[str, Any]:
    """For each m the median seconds of sampling all questions, the sequences and tokens, and the peak memory in MiB."""
    with tempfile.TemporaryDirectory() as place:
        model = build(Path(place), width, layers, prompt + completion)
        sample = _sampler(case, model, Path(place), prompt, completion)
        generator = torch.Generator().manual_seed(1)

        def fresh() -> list[list[int]]:
            return torch.randint(2, VOCABULARY, (questions, prompt), generator=generator).tolist()

        sample(fresh()[:1], max(sizes))  # what is compiled or started at first use
        rows = []
        for m in sorted(sizes):
            seconds, tokens = [], []
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            for _ in range(repeats):
                prompts = fresh()
                started = time.perf_counter()
                tokens.append(sample(prompts, m))
                seconds.append(time.perf_counter() - started)
            rows.append(
                {
                    "m": m,
                    "seconds": statistics.median(seconds),
                    "sequences": questions * m,
                    "tokens": statistics.median(tokens),
                    "mib": _peak(),
                }
            )
        return {"rows": rows, "parameters": model.num_parameters(), "threads": torch.get_num_threads()}


def _sampler(case: str, model: Any, folder: Path, prompt: int, completion: int) -> Sample:
    sampling = SamplingParams(completion)
    if case == "generate":

        def generate(prompts: list[list[int]], m: int) -> int:
            ids = torch.tensor(prompts, device=model.device).repeat_interleave(m, dim=0)
            settings = GenerationConfig(
                max_new_tokens=completion,
                do_sample=True,
                top_k=0,
                pad_token_id=0,
                eos_token_id=EOS,
                disable_compile=True,
            )
            with torch.no_grad():
                out = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=settings,
                )
            return int((out[:, ids.shape[1] :] != 0).sum())

        return generate

    engine: Any = Decoder(model, EOS) if case == "transformers" else _colocated(model, folder, prompt, completion)
    seed = iter(range(10**9))

    def engine_sample(prompts: list[list[int]], m: int) -> int:
        groups = engine.generate(GenerationRequest(prompts, m, sampling, [next(seed) * 1000 for _ in prompts]))
        return sum(len(sample.ids) for group in groups for sample in group)

    return engine_sample


def _colocated(model: Any, folder: Path, prompt: int, completion: int) -> Any:
    from dro_rl.engines.vllm_colocate import ColocatedEngine

    config = DROConfig(
        output_dir=str(folder / "run"),
        report_to="none",
        rollout_engine="vllm",
        bf16=False,
        max_prompt_length=prompt,
        max_completion_length=completion,
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return ColocatedEngine(lambda: model, Accelerator(), tokenizer, config)


def measure_sync(width: int, layers: int, repeats: int) -> dict[str, Any]:
    """Median seconds of pushing weights in process, and by folder: writing it, then vLLM reading it."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = build(folder, width, layers, 512)
        engine = _colocated(model, folder, 256, 16)

        def push() -> None:
            engine.push()

        def write() -> None:
            model.save_pretrained(folder / "push")

        def read() -> None:
            engine._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder / "push")})

        figures = {name.__name__: _seconds(name, repeats) for name in (push, write, read)}
        return {"width": width, "parameters": model.num_parameters(), **figures}


def _seconds(action: Callable[[], None], repeats: int) -> float:
    action()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _dtype() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def _peak() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(
    case: Annotated[str | None, typer.Option(help="vllm, transformers, generate or sync: in this process.")] = None,
    m: Annotated[list[int] | None, typer.Option(help="Rollouts of a question.")] = None,
    questions: Annotated[int, typer.Option(help="Questions sampled at once.")] = 2,
    documents: Annotated[int, typer.Option(help="Documents of a prompt.")] = 20,
    document: Annotated[int, typer.Option(help="Tokens of a document.")] = 100,
    completion: Annotated[int, typer.Option(help="Tokens of a selection.")] = 24,
    width: Annotated[int, typer.Option(help="Width of the Llama.")] = 512,
    layers: Annotated[int, typer.Option(help="Its layers.")] = 4,
    sync_width: Annotated[list[int] | None, typer.Option(help="Widths whose weights are pushed.")] = None,
    repeats: Annotated[int, typer.Option(help="Measurements, of which the median counts.")] = 3,
    output: Annotated[Path | None, typer.Option(help="Also write the JSON here.")] = None,
) -> None:
    """Time the engines."""
    transformers.utils.logging.disable_progress_bar()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    sizes = m or [1, 4, 8, 16]
    prompt = documents * document
    if case == "sync":
        print(json.dumps(measure_sync(width, layers, repeats)))
        return
    if case is not None:
        print(json.dumps(measure(case, sizes, questions, prompt, completion, width, layers, repeats)))
        return
    shape = {"documents": documents, "document": document, "completion": completion, "questions": questions}
    shape |= {"layers": layers, "repeats": repeats}
    engines = {name: _in_a_process(name, {**shape, "width": width, "m": sizes}) for name in CASES}
    syncs = [_in_a_process("sync", {**shape, "width": w}) for w in sync_width or [256, 512, 1024]]
    result = {
        "machine": f"{platform.machine()}, {_device()}, {engines['vllm']['threads']} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "vllm": _vllm_version(),
        "model": f"Llama, {_millions(engines['vllm'])}, {layers} layers, {width} wide, {_dtype()}",
        "shape": {**shape, "prompt": prompt},
        "engines": engines,
        "sync": syncs,
    }
    _print(result)
    if output is not None:
        output.write_text(json.dumps(result, indent=2) + "\n")


def _in_a_process(case: str, options: dict[str, Any]) -> dict[str, Any]:
    arguments = ["--case", case]
    for key, value in options.items():
        for item in value if isinstance(value, list) else [value]:
            arguments += [f"--{key}", str(item)]
    print(f"{case}: {', '.join(f'{key} {value}' for key, value in options.items())}", file=sys.stderr)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.rollouts", *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def _millions(measured: dict[str, Any]) -> str:
    return f"{measured['parameters'] / 1e6:.0f} M parameters"


def _vllm_version() -> str:
    from dro_rl.engines.vllm_common import vllm_version

    return vllm_version()


def _print(result: dict[str, Any]) -> None:
    shape = result["shape"]
    print(
        f"Rollouts, {result['model']}; {shape['questions']} questions, prompts of {shape['documents']} documents "
        f"({shape['prompt']} tokens), selections of {shape['completion']}; {result['machine']}, vLLM {result['vllm']}, "
        f"transformers {result['transformers']}, torch {result['torch']}\n"
    )
    print("| m | engine | s | sequences/s | tokens/s | against generate | s against m = 1 | peak MiB |")
    print("|---:|---|---:|---:|---:|---:|---:|---:|")
    for place, plain in enumerate(result["engines"]["generate"]["rows"]):
        for name in CASES:
            rows = result["engines"][name]["rows"]
            row = rows[place]
            seconds = row["seconds"]
            print(
                f"| {row['m']} | {name} | {seconds:.2f} | {row['sequences'] / seconds:.2f} "
                f"| {row['tokens'] / seconds:.0f} | {plain['seconds'] / seconds:.1f}x "
                f"| {seconds / rows[0]['seconds']:.2f}x | {row['mib']:.0f} |"
            )
    if _device() == "cpu":
        print(
            f"\nvLLM's peak holds a cache of {os.environ['VLLM_CPU_KVCACHE_SPACE']} GiB that it takes when it starts."
        )
    print("\nPushing weights\n\n| model | in process s | folder: write s | folder: read s |\n|---:|---:|---:|---:|")
    for row in result["sync"]:
        print(f"| {_millions(row)} | {row['push']:.2f} | {row['write']:.2f} | {row['read']:.2f} |")


if __name__ == "__main__":
    typer.run(main)
