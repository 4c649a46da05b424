"""vLLM in the trainer's process, on the trainer's devices, through TRL's `VLLMGeneration`.

TRL builds the engine and walks the weights (FSDP, DeepSpeed, adapters). Requests go to the engine itself, so that each
question has a seed of its own and its m samples are one request. Adapters that vLLM takes alone go to it beside TRL.
"""

from __future__ import annotations

import copy
import itertools
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dro_rl.config import DROConfig
from dro_rl.engines.protocol import GenerationRequest
from dro_rl.engines.vllm_adapters import Adapters
from dro_rl.engines.vllm_common import (
    LOGITS_PROCESSOR,
    check_installed,
    constrained,
    cpu_cache_bytes,
    engine_dtype,
    engine_length,
    random_state_kept,
    request_options,
    token_cache_bytes,
)
from dro_rl.errors import InputError, first_line
from dro_rl.likelihood import without_adapters
from dro_rl.models import quantization
from dro_rl.models.quantization import in_numbers, is_quantised
from dro_rl.models.saving import is_adapted, save_adapters
from dro_rl.models.sharding import is_sharded
from dro_rl.proposal import Completion, SamplingParams


class ColocatedEngine:
    """Samples with vLLM beside the model that is being trained.

    The same prompt, seed and weights give the same completions up to rounding: what else is in a batch can change a
    log-probability in its last digits, and seldom a token.

    Args:
        selector: the selector as it is now, for its weights.
        accelerator: the trainer's.
        tokenizer: the selector's.
        config: the settings under `vllm_*`.
        ends: token ids, each of which ends a completion; the tokenizer's end of sequence, unless told.
        adapters: the selector's, where vLLM holds its base and is sent them alone; None: it is sent merged weights.
        others: settings and adapters of roles that `also` will be asked for, over the same base.

    Raises:
        InputError: vLLM is not installed, or cannot load the selector.
    """

    def __init__(
        self,
        selector: Callable[[], Any],
        accelerator: Accelerator,
        tokenizer: PreTrainedTokenizerBase,
        config: DROConfig,
        ends: Sequence[int] = (),
        adapters: Adapters | None = None,
        others: Sequence[tuple[DROConfig, Adapters]] = (),
    ) -> None:
        check_installed("rollout_engine", config.rollout_engine)
        self._selector, self._config = selector, config
        self._alone = adapters is not None
        self.has_room = bool(others)
        """Whether `also` may be asked for."""
        self._sharded = is_sharded(accelerator)
        self._cpu = accelerator.device.type == "cpu"
        self._ends = ends or (tokenizer.eos_token_id,)
        self._pushed: int | None = None
        self._numbers = itertools.count(1)  # of adapters, of all roles together
        self._lora: Any = None
        settings = [config, *(each for each, _ in others)]
        loras = [each for each in (adapters, *(each for _, each in others)) if each is not None]
        with random_state_kept(), _launch_variables_kept(), _llvmlite_aside(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # vLLM's imports give some, on what it uses of torch
            self._generation = self._build(accelerator, tokenizer, settings, loras)
        self._llm = self._generation.llm

    def also(self, selector: Callable[[], Any], config: DROConfig, ends: Sequence[int]) -> ColocatedEngine:
        """An engine for another role over the same base and cache, with that role's adapters beside this one's."""
        other = copy.copy(self)
        other._selector, other._config, other._ends = selector, config, ends
        other._pushed = other._lora = None
        return other

    def _build(
        self,
        accelerator: Accelerator,
        tokenizer: PreTrainedTokenizerBase,
        settings: Sequence[DROConfig],
        adapters: Sequence[Adapters],
    ) -> Any:
        # Weights are handed over as tensors, which needs the engine in this process.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from trl.generation import vllm_generation as trl_vllm

        vllm_generation = cast(Any, trl_vllm)
        config, model = self._config, self._selector()
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        lengths = [engine_length(each, positions) for each in settings]
        length = None if None in lengths else max(cast(list[int], lengths))
        options: dict[str, Any] = {
            "dtype": engine_dtype(config, str(model.dtype).removeprefix("torch.")),
            "skip_tokenizer_init": True,
            "use_tqdm_on_load": False,
            **origin(model, tokenizer),
        }
        if adapters:
            rank = max(each.max_rank for each in adapters)
            options |= {"enable_lora": True, "max_lora_rank": rank, "max_loras": len(adapters)}
            options["enable_sleep_mode"] = config.vllm_enable_sleep_mode
        if config.constrain_selection:
            options["logits_processors"] = [LOGITS_PROCESSOR]
        if self._cpu:
            token = token_cache_bytes(model.config.get_text_config(), getattr(torch, options["dtype"]))
            options |= cpu_options(length, cpu_cache_bytes(token, length))
        plain = vllm_generation.LLM
        # TRL has no argument for these: https://github.com/huggingface/trl, generation/vllm_generation.py, 1.16.
        vllm_generation.LLM = lambda **given: plain(**{**given, **options})
        try:
            generation = vllm_generation.VLLMGeneration(
                model=SimpleNamespace(name_or_path=model.name_or_path, named_modules=lambda: ()),
                accelerator=accelerator,
                processing_class=tokenizer,
                mode="colocate",
                tensor_parallel_size=config.vllm_tensor_parallel_size,
                gpu_memory_utilization=config.vllm_gpu_memory_utilization,
                max_model_length=length,
                # TRL's sleep drops the base, which is not sent again beside adapters.
                enable_sleep_mode=config.vllm_enable_sleep_mode and not adapters,
                model_impl=config.vllm_model_impl,
            )
            _keep_process_groups(generation.llm)
            if self._cpu:  # what its attention cannot do on a CPU shows with the first token
                generation.llm.generate([{"prompt_token_ids": [tokenizer.eos_token_id]}], use_tqdm=False)
            if adapters and quantization.settings_in(model) is not None:
                # What it loaded are the base's own numbers; adapters are trained over those that the codes stand for.
                _reload(generation.llm, numbers_of(model, merged=False))
            if adapters and config.vllm_enable_sleep_mode:
                generation.llm.sleep(level=1)
            return generation
        except Exception as error:  # each release and device has errors of its own
            raise InputError(
                "rollout_engine",
                "vllm",
                f"vLLM runs the selector here ({first_line(error)})",
                "Correct its vllm_* settings, or use rollout_engine: transformers.",
            ) from error
        finally:
            vllm_generation.LLM = plain

    @contextmanager
    def at(self, step: int) -> Iterator[ColocatedEngine]:
        """The engine with the weights that the selector has after `step` updates, awake for as long as it is open."""
        sleeps = self._config.vllm_enable_sleep_mode
        if sleeps and self._alone:
            self._llm.wake_up(tags=["weights"])
        if self._pushed != step or sleeps:  # asleep it has let go of its weights
            self.push()
            self._pushed = step
        if sleeps:
            self._llm.wake_up(tags=["kv_cache"])
        try:
            yield self
        finally:
            if sleeps:
                self._llm.sleep(level=1 if self._alone else 2)  # 1 keeps the weights, in the processor's memory

    def push(self) -> None:
        """Hand the selector's weights, or its adapters alone, to vLLM, and forget what the old ones computed."""
        if self._alone:
            self._push_adapters()
            return
        generation = self._generation
        take_weights_from(generation, self._selector(), sharded=self._sharded)
        if not self._cpu:
            generation.sync_weights()
            return
        # On a CPU vLLM packs weights anew, and what it packs has no loader: TRL's tensor-by-tensor sync fails there
        # (seen with TRL 1.16 and vLLM 0.31). Its own reload unpacks first.
        _reload(self._llm, generation._iter_named_params())

    def _push_adapters(self) -> None:
        """A push has a name and a number of its own: by the name vLLM tells whose prefixes it has cached."""
        from vllm.lora.request import LoRARequest

        engine, number = self._llm.llm_engine, next(self._numbers)
        if self._lora is not None:
            engine.remove_lora(self._lora.lora_int_id)
        with tempfile.TemporaryDirectory(prefix="dro_rl-adapter-") as folder:
            save_adapters(self._selector(), Path(folder))
            self._lora = LoRARequest(f"adapter-{number}", number, folder)
            if not engine.add_lora(self._lora):
                raise RuntimeError("vLLM did not take the adapters")

    def forget(self) -> None:
        """The trainer's weights have been replaced: push before the next sample, whatever the step."""
        self._pushed = None

    def close(self) -> None:
        """Its engine ends with the process."""

    def samples_policy(self, sampling: SamplingParams) -> bool:
        """See `RolloutEngine.samples_policy`: another implementation computed log q, so the ratio is always taken."""
        return False

    def generate(self, request: GenerationRequest) -> list[list[Completion]]:
        """See `RolloutEngine.generate`."""
        from vllm import SamplingParams as VLLMSamplingParams

        extra: list[Any] = [None] * len(request.prompts)
        if request.constraints is not None:
            extra = [constrained(each) for each in request.constraints]
        first, requests = self._of_the_group(list(zip(request.prompts, request.seeds, extra, strict=True)))
        if not requests:
            return []
        with random_state_kept():
            outputs = self._llm.generate(
                [{"prompt_token_ids": list(prompt)} for prompt, _, _ in requests],
                [
                    VLLMSamplingParams(
                        **request_options(request, seed, self._ends),
                        detokenize=False,
                        extra_args=asked,
                    )
                    for _, seed, asked in requests
                ],
                use_tqdm=False,
                lora_request=self._lora,
            )
        return [
            [
                Completion(
                    tuple(sample.token_ids),
                    tuple(known[token].logprob for token, known in zip(sample.token_ids, sample.logprobs, strict=True)),
                )
                for sample in output.outputs
            ]
            for output in outputs[first : first + len(request.prompts)]
        ]

    def _of_the_group(self, own: list[Any]) -> tuple[int, list[Any]]:
        """The requests of all processes that share an engine's shards, and the place of this process's first."""
        if self._config.vllm_tensor_parallel_size == 1:
            return 0, own
        group = self._generation.tp_group
        gathered: list[Any] = [None] * self._config.vllm_tensor_parallel_size
        torch.distributed.all_gather_object(gathered, own, group=group)
        rank = torch.distributed.get_rank(group=group)
        return sum(map(len, gathered[:rank])), [request for requests in gathered for request in requests]


def _keep_process_groups(llm: Any) -> None:
    """vLLM 0.31 ends its engine when the process ends, and every process group with it: the trainer's too, which are
    not its own and are gone by then. What is in this process ends with it anyway."""
    finalizer = getattr(llm.llm_engine.engine_core, "_finalizer", None)
    if finalizer is not None:
        finalizer.detach()


@contextmanager
def _launch_variables_kept() -> Iterator[None]:
    """TRL sets these for vLLM to start with. Processes started later must not take themselves for a launch of many."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _llvmlite_aside() -> Iterator[None]:
    """On a CPU vLLM 0.31 looks through the variables of all modules for its kernels, and fails on llvmlite's handle
    of its library, which is there once numba is (first-stage retrieval): it has any attribute that it is asked for."""
    name = "llvmlite.binding.ffi"
    module = sys.modules.pop(name, None)
    try:
        yield
    finally:
        if module is not None:
            sys.modules[name] = module


def origin(model: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What vLLM is told to load what the trainer loaded: the revision, and whether its own code is trusted.

    Read off what was loaded: code of a model's own is there where it was trusted, and nowhere else.
    """
    base = without_adapters(model)
    trusted = any(type(each).__module__.startswith("transformers_modules.") for each in (base, base.config, tokenizer))
    return {"revision": base.config._commit_hash, "trust_remote_code": trusted}


def take_weights_from(generation: Any, model: Any, *, sharded: bool) -> None:
    """Have TRL's `VLLMGeneration` read the weights of `model` at its next sync."""
    generation.model = model
    vars(generation).pop("_iter_named_params", None)  # of an adapted model before it
    if is_adapted(model) and not sharded:
        # TRL merges adapters into the model and takes them out again, which rounds the base a little each time.
        generation._iter_named_params = partial(numbers_of, model)


def _reload(llm: Any, weights: Iterator[tuple[str, Tensor]]) -> None:
    """Have vLLM take a model's weights by its own reload."""
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
    if not llm.reset_prefix_cache():
        raise RuntimeError("vLLM kept its prefix cache, which older weights computed")


def cpu_options(length: int | None, cache_bytes: int) -> dict[str, Any]:
    """How vLLM runs on a CPU.

    A prompt is not split over steps: for a request with a seed vLLM 0.31 then turns its generator back, which a CPU's
    cannot.
    """
    return {
        "enforce_eager": True,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(4096, length or 4096),
        "kv_cache_memory_bytes": cache_bytes,
    }


def numbers_of(model: Any, *, merged: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Each parameter of an adapted model's base as numbers: (name in the base, tensor). Nothing changes.

    Args:
        model: a PEFT model with one LoRA adapter.
        merged: with the adapter added.
    """
    base = model.get_base_model()
    adapted = {
        f"{name}.base_layer.weight": module
        for name, module in base.named_modules()
        if merged and hasattr(module, "get_delta_weight")
    }
    layers = dict(base.named_modules())
    for name, parameter in base.named_parameters():
        if ".lora_" in name:
            continue
        layer = layers[name.rpartition(".")[0]]
        value = in_numbers(layer) if name.endswith(".weight") and is_quantised(layer) else parameter.data
        if name in adapted:
            value = value + adapted[name].get_delta_weight(model.active_adapter).to(value)
        yield name.replace(".base_layer", ""), value
