"""Claims about weights, diagnostics and losses. Expectations are exact: all m-tuples of a small policy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dro_rl.objective import (
    effective_sample_size,
    evidence_bound,
    generator_loss,
    importance_weights,
    selector_coefficients,
    selector_loss,
    temperature_for_ess,
    weight_entropy,
)

LOGPS = torch.tensor([[-3.0, -1.0, -2.5, -7.0], [-0.1, -0.2, -0.3, -40.0]], dtype=torch.float64)


# Weights ----------------------------------------------------------------------------------------------------


def test_weights_are_the_normalised_likelihoods() -> None:
    likelihoods = LOGPS.exp()
    torch.testing.assert_close(importance_weights(LOGPS), likelihoods / likelihoods.sum(-1, keepdim=True))


def test_weights_ignore_a_constant_added_to_a_group() -> None:
    """Answers differ in length and difficulty: only differences within a group count."""
    shift = torch.tensor([[-500.0], [300.0]], dtype=torch.float64)
    torch.testing.assert_close(importance_weights(LOGPS + shift), importance_weights(LOGPS))


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_weights_and_their_gradients_stay_finite_at_extreme_likelihoods(scale: float) -> None:
    logps = torch.tensor([[scale, 0.0, -scale, 1.0]], requires_grad=True)
    weights = importance_weights(logps)
    assert weights.isfinite().all()
    assert weights.sum().item() == pytest.approx(1)
    (gradient,) = torch.autograd.grad(weights[0, 0], logps)
    assert gradient.isfinite().all()


def test_equal_extremes_tie() -> None:
    torch.testing.assert_close(importance_weights(torch.full((3,), -1e4)), torch.full((3,), 1 / 3))


def test_weights_sum_to_one_over_the_unmasked_and_to_zero_in_an_empty_group() -> None:
    mask = torch.tensor([[True, False, True, False], [False] * 4])
    weights = importance_weights(LOGPS, mask=mask)
    assert weights.sum(-1).tolist() == pytest.approx([1, 0])
    assert not weights[~mask].any()


def test_what_stands_under_the_mask_does_not_matter() -> None:
    """An invalid rollout is never scored: its likelihood is NaN."""
    mask = torch.tensor([[True, True, False, True], [True, False, False, True]])
    unscored = LOGPS.masked_fill(~mask, math.nan)
    ratio = torch.zeros_like(LOGPS).masked_fill(~mask, math.nan)
    expected = importance_weights(LOGPS, mask=mask)
    torch.testing.assert_close(importance_weights(unscored, mask=mask, proposal_log_ratio=ratio), expected)


def test_nan_under_the_mask_reaches_no_gradient() -> None:
    logps = torch.tensor([[-1.0, math.nan, -2.0]], requires_grad=True)
    mask = torch.tensor([[True, False, True]])
    for value in (importance_weights(logps, mask=mask)[0, 0], evidence_bound(logps, mask=mask).sum()):
        (gradient,) = torch.autograd.grad(value, logps)
        assert gradient.isfinite().all()
        assert gradient[0, 1] == 0


def test_impossible_answers_tie() -> None:
    """All −inf is a tie among the unmasked, not a NaN; one possible answer among them takes all."""
    impossible = torch.full((3,), -math.inf)
    assert importance_weights(impossible).tolist() == pytest.approx([1 / 3] * 3)
    mask = torch.tensor([True, True, False])
    assert importance_weights(impossible, mask=mask).tolist() == pytest.approx([0.5, 0.5, 0])
    assert importance_weights(torch.tensor([-math.inf, -900.0, -math.inf])).tolist() == [0, 1, 0]


def test_half_precision_likelihoods_are_widened() -> None:
    logps = torch.tensor([-100.0, -100.5], dtype=torch.bfloat16)
    assert importance_weights(logps).dtype == torch.float32


def test_temperature_is_a_root_of_the_likelihood_one_for_each_question() -> None:
    temperature = torch.tensor([1.0, 4.0], dtype=torch.float64)
    weights = importance_weights(LOGPS, temperature=temperature)
    torch.testing.assert_close(weights[0], importance_weights(LOGPS[0]))
    torch.testing.assert_close(weights[1], (LOGPS[1] / 4).softmax(-1))
    torch.testing.assert_close(weights[1], importance_weights(LOGPS, temperature=4.0)[1])


def test_temperature_leaves_the_proposal_ratio_alone() -> None:
    """It softens the posterior; the correction for the proposal is not a matter of taste."""
    ratio = torch.tensor([0.3, -0.4, 0.0, 0.1], dtype=torch.float64)
    weights = importance_weights(LOGPS[0], proposal_log_ratio=ratio, temperature=3.0)
    torch.testing.assert_close(weights, (LOGPS[0] / 3 + ratio).softmax(-1))


def test_the_ratio_is_truncated_only_from_above() -> None:
    ratio = torch.tensor([5.0, 1.0, -5.0, 0.0], dtype=torch.float64)
    weights = importance_weights(LOGPS[0], proposal_log_ratio=ratio, max_log_ratio=2.0)
    torch.testing.assert_close(weights, (LOGPS[0] + torch.tensor([2.0, 1.0, -5.0, 0.0])).softmax(-1))


def test_without_a_limit_the_ratio_is_exact() -> None:
    ratio = torch.tensor([50.0, 1.0, -5.0, 0.0], dtype=torch.float64)
    expected = (LOGPS[0] + ratio).softmax(-1)
    torch.testing.assert_close(importance_weights(LOGPS[0], proposal_log_ratio=ratio), expected)


# Diagnostics ------------------------------------------------------------------------------------------------


def test_effective_sample_size_is_between_one_and_m() -> None:
    weights = importance_weights(torch.randn(200, 8, generator=torch.Generator().manual_seed(0)) * 10)
    ess = effective_sample_size(weights)
    assert ((ess >= 1 - 1e-5) & (ess <= 8 + 1e-5)).all()
    torch.testing.assert_close(ess, 1 / weights.square().sum(-1))


@pytest.mark.parametrize(
    ("weights", "ess", "entropy"),
    [
        ([1.0, 0, 0, 0], 1, 0),
        ([0.25] * 4, 4, math.log(4)),
        ([0.5, 0.5, 0, 0], 2, math.log(2)),
        ([0.0] * 4, 0, 0),
    ],
)
def test_effective_sample_size_and_entropy_at_their_ends(weights: list[float], ess: float, entropy: float) -> None:
    assert effective_sample_size(torch.tensor(weights)).item() == pytest.approx(ess)
    assert weight_entropy(torch.tensor(weights)).item() == pytest.approx(entropy)


def test_evidence_bound_is_the_log_of_the_mean_likelihood() -> None:
    torch.testing.assert_close(evidence_bound(LOGPS), LOGPS.exp().mean(-1).log())


def test_evidence_bound_stays_finite_where_the_likelihoods_underflow() -> None:
    bound = evidence_bound(torch.tensor([-1e4, -1e4 - 1]))
    assert bound.item() == pytest.approx(-1e4 + math.log((1 + math.exp(-1)) / 2))


def test_an_invalid_rollout_lowers_the_evidence_bound() -> None:
    """It explains nothing and still counts in m: writing garbage must not raise the bound."""
    mask = torch.tensor([[True, True, False, False], [False] * 4])
    bound = evidence_bound(LOGPS.masked_fill(~mask, math.nan), mask=mask)
    assert bound[0].item() == pytest.approx(math.log((math.exp(-3) + math.exp(-1)) / 4))
    assert bound[1].item() == -math.inf


@pytest.mark.parametrize("target", [0.3, 0.5, 0.9])
def test_the_temperature_for_an_effective_sample_size_is_the_smallest(target: float) -> None:
    logps = torch.tensor([[-60.0, -20.0, -35.0, -48.0]], dtype=torch.float64)
    temperature = temperature_for_ess(logps, target)
    assert temperature.item() > 1

    def share(factor: float) -> float:
        weights = importance_weights(logps, temperature=temperature * factor)
        return effective_sample_size(weights).item() / 4

    assert share(1.0) >= target - 1e-5
    assert share(0.999) < target


def test_weights_that_are_even_enough_keep_temperature_one() -> None:
    assert temperature_for_ess(torch.tensor([[-1.0, -1.1, -1.2]]), 0.5).item() == 1


def test_the_target_is_a_share_of_the_valid_rollouts() -> None:
    logps = torch.tensor([-60.0, -20.0, math.nan, math.nan], dtype=torch.float64)
    mask = torch.tensor([True, True, False, False])
    temperature = temperature_for_ess(logps, 0.8, mask=mask)
    ess = effective_sample_size(importance_weights(logps, mask=mask, temperature=temperature))
    assert ess.item() == pytest.approx(1.6, abs=1e-4)


def test_a_target_out_of_reach_still_looks_at_the_answers() -> None:
    """Ratios alone leave an effective sample size of 1.0: the answers are softened to half of what can be had."""
    ratio = torch.tensor([[12.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    answers = torch.tensor([[-1.0, -2.0, -9.0, -3.0]], dtype=torch.float64)
    temperature = temperature_for_ess(answers, 0.9, proposal_log_ratio=ratio)
    assert temperature.item() < 1e3
    even = torch.tensor([[0.0, 2.0, 2.0, 0.0]], dtype=torch.float64)
    reached = temperature_for_ess(answers, 0.99, proposal_log_ratio=even)
    weights = importance_weights(answers, proposal_log_ratio=even, temperature=reached)
    most = max(
        effective_sample_size(importance_weights(answers, proposal_log_ratio=even, temperature=t)).item()
        for t in torch.logspace(0, 6, 400).tolist()
    )
    assert most < 0.99 * 4
    assert effective_sample_size(weights).item() == pytest.approx(0.99 * most, rel=1e-3)


def test_the_temperature_is_found_where_the_ratio_opposes_the_likelihood() -> None:
    """At temperature 2 the two even out; beyond, the ratio alone is as uneven as the likelihood was."""
    logps = torch.tensor([0.0, -10.0], dtype=torch.float64)
    ratio = torch.tensor([-5.0, 0.0], dtype=torch.float64)
    even = importance_weights(logps, proposal_log_ratio=ratio, temperature=2.0)
    assert effective_sample_size(even).item() == pytest.approx(2)
    assert temperature_for_ess(logps, 0.9, proposal_log_ratio=ratio).item() < 2


# Losses -----------------------------------------------------------------------------------------------------


def test_losses_are_weighted_sums_averaged_over_questions() -> None:
    weights = importance_weights(LOGPS)
    expected = -(weights * LOGPS).sum(-1).mean()
    torch.testing.assert_close(selector_loss(LOGPS, weights), expected)
    torch.testing.assert_close(generator_loss(LOGPS, weights), expected)


def test_the_generator_loss_has_the_gradient_of_the_evidence_bound() -> None:
    """With the weights of the same likelihoods, exactly: one forward gives the weights and the loss."""
    logps = LOGPS.clone().requires_grad_()
    (loss_gradient,) = torch.autograd.grad(generator_loss(logps, importance_weights(logps)), logps)
    (bound_gradient,) = torch.autograd.grad(-evidence_bound(logps).mean(), logps)
    torch.testing.assert_close(loss_gradient, bound_gradient)


def test_the_generator_loss_has_that_gradient_also_with_invalid_rollouts() -> None:
    mask = torch.tensor([[True, False, True, True], [True, True, False, False]])
    logps = LOGPS.masked_fill(~mask, math.nan).requires_grad_()
    weights = importance_weights(logps, mask=mask)
    (loss_gradient,) = torch.autograd.grad(generator_loss(logps, weights), logps)
    (bound_gradient,) = torch.autograd.grad(-evidence_bound(logps, mask=mask).mean(), logps)
    torch.testing.assert_close(loss_gradient, bound_gradient)


def test_weights_are_constants_to_the_losses() -> None:
    """No gradient flows through a weight: the M-step has them fixed."""
    logps = LOGPS.clone().requires_grad_()
    weights = importance_weights(logps)
    (gradient,) = torch.autograd.grad(selector_loss(logps, weights), logps)
    torch.testing.assert_close(gradient, -weights.detach() / 2)


def test_an_empty_group_has_no_loss_and_no_gradient() -> None:
    logps = torch.full((1, 3), math.nan, requires_grad=True)
    weights = importance_weights(logps, mask=torch.zeros(1, 3, dtype=torch.bool))
    loss = generator_loss(logps, weights)
    (gradient,) = torch.autograd.grad(loss, logps)
    assert loss.item() == 0
    assert not gradient.any()


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_losses_and_their_gradients_stay_finite(scale: float) -> None:
    logps = torch.tensor([[scale, scale / 2, 0.0]], requires_grad=True)
    for loss in (generator_loss, selector_loss):
        value = loss(logps, importance_weights(logps))
        (gradient,) = torch.autograd.grad(value, logps)
        assert value.isfinite()
        assert gradient.isfinite().all()


def test_a_group_that_ties_moves_nothing_under_the_mean_baseline() -> None:
    """And does under the paper's form: it pushes the selector toward whatever it sampled."""
    logps = LOGPS[:1].clone().requires_grad_()
    tie = torch.full((1, 4), 0.25, dtype=torch.float64)
    (mean,) = torch.autograd.grad(selector_loss(logps, tie, baseline="mean"), logps)
    (none,) = torch.autograd.grad(selector_loss(logps, tie), logps)
    assert not mean.any()
    assert none.all()


def test_an_unknown_baseline_is_refused() -> None:
    with pytest.raises(ValueError, match="'none' or 'mean', not 'median'"):
        selector_loss(LOGPS, LOGPS, baseline="median")


@pytest.mark.parametrize("missing", [{"beta": 0.1}, {"entropy_coef": 0.1}])
def test_regularisers_without_log_probabilities_are_refused(missing: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="selection_logps"):
        selector_coefficients(importance_weights(LOGPS), **missing)


# Expectations, by enumeration -------------------------------------------------------------------------------


POLICY = torch.tensor([0.3, -0.8, 1.1], dtype=torch.float64)
REFERENCE = torch.tensor([0.1, 0.4, 0.0], dtype=torch.float64).log_softmax(0)
ANSWERS = torch.tensor([-2.0, -0.5, -1.4], dtype=torch.float64)


MOVED = torch.tensor([-0.4, 0.9, 0.3], dtype=torch.float64)
"""The policy some steps after it sampled."""


def expected_gradient(m: int, coefficients: Callable[[Tensor, Tensor], Tensor], policy: Tensor = POLICY) -> Tensor:
    """E[Σ c_i ∇ log p_θ(z_i)] over all m-tuples z of the policy that sampled: (3,), exact.

    Args:
        coefficients: of the tuple (m,) and the log-probabilities of its members at θ, to (m,).
        policy: θ.
    """
    logits = policy.clone().requires_grad_()
    logp, sampled = logits.log_softmax(0), POLICY.log_softmax(0)
    total = torch.zeros((), dtype=torch.float64)
    for members in itertools.product(range(3), repeat=m):
        z = torch.tensor(members)
        c = coefficients(z, logp[z].detach())
        total = total + sampled[z].sum().exp() * (c.detach() * logp[z]).sum()
    return torch.autograd.grad(total, logits)[0]


@pytest.mark.parametrize("m", [2, 3, 4])
def test_the_mean_baseline_changes_no_expectation(m: int) -> None:
    def gradient(baseline: str) -> Tensor:
        return expected_gradient(
            m, lambda z, _: selector_coefficients(importance_weights(ANSWERS[z]), baseline=baseline)
        )

    assert gradient("none").norm() > 0.05
    torch.testing.assert_close(gradient("mean"), gradient("none"), atol=1e-12, rtol=0)


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_the_mean_baseline_changes_no_expectation_at_later_steps_of_an_iteration(m: int) -> None:
    """The weights are those of the policy that sampled; the variate follows the policy of the moment."""

    def gradient(baseline: str, follows: bool = True) -> Tensor:
        def coefficients(z: Tensor, logp: Tensor) -> Tensor:
            now = {"selection_logps": logp, "sampled_logps": POLICY.log_softmax(0)[z]} if follows else {}
            return selector_coefficients(importance_weights(ANSWERS[z]), baseline=baseline, **now)

        return expected_gradient(m, coefficients, MOVED)

    torch.testing.assert_close(gradient("mean"), gradient("none"), atol=1e-12, rtol=0)
    assert (gradient("mean", follows=False) - gradient("none")).norm() > 0.1, "a variate that stays behind is a bias"


@pytest.mark.parametrize("baseline", ["none", "mean"])
def test_an_m_step_to_its_end_finds_the_posterior(baseline: str) -> None:
    """Many steps on one E-step: a weighted likelihood has its maximum at the weights' mean, with or without variate."""
    generator = torch.Generator().manual_seed(0)
    z = torch.multinomial(POLICY.softmax(0), 4000 * 8, replacement=True, generator=generator).reshape(4000, 8)
    weights = importance_weights(ANSWERS[z])
    target = torch.stack([weights[z == outcome].sum() for outcome in range(3)]) / len(z)
    logits = POLICY.clone().requires_grad_()
    for _ in range(400):
        logp = logits.log_softmax(0)
        loss = selector_loss(logp[z], weights, baseline=baseline, sampled_logps=POLICY.log_softmax(0)[z])
        (gradient,) = torch.autograd.grad(loss, logits)
        with torch.no_grad():
            logits -= gradient
    torch.testing.assert_close(logits.softmax(0).detach(), target, atol=0.02, rtol=0)


def test_a_policy_that_has_moved_beyond_all_numbers_keeps_its_coefficients_finite() -> None:
    far = torch.tensor([[-1e4, 0.0, -3.0]])
    found = selector_coefficients(
        importance_weights(far), baseline="mean", selection_logps=-far, sampled_logps=far, entropy_coef=0.1
    )
    assert found.isfinite().all()


@pytest.mark.parametrize("m", [2, 4])
def test_the_mean_baseline_changes_no_expectation_where_some_selections_are_invalid(m: int) -> None:
    """The third selection names no document. Weights of the others alone still say: sample it less."""
    valid = torch.tensor([True, True, False])

    def gradient(baseline: str) -> Tensor:
        def coefficients(z: Tensor, _: Tensor) -> Tensor:
            weights = importance_weights(ANSWERS[z], mask=valid[z])
            return selector_coefficients(weights, baseline=baseline)

        return expected_gradient(m, coefficients)

    assert gradient("none")[2] < -0.1
    torch.testing.assert_close(gradient("mean"), gradient("none"), atol=1e-12, rtol=0)


@pytest.mark.parametrize("moved", [None, MOVED], ids=["where it was sampled", "moved since"])
@pytest.mark.parametrize("m", [1, 2, 3, 4])
@pytest.mark.parametrize(("beta", "entropy_coef"), [(0.7, 0.0), (0.0, 0.3), (0.7, 0.3)])
def test_kl_and_entropy_have_exact_gradients_in_expectation(
    moved: Tensor | None, m: int, beta: float, entropy_coef: float
) -> None:
    """Unbiased for every m and wherever the policy has moved: −β ∇KL(p_θ‖ref) + c ∇H(p_θ), to rounding."""
    policy = POLICY if moved is None else moved

    def coefficients(z: Tensor, logp: Tensor) -> Tensor:
        return selector_coefficients(
            torch.zeros(m, dtype=torch.float64),
            selection_logps=logp,
            sampled_logps=None if moved is None else POLICY.log_softmax(0)[z],
            reference_logps=REFERENCE[z],
            beta=beta,
            entropy_coef=entropy_coef,
        )

    estimate = expected_gradient(m, coefficients, policy)
    logits = policy.clone().requires_grad_()
    logp = logits.log_softmax(0)
    kl = (logp.exp() * (logp - REFERENCE)).sum()
    entropy = -(logp.exp() * logp).sum()
    (exact,) = torch.autograd.grad(-beta * kl + entropy_coef * entropy, logits)
    assert exact.norm() > 0.02
    torch.testing.assert_close(estimate, exact, atol=1e-12, rtol=0)


def test_regularisers_compare_each_rollout_with_the_others() -> None:
    """Leave-one-out: what all rollouts cost alike moves nothing, whatever it is. Less variance, no bias."""
    alike = torch.full((1, 4), -30.0)
    options = {"beta": 1.0, "entropy_coef": 1.0}
    none = selector_coefficients(torch.zeros(1, 4), selection_logps=alike, reference_logps=alike / 2, **options)
    assert not none.any()
    shifted = [
        selector_coefficients(torch.zeros(2, 4), selection_logps=LOGPS + shift, entropy_coef=1.0)
        for shift in (0.0, -100.0)
    ]
    torch.testing.assert_close(shifted[0], shifted[1])


def test_a_single_rollout_has_weight_one_whatever_it_is() -> None:
    """m = 1 gives no selection signal: refused by the config unless asked for."""
    weights = importance_weights(torch.tensor([[-3.0], [-900.0]]))
    assert weights.tolist() == [[1.0], [1.0]]
    assert selector_coefficients(weights, baseline="mean").tolist() == [[0.0], [0.0]]


def test_a_single_rollout_teaches_the_selector_nothing_in_expectation() -> None:
    gradient = expected_gradient(1, lambda z, _: importance_weights(ANSWERS[z]))
    torch.testing.assert_close(gradient, torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)


def test_an_invalid_rollout_has_weight_zero_and_takes_part_in_the_control_variate() -> None:
    weights = importance_weights(torch.tensor([-1.0, -2.0, -3.0]), mask=torch.tensor([True, True, False]))
    assert selector_coefficients(weights)[2] == 0
    torch.testing.assert_close(selector_coefficients(weights, baseline="mean")[2], torch.tensor(-1 / 3))
