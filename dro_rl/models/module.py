"""Both language models in one module, so that the stock Trainer, DDP, FSDP and DeepSpeed see one model.

`SelectorGenerator.forward` scores a micro-batch for both roles and returns both losses: one forward, one backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dro_rl.likelihood import Scoring, answer_logp, row_logps
from dro_rl.likelihood.packing import Row
from dro_rl.objective import generator_loss, selector_loss
from dro_rl.roles import ROLES, Role


@dataclass(frozen=True, slots=True)
class WeightedRows:
    """What one role scores in a micro-batch.

    Args:
        rows: prompts with their completions. The selector's completions are a question's distinct samples; the
            generator's are the accepted answers, which make one log-likelihood together.
        coefficients: what multiplies each log-probability in the loss: one a completion for the selector, in row order,
            one a row for the generator. Duplicates of a sample are one completion with their coefficients summed.
    """

    rows: Sequence[Row]
    coefficients: Sequence[float]


Weigh = Callable[[Tensor, Tensor], tuple[Sequence[float], Sequence[float]]]
Switch = Callable[[str], Any]


class SelectorGeneratorOutput(NamedTuple):
    """Losses (scalars, with gradient; None for a role that was not asked), log-probabilities (detached, nats)."""

    selector_loss: Tensor | None
    generator_loss: Tensor | None
    selection_logps: Tensor | None


class SelectorGenerator(nn.Module):
    """A selector and a generator.

    Args:
        selector, generator: causal LMs, or PEFT models around them.
    """

    def __init__(self, selector: PreTrainedModel, generator: PreTrainedModel) -> None:
        super().__init__()
        self.selector = selector
        self.generator = generator

    @property
    def config(self) -> Any:
        """The selector's: the Trainer asks a model for one."""
        return self.selector.config

    def forward(
        self,
        selector: WeightedRows | None = None,
        generator: WeightedRows | None = None,
        scoring: Scoring | None = None,
        weigh: Weigh | None = None,
        switch: Switch = lambda role: None,
        call: tuple[Role, Callable[[Any], Any]] | None = None,
    ) -> Any:
        """Score a micro-batch for training, or call a function with one role.

        The second use exists for sharded models, whose parameters are gathered only within the forward of the module
        that was wrapped.

        Args:
            selector, generator: the rows of each role.
            scoring: how they are scored.
            weigh: gives the coefficients of both roles from the detached log-probabilities of both, in place of those
                that the rows have: on fresh rollouts this one pass gives likelihoods, weights and losses.
            switch: told the role whose computation begins, in the backward pass too.
            call: a role and a function of it.
        """
        if call is not None:
            role, function = call
            return function(getattr(self, role))
        scoring = scoring or Scoring()
        selection = answers = None
        if selector is not None:
            switch("selector")
            scored = row_logps(self.selector, selector.rows, shared_prefix=scoring.shared_prefix)
            selection = torch.stack([logps.sum() for row in scored for logps in row])
            # Backward begins with the model that came last, and comes to this tensor when it is through with it.
            _on_backward(selection, lambda: switch("selector"))
        if generator is not None:
            switch("generator")
            scored = row_logps(
                self.generator, generator.rows, shared_prefix=scoring.shared_prefix, prefix_tree=scoring.prefix_tree
            )
            answers = torch.stack(
                [answer_logp(row, scoring.answer_likelihood, scoring.answer_aliases) for row in scored]
            )
            _on_backward(answers, lambda: switch("generator"))
        coefficients: dict[str, Sequence[float]] = {
            "selector": selector.coefficients if selector else (),
            "generator": generator.coefficients if generator else (),
        }
        if weigh is not None and selection is not None and answers is not None:
            coefficients["selector"], coefficients["generator"] = weigh(selection.detach(), answers.detach())
        return SelectorGeneratorOutput(
            None if selection is None else selector_loss(selection, _like(selection, coefficients["selector"])),
            None if answers is None else generator_loss(answers, _like(answers, coefficients["generator"])),
            None if selection is None else selection.detach(),
        )

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Trade compute for activation memory in every role that trains. `options` are the models' own."""
        for role in ROLES:
            model = getattr(self, role)
            if any(parameter.requires_grad for parameter in model.parameters()):
                model.gradient_checkpointing_enable(**options)
                # With a frozen base under adapters, checkpointed layers need an input that asks for gradients.
                model.enable_input_require_grads()

    def gradient_checkpointing_disable(self) -> None:
        for role in ROLES:
            getattr(self, role).gradient_checkpointing_disable()

    def freeze(self, role: Role) -> None:
        """Keep a role as it is: no gradients, no optimizer state, no update."""
        getattr(self, role).requires_grad_(False)


def _on_backward(tensor: Tensor, action: Callable[[], Any]) -> None:
    def hook(gradient: Tensor) -> None:
        action()

    if tensor.requires_grad:
        tensor.register_hook(hook)


def _like(logps: Tensor, coefficients: Sequence[float]) -> Tensor:
    return torch.tensor(coefficients, dtype=torch.float32, device=logps.device)
