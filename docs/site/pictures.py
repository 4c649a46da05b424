"""Draw the pictures of docs/how-it-learns.md into docs/pictures/, from the package's own functions.

python docs/site/pictures.py
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from dro_rl.objective import (
    effective_sample_size,
    evidence_bound,
    importance_weights,
    selector_coefficients,
    temperature_for_ess,
)

PLACE = Path(__file__).parents[1] / "pictures"
BLUE, ORANGE, GREEN, GREY = "#1f6fb2", "#d9691a", "#2f8f5b", "#8a8f98"
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "dro_rl", "font.size": 11, "axes.titlesize": 11, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "figure.constrained_layout.use": True,
}  # fmt: skip


def posterior() -> Figure:
    """What the selector believes, what the answer says, and both together."""
    names = ["[1]", "[2]", "[3]", "[4]", "[5]", "[6]"]
    selector = torch.tensor([0.42, 0.26, 0.14, 0.09, 0.06, 0.03])
    answer = torch.tensor([0.02, 0.05, 0.60, 0.01, 0.30, 0.01])
    # Every selection listed once: as if drawn from the uniform distribution, and weighed by p/q.
    weights = importance_weights(answer.log(), proposal_log_ratio=selector.log() - math.log(1 / len(names)))
    figure, panels = plt.subplots(1, 3, figsize=(9, 2.6), sharex=True)
    titles = ("p(z|x): the selector", "p(y|x,d): the true answer", "weight: both, normalised")
    for panel, title, values, colour in zip(
        panels, titles, (selector, answer, weights), (BLUE, ORANGE, GREEN), strict=True
    ):
        panel.bar(names, values, color=colour)
        panel.set(title=title, ylim=(0, 0.75))
    panels[0].set_ylabel("probability")
    figure.supxlabel("selection", fontsize=11)
    return figure


def temperature() -> Figure:
    """Eight rollouts of one question, their weights as they are and softened."""
    logps = torch.tensor([-2.0, -3.1, -4.0, -5.2, -6.5, -8.0, -9.4, -12.0])
    chosen = temperature_for_ess(logps, 0.5)
    shown = [("T = 1", 1.0, BLUE), ("T = 3", 3.0, ORANGE), (f"target_ess: 0.5 (T = {chosen:.1f})", chosen, GREEN)]
    figure, panel = plt.subplots(figsize=(9, 3))
    for number, (name, value, colour) in enumerate(shown):
        weights = importance_weights(logps, temperature=value)
        left = [place + 0.27 * (number - 1) for place in range(len(logps))]
        label = f"{name}: {effective_sample_size(weights):.1f} effective rollouts"
        panel.bar(left, weights, width=0.25, color=colour, label=label)
    panel.set_xticks(range(len(logps)), [f"{value:g}".replace("-", "−") for value in logps.tolist()])
    panel.set(xlabel="log p(y|x,d) of the eight rollouts, nats", ylabel="weight")
    panel.legend()
    return figure


def rollouts() -> Figure:
    """What more rollouts buy: the bound, and the effective sample size."""
    g = torch.Generator().manual_seed(0)
    counts = [2, 4, 8, 16, 32, 64]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    for spread, colour in ((1.0, BLUE), (2.0, ORANGE), (4.0, GREEN)):
        bounds, sizes = [], []
        for m in counts:
            logps = spread * torch.randn(20_000, m, generator=g)
            # Below log p(y|x), which is that of the mean over all selections: log E[exp(s n)] = s²/2.
            bounds.append((evidence_bound(logps) - spread**2 / 2).mean())
            sizes.append(effective_sample_size(importance_weights(logps)).mean())
        name = f"log p(y|x,d) spread by {spread:g} nats"
        left.plot(counts, bounds, "o-", color=colour, label=name)
        right.plot(counts, sizes, "o-", color=colour, label=name)
    left.axhline(0, color=GREY, linewidth=1)
    left.set(title="bound − log p(y|x), nats, mean", xlabel="rollouts of a question, m")
    right.plot(counts, counts, ":", color=GREY, label="all alike")
    right.set(title="effective sample size, mean", xlabel="rollouts of a question, m", yscale="log")
    right.set_yticks([1, 4, 16, 64], ["1", "4", "16", "64"])
    for panel in (left, right):
        panel.set_xscale("log", base=2)
        panel.set_xticks(counts, [str(m) for m in counts])
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def ratio() -> Figure:
    """A policy, a proposal that explores, and what the ratio makes of the proposal's draws."""
    places = torch.arange(12, dtype=torch.float64)
    policy = (-0.75 * places).log_softmax(0)
    proposal = (policy / 3).log_softmax(0)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    # What the draws of each selection weigh together: as often as q draws it, times its ratio, all answers alike.
    whole, cut = (
        importance_weights(proposal, proposal_log_ratio=policy - proposal, max_log_ratio=limit) for limit in (None, 0.5)
    )
    names = [f"{int(place) + 1}" for place in places]
    for panel, title, seen in (
        (left, "p/q whole: the rollouts count as p", whole),
        (right, "max_log_ratio: 0.5: the likeliest count for less", cut),
    ):
        panel.bar(names, seen, color=GREEN, alpha=0.55, label="draws of q, weighed")
        panel.plot(names, policy.exp(), "o-", color=BLUE, label="p, the policy")
        panel.plot(names, proposal.exp(), "s--", color=ORANGE, label="q: p at temperature 3")
        panel.set(title=title, xlabel="selections, the likeliest first")
    left.set_ylabel("probability")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def baseline() -> Figure:
    """How noisy the selector's step is, with the control variate and without."""
    gains = torch.linspace(0, 5, 21, dtype=torch.float64).tolist()
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    for panel, share in zip(panels, (0.2, 0.6), strict=True):
        for name, colour in (("none", ORANGE), ("mean", BLUE)):
            panel.plot(gains, [noise(gain, share, name) for gain in gains], color=colour, label=name, linewidth=2)
        panel.set(title=f"the best has p(z|x) = {share:g}", xlabel="nats by which it explains the answer better")
    panels[0].set(ylabel="sd of the gradient, m = 8", ylim=(0, None))
    panels[0].legend(title="selector_baseline", loc="upper left")
    return figure


def noise(gain: float, share: float, kind: str, m: int = 8, selections: int = 10) -> float:
    """Standard deviation, over draws of m rollouts, of the gradient for the logit of the best of some selections.

    Args:
        gain: nats by which the best explains the answer better than the others, which are alike.
        share: its probability under the policy.
        kind: `selector_baseline`.
    """
    g = torch.Generator().manual_seed(1)
    policy = torch.full((selections,), (1 - share) / (selections - 1), dtype=torch.float64)
    policy[0] = share
    drawn = torch.multinomial(policy.expand(20_000, -1), m, replacement=True, generator=g)
    best = (drawn == 0).double()
    coefficients = selector_coefficients(importance_weights(gain * best), baseline=kind)
    gradients: Tensor = (coefficients * (best - share)).sum(-1)
    return gradients.std().item()


PICTURES: dict[str, Callable[[], Figure]] = {
    each.__name__: each for each in (posterior, temperature, rollouts, ratio, baseline)
}


def draw(folder: Path) -> None:
    """Every picture, as SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        for name, picture in PICTURES.items():
            figure = picture()
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})
            plt.close(figure)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else PLACE)
