"""Both language models in one module, so that the stock Trainer, DDP, FSDP and DeepSpeed see one model.

`SelectorGenerator.forward` scores a micro-batch for both roles and returns both losses: one forward, one backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dro_rl.likelihood import LIKELIHOODS, Scoring, answer_logps, row_logps
from dro_rl.likelihood.attention import drops_out
from dro_rl.likelihood.packing import Row
from dro_rl.likelihood.prefill import Prefills
from dro_rl.objective import weighted_nll
from dro_rl.roles import POLICIES, ROLES, Role


class Batch(Protocol):
    """What is scored together: rows of each role that moves, and what their log-probabilities are multiplied by.

    The selector's completions are a question's distinct samples, each with a log-probability of its own; the
    completions of a generator's row are the accepted answers, which make one log-likelihood together.
    """

    roles: Sequence[Role]

    def begins_alike(self, role: Role) -> bool:
        """Whether prompts of a role may begin alike, and that be worth computing once."""
        ...

    def rows(self, role: Role, logps: Mapping[Role, Tensor]) -> Sequence[Row]:
        """What a role reads, given the log-probabilities of the roles before it, detached, nats."""
        ...

    def coefficients(self, logps: Mapping[Role, Tensor]) -> Mapping[Role, Sequence[float]]:
        """By role, in the order of `logps`: the log-probabilities of this very pass, detached, nats. Of answers
        both: their sum over tokens and their mean, (rows, 2)."""
        ...


Switch = Callable[[str], Any]


class SelectorGeneratorOutput(NamedTuple):
    """Of each role that was asked: its loss (a scalar, with gradient) and its log-probabilities (detached, nats), those
    of answers as sum and mean, (rows, 2)."""

    losses: dict[Role, Tensor]
    logps: dict[Role, Tensor]


class SelectorGenerator(nn.Module):
    """A selector and a generator, as one module.

    Args:
        models: causal LMs, or PEFT models around them, by role; no generator where it is frozen elsewhere.
    """

    selector: PreTrainedModel
    generator: PreTrainedModel

    def __init__(self, **models: PreTrainedModel) -> None:
        super().__init__()
        self.roles = tuple(role for role in ROLES if role in models)
        for role in self.roles:
            setattr(self, role, models[role])

    @property
    def config(self) -> Any:
        """The selector's: the Trainer asks a model for one."""
        return self.selector.config

    @property
    def drops_out(self) -> bool:
        """Whether two passes over the same tokens may differ, by dropout in layers or in attention."""
        return any(drops_out(getattr(self, role)) for role in self.roles)

    def forward(
        self,
        batch: Batch | None = None,
        scoring: Scoring | None = None,
        switch: Switch = lambda role: None,
        prefills: Prefills | None = None,
        call: tuple[Role, Callable[[Any], Any]] | None = None,
    ) -> Any:
        """Score a micro-batch for training, or call a function with one role.

        The second use exists for sharded models, whose parameters are gathered only within the forward of the module
        that was wrapped.

        Args:
            batch: the rows of each role, and what makes their losses.
            scoring: how they are scored.
            switch: told the role whose computation begins, in the backward pass too.
            prefills: prompts that a policy has been through already.
            call: a role and a function of it.
        """
        if call is not None:
            role, function = call
            return function(getattr(self, role))
        assert batch is not None
        scoring = scoring or Scoring()
        logps: dict[Role, Tensor] = {}
        detached: dict[Role, Tensor] = {}
        for role in batch.roles:
            rows = batch.rows(role, detached)
            switch(role)
            tree = scoring.prefix_tree and batch.begins_alike(role)
            kept = prefills.take(rows) if prefills is not None and role in POLICIES else []
            scored = row_logps(
                getattr(self, role), rows, shared_prefix=scoring.shared_prefix, prefix_tree=tree, prefills=kept
            )
            found = _totals(role, scored, scoring)
            logps[role] = found if role in POLICIES else found[:, LIKELIHOODS.index(scoring.answer_likelihood)]
            detached[role] = found.detach()
            # Backward begins with the model that came last, and comes to this tensor when it is through with it.
            # Prompts that were read before all else come after all else.
            for tensor in (logps[role], *(each.last for each in kept)):
                _on_backward(tensor, partial(switch, role))
        coefficients = batch.coefficients(detached)
        losses = {role: weighted_nll(values, _like(values, coefficients[role])) for role, values in logps.items()}
        return SelectorGeneratorOutput(losses, detached)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Trade compute for activation memory in every role that trains. `options` are the models' own."""
        for role in self.roles:
            model = getattr(self, role)
            if any(parameter.requires_grad for parameter in model.parameters()):
                model.gradient_checkpointing_enable(**options)
                # With a frozen base under adapters, checkpointed layers need an input that asks for gradients.
                model.enable_input_require_grads()

    def gradient_checkpointing_disable(self) -> None:
        for role in self.roles:
            getattr(self, role).gradient_checkpointing_disable()

    def freeze(self, role: Role) -> None:
        """Keep a role as it is: no gradients, no optimizer state, no update."""
        getattr(self, role).requires_grad_(False)


def _on_backward(tensor: Tensor, action: Callable[[], Any]) -> None:
    def hook(gradient: Tensor) -> None:
        action()

    if tensor.requires_grad:
        tensor.register_hook(hook)


def _totals(role: Role, scored: Sequence[Sequence[Tensor]], scoring: Scoring) -> Tensor:
    """(completions,) log-probabilities of a policy; of what scores answers (rows, 2), sum and mean."""
    if role in POLICIES:
        return torch.stack([logps.sum() for row in scored for logps in row])
    return torch.stack([answer_logps(row, scoring.answer_aliases) for row in scored])


def _like(logps: Tensor, coefficients: Sequence[float]) -> Tensor:
    return torch.tensor(coefficients, dtype=torch.float32, device=logps.device)
