"""The passes of an M-step: which questions go through both models together, and what is tried out for that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from dro_rl.em.fast_path import FastPath
from dro_rl.em.iteration import Rollouts
from dro_rl.em.m_step import Group, MicroBatch
from dro_rl.em.method import Method
from dro_rl.em.schedule import Schedule
from dro_rl.em.timing import PhaseClock
from dro_rl.errors import Phrase, is_out_of_memory
from dro_rl.likelihood import passes
from dro_rl.likelihood.prefill import Prefills
from dro_rl.likelihood.room import Room, free
from dro_rl.models.module import SelectorGenerator
from dro_rl.prompts import Prompter
from dro_rl.records import Question
from dro_rl.roles import Role


class Passes:
    """Makes micro-batches of slots of a step.

    Args:
        schedule: which question a slot is of.
        questions: the training set.
        prompters: the prompts of each role.
        method: what is asked, scored and weighed.
        fast_path: which roles pack their rows.
        room: for how many tokens a pass has room.
        prefills: prompts that one pass may take as sampling read them.
        model: both models, unwrapped, to try that out.
        to_come: bytes that the optimizer is still going to hold.
        offloading: what each pass is within.
        accelerator, clock: the trainer's.
    """

    def __init__(
        self,
        schedule: Schedule,
        questions: Sequence[Question],
        prompters: Mapping[Role, Prompter],
        method: Method,
        fast_path: FastPath,
        room: Room,
        prefills: Prefills,
        model: Callable[[], SelectorGenerator],
        to_come: Callable[[], int],
        offloading: AbstractContextManager[Any],
        accelerator: Accelerator,
        clock: PhaseClock,
    ) -> None:
        self.schedule, self.questions, self.prompters, self.method = schedule, questions, prompters, method
        self.fast_path, self.room, self.prefills, self.model, self.to_come = fast_path, room, prefills, model, to_come
        self.offloading, self.accelerator, self.clock = offloading, accelerator, clock
        self._tried: set[tuple[Role, ...]] = set()
        self._largest = 0  # tokens of the largest of the last passes that has several questions

    def of(self, rollouts: Rollouts, slots: Sequence[int], roles: Sequence[Role], *, unmoved: bool) -> list[MicroBatch]:
        """Slots as what the models score: whole groups in the order of the slots, as many at once as have room.

        Every process has as many, since those that shard parameters meet in each pass.

        Args:
            rollouts: of the iteration.
            slots: those of this process.
            roles: which models move.
            unmoved: whether the selector is still the one that the E-step weighed with.
        """
        groups = []
        for position, places in self.schedule.places(slots).items():
            whole = rollouts.groups[position]
            question = self.questions[whole[0].question]
            groups.append(Group(whole, places, question, self.prompters, self.method, roles))
        packed = {role: self.fast_path.takes(role, max(group.depth(role) for group in groups)) for role in roles}
        made = partial(
            MicroBatch,
            method=self.method,
            roles=roles,
            on_policy=rollouts.on_policy,
            unmoved=unmoved,
            eos_token_id=self.prompters["generator"].eos_token_id,
        )
        sizes = [group.tokens(packed) for group in groups]
        if self.room.auto and tuple(roles) not in self._tried:
            self._try(groups, sizes, packed, made)
            self._tried.add(tuple(roles))
        runs = passes(sizes, self.room.tokens)
        if len(runs) > 1:
            self.prefills.drop()  # what later passes take up would be held through the first
        self._largest = max((sum(sizes[i] for i in run) for run in runs if len(run) > 1), default=0)
        if self.room.auto:
            largest = groups[max(range(len(sizes)), key=sizes.__getitem__)]
            self.room.alone = None if self._largest else _alone(largest, packed)
        batches = [[groups[i] for i in run] for run in runs]
        most = int(self.accelerator.gather(torch.tensor([len(batches)], device=self.accelerator.device)).max())
        return [made(batch) for batch in [*batches, *([] for _ in range(most - len(batches)))]]

    @property
    def can_lower(self) -> bool:
        """Whether passes can hold less: without what was kept of sampling, or with fewer questions together by `auto`
        where no other process waits."""
        return self.prefills.holds or bool(self.room.auto and self._largest and self.accelerator.num_processes == 1)

    def lower(self) -> None:
        """Hold less than the passes that memory ran out in."""
        if not self.prefills.give_up():
            self.room.lower(min(self.room.tokens, self._largest) // 2)

    def _try(
        self,
        groups: Sequence[Group],
        sizes: Sequence[int],
        packed: Mapping[Role, bool],
        made: Callable[[list[Group]], MicroBatch],
    ) -> None:
        """Find out how much has room. Gradients, of which there are none yet, are left empty."""
        failed: list[Exception] = []

        def fits(places: Sequence[int]) -> bool:
            try:
                self._pass_through(made([groups[i] for i in places]))
                return True
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failed[:] = [error.with_traceback(None)]
                return False
            finally:
                self.model().zero_grad(set_to_none=True)
                free()

        with self.clock.phase("verification"):
            largest = self.room.find(sizes, fits)
        if largest is not None:
            self.room.alone, self._largest = _alone(groups[largest], packed), 0
            raise failed[0]

    def _pass_through(self, batch: MicroBatch) -> None:
        """Forward and backward of both models, with as much taken as the optimizer will take."""
        device, model = self.accelerator.device, self.model().train()
        taken = torch.empty(self.to_come(), dtype=torch.uint8, device=device)
        with self.offloading, torch.random.fork_rng([device] if device.type == "cuda" else []):
            with self.accelerator.autocast():
                losses = model(batch=batch, scoring=self.method.scoring).losses
            torch.stack([*losses.values()]).sum().backward()
        del taken


@contextmanager
def accumulating(accelerator: Accelerator, model: nn.Module, *, sharded: bool) -> Iterator[None]:
    """A backward pass that more of the same step follow. Sharded gradients are reduced in each all the same."""
    state = accelerator.gradient_state
    before = state.sync_gradients
    state._set_sync_gradients(False)
    try:
        with nullcontext() if sharded else accelerator.no_sync(model):
            yield
    finally:
        state._set_sync_gradients(before)


def _alone(group: Group, packed: Mapping[Role, bool]) -> Phrase:
    """One question, and how much it takes."""
    each = " and ".join(f"{count:,} of the {role}" for role, count in group.by_role(packed).items())
    return Phrase(f"question {group.question.id} alone takes {group.tokens(packed):,} tokens ({each})")
