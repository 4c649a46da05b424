"""Bytes on one device, by what a run does and by what holds them: arithmetic over sizes that were counted elsewhere.

Approximations, all of which `benchmarks/plan.py` holds against runs: gradients come while activations go, so where a
step is one pass the larger of the two counts; logits stand three times over in their backward pass; a pass without
gradient holds of each token what one layer keeps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dro_rl.em.memory import state_bytes
from dro_rl.likelihood import LOGITS_PER_CHUNK
from dro_rl.resources.machine import Sharding
from dro_rl.resources.models import RoleSize
from dro_rl.resources.work import Work
from dro_rl.roles import Role

FLOAT = 4
BUCKET = 5 * 10**8
"""Numbers in flight at once under DeepSpeed, twice, unless its configuration says otherwise."""
CONTEXT = 6 * 2**27
"""Bytes that CUDA and its libraries hold in a process: 0.75 GiB, assumed."""


@dataclass(frozen=True, slots=True)
class Phase:
    """Bytes on one device while a run does one thing.

    Args:
        name: what it does.
        weights, gradients, optimizer, activations: what holds them; logits are activations.
        cache: keys and values of sampling.
        other: the process itself, or CUDA's context.
    """

    name: str
    weights: float
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    cache: float = 0.0
    other: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.cache + self.other


@dataclass(frozen=True, slots=True)
class Settings:
    """What of a recipe and of a machine decides memory.

    Args:
        devices: processes.
        sharding: how they share the models.
        half: bytes of the type that is computed in, where it is not that of the weights; None: that of the weights.
        recomputes: gradient checkpointing.
        optim: as in the recipe.
        accumulates: whether a step is several passes, whose gradients wait for each other.
        scores: whether the E-step scores in passes of its own.
        reuses: whether the pass that samples keeps its graph and trains.
        shares_base: whether both roles' adapters are on one base.
        reference: whether the initial selector is kept beside the trained one.
        warms: roles that are warmed up.
        warmup_batch: sequences of a pass of the warm-up.
        engine: what samples.
        sampled_at_once: prompts that are decoded together.
        num_generations: samples of each.
        decoded: tokens of the longest completion.
        constrained: whether only a few logits are looked at.
        vllm: bytes that vLLM takes in this process; 0 where there is none.
        vllm_sleeps: whether it gives them back while models train.
        process: bytes of the process without any model.
    """

    devices: int
    sharding: Sharding
    half: int | None
    recomputes: bool
    optim: str
    accumulates: bool
    scores: bool
    reuses: bool
    shares_base: bool
    reference: bool
    warms: tuple[Role, ...]
    warmup_batch: int
    engine: str
    sampled_at_once: int
    num_generations: int
    decoded: int
    constrained: bool
    vllm: float
    vllm_sleeps: bool
    process: float


def phases(settings: Settings, sizes: Mapping[Role, RoleSize], work: Work) -> list[Phase]:
    """Every phase of a run that holds memory of its own, in the order in which they come."""
    found = [_warmup(settings, sizes[role], role, work) for role in settings.warms]
    weights = sum(_weights(settings, size) for size in sizes.values())
    selector = sizes["selector"]
    if settings.shares_base:
        generator = sizes["generator"]
        weights -= generator.weight_bytes - generator.trained_bytes
    if settings.reference:  # under adapters the base that is there, with theirs as they began
        weights += selector.trained_bytes if selector.adapted else selector.weight_bytes
    optimizer = sum(_optimizer(settings, size) for size in sizes.values())
    gradients = {role: _gradients(settings, size) for role, size in sizes.items()}
    vllm = settings.vllm
    asleep = 0.0 if settings.vllm_sleeps else vllm

    def phase(name: str, *, activations: float = 0.0, cache: float = 0.0, gradients: float = 0.0) -> Phase:
        return Phase(name, weights, gradients, optimizer, activations, cache, settings.process)

    kept = {role: _kept(settings, size, work.pass_tokens[role]) for role, size in sizes.items()}
    if settings.engine == "vllm":
        found.append(phase("sampling", cache=vllm))
    else:
        cache, activations = _sampling(settings, selector, work)
        if settings.reuses:
            activations += kept["selector"] + selector.casts
        found.append(phase("sampling", activations=activations, cache=cache + vllm))
    if settings.scores and "generator" in sizes:
        found.append(phase("scoring", activations=_scoring(sizes, work), cache=asleep))
    layer = max(_layer(size, work.pass_tokens[role]) for role, size in sizes.items())
    logits = max(_logits(size, work.predicting[role]) for role, size in sizes.items())
    casts = sum(size.casts for size in sizes.values())
    whole = sum(gradients.values())
    activations = sum(kept.values()) + casts + _gathered(settings, sizes)
    if settings.reuses:  # the keys and values of prompts twice, and what weights are cast to
        activations += work.pass_tokens["selector"] * selector.cache_bytes + selector.casts
    if settings.accumulates:
        found.append(phase("training", activations=activations + max(layer, logits), cache=asleep, gradients=whole))
    else:
        found.append(phase("training", activations=activations + max(layer, logits), cache=asleep))
        found.append(phase("backward's end", activations=casts + layer, cache=asleep, gradients=whole))
    found.append(phase("optimizer step", cache=asleep, gradients=whole))
    return found


def peak(found: Sequence[Phase]) -> Phase:
    """The phase that takes most."""
    return max(found, key=lambda each: each.total)


def _weights(settings: Settings, size: RoleSize) -> float:
    if settings.sharding == "zero2":  # in 16 bits on every device; those in float32 go with the optimizer
        return 2.0 * size.parameters
    if settings.sharding == "zero3":
        return 2.0 * size.parameters / settings.devices
    return size.weight_bytes / (settings.devices if settings.sharding == "fsdp2" else 1)


def _gradients(settings: Settings, size: RoleSize) -> float:
    if settings.sharding in ("zero2", "zero3"):
        return 2.0 * size.trained / settings.devices
    if settings.sharding == "fsdp2":
        return size.trained_bytes / settings.devices
    return size.trained_bytes * (2 if settings.sharding == "ddp" else 1)  # DDP sends copies, in buckets


def _optimizer(settings: Settings, size: RoleSize) -> float:
    state = state_bytes(settings.optim)
    if settings.sharding in ("zero2", "zero3"):
        return float(size.trained * (state + FLOAT)) / settings.devices
    return float(size.trained * state) / (settings.devices if settings.sharding == "fsdp2" else 1)


def _gathered(settings: Settings, sizes: Mapping[Role, RoleSize]) -> float:
    """What sharded parameters take while they are whole: a layer and the next, or DeepSpeed's buckets."""
    if settings.sharding in ("zero2", "zero3"):
        return 2.0 * min(2 * BUCKET, sum(size.parameters for size in sizes.values()))
    if settings.sharding == "fsdp2":
        return max(2 * (settings.half or FLOAT) * size.parameters / size.layers for size in sizes.values())
    return 0.0


def _kept(settings: Settings, size: RoleSize, tokens: int) -> float:
    if not size.trained:
        return 0.0
    return tokens * (size.kept_recomputing if settings.recomputes else size.kept)


def _layer(size: RoleSize, tokens: int) -> float:
    """Bytes of one layer of a pass: what it holds while it is computed, or computed again."""
    return tokens * size.kept / size.layers


def _logits(size: RoleSize, predicting: int) -> float:
    rows = min(predicting, max(1, LOGITS_PER_CHUNK // size.vocabulary))
    return 3.0 * FLOAT * rows * size.vocabulary


def _scoring(sizes: Mapping[Role, RoleSize], work: Work) -> float:
    """Of passes without gradient, each of one role."""
    tokens = sum(work.pass_tokens.values())
    return max(_layer(size, tokens) + _logits(size, work.predicting[role]) for role, size in sizes.items())


def _sampling(settings: Settings, size: RoleSize, work: Work) -> tuple[float, float]:
    """Bytes of the cache and of the rest while a batch of prompts is decoded with transformers."""
    batch, m = settings.sampled_at_once, settings.num_generations
    length = work.longest_prompt + (m * settings.decoded if size.packed else settings.decoded)
    cache = 2.0 * batch * (1 if size.packed else m) * length * size.cache_bytes  # it grows by copying
    prefill = _layer(size, int(batch * work.prompt))
    logits = batch * m * size.vocabulary * (FLOAT if settings.constrained else 6 * FLOAT)
    return cache, max(prefill, logits)


def _warmup(settings: Settings, size: RoleSize, role: Role, work: Work) -> Phase:
    """Supervised training of one model, padded rows, alone in memory."""
    asked = work.longest_conversation or work.longest_prompt + work.selection
    longest = asked if role == "selector" else work.longest_reading + work.longest_answer
    tokens = int(settings.warmup_batch * longest)
    gradients = _gradients(settings, size)
    activations = _kept(settings, size, tokens) + _layer(size, tokens) + size.casts
    return Phase(
        f"warm-up {role}",
        _weights(settings, size),
        gradients,
        _optimizer(settings, size),
        activations + _gathered(settings, {role: size}),
        0.0,
        settings.process,
    )
