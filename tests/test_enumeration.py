"""A world small enough to enumerate: with all 12 selections of 2 of 4 documents, every claim is exact.

The selector draws one document, then another; the generator reads the pair. Both are tables.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dro_rl.likelihood import completion_logps
from dro_rl.likelihood.packing import Row
from dro_rl.models.module import SelectorGenerator
from dro_rl.objective import evidence_bound, generator_loss, importance_weights, selector_loss
from dro_rl.prompts import Prompter
from dro_rl.selection import format_selection

SELECTIONS = list(itertools.permutations(range(4), 2))
FIRST = torch.tensor([z[0] for z in SELECTIONS])
SECOND = torch.tensor([z[1] for z in SELECTIONS])
ANSWERS = (0, 2, 1)
"""The accepted answer of each question, of three possible ones."""


class World(torch.nn.Module):
    """Tables: the selector's scores of the first and the second document, the generator's of answers."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)

        def table(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(1.5 * torch.randn(*shape, generator=generator, dtype=torch.float64))

        self.first, self.second = table(3, 4), table(4, 4)
        self.read_first, self.read_second, self.prior = table(4, 3), table(4, 3), table(3, 3)

    @property
    def selector(self) -> list[Tensor]:
        return [self.first, self.second]

    @property
    def generator(self) -> list[Tensor]:
        return [self.read_first, self.read_second, self.prior]

    def selection_logps(self, question: int, temperature: float = 1.0) -> Tensor:
        """(12,) log p(z|x); with a temperature, the log q of sampling token by token at it."""
        taken = torch.eye(4, dtype=torch.bool)
        second = (self.second / temperature).masked_fill(taken, -math.inf).log_softmax(-1)
        return (self.first[question] / temperature).log_softmax(-1)[FIRST] + second[FIRST, SECOND]

    def answer_logps(self, question: int) -> Tensor:
        """(12,) log p(y|x,d_z)."""
        logits = self.read_first[FIRST] + self.read_second[SECOND] + self.prior[question]
        return logits.log_softmax(-1)[:, ANSWERS[question]]

    def evidence(self, question: int) -> Tensor:
        """log p(y|x), exactly."""
        return (self.selection_logps(question) + self.answer_logps(question)).logsumexp(0)

    def posterior(self, question: int) -> Tensor:
        """(12,) p(z|x,y), by the package: every selection once, so that the ratio p/q is p itself."""
        with torch.no_grad():
            return importance_weights(self.answer_logps(question), proposal_log_ratio=self.selection_logps(question))


def gradient(value: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """All gradients in one vector."""
    parts = torch.autograd.grad(value, parameters)
    return torch.cat([part.flatten() for part in parts])


def estimates(world: World, m: int, repeats: int, temperature: float, ratio: bool) -> Callable[[str], Tensor]:
    """The package's gradients of question 0's log p(y|x) from m samples: (repeats, parameters)."""
    logp, logq = world.selection_logps(0), world.selection_logps(0, temperature).detach()
    answers = world.answer_logps(0)
    samples = torch.multinomial(
        logq.exp(), repeats * m, replacement=True, generator=torch.Generator().manual_seed(17)
    ).view(repeats, m)
    log_ratio = (logp - logq)[samples].detach() if ratio else None
    weights = importance_weights(answers[samples].detach(), proposal_log_ratio=log_ratio)

    def of(role: str) -> Tensor:
        loss, logps, parameters = (
            (selector_loss, logp, world.selector) if role == "selector" else (generator_loss, answers, world.generator)
        )
        rows = []
        for i in range(repeats):
            parts = torch.autograd.grad(-loss(logps[samples[i]], weights[i]), parameters, retain_graph=True)
            rows.append(torch.cat([part.flatten() for part in parts]))
        return torch.stack(rows)

    return of


def error(world: World, role: str, m: int, repeats: int, temperature: float = 1.0, ratio: bool = False) -> float:
    """Root mean square distance of the estimates to the exact gradient, relative to its length."""
    exact = gradient(world.evidence(0), getattr(world, role))
    found = estimates(world, m, repeats, temperature, ratio)(role)
    return ((found - exact).square().sum(-1).mean().sqrt() / exact.norm()).item()


@pytest.fixture
def world() -> World:
    return World()


def test_the_world_is_a_distribution(world: World) -> None:
    for question in range(3):
        assert world.selection_logps(question).exp().sum().item() == pytest.approx(1)
        assert world.selection_logps(question, 2.0).exp().sum().item() == pytest.approx(1)


def test_weights_over_all_selections_are_the_posterior(world: World) -> None:
    joint = (world.selection_logps(0) + world.answer_logps(0)).exp()
    torch.testing.assert_close(world.posterior(0), (joint / joint.sum()).detach())


@pytest.mark.parametrize("question", range(3))
def test_posterior_weighted_losses_have_the_gradient_of_the_evidence(world: World, question: int) -> None:
    """Fisher's identity, for both models: what makes the M-step climb log p(y|x)."""
    weights = world.posterior(question)
    for loss, logps, parameters in (
        (selector_loss, world.selection_logps(question), world.selector),
        (generator_loss, world.answer_logps(question), world.generator),
    ):
        exact = gradient(world.evidence(question), parameters)
        assert exact.norm() > 0.05
        torch.testing.assert_close(gradient(-loss(logps, weights), parameters), exact, atol=1e-12, rtol=0)


@pytest.mark.parametrize("role", ["selector", "generator"])
def test_sampled_gradients_converge_to_the_exact_one(world: World, role: str) -> None:
    """Self-normalised weights are consistent: 256 times the samples, about a sixteenth of the error.

    They are biased for finite m, by O(1/m): the mean over many small groups is not exact, nor claimed to be.
    """
    few, many = error(world, role, 16, 64), error(world, role, 4096, 8)
    assert few > 0.05
    assert many < few / 8


@pytest.mark.parametrize("role", ["selector", "generator"])
def test_another_proposal_converges_to_the_same_gradient_with_the_ratio_alone(world: World, role: str) -> None:
    """Samples at temperature 2: corrected by p/q they have the same limit, uncorrected another."""
    few = error(world, role, 16, 64, temperature=2.0, ratio=True)
    many = error(world, role, 4096, 8, temperature=2.0, ratio=True)
    uncorrected = error(world, role, 4096, 8, temperature=2.0, ratio=False)
    assert many < few / 8
    assert uncorrected > 4 * many
    assert uncorrected > 0.1


def test_the_evidence_bound_is_below_the_evidence_and_closes_with_m(world: World) -> None:
    exact = world.evidence(0).item()
    p, answers = world.selection_logps(0).exp().detach(), world.answer_logps(0).detach()

    def mean_bound(m: int) -> float:
        draws = torch.multinomial(p, 4096 * m, replacement=True, generator=torch.Generator().manual_seed(5))
        return evidence_bound(answers[draws.view(4096, m)]).mean().item()

    one, eight, many = mean_bound(1), mean_bound(8), mean_bound(128)
    assert one < eight < many < exact + 0.01
    assert exact - many < (exact - eight) / 4


def test_the_evidence_never_falls_over_exact_iterations(world: World) -> None:
    """EM with exact posteriors and an M-step that is solved closely: log p(y|x) rises until it stands."""
    history = [sum(world.evidence(q).item() for q in range(3))]
    for _ in range(15):
        weights = [world.posterior(question) for question in range(3)]

        def loss(weights: list[Tensor] = weights) -> Tensor:
            total = torch.zeros((), dtype=torch.float64)
            for question in range(3):
                total = total + selector_loss(world.selection_logps(question), weights[question])
                total = total + generator_loss(world.answer_logps(question), weights[question])
            return total

        optimizer = torch.optim.SGD(world.parameters(), lr=0.3)
        for _ in range(20):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        history.append(sum(world.evidence(q).item() for q in range(3)))
    steps = [after - before for before, after in itertools.pairwise(history)]
    assert min(steps) > 0
    assert history[-1] > history[0] + 1


def test_one_forward_of_two_language_models_has_the_gradient_of_the_evidence(make_model, tokenizer, questions) -> None:
    """The same identity through tokens, prompts and `SelectorGenerator`: every parameter of both models."""
    question = questions[0]
    selector_prompter, generator_prompter = (
        Prompter(tokenizer, "toy_selector"),
        Prompter(tokenizer, "toy_generator"),
    )
    model = SelectorGenerator(selector=make_model(seed=1), generator=make_model("qwen2", seed=2)).double()
    prompt = selector_prompter.selector_prompt(question, 2).ids
    written = [selector_prompter.completion(format_selection([a + 1, b + 1])) for a, b in SELECTIONS]
    answer = generator_prompter.completion(question.answers[0])
    reading = [generator_prompter.generator_prompt(question, [a + 1, b + 1]).ids for a, b in SELECTIONS]

    def joint() -> tuple[Tensor, Tensor]:
        chosen = torch.stack([each.sum() for each in completion_logps(model.selector, prompt, written)])
        answered = [completion_logps(model.generator, ids, [answer])[0].sum() for ids in reading]
        return chosen, torch.stack(answered)

    selection, answers = joint()
    (selection + answers).logsumexp(0).backward()
    exact = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    weights = importance_weights(answers.detach(), proposal_log_ratio=selection.detach())
    assert 1 / weights.square().sum() > 1.2
    rows = {"selector": [Row(prompt, written)], "generator": [Row(ids, [answer]) for ids in reading]}
    batch = SimpleNamespace(
        roles=list(rows),
        rows=lambda role, logps: rows[role],
        begins_alike=lambda role: False,
        coefficients=lambda logps: dict.fromkeys(logps, weights.tolist()),
    )
    sum(model(batch=batch).losses.values()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            -parameter.grad, exact[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
