"""Claims about the proposal: q is stored as it was, whatever differs from p is corrected, the constraint is in both."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, VOCABULARY
from torch import Tensor
from training_world import largest_difference, questions, weights, world

from dro_rl import likelihood
from dro_rl.config import DROConfig
from dro_rl.em.e_step import Asked, EStep
from dro_rl.em.method import Method
from dro_rl.em.temperature import STEP, guarded_temperature, scheduled_temperature
from dro_rl.engines.decoding import Decoder
from dro_rl.engines.protocol import GenerationRequest
from dro_rl.engines.transformers_engine import TransformersEngine
from dro_rl.errors import InputError
from dro_rl.evaluation.stages import read_stages
from dro_rl.likelihood import row_logps
from dro_rl.likelihood.packing import Row
from dro_rl.models.module import SelectorGenerator
from dro_rl.objective import importance_weights
from dro_rl.pipeline import PipelineSettings, RAGPipeline
from dro_rl.prompts import Prompter
from dro_rl.proposal import SamplingParams
from dro_rl.recipe import load_recipe
from dro_rl.records import Rollout, Sample, Selection
from dro_rl.roles import ROLES
from dro_rl.rollouts import log as rollout_log
from dro_rl.rollouts.diagnostics import columns, summarize
from dro_rl.selection import format_selection, parse_selection
from dro_rl.selection.constraint import SelectionConstraint, allowed_for

EOS, K = 1, 2
SELECTIONS = list(itertools.permutations(range(1, 5), K))
"""All selections of two of the four documents that a question has here."""
PROMPT = tuple(range(40, 60))


def written(tokenizer, n: int = 4, k: int = K) -> list[tuple[int, ...]]:
    prompter = Prompter(tokenizer, "toy_selector")
    return [prompter.completion(format_selection(z)) for z in itertools.permutations(range(1, n + 1), k)]


def reference_logps(model, completion: Sequence[int], constraint: SelectionConstraint, prompt=PROMPT) -> Tensor:
    """log p of each token by the plainest way: all logits, all but the allowed at −inf, one softmax."""
    logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    mask = torch.full_like(logits, -torch.inf)
    for t in range(len(completion)):
        mask[t, list(constraint.allowed(completion[:t]))] = 0.0
    return (logits + mask).log_softmax(-1).gather(-1, torch.tensor(completion).unsqueeze(-1)).squeeze(-1)


# The constraint, sampled and scored -----------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 5), (5, 3), (12, 2), (20, 5)])
def test_of_thousands_of_samples_none_is_invalid(make_model, tokenizer, n: int, k: int) -> None:
    """An untrained model, which writes none that is valid by itself, two digits, and N < K."""
    constraint = SelectionConstraint(tokenizer, n, k)
    sampling = SamplingParams(constraint.verify(), temperature=1.5)
    engine = Decoder(make_model(), EOS, shared_prefix=False)
    groups = engine.generate(GenerationRequest([PROMPT] * 2, 500, sampling, [1, 2], [constraint] * 2))
    prompter = Prompter(tokenizer, "toy_selector")
    for sample in itertools.chain(*groups):
        selection = parse_selection(prompter.decode(sample.ids), n, min(k, n))
        assert not selection.problems
        assert sample.ids == prompter.completion(format_selection(selection.numbers))
    free = engine.generate(GenerationRequest([PROMPT], 50, sampling, [1]))[0]
    assert not any(parse_selection(prompter.decode(sample.ids), n, k).valid for sample in free)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "plain"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sampled_and_scored_log_probabilities_agree(make_model, tokenizer, architecture: str, shared: bool) -> None:
    model = make_model(architecture)
    constraints = [SelectionConstraint(tokenizer, n, 3) for n in (3, 11)]
    prompts = [PROMPT, PROMPT[5:]]
    engine = Decoder(model, EOS, shared_prefix=shared)
    groups = engine.generate(GenerationRequest(prompts, 8, SamplingParams(24), [3, 4], constraints))
    rows = [
        Row(prompt, [sample.ids for sample in group], allowed_for(constraint, [sample.ids for sample in group]))
        for prompt, group, constraint in zip(prompts, groups, constraints, strict=True)
    ]
    scored = row_logps(model, rows, shared_prefix=shared)
    for sample, logps in zip(itertools.chain(*groups), itertools.chain(*scored), strict=True):
        assert sample.logps == pytest.approx(logps.tolist(), abs=1e-4)
        assert sum(sample.logps) < -0.1


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "plain"])
def test_probabilities_of_all_selections_sum_to_one(make_model, tokenizer, shared: bool) -> None:
    """One spelling a selection, and nothing lost to anything else."""
    for n, k in ((1, 1), (4, 2), (3, 3), (11, 2)):
        constraint, completions = SelectionConstraint(tokenizer, n, k), written(tokenizer, n, k)
        (scored,) = row_logps(
            make_model(), [Row(PROMPT, completions, allowed_for(constraint, completions))], shared_prefix=shared
        )
        assert sum(logps.sum().exp().item() for logps in scored) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("path", ["shared", "shared, head in chunks", "plain"])
def test_scores_and_gradients_are_those_of_a_masked_softmax(make_model, tokenizer, path: str, monkeypatch) -> None:
    if path == "shared, head in chunks":
        monkeypatch.setattr(likelihood, "LOGITS_PER_CHUNK", 3 * VOCABULARY)
    model = make_model().double()
    constraint, completions = SelectionConstraint(tokenizer, 4, K), written(tokenizer)
    expected = torch.stack([reference_logps(model, completion, constraint).sum() for completion in completions])
    row = Row(PROMPT, completions, allowed_for(constraint, completions))
    (scored,) = row_logps(model, [row], shared_prefix=path != "plain")
    found = torch.stack([logps.sum() for logps in scored])
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)
    mix = torch.linspace(-1, 2, len(completions))
    parameters = list(model.parameters())
    for one, other in zip(
        torch.autograd.grad((found * mix).sum(), parameters),
        torch.autograd.grad((expected * mix).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_posterior_weighted_loss_has_the_gradient_of_the_constrained_evidence(make_model, tokenizer) -> None:
    """Fisher's identity over every constrained selection: log p(y|x) with p(z|x) renormalised over what can be said."""
    model = SelectorGenerator(selector=make_model(seed=1), generator=make_model("qwen2", seed=2)).double()
    constraint, completions = SelectionConstraint(tokenizer, 4, K), written(tokenizer)
    answers = torch.linspace(-4, 0, len(completions), dtype=torch.float64)
    selection = torch.stack([reference_logps(model.selector, ids, constraint).sum() for ids in completions])
    (selection + answers).logsumexp(0).backward()
    exact = {name: parameter.grad.clone() for name, parameter in model.selector.named_parameters()}
    assert max(gradient.abs().max() for gradient in exact.values()) > 0.01
    model.zero_grad()
    posterior = importance_weights(answers, proposal_log_ratio=selection.detach())
    row = Row(PROMPT, completions, allowed_for(constraint, completions))
    batch = SimpleNamespace(
        roles=["selector"], rows=lambda *_: [row], begins_alike=lambda _: False,
        coefficients=lambda _: {"selector": posterior.tolist()},
    )  # fmt: skip
    model(batch=batch).losses["selector"].backward()
    for name, parameter in model.selector.named_parameters():
        torch.testing.assert_close(
            -parameter.grad, exact[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_without_a_constraint_the_same_scores_are_lower(make_model, tokenizer) -> None:
    """Guards the tests above: the whole vocabulary takes probability from every token that is not forced."""
    completions = written(tokenizer)
    constraint = SelectionConstraint(tokenizer, 4, K)
    model = make_model()
    (free,) = row_logps(model, [Row(PROMPT, completions)])
    (kept,) = row_logps(model, [Row(PROMPT, completions, allowed_for(constraint, completions))])
    assert all(one.sum() < other.sum() - 1 for one, other in zip(free, kept, strict=True))


def test_rows_with_and_without_a_constraint_are_not_scored_together(make_model) -> None:
    with pytest.raises(ValueError, match="all constrained, or none"):
        row_logps(make_model(), [Row([5], [[6]], [[[6, 7]]]), Row([5], [[6]])])


def test_greedy_takes_the_likeliest_of_what_is_allowed(make_model, tokenizer) -> None:
    model, constraint = make_model(), SelectionConstraint(tokenizer, 12, 3)
    ((sample,),) = Decoder(model, EOS).generate(
        GenerationRequest([PROMPT], 1, SamplingParams(30, temperature=0.0), [0], [constraint])
    )
    for t, token in enumerate(sample.ids):
        logits = model(torch.tensor([[*PROMPT, *sample.ids[:t]]])).logits[0, -1]
        assert token == max(constraint.allowed(sample.ids[:t]), key=lambda id_: logits[id_].item())
    assert sample.logps == pytest.approx(reference_logps(model, sample.ids, constraint).tolist(), abs=1e-4)


# What q is, and what corrects it --------------------------------------------------------------------------------

PROPOSALS = {
    "p": {},
    "hot": {"temperature": 1.7},
    "cold": {"temperature": 0.6},
    "top_p": {"top_p": 0.8},
    "top_k": {"top_k": 2, "temperature": 1.3},
    "min_p": {"min_p": 0.3},
}


def sampled(make_model, tokenizer, m: int = 2000, **settings: Any) -> tuple[list[Rollout], DROConfig]:
    """One question's rollouts through the whole E-step."""
    prompters = {role: Prompter(tokenizer, f"toy_{role}") for role in ROLES}
    selector, generator = make_model(seed=4), make_model("qwen2", seed=2)
    config = DROConfig(
        output_dir="unused", report_to="none", num_generations=m, num_selected=K, constrain_selection=True,
        per_device_train_batch_size=m, **settings,
    )  # fmt: skip
    models = {"selector": selector, "generator": generator}
    trained = SimpleNamespace(open=lambda: nullcontext(selector), prompter=prompters["selector"], prefills=None)
    e_step = EStep(
        TransformersEngine(trained, 8, False), lambda role: nullcontext(models[role]), lambda: nullcontext(selector),
        prompters, Method.of(config),
    )  # fmt: skip
    question = replace(questions(1, documents=4)[0], question="?")
    asked = Asked([0], [question], [7], config.temperature)
    return e_step.weigh(asked, e_step.sample(asked, 0)), config


@pytest.mark.parametrize("name", PROPOSALS)
def test_log_q_is_the_distribution_that_was_sampled_from(make_model, tokenizer, name: str) -> None:
    """Over the twelve selections: log q sums to one where it is not zero, and is how often each is drawn."""
    rollouts, config = sampled(make_model, tokenizer, **PROPOSALS[name])
    log_q = {rollout.selection.numbers: rollout.proposal_logp for rollout in rollouts}
    log_p = {rollout.selection.numbers: rollout.selection_logp for rollout in rollouts}
    q = torch.tensor(list(log_q.values()), dtype=torch.float64).exp()
    assert all(rollout.proposal_logp == pytest.approx(log_q[rollout.selection.numbers]) for rollout in rollouts)
    assert 1 - q.sum().item() < 0.01, "what was never drawn is rare"
    assert q.sum().item() < 1 + 1e-5
    counts = torch.tensor([sum(r.selection.numbers == z for r in rollouts) for z in log_q], dtype=torch.float64)
    assert ((counts / len(rollouts) - q).abs() < 4.5 * (q * (1 - q) / len(rollouts)).sqrt()).all()

    # E_q[p/q f] is the sum of p f over what q can draw: all of it, unless q leaves selections out.
    mass = sum(torch.tensor(value).exp().item() for value in log_p.values())
    if config.sampling.truncates:
        assert mass < 0.97
    else:
        assert mass == pytest.approx(1, abs=0.02)
    found = summarize(columns([rollouts], questions(1, documents=4)))
    assert found.ratio_mean == pytest.approx(mass, abs=0.1)
    assert found.clean == 1
    assert found.temperature == pytest.approx(config.temperature)


@pytest.mark.parametrize("name", ["hot", "cold", "top_k"])
def test_corrected_weights_are_the_posterior_among_what_can_be_drawn(make_model, tokenizer, name: str) -> None:
    rollouts, _ = sampled(make_model, tokenizer, max_log_ratio=100.0, **PROPOSALS[name])
    known = {r.selection.numbers: (r.selection_logp, r.answer_logp, r.proposal_logp) for r in rollouts}
    table = torch.tensor(list(known.values()), dtype=torch.float64)
    exact = (table[:, 0] + table[:, 1]).softmax(0)
    uncorrected = (table[:, 2] + table[:, 1]).softmax(0)
    found = torch.tensor([sum(r.weight for r in rollouts if r.selection.numbers == z) for z in known])
    effective = 1 / sum(r.weight**2 for r in rollouts)
    assert ((found - exact).abs() < 4.5 * (exact * (1 - exact) / effective).sqrt() + 1e-4).all()
    assert (uncorrected - exact).abs().max() > 0.03


def test_the_reference_is_scored_under_the_same_constraint(make_model, tokenizer) -> None:
    """The reference is the selector itself here: no divergence, whatever the proposal."""
    for settings in PROPOSALS.values():
        rollouts, _ = sampled(make_model, tokenizer, m=16, beta=0.1, **settings)
        assert all(r.reference_logp == pytest.approx(r.selection_logp, abs=1e-4) for r in rollouts)
        assert summarize(columns([rollouts], questions(1, documents=4))).kl == pytest.approx(0, abs=1e-4)


def test_the_share_of_truncated_ratios_is_logged(make_model, tokenizer) -> None:
    rollouts, _ = sampled(make_model, tokenizer, m=400, temperature=2.5, max_log_ratio=0.2)
    beyond = [r.selection_logp - r.proposal_logp > 0.2 for r in rollouts]
    assert 0 < sum(beyond) < 400
    found = summarize(columns([rollouts], questions(1, documents=4)), max_log_ratio=0.2)
    assert found.truncated == pytest.approx(sum(beyond) / 400)


@pytest.mark.parametrize(
    "key",
    [
        "repetition_penalty",
        "generation_kwargs",
        "vllm_structured_outputs_regex",
        "vllm_importance_sampling_cap",
        "epsilon",
    ],
)
def test_what_would_make_the_proposal_dishonest_is_refused_with_the_reason(tmp_path, key: str) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(world(tmp_path), {key: 1.1})
    assert caught.value.place == key
    assert "there is no such key" not in caught.value.rule


# Schedule and guard ---------------------------------------------------------------------------------------------


def config_of(**settings: Any) -> DROConfig:
    return DROConfig(output_dir="unused", report_to="none", num_generations=4, **settings)


def group(numbers: Sequence[tuple[int, ...]], temperature: float) -> list[list[Sample]]:
    return [[Sample(0, i, (), (), "", Selection(n, bool(n)), temperature=temperature) for i, n in enumerate(numbers)]]


DIFFERENT, SAME, INVALID = [(1,), (2,), (3,), (1, 2)], [(1,)] * 4, [()] * 4


def test_the_schedule_is_a_straight_line_over_the_iterations() -> None:
    config = config_of(temperature=2.0, temperature_end=1.0, num_iterations=5)
    assert [scheduled_temperature(config, t) for t in range(6)] == [2.0, 1.75, 1.5, 1.25, 1.0, 1.0]
    assert scheduled_temperature(config_of(temperature=1.3), 4) == 1.3
    assert scheduled_temperature(config_of(temperature=1.3, temperature_end=1.0, num_iterations=1), 0) == 1.3


def test_the_guard_raises_while_rollouts_repeat_and_comes_back() -> None:
    config = config_of(duplicate_threshold=0.5, temperature_max=1.9, num_iterations=20)
    temperature, seen = 1.0, []
    for t, numbers in enumerate([SAME] * 4 + [INVALID] + [DIFFERENT] * 5, start=1):
        temperature = guarded_temperature(config, t, group(numbers, temperature))
        seen.append(temperature)
    assert seen[:5] == [STEP, STEP**2, 1.9, 1.9, 1.9]
    assert seen[5:] == pytest.approx([1.9 / STEP, 1.9 / STEP**2, 1.0, 1.0, 1.0])
    assert seen[-1] == 1.0, "back to sampling from p itself, exactly"


def test_the_guard_multiplies_what_the_schedule_says() -> None:
    config = config_of(duplicate_threshold=0.5, temperature=1.5, temperature_end=1.0, num_iterations=3)
    assert guarded_temperature(config, 0, []) == 1.5
    assert guarded_temperature(config, 1, group(SAME, 1.5)) == pytest.approx(1.25 * STEP)
    assert guarded_temperature(config, 2, group(SAME, 1.25 * STEP)) == pytest.approx(STEP**2)
    assert guarded_temperature(config, 2, group(DIFFERENT, 1.25 * STEP)) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"temperature_end": 0.0}, "temperature_end"),
        ({"duplicate_threshold": 1.0}, "duplicate_threshold"),
        ({"duplicate_threshold": 0.5, "temperature_max": 1.0}, "temperature_max"),
        ({"duplicate_threshold": 0.5, "temperature_end": 2.5}, "temperature_max"),
    ],
)
def test_settings_that_contradict_are_refused(settings: dict[str, float], key: str) -> None:
    with pytest.raises(InputError) as caught:
        config_of(**settings)
    assert caught.value.place == key


# The job --------------------------------------------------------------------------------------------------------


def steps(run: Path) -> list[dict[str, float]]:
    return [e for e in json.loads((run / "trainer_state.json").read_text())["log_history"] if "loss" in e]


@pytest.mark.parametrize("fused", [False, True], ids=["scored first", "fused"])
def test_a_constrained_run_is_valid_from_the_first_rollout_to_serving(job, fused: bool) -> None:
    run = job(constrain_selection=True, beta=0.1, entropy_coef=0.01, questions_per_iteration=4 if fused else 8)
    assert [step["rollouts/clean"] for step in steps(run)] == [1.0] * (2 if fused else 4)
    fresh = [step["sampling/logp_difference_max"] for step in steps(run) if "sampling/logp_difference_max" in step]
    assert len(fresh) == 2
    assert max(fresh) < 1e-4, "what the trainer scores is what the engine sampled from"
    assert all(step["sampling/log_ratio_max"] == 0 for step in steps(run))
    assert {stage["valid"] for stage in read_stages(run)} == {100.0}
    pipeline = RAGPipeline.from_pretrained(run)
    assert pipeline.settings.constrain_selection
    asked = [
        replace(question, documents=question.documents[:n], supporting=())
        for n, question in zip((1, 2, 5), questions(3, seed=9), strict=True)
    ]
    selections = pipeline.select_all(asked)
    assert [len(selection.numbers) for selection in selections] == [1, 2, 2]
    assert all("format" not in selection.problems for selection in selections)


def test_packed_and_plain_train_the_same_weights_under_the_constraint(job) -> None:
    one, other = (job(f"run-{mode}", constrain_selection=True, shared_prefix=mode) for mode in ("on", "off"))
    assert largest_difference(weights(one), weights(other)) < 2e-6
    assert largest_difference(weights(one), weights(job("free"))) > 1e-5


@pytest.mark.parametrize("fused", [False, True], ids=["scored first", "fused"])
def test_the_guard_raises_the_temperature_and_says_so(job, fused: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="dro_rl")
    questions_of = {"questions_per_iteration": 4, "num_selected": 1} if fused else {}
    run = job(duplicate_threshold=0.01, temperature_max=1.2, temperature=1.1, temperature_end=1.0, **questions_of)
    temperatures = [step["sampling/temperature"] for step in steps(run)]
    assert temperatures == pytest.approx([1.1, 1.2] if fused else [1.1, 1.1, 1.2, 1.2])
    assert any("temperature 1.1 -> 1.2" in record.message for record in caplog.records)
    for iteration, temperature in ((1, 1.1), (2, 1.2)):
        logged = rollout_log.read(rollout_log.part_paths(run, iteration), ["temperature"])["temperature"].to_pylist()
        assert logged == pytest.approx([temperature] * (16 if fused else 32))


def test_the_guards_memory_travels_with_a_checkpoint(job) -> None:
    """Resumed in another folder, where no rollout log is, at the end of an iteration that repeated itself."""
    guarded: dict[str, Any] = {
        "duplicate_threshold": 0.01, "save_total_limit": None, "metric_for_best_model": "answer_logp",
    }  # fmt: skip
    run = job("run", **guarded)
    moved = job("moved", **guarded, resume_from_checkpoint=str(run / "checkpoint-2"))
    assert [step["sampling/temperature"] for step in steps(moved)] == pytest.approx([1, 1, STEP, STEP])
    assert largest_difference(weights(run), weights(moved)) == 0


def test_leaving_selections_out_is_said(job, caplog: pytest.LogCaptureFixture) -> None:
    job(top_p=0.9)
    assert any("sampling/ratio_mean" in record.message for record in caplog.records)


def test_a_constraint_that_does_not_fit_the_length_is_refused_before_models_load(job) -> None:
    with pytest.raises(InputError, match="max_completion_length: 3: a selection of 2 documents fits"):
        job(constrain_selection=True, max_completion_length=3)


def test_settings_of_before_load_without_the_constraint() -> None:
    assert not PipelineSettings(K, None, 8, 8, {}).constrain_selection
