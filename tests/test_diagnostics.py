"""Claims about the figures of rollouts: equal to the definitions by enumeration, whatever the proposal was."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dro_rl.em.temperature import repeated_share
from dro_rl.metrics import recall_at_k
from dro_rl.objective import effective_sample_size, evidence_bound, importance_weights, weight_entropy
from dro_rl.records import Document, Question, Rollout, Selection
from dro_rl.rollouts import log
from dro_rl.rollouts.diagnostics import Columns, GroupFigures, Summary, columns, logged, pooled, summarize
from dro_rl.rollouts.read import columns_of, summarize_iteration

QUESTION = Question("q", "?", ("a",), tuple(Document(f"d{n}", "", "text") for n in (1, 2, 3, 4)), ("d2",))
SELECTIONS = [(1,), (2,), (3,), ()]
"""Every selection of a selector of four: the last one names nothing."""
POLICY = np.array([0.5, 0.25, 0.125, 0.125])
ANSWERS = np.array([0.1, 0.8, 0.3, math.nan])
REFERENCE = np.array([0.25, 0.25, 0.25, 0.25])


def rollouts(
    drawn: Sequence[int], proposal: Sequence[float] = tuple(POLICY), *, question: int = 0, policy: np.ndarray = POLICY
) -> list[Rollout]:
    """A group of the selections drawn, weighed as the E-step does."""
    picked = list(drawn)
    log_q = np.log(np.array(proposal))[picked]
    log_p, answers = np.log(policy)[picked], np.log(ANSWERS)[picked]
    valid = torch.tensor([bool(SELECTIONS[i]) for i in picked])
    weights = importance_weights(torch.tensor(answers), proposal_log_ratio=torch.tensor(log_p - log_q), mask=valid)
    ess = effective_sample_size(weights).item()
    return [
        Rollout(
            question=question,
            sample=sample,
            token_ids=(1,),
            proposal_logps=(float(log_q[sample]),),
            text="",
            selection=Selection(SELECTIONS[i], bool(SELECTIONS[i]), () if SELECTIONS[i] else ("format",)),
            reference_logp=float(np.log(REFERENCE)[i]),
            selection_logp=float(log_p[sample]),
            answer_logp=float(answers[sample]),
            reward=float(answers[sample]),
            weight=weights[sample].item(),
            proposal_weight=1 / len(picked),
            ess=ess,
            weight_temperature=1.0,
        )
        for sample, i in enumerate(picked)
    ]


def heated(temperature: float) -> np.ndarray:
    """The policy sampled at a temperature."""
    flat = POLICY ** (1 / temperature)
    return flat / flat.sum()


def summary(*groups: list[Rollout], **limits: float) -> Summary:
    return summarize(columns(groups, [QUESTION] * 9), **limits)


# What the policy is, under any proposal ---------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 2, 3])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_the_bounds_exponential_has_expectation_p_of_the_answer(m: int, temperature: float) -> None:
    """Over every group that q can draw. Uncorrected it is that of the proposal: above p(y|x) at T = 2."""
    proposal = heated(temperature)
    evidence = float(np.nansum(POLICY * ANSWERS))
    expected = uncorrected = 0.0
    for drawn in itertools.product(range(4), repeat=m):
        probability = float(np.prod(proposal[list(drawn)]))
        group = rollouts(drawn, proposal)
        expected += probability * math.exp(GroupFigures(columns([group], [QUESTION])).evidence_bound[0])
        uncorrected += probability * float(np.nansum(ANSWERS[list(drawn)])) / m
    assert expected == pytest.approx(evidence, rel=1e-12)
    if temperature != 1:
        assert abs(uncorrected - evidence) > 0.01
    if temperature == 2:
        assert uncorrected > evidence


@pytest.mark.parametrize("counts", [(2, 2, 2, 2), (1, 4, 2, 1), (6, 1, 1, 2)])
def test_entropy_divergence_and_recall_are_the_policys(counts: tuple[int, ...]) -> None:
    """A group that holds each selection as often as q draws it: self-normalised, the figures are those of p."""
    drawn = [i for i, count in enumerate(counts) for _ in range(count)]
    found = summary(rollouts(drawn, np.array(counts) / sum(counts)))
    assert found.selector_entropy == pytest.approx(-(POLICY * np.log(POLICY)).sum())
    assert found.kl == pytest.approx((POLICY * np.log(POLICY / REFERENCE)).sum())
    assert found.recall[1] == pytest.approx(POLICY[1])
    valid = POLICY[:3] / POLICY[:3].sum()
    assert found.answer_logp == pytest.approx((valid * np.log(ANSWERS[:3])).sum())
    rewarded = [replace(r, reward=float(len(r.selection.numbers) + r.sample)) for r in rollouts([0, 1, 2], POLICY)]
    of_each = np.array([len(numbers) for numbers in SELECTIONS[:3]]) + np.arange(3)
    assert summary(rewarded).reward == pytest.approx(of_each.mean())  # drawn from p: each counts once
    assert summary(rewarded, rewarded).reward_sd == 0
    assert found.weighted_recall[1] == pytest.approx(0.25 * 0.8 / np.nansum(POLICY * ANSWERS))


def test_they_come_close_with_m_at_another_temperature() -> None:
    proposal, generator = heated(2.0), np.random.default_rng(0)
    near = summary(rollouts(generator.choice(4, 20_000, p=proposal).tolist(), proposal))
    assert near.recall[1] == pytest.approx(POLICY[1], abs=0.01)
    assert near.selector_entropy == pytest.approx(-(POLICY * np.log(POLICY)).sum(), abs=0.02)
    assert near.evidence_bound == pytest.approx(math.log(np.nansum(POLICY * ANSWERS)), abs=0.02)


def test_on_policy_the_bound_is_that_of_the_objective() -> None:
    """The same figure by numpy and by torch, with invalid rollouts and far from zero."""
    generator = torch.Generator().manual_seed(0)
    answers = -torch.rand(50, 6, generator=generator, dtype=torch.float64) * 1e4
    valid = torch.rand(50, 6, generator=generator) > 0.3
    valid[0] = False
    zeros = np.zeros(300)
    rows = np.flatnonzero(valid.numpy().ravel())
    found = GroupFigures(
        Columns(
            size=np.full(50, 6), num_documents=np.full(50, 4), num_supporting=np.zeros(50, int), ess=np.ones(50),
            weight_temperature=np.ones(50), prompt_cut=np.zeros(50, bool), valid=valid.numpy().ravel(),
            clean=valid.numpy().ravel(), answer_logp=np.where(valid.numpy().ravel(), answers.numpy().ravel(), np.nan),
            selection_logp=zeros, proposal_logp=zeros, reference_logp=zeros, reward=zeros, weight=zeros + 1 / 6,
            temperature=zeros,
            length=valid.numpy().ravel().astype(int), numbers=np.ones(len(rows), int),
            supporting=np.zeros(len(rows), bool), shown=np.ones(len(rows), int), problems={}, draw=np.ones(50, int),
        )
    )  # fmt: skip
    assert found.evidence_bound == pytest.approx(evidence_bound(answers, mask=valid).numpy(), rel=1e-12)


# What was drawn ---------------------------------------------------------------------------------------------


def test_one_groups_figures_by_hand() -> None:
    found = summary(rollouts([0, 0, 1, 3]), max_log_ratio=2.0, min_weight=0.2)
    weights = np.array([0.1, 0.1, 0.8]) / 1.0
    assert found.ess == pytest.approx(1 / (weights**2).sum())
    assert found.ess_share == pytest.approx(found.ess / 4)
    assert found.weight_entropy == pytest.approx(weight_entropy(torch.tensor(weights)).item())
    assert (found.valid, found.clean) == (0.75, 0.75)
    assert found.duplicate == 1 / 2
    assert found.dropped_mass == pytest.approx(0.2)
    assert (found.truncated, found.log_ratio_max, found.ratio_mean) == (0.0, 0.0, 1.0)
    assert found.first == pytest.approx((2 / 3, 1 / 3, 0, 0))
    assert found.first_chance == 0.25
    assert found.problems == {"format": 1}


def test_ess_counts_rollouts_and_its_share_is_of_m() -> None:
    """Defect: one name for 0..m in one room and for a share in another."""
    assert summary(rollouts([0, 0, 0, 0])).ess == pytest.approx(4)
    assert summary(rollouts([0, 0])).ess == pytest.approx(2)
    assert {summary(rollouts([0] * m)).ess_share for m in (2, 4, 8)} == {1.0}


@pytest.mark.parametrize(
    ("groups", "share"),
    [([[0, 1, 2]], 0), ([[0, 0, 0]], 1), ([[0, 0, 1], [1, 1, 3]], 2 / 3), ([[3, 3]], math.nan), ([[0, 3]], math.nan)],
)
def test_duplicates_are_of_what_could_repeat(groups: list[list[int]], share: float) -> None:
    """The guard of the temperature and the log count the same, from selections alone and from columns."""
    made = [rollouts(drawn) for drawn in groups]
    assert summary(*made).duplicate == pytest.approx(share, nan_ok=True)
    assert repeated_share(made) == pytest.approx(share, nan_ok=True)


def test_order_makes_another_selection() -> None:
    """(1, 2) is not (2, 1), nor (1,) with a 2 behind it."""
    group = [
        replace(rollout, selection=Selection(numbers, True))
        for rollout, numbers in zip(rollouts([0] * 4), [(1, 2), (2, 1), (1,), (1, 2)], strict=True)
    ]
    assert summary(group).duplicate == pytest.approx(1 / 3)
    assert summary(group).selected[:2] == pytest.approx((1.0, 0.75))
    assert summary(group).first[:2] == pytest.approx((0.75, 0.25))


@pytest.mark.parametrize(("spread", "tie"), [(0.0, 1), (0.04, 1), (0.06, 0)])
def test_a_near_tie_is_a_tie(spread: float, tie: float) -> None:
    """Within 0.05 nats no weight is more than 5 % above another."""
    group = [replace(r, reward=-1.0 - spread * r.sample) for r in rollouts([0, 1])]
    assert summary(group).all_tie == tie


def test_recall_is_that_of_the_metrics() -> None:
    """As `recall_at_k` counts it, over questions with several supporting documents and selections of any length."""
    question = replace(QUESTION, supporting=("d1", "d4"))
    numbers = [(4, 2, 1), (2,), (), (3, 1)]
    group = [replace(r, selection=Selection(z, bool(z))) for r, z in zip(rollouts([0, 1, 3, 2]), numbers, strict=True)]
    uniform = [replace(r, selection_logp=-1.0, proposal_logps=(-1.0,)) for r in group]
    found = summarize(columns([uniform], [question]))
    for k, value in found.recall.items():
        assert value == pytest.approx(np.mean([recall_at_k(z, (1, 4), k) for z in numbers]))


def test_a_question_without_labels_has_no_recall() -> None:
    found = summarize(columns([rollouts([1, 1])], [replace(QUESTION, supporting=())]))
    assert found.labelled == 0
    assert math.isnan(found.recall[1])
    assert "recall@1" not in logged(found)


# One set, from anywhere -------------------------------------------------------------------------------------


def many() -> list[list[Rollout]]:
    generator = np.random.default_rng(1)
    proposal = heated(1.5)
    return [rollouts(generator.choice(4, 4, p=proposal).tolist(), proposal, question=n) for n in range(9)]


def test_records_and_the_log_give_the_same_figures() -> None:
    """What the step log says and what the command line says afterwards are one computation of equal columns."""
    groups = many()
    table = log.to_table([r for group in groups for r in group], [QUESTION] * 9, 3, 7, 0, 4)
    iteration = summarize_iteration(table, 0.1)
    assert repr(iteration.rollouts) == repr(summary(*groups, max_log_ratio=0.1))
    assert (iteration.number, iteration.first_step) == (3, 7)
    written, made = columns_of(table), columns(groups, [QUESTION] * 9)
    assert (written.group == made.group).all()
    assert (written.row == made.row).all()


def test_pooled_summaries_are_the_summary_of_all() -> None:
    """Every figure, by the count of what it is a mean over. Defect: means of means over parts of unequal size."""
    groups = many()
    whole, parts = summary(*groups, max_log_ratio=0.1), [summary(*groups[:2], max_log_ratio=0.1)]
    parts += [summary(group, max_log_ratio=0.1) for group in groups[2:]]
    for name, value in asdict(pooled(parts)).items():
        assert value == pytest.approx(getattr(whole, name), nan_ok=True), name


def test_the_step_log_has_every_name_once() -> None:
    names = logged(summary(rollouts([0, 1]), max_log_ratio=2.0))
    assert {"evidence_bound", "ess", "ess_share", "selector_entropy", "rollouts/clean", "recall@3"} <= set(names)
    assert all(isinstance(value, float) for value in names.values())


def test_looking_into_rollouts_needs_no_torch(tmp_path: Path) -> None:
    """Two seconds of import before a table that needs none of it."""
    run = tmp_path / "run"
    groups = many()
    log.write(
        log.to_table([r for group in groups for r in group], [QUESTION] * 9, 1, 0, 0, 4), log.part_path(run, 1, 0)
    )
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom dro_rl.cli import app\n"
        "for command in ('ls', 'show', 'stats'):\n"
        f"    assert CliRunner().invoke(app, ['rollouts', command, {str(run)!r}]).exit_code == 0\n"
        "print([name for name in ('torch', 'transformers', 'trl', 'datasets') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"
