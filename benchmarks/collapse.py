"""How a policy falls onto a place in the list, and what gets it off: five numbers trained by the package's weights.

The policy's score of a document is a preference for its place, plus how relevant it looks times a number. In the first
world nothing looks relevant, as to a model that cannot tell documents apart yet, and the policy leans towards a place.
In the second it can learn to tell, and begins with 99 % on one place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import OUTPUT, DeviceOption, OutputOption
from dro_rl.objective import importance_weights

DOCUMENTS, QUESTIONS, STEPS = 4, 8, 40
GAIN = 4.0
"""Nats that the right document is worth above the others, which differ by up to two."""
COLLAPSED = 0.625
"""Of a place: the limit of the signal `position`, half way from chance to always."""


@dataclass(frozen=True)
class Draw:
    """How rollouts are had: m over some orders at a temperature, or every selection listed once."""

    m: int = DOCUMENTS
    orders: int = 1
    temperature: float = 1.0
    listed: bool = False


WORLDS = {"nothing to tell by": (1.0, 0.0), "from 99 % on a place": (6.0, 1.5)}
"""The first place's score at the start, and how much more relevant the right document looks, in standard deviations."""


def trained(draw: Draw, start: float, relevance: float, rate: float, trainings: int) -> dict[str, float]:
    """Means over trainings, after the last step: the policy's recall, the share of its commonest place, and how many
    trainings have it above `COLLAPSED`."""
    g = torch.Generator().manual_seed(1)
    shape = (trainings, QUESTIONS, DOCUMENTS)
    scores = torch.zeros(trainings, DOCUMENTS + 1, dtype=torch.float64)
    scores[:, 0] = start
    scores.requires_grad_(True)
    optimizer = torch.optim.Adam([scores], lr=rate)  # elementwise: the trainings know nothing of each other
    recall = top = torch.zeros(trainings)
    for _ in range(STEPS):
        right = torch.randint(DOCUMENTS, (*shape[:2], 1), generator=g)
        answers = torch.rand(shape, generator=g, dtype=torch.float64) * -2
        answers = answers.scatter_add(2, right, torch.full_like(answers, GAIN)[..., :1])
        looks = torch.randn(shape, generator=g, dtype=torch.float64)
        looks = looks.scatter_add(2, right, torch.full_like(looks, relevance)[..., :1])
        order = torch.rand(*shape[:2], draw.orders, DOCUMENTS, generator=g).argsort(-1)

        def by_place(values: Tensor, order: Tensor = order) -> Tensor:
            return values.unsqueeze(2).expand(order.shape).gather(3, order)

        logits = scores[:, None, None, :DOCUMENTS] + scores[:, None, None, DOCUMENTS:] * by_place(looks)
        logp = logits.log_softmax(-1)
        proposal = (logp.detach() / draw.temperature).log_softmax(-1)
        if draw.listed:
            proposal = torch.zeros_like(proposal)
            places = torch.arange(DOCUMENTS).expand(order.shape)
        else:
            each = draw.m // draw.orders
            drawn = torch.multinomial(proposal.exp().view(-1, DOCUMENTS), each, replacement=True, generator=g)
            places = drawn.view(*order.shape[:3], each)

        def of_rollouts(values: Tensor, places: Tensor = places) -> Tensor:
            return values.gather(3, places).flatten(2)

        chosen = of_rollouts(logp)
        ratio = chosen.detach() - of_rollouts(proposal)
        weights = importance_weights(of_rollouts(by_place(answers)), proposal_log_ratio=ratio)
        even = importance_weights(torch.zeros_like(ratio), proposal_log_ratio=ratio)
        optimizer.zero_grad()
        (-((weights - even) * chosen).sum() / QUESTIONS).backward()
        optimizer.step()
        policy = logp.detach().exp()
        recall = (policy * (order == right.unsqueeze(2))).sum(-1).mean((1, 2))
        top = policy.mean((1, 2)).amax(-1)
    collapsed = (top > COLLAPSED).double()
    return {
        name: value.mean().item()
        for name, value in {"recall": recall, "commonest": top, "collapsed": collapsed}.items()
    }


def main(
    context: typer.Context,
    m: Annotated[int, typer.Option(help="Rollouts of a question: a multiple of two.")] = 8,
    rate: Annotated[float, typer.Option(help="Adam's learning rate, of scores in nats.")] = 0.2,
    trainings: Annotated[int, typer.Option(help="Trainings that are averaged.")] = 100,
    device: DeviceOption = "cpu",
    output: OutputOption = OUTPUT,
) -> None:
    """Train a policy of five numbers, with rollouts had in several ways."""
    draws = {
        f"m = {m}": Draw(m),
        f"m = {m}, temperature 1.5": Draw(m, temperature=1.5),
        f"m = {m}, 2 orders": Draw(m, 2),
        f"m = {m}, 2 orders, temperature 1.5": Draw(m, 2, 1.5),
        f"m = {m}, {m} orders": Draw(m, m),
        "all listed": Draw(listed=True),
    }
    rows = [
        {"world": world, "rollouts": name, **trained(draw, *start, rate, trainings)}
        for world, start in WORLDS.items()
        for name, draw in draws.items()
    ]
    harness.report(
        "collapse",
        context,
        f"A policy of five numbers after {STEPS} steps of {QUESTIONS} questions with {DOCUMENTS} candidates",
        ["world", "rollouts", "recall", "commonest place", f"above {COLLAPSED:.1%}"],
        [
            [row["world"], row["rollouts"], *(f"{row[name]:.0%}" for name in ("recall", "commonest", "collapsed"))]
            for row in rows
        ],
        rows,
        [f"Means over {trainings} trainings; the last column is the share of them."],
    )


if __name__ == "__main__":
    typer.run(main)
