"""Operations of each phase, and the seconds they come to: by a card's peak, or by what a short run took here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dro_rl.em.schedule import Schedule
from dro_rl.em.timing import PEAK_FLOPS
from dro_rl.resources.machine import BANDWIDTH, Machine
from dro_rl.resources.models import RoleSize
from dro_rl.resources.work import Work
from dro_rl.roles import Role

UTILISATION = 0.4
"""Share of a card's peak that training and prefills are taken to reach, where nothing was measured."""


@dataclass(frozen=True, slots=True)
class Counts:
    """How often a run does what.

    Args:
        schedule: its iterations and steps.
        steps, iterations: optimizer steps and E-steps of the run.
        evaluations: of the whole dev split.
        dev: its questions.
        checkpoints: that are written.
        warmup_steps: optimizer steps of each role's warm-up.
        warmup_batch: sequences of one, on all devices.
    """

    schedule: Schedule
    steps: int
    iterations: int
    evaluations: int
    dev: int
    checkpoints: int
    warmup_steps: Mapping[Role, int]
    warmup_batch: int

    @property
    def sampled(self) -> int:
        """Questions that get rollouts, over the run."""
        return self.iterations * self.schedule.questions_per_iteration

    @property
    def trained(self) -> int:
        """Questions that go through an M-step, over the run."""
        return self.steps * self.schedule.questions_per_step


@dataclass(frozen=True, slots=True)
class Done:
    """A phase of the whole run, on all devices.

    Args:
        phase: its name, as the log has it.
        tokens: that go through its models.
        operations: floating-point ones.
        seconds: of the wall clock; None where it cannot be told.
    """

    phase: str
    tokens: float
    operations: float
    seconds: float | None = None


def operations(
    sizes: Mapping[Role, RoleSize], work: Work, counts: Counts, *, scores: bool, reuses: bool, recomputes: bool
) -> list[Done]:
    """What a run does, by phase, without an optimizer's few operations a weight.

    A weight costs two operations a token forward, four backward (`em.timing.flops_per_token`); a token pays
    4 · width a layer for each that it attends to; a predicted one 2 · width · vocabulary.

    Args:
        scores: whether the E-step scores in passes of its own.
        reuses: whether the selector's prompts go forward once, in sampling.
        recomputes: whether layers are computed again in the backward pass.
    """
    m = counts.schedule.num_generations
    selector, generator = sizes["selector"], sizes.get("generator")
    written = m * work.windows * work.selection
    sampled = _prompts(work, m) * work.prompt + written
    done = [
        Done(
            "rollout",
            counts.sampled * sampled,
            counts.sampled * _forward(selector, sampled, work.prompt + work.selection, written),
        )
    ]
    context = {"selector": work.prompt + work.selection, "generator": work.reading + work.answer}
    predicting = {
        "selector": work.distinct * work.windows * work.selection,
        "generator": work.distinct * work.answer,
    }
    read = {role: _forward(size, work.tokens[role], context[role], predicting[role]) for role, size in sizes.items()}
    if scores and generator:
        done.append(Done("scoring", counts.sampled * work.tokens["generator"], counts.sampled * read["generator"]))
    for role, size in sizes.items():
        if size.trained:
            again = size.forward * work.tokens[role] if recomputes else 0.0
            ratio = size.step / size.forward
            prompts = work.tokens[role] - work.distinct * work.selection
            spared = _forward(size, prompts, work.prompt, 0.0) if reuses and role == "selector" else 0.0
            each = ratio * read[role] + again - spared
            done.append(Done(role, counts.trained * work.tokens[role], counts.trained * each))
    asked = counts.evaluations * counts.dev
    if asked:
        tokens = work.windows * (work.prompt + work.selection) + 2 * (work.reading + work.answer)
        answered = _forward(selector, work.prompt + work.selection, context["selector"], work.selection) * work.windows
        if generator:
            answered += 2 * _forward(generator, work.reading + work.answer, context["generator"], work.answer)
        done.append(Done("evaluation", asked * tokens, asked * answered))
    for role, steps in counts.warmup_steps.items():
        examples = steps * counts.warmup_batch
        tokens = (work.conversation if role == "selector" else 0.0) or context[role]
        each = _forward(sizes[role], tokens, tokens, work.selection)
        done.append(Done(f"warm-up {role}", examples * tokens, 3 * examples * each))
    return done


def by_card(
    done: list[Done], sizes: Mapping[Role, RoleSize], work: Work, counts: Counts, machine: Machine, at_once: int
) -> list[Done]:
    """The same with seconds: operations at `UTILISATION` of the peak, and for each decoded token a reading of all
    weights.

    Args:
        at_once: prompts of a device that are decoded together.
    """
    if machine.card is None:
        return done
    rate = PEAK_FLOPS[machine.card] * UTILISATION * machine.devices
    bandwidth = BANDWIDTH[machine.card] * machine.devices
    batches = counts.sampled * _prompts(work, counts.schedule.num_generations) / at_once
    asked = counts.evaluations * counts.dev / at_once
    answering = sizes["generator"].parameters if "generator" in sizes else 0
    decoding = {
        "rollout": batches * work.selection * 2.0 * sizes["selector"].parameters / bandwidth,
        "evaluation": 2.0
        * asked
        * (work.windows * work.selection * sizes["selector"].parameters + work.answer * answering)
        / bandwidth,
    }
    return [
        Done(each.phase, each.tokens, each.operations, each.operations / rate + decoding.get(each.phase, 0.0))
        for each in done
    ]


def _prompts(work: Work, m: int) -> float:
    """The selector's prompts of a question: one for all rollouts, and from the second window on one for each."""
    return 1 + m * (work.windows - 1)


def _forward(size: RoleSize, tokens: float, context: float, predicting: float) -> float:
    attention = 4.0 * size.attention * size.layers * tokens * context / 2
    return size.forward * tokens + attention + 2.0 * size.width * size.vocabulary * predicting
