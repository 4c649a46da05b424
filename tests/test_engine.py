"""Claims about the transformers engine: what it draws, from which distribution, and that log q says so."""

from __future__ import annotations

import random
from contextlib import nullcontext
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from conftest import ARCHITECTURES, VOCABULARY

from dro_rl.config import DROConfig
from dro_rl.em.e_step import Asked, EStep
from dro_rl.em.method import Method
from dro_rl.engines.decoding import Decoder, draw, truncate
from dro_rl.engines.protocol import GenerationRequest
from dro_rl.engines.transformers_engine import TransformersEngine
from dro_rl.likelihood import completion_logps
from dro_rl.prompts import Prompter
from dro_rl.proposal import Completion, SamplingParams, rollout_seed, uniforms

EOS = 1
PROMPTS = [[random.Random(f"{i}/{j}").randrange(2, VOCABULARY) for j in range(n)] for i, n in enumerate((21, 4, 13))]
SEEDS = [11, 22, 33]
SAMPLING = SamplingParams(max_completion_length=7)


def generate(model, m: int = 4, sampling: SamplingParams = SAMPLING, **options) -> list[list[Completion]]:
    return Decoder(model, EOS, **options).generate(GenerationRequest(PROMPTS, m, sampling, SEEDS))


def assert_same(first: list[list[Completion]], second: list[list[Completion]]) -> None:
    """The same tokens, and log q to rounding."""
    for one, other in zip(chain(*first), chain(*second), strict=True):
        assert one.ids == other.ids
        assert one.logps == pytest.approx(other.logps, abs=2e-5)


# Completions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_log_q_at_temperature_one_is_log_p(make_model, architecture: str) -> None:
    """Sampling with a cache and scoring without one are the same model, on both decoding paths."""
    model = make_model(architecture)
    for shared in (True, False):
        for prompt, group in zip(PROMPTS, generate(model, shared_prefix=shared), strict=True):
            scored = completion_logps(model, prompt, [sample.ids for sample in group])
            for sample, logps in zip(group, scored, strict=True):
                assert sample.logps == pytest.approx(logps.tolist(), abs=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("sampling", [SAMPLING, SamplingParams(7, 0.7, 0.9, 50, 0.01)], ids=["p", "q"])
def test_one_cache_and_m_caches_draw_the_same(make_model, architecture: str, sampling: SamplingParams) -> None:
    model = make_model(architecture)
    assert_same(
        generate(model, sampling=sampling, shared_prefix=True),
        generate(model, sampling=sampling, shared_prefix=False),
    )


def test_the_samples_of_a_prompt_decode_in_one_row(make_model) -> None:
    """Guards the test above against comparing one path with itself."""
    model = make_model()
    shapes: list[tuple[int, ...]] = []
    model.get_input_embeddings().register_forward_hook(lambda _, args, __: shapes.append(tuple(args[0].shape)))
    generate(model, shared_prefix=True)
    generate(model, shared_prefix=False)
    assert shapes == [(1, 21 + 4 + 13), *[(3, 4)] * 6, (3, 21), *[(12, 1)] * 6]


@pytest.mark.parametrize("architecture", ["mistral", "gemma2"])
@pytest.mark.parametrize("window", [16, 30, 128])
@pytest.mark.parametrize("m", [1, 4])
def test_a_sliding_window_is_kept_while_decoding(make_model, architecture: str, window: int, m: int) -> None:
    """21 + 7 tokens: a window narrower than a prompt; than what the batch holds together; and wide enough."""
    model = make_model(architecture, sliding_window=window)
    for prompt, group in zip(PROMPTS, generate(model, m), strict=True):
        scored = completion_logps(model, prompt, [sample.ids for sample in group])
        for sample, logps in zip(group, scored, strict=True):
            assert sample.logps == pytest.approx(logps.tolist(), abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "expanded"])
def test_a_prompt_and_its_seed_decide_what_is_drawn(make_model, shared: bool, batch_size: int) -> None:
    """Whatever else is in the batch, and in any order: runs resume exactly."""
    model = make_model()
    together = generate(model, shared_prefix=shared)
    assert_same(together, generate(model, shared_prefix=shared, batch_size=batch_size))
    engine = Decoder(model, EOS, shared_prefix=shared)
    backwards = engine.generate(GenerationRequest(PROMPTS[::-1], 4, SAMPLING, SEEDS[::-1]))
    assert_same(together, backwards[::-1])


def test_another_seed_draws_something_else(make_model) -> None:
    model = make_model()
    engine = Decoder(model, EOS)
    first, second = (engine.generate(GenerationRequest(PROMPTS[:1], 4, SAMPLING, [seed]))[0] for seed in (1, 2))
    assert not {sample.ids for sample in first} & {sample.ids for sample in second}


def test_the_samples_of_a_group_differ(make_model) -> None:
    for group in generate(make_model(), m=8):
        assert len({sample.ids for sample in group}) == 8


def test_the_end_of_sequence_ends_a_completion_and_belongs_to_it(make_model) -> None:
    """Its log-probability is part of log p(z|x)."""
    model = make_model(vocab_size=8)
    engine = Decoder(model, EOS)
    group = engine.generate(GenerationRequest([[2, 3, 4]], 32, SamplingParams(12), [0]))[0]
    ended = [sample for sample in group if EOS in sample.ids]
    assert len(ended) > 8
    assert len({len(sample.ids) for sample in ended}) > 3
    for sample in ended:
        assert sample.ids.index(EOS) == len(sample.ids) - 1
    for sample in group:
        assert len(sample.logps) == len(sample.ids)
        assert sample in ended or len(sample.ids) == 12


def test_one_finished_sample_does_not_stop_or_change_the_others(make_model) -> None:
    """The same seeds without an end-of-sequence: what comes before it is the same."""
    model = make_model(vocab_size=8)
    with_end = Decoder(model, EOS).generate(GenerationRequest([[2, 3, 4]], 32, SamplingParams(12), [0]))[0]
    without = Decoder(model, 99).generate(GenerationRequest([[2, 3, 4]], 32, SamplingParams(12), [0]))[0]
    for sample, whole in zip(with_end, without, strict=True):
        assert len(whole.ids) == 12
        assert sample.ids == whole.ids[: len(sample.ids)]
        assert sample.logps == pytest.approx(whole.logps[: len(sample.ids)], abs=1e-6)


def test_length_one_is_one_token(make_model) -> None:
    for group in generate(make_model(), sampling=SamplingParams(1)):
        assert [len(sample.ids) for sample in group] == [1] * 4


def test_greedy_takes_the_likeliest_tokens(make_model) -> None:
    model = make_model()
    (group,) = Decoder(model, EOS).generate(GenerationRequest(PROMPTS[:1], 1, SamplingParams(5, temperature=0.0), [0]))
    ids = list(PROMPTS[0])
    for token in group[0].ids:
        assert token == model(torch.tensor([ids])).logits[0, -1].argmax().item()
        ids.append(token)
    scored = completion_logps(model, PROMPTS[0], [group[0].ids])[0]
    assert group[0].logps == pytest.approx(scored.tolist(), abs=1e-4)


def test_sampling_uses_no_global_randomness(make_model) -> None:
    model = make_model()
    torch.manual_seed(1)
    first = generate(model)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert_same(first, generate(model))
    assert torch.equal(before, torch.get_rng_state())


def test_seeds_are_made_of_their_parts() -> None:
    assert rollout_seed(0, 1, 2) == rollout_seed(0, 1, 2)
    assert len({rollout_seed(s, i, p) for s in range(3) for i in range(12) for p in range(12)}) == 3 * 12 * 12
    torch.Generator().manual_seed(rollout_seed(0, 1, 2))


def test_on_policy_means_no_temperature_and_no_truncation() -> None:
    assert SAMPLING.on_policy
    for other in ({"temperature": 0.7}, {"top_p": 0.95}, {"top_k": 20}, {"min_p": 0.1}):
        assert not SamplingParams(7, **other).on_policy


def test_a_process_without_questions_has_no_rollouts(make_model, tokenizer, tmp_path) -> None:
    """The last part of an E-step, and an online step, may have fewer questions than there are processes."""
    model = make_model()
    prompters = {role: Prompter(tokenizer, role) for role in ("selector", "generator")}
    method = Method.of(DROConfig(output_dir=str(tmp_path), report_to="none"))
    trained = SimpleNamespace(open=lambda: nullcontext(model), prompter=prompters["selector"], prefills=None)
    e_step = EStep(TransformersEngine(trained, 8, True), lambda role: nullcontext(model), None, prompters, method)
    nothing = Asked([], [], [], 1.0)
    assert e_step.weigh(nothing, e_step.sample(nothing, 0)) == []


# One token --------------------------------------------------------------------------------------------------


LOGITS = torch.tensor([2.0, 1.0, 0.5, -0.5, -2.0, 1.5])
COUNT = 40_000


def frequencies(sampling: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """How often each token is drawn, and the log q that is reported for it (NaN for one never drawn)."""
    u = uniforms(7, 1, COUNT)[0]
    ids, logps = draw(LOGITS.expand(COUNT, -1), sampling, u)
    reported = torch.full_like(LOGITS, torch.nan)
    reported[ids] = logps
    return torch.bincount(ids, minlength=6) / COUNT, reported


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(1),
        SamplingParams(1, temperature=0.5),
        SamplingParams(1, temperature=3.0),
        SamplingParams(1, top_k=3),
        SamplingParams(1, top_p=0.8),
        SamplingParams(1, min_p=0.3),
        SamplingParams(1, temperature=2.0, top_k=5, top_p=0.9, min_p=0.2),
    ],
    ids=str,
)
def test_tokens_are_drawn_as_often_as_log_q_says(sampling: SamplingParams) -> None:
    """Within four standard deviations each, and log q sums to one over what is drawn: it is renormalised."""
    found, reported = frequencies(sampling)
    q = reported.exp().nan_to_num(0.0)
    assert q.sum().item() == pytest.approx(1, abs=1e-5)
    deviation = (q * (1 - q) / COUNT).sqrt()
    assert ((found - q).abs() <= 4 * deviation + 1e-9).all()


@pytest.mark.parametrize(
    ("sampling", "support"),
    [
        (SamplingParams(1, top_k=3), {0, 1, 5}),
        (SamplingParams(1, top_k=100), {0, 1, 2, 3, 4, 5}),
        (SamplingParams(1, top_p=0.4), {0}),
        (SamplingParams(1, top_p=0.5), {0, 5}),
        (SamplingParams(1, min_p=0.5), {0, 5}),
        (SamplingParams(1, min_p=0.3), {0, 1, 5}),
    ],
    ids=str,
)
def test_truncation_keeps_what_its_definition_says(sampling: SamplingParams, support: set[int]) -> None:
    """p is about (.43, .16, .10, .04, .01, .26); top_p keeps the token that crosses the limit."""
    kept = truncate(LOGITS, sampling).isfinite().nonzero().flatten()
    assert set(kept.tolist()) == support


def test_temperature_divides_the_logits() -> None:
    _, reported = frequencies(SamplingParams(1, temperature=0.5))
    drawn = ~reported.isnan()
    torch.testing.assert_close(reported[drawn], (LOGITS / 0.5).log_softmax(-1)[drawn])


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_draw_a_token_that_can_be_drawn(u: float) -> None:
    logits = torch.tensor([-torch.inf, 0.0, 1.0, -torch.inf])
    token, logp = draw(logits, SAMPLING, torch.tensor(u, dtype=torch.float64))
    assert token.item() in (1, 2)
    assert logp.isfinite()


def test_greedy_reports_the_log_probability_under_p() -> None:
    token, logp = draw(LOGITS, SamplingParams(1, temperature=0.0), torch.tensor(0.9))
    assert token.item() == 0
    assert logp.item() == pytest.approx(LOGITS.log_softmax(-1)[0].item())
