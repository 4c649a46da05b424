"""One optimizer for both models: a learning rate, a schedule and a clip for each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, get_scheduler

from dro_rl.errors import InputError, first_line
from dro_rl.roles import ROLES, Role


def parameter_groups(
    model: nn.Module, rates: Mapping[Role, float], decayed: Collection[str], weight_decay: float
) -> tuple[list[dict[str, Any]], list[Role]]:
    """A group (two, with weight decay) for each model that trains, and whose each is.

    Args:
        model: both models, each under its role's name.
        rates: learning rates by role.
        decayed: names of the parameters that decay.
        weight_decay: how much.
    """
    groups, roles = [], []
    for role in ROLES:
        for decays in (True, False):
            parameters = [
                parameter
                for name, parameter in model.named_parameters()
                if name.split(".")[0] == role and parameter.requires_grad and (name in decayed) == decays
            ]
            if parameters:
                decay = weight_decay if decays else 0.0
                groups.append({"params": parameters, "lr": rates[role], "weight_decay": decay})
                roles.append(role)
    return groups, roles


def clip(module: nn.Module, most: float) -> float | None:
    """Clip one model's gradient on its own, so that neither's scale decides the other's step.

    Returns:
        Its norm before; None where it has no gradient.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.grad is not None]
    if not parameters:
        return None
    norm: Any = nn.utils.clip_grad_norm_(parameters, most)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def role_factors(args: TrainingArguments, rates: Sequence[float], steps: int) -> list[Callable[[int], float]]:
    """What multiplies each rate after so many steps.

    transformers turns an absolute floor (`min_lr`, `lr_end`) into a share of the optimizer's own learning rate, and
    gives every parameter group that share. Here each rate has a schedule as if it were alone.

    Args:
        args: names the schedule and its settings.
        rates: peak learning rates.
        steps: of the whole run.

    Raises:
        InputError: the schedule cannot be made of its settings, or its floor is above a rate.
    """
    factors = []
    for rate in rates:
        factor = _alone(args, rate, steps).lr_lambdas[0]
        if factor(steps) > 1:
            raise InputError(
                "lr_scheduler_kwargs",
                args.lr_scheduler_kwargs,
                f"a learning rate falls to its floor, and {rate:g} is below it",
                "Lower the floor, or give it as a share of the rate (min_lr_rate).",
            )
        factors.append(factor)
    return factors


def align(scheduler: Any) -> bool:
    """Give each parameter group the rate that its schedule has where it stands: it may be another run's length by now.

    Returns:
        Whether a rate is another one than it was.
    """
    if not isinstance(scheduler, LambdaLR):
        return False
    groups, step = scheduler.optimizer.param_groups, scheduler.last_epoch
    before = [group["lr"] for group in groups]
    for group, rate, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["lr"] = rate * factor(step)
    scheduler._last_lr = [group["lr"] for group in groups]
    return before != scheduler._last_lr


def _alone(args: TrainingArguments, rate: float, steps: int) -> Any:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate)
    try:
        return get_scheduler(
            args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=cast(Any, args.lr_scheduler_kwargs),
        )
    except Exception as error:  # each schedule has errors of its own
        raise InputError(
            "lr_scheduler_kwargs",
            args.lr_scheduler_kwargs,
            f"lr_scheduler_type: {args.lr_scheduler_type} can be made of it ({first_line(error)})",
            "Correct it, or use lr_scheduler_type: constant.",
        ) from None
