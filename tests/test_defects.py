"""One claim for each defect of the method's first implementation, by the name of the defect.

Covered by name elsewhere:
    A2 (trained on prompts without numbers), A7 (raw or through the chat template): test_prompts,
        test_sampling_scoring_training_evaluation_and_warm_up_ask_with_the_same_tokens
    A8 (header tokens in loss and likelihood): test_prompts,
        test_the_assistant_header_is_in_the_prompt_and_never_in_the_completion
    A9 (count checked, range not; other lengths thrown away), D3 (digits in prose; slice, then filter):
        test_selection
    A11 (no loop, no validation, no early stop): test_training; its missing diagnostics: here
    D2 (punctuation became a space; one accepted answer): test_metrics
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dro_rl.config import DROConfig
from dro_rl.em.e_step import Asked, EStep
from dro_rl.em.m_step import Group, MicroBatch
from dro_rl.em.method import Method
from dro_rl.evaluation.evaluator import evaluate
from dro_rl.job.examples import generator_examples
from dro_rl.likelihood import completion_logps
from dro_rl.pipeline import PipelineSettings, RAGPipeline
from dro_rl.prompts import Prompter
from dro_rl.proposal import Completion
from dro_rl.recipe import RunConfig
from dro_rl.records import Question, Rollout, Selection
from dro_rl.roles import ROLES
from dro_rl.rollouts.diagnostics import columns, logged, summarize

K = 2


class Script:
    """An engine that writes given texts, each with log q = −3 in all."""

    def __init__(self, prompter: Prompter, texts: Sequence[str]) -> None:
        self.completions = []
        for text in texts:
            ids = prompter.completion(text)
            self.completions.append(Completion(ids, (-3.0 / len(ids),) * len(ids)))

    def at(self, step: int):
        return nullcontext(self)

    def generate(self, request):
        assert request.num_generations == len(self.completions)
        return [self.completions for _ in request.prompts]

    def samples_policy(self, sampling) -> bool:
        return sampling.on_policy


class Lab:
    """An E-step over real tiny models, with a scripted sampler."""

    def __init__(self, make_model, tokenizer, questions) -> None:
        self.selector, self.generator = make_model(seed=1), make_model("qwen2", seed=2)
        self.prompters = {role: Prompter(tokenizer, f"toy_{role}") for role in ("selector", "generator")}
        self.questions = questions

    def config(self, m: int, **settings) -> DROConfig:
        return DROConfig(
            output_dir="unused",
            num_generations=m,
            num_selected=K,
            report_to="none",
            per_device_train_batch_size=m,
            **settings,
        )

    def rollouts(self, texts: Sequence[str], question: int = 0, **settings) -> list[Rollout]:
        config = self.config(len(texts), **settings)
        e_step = EStep(
            Script(self.prompters["selector"], texts),
            lambda role: nullcontext(getattr(self, role)),
            None,
            self.prompters,
            Method.of(config),
        )
        asked = Asked([question], [self.questions[question]], [0], config.temperature)
        return e_step.weigh(asked, e_step.sample(asked, 0))

    def answer_logps(self, numbers: Sequence[int], answer: str, question: int = 0) -> torch.Tensor:
        """Token log-probabilities of an answer, end-of-sequence included."""
        prompter = self.prompters["generator"]
        prompt = prompter.generator_prompt(self.questions[question], numbers).ids
        return completion_logps(self.generator, prompt, [prompter.completion(answer)])[0].detach()

    def micro_batch(self, rollouts: Sequence[Rollout], **settings) -> MicroBatch:
        method = Method.of(self.config(len(rollouts), **settings))
        group = Group(rollouts, range(len(rollouts)), self.questions[0], self.prompters, method, ROLES)
        end = self.prompters["generator"].eos_token_id
        return MicroBatch([group], method, ROLES, on_policy=True, unmoved=False, eos_token_id=end)


def coefficients(micro_batch: MicroBatch) -> dict[str, list[float]]:
    """At the weights that the E-step weighed with."""
    known = {rollout.token_ids: rollout.selection_logp for rollout in micro_batch.rollouts}
    answers = torch.zeros(len(micro_batch.rows("generator")), dtype=torch.float64)
    selection = [known[tuple(ids)] for row in micro_batch.rows("selector") for ids in row.completions]
    return micro_batch.coefficients({"generator": answers, "selector": torch.tensor(selection, dtype=torch.float64)})


@pytest.fixture
def lab(make_model, tokenizer, questions) -> Lab:
    return Lab(make_model, tokenizer, questions)


TEXTS = ["[1] > [2]", "[2] > [1]", "[3] > [4]", "[4] > [2]"]
NUMBERS = [(1, 2), (2, 1), (3, 4), (4, 2)]


def test_a1_all_m_samples_are_used(lab) -> None:
    """A1: only the first of the m samples was used, so that every weight was one."""
    rollouts = lab.rollouts(TEXTS)
    expected = torch.stack([lab.answer_logps(numbers, "heron").sum() for numbers in NUMBERS]).softmax(0)
    assert [rollout.weight for rollout in rollouts] == pytest.approx(expected.tolist(), abs=1e-4)
    assert max(expected) < 0.999
    micro_batch = lab.micro_batch(rollouts)
    assert len(micro_batch.rows("selector")[0].completions) == 4
    assert len(micro_batch.rows("generator")) == 4


def test_a3_the_likelihood_is_a_sum_over_tokens_with_the_end_of_sequence(lab) -> None:
    """A3: a mean over tokens, for the weights and for both losses, which is another posterior."""
    rollouts = lab.rollouts(TEXTS)
    for rollout, numbers in zip(rollouts, NUMBERS, strict=True):
        tokens = lab.answer_logps(numbers, "heron")
        assert len(tokens) > 2
        assert rollout.answer_logp == pytest.approx(tokens.sum().item(), abs=1e-4)
    averaged = lab.rollouts(TEXTS, answer_likelihood="mean")
    assert averaged[0].answer_logp == pytest.approx(lab.answer_logps((1, 2), "heron").mean().item(), abs=1e-4)


def test_a4_rejected_samples_take_no_weight(lab) -> None:
    """A4: the softmax came before the filter, so that the kept weights summed to a half."""
    rollouts = lab.rollouts(["[1] > [2]", "no idea", "[2] > [1]", "[9]"])
    assert [rollout.selection.valid for rollout in rollouts] == [True, False, True, False]
    assert sum(rollout.weight for rollout in rollouts) == pytest.approx(1)
    assert [rollouts[1].weight, rollouts[3].weight] == [0, 0]
    assert coefficients(lab.micro_batch(rollouts))["selector"] == [rollout.weight for rollout in rollouts]


def test_a5_duplicates_keep_their_multiplicity(lab) -> None:
    """A5: equal samples were merged and counted once, so that they stood for no more than a rare one."""
    once, twice = (
        lab.rollouts(["[1] > [2]", "[2] > [1]"]),
        lab.rollouts(["[1] > [2]", "[2] > [1]", "[1] > [2]"]),
    )
    odds = once[0].weight / once[1].weight
    assert (twice[0].weight + twice[2].weight) / twice[1].weight == pytest.approx(2 * odds, rel=1e-4)


def test_a5_duplicates_are_scored_once_with_their_coefficients_summed(lab) -> None:
    """A5: and were keyed on the text. The generator's key is what it reads; the selector's, its tokens."""
    rollouts = lab.rollouts(["[1] > [2]", "[1]>[2]", "[2] > [1]", "[1] > [2]"])
    micro_batch = lab.micro_batch(rollouts)
    found, weights = coefficients(micro_batch), [rollout.weight for rollout in rollouts]
    assert found["generator"] == pytest.approx([weights[0] + weights[1] + weights[3], weights[2]])
    assert len(micro_batch.rows("generator")) == 2
    assert found["selector"] == pytest.approx([weights[0] + weights[3], weights[1], weights[2]])
    assert len(micro_batch.rows("selector")[0].completions) == 3


def test_light_rollouts_are_left_out_of_the_generators_loss_when_asked(lab) -> None:
    """`min_weight`: their rows are not made; what the others weigh stays as it is, and so does the selector's row."""
    rollouts = lab.rollouts(TEXTS)
    light, second = sorted(rollout.weight for rollout in rollouts)[:2]
    assert light < second < 0.25
    kept = [rollout for rollout in rollouts if rollout.weight > light]
    micro_batch = lab.micro_batch(rollouts, min_weight=second)
    assert coefficients(micro_batch)["generator"] == [rollout.weight for rollout in kept]
    assert len(micro_batch.rows("generator")) == 3
    assert len(micro_batch.rows("selector")[0].completions) == 4
    found = summarize(columns([rollouts], lab.questions), min_weight=second)
    assert found.dropped_mass == pytest.approx(light)


def test_a6_another_proposal_is_corrected(lab) -> None:
    """A6: samples at temperature 0.7 with top-p were taken for samples of p; log q was saved and not used."""
    rollouts = lab.rollouts(TEXTS, temperature=0.7, max_log_ratio=1e9)
    prompt = lab.prompters["selector"].selector_prompt(lab.questions[0], K).ids
    written = [lab.prompters["selector"].completion(text) for text in TEXTS]
    policy = torch.stack([each.sum() for each in completion_logps(lab.selector, prompt, written)]).detach()
    answers = torch.stack([lab.answer_logps(numbers, "heron").sum() for numbers in NUMBERS])
    expected = (answers + policy - -3.0).softmax(0)
    assert [rollout.selection_logp for rollout in rollouts] == pytest.approx(policy.tolist(), abs=1e-3)
    assert [rollout.weight for rollout in rollouts] == pytest.approx(expected.tolist(), abs=1e-3)
    assert (expected - answers.softmax(0)).abs().max() > 0.1


def test_a6_samples_of_p_itself_have_ratio_one(lab) -> None:
    """At temperature 1 without truncation nothing is corrected, and nothing is scored for it."""
    assert [rollout.selection_logp for rollout in lab.rollouts(TEXTS)] == pytest.approx([-3.0] * 4)


def test_a9_valid_lists_that_are_not_of_k_numbers_are_used(lab) -> None:
    """A9: outputs of other than K numbers were thrown away; 0 and numbers above N became targets."""
    rollouts = lab.rollouts(["[3]", "[4] > [3] > [2] > [1]", "[0] > [5] > [2]", "[1] > [2]"])
    assert [rollout.selection.numbers for rollout in rollouts] == [(3,), (4, 3), (2,), (1, 2)]
    assert all(rollout.weight > 0 for rollout in rollouts)


@pytest.mark.parametrize("aliases", ["first", "max", "logsumexp"])
def test_a10_every_accepted_answer_can_count(lab, aliases: str) -> None:
    """A10: one accepted answer, everywhere."""
    logps = {answer: lab.answer_logps((1, 2), answer).sum() for answer in "abcdefgh"}
    worst, best = min(logps, key=logps.__getitem__), max(logps, key=logps.__getitem__)
    lab.questions = [replace(lab.questions[0], answers=(worst, best, best))]
    expected = {
        "first": logps[worst], "max": logps[best], "logsumexp": torch.logaddexp(logps[worst], logps[best]),
    }[aliases]  # fmt: skip
    assert logps[best] > logps[worst] + 0.1
    assert lab.rollouts(TEXTS, answer_aliases=aliases)[0].answer_logp == pytest.approx(expected.item(), abs=1e-4)


def test_a11_every_step_reports_what_its_weights_are_worth(lab) -> None:
    """A11: neither effective sample size nor variance nor recall was ever logged."""
    rollouts = lab.rollouts(["[1] > [2]", "[2] > [1]", "[1] > [2]", "none"])
    metrics = logged(summarize(columns([rollouts], lab.questions)))
    weights = torch.tensor([rollout.weight for rollout in rollouts])
    assert metrics["ess"] == pytest.approx(1 / weights.square().sum().item(), rel=1e-4)
    assert metrics["rollouts/valid"] == 0.75
    assert metrics["rollouts/duplicate"] == 0.5
    assert metrics["rollouts/all_tie"] == 0
    assert metrics["rollouts/all_invalid"] == 0
    assert metrics["selector_entropy"] == pytest.approx(3.0)
    assert metrics["recall@1"] == 0.25
    assert metrics["recall@3"] == 0.75
    known = torch.tensor([rollout.answer_logp for rollout in rollouts[:3]])
    assert metrics["answer_logp"] == pytest.approx(known.mean().item(), rel=1e-5)
    assert metrics["evidence_bound"] == pytest.approx((known.exp().sum() / 4).log().item(), rel=1e-5)
    assert {"weight_entropy", "weight_temperature"} <= set(metrics)


# Evaluation -------------------------------------------------------------------------------------------------


@pytest.fixture
def pipeline(lab) -> RAGPipeline:
    models = {"selector": lab.selector, "generator": lab.generator}
    return RAGPipeline(
        lambda role: nullcontext(models[role]),
        lab.prompters,
        PipelineSettings(K, None, 12, 6, {}),
        batch_size=3,
    )


def test_d1_evaluation_is_greedy(pipeline, lab, questions) -> None:
    """D1: temperature 0.8 for ranking and for answering."""
    for answer, question in zip(pipeline.answer_all(questions), questions, strict=True):
        prompt = lab.prompters["generator"].generator_prompt(question, answer.selection.numbers or (1, 2)).ids
        ids = lab.generator.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, use_cache=False)
        written = ids[0, len(prompt) :].tolist()
        assert answer.text == lab.prompters["generator"].decode(written)
        logp = completion_logps(lab.generator, prompt, [written])[0].sum().item()
        assert answer.logp == pytest.approx(logp, abs=1e-3)


def test_d1_evaluation_gives_the_same_every_time(pipeline, questions) -> None:
    """D1: every run gave another exact match."""
    torch.manual_seed(1)
    first = pipeline.answer_all(questions)
    torch.manual_seed(2)
    assert pipeline.answer_all(questions) == first
    one_by_one = [pipeline.answer_all([question])[0] for question in questions]
    assert [answer.text for answer in one_by_one] == [answer.text for answer in first]


def test_d3_a_selector_that_names_nothing_leaves_documents_to_read(pipeline, lab, questions) -> None:
    """D3: no valid number gave an empty context. It reads the first K, and says that nothing was selected."""
    prompter = lab.prompters["generator"]
    asked: list[Sequence[int]] = []
    lab.prompters["generator"] = SimpleNamespace(
        generator_prompt=lambda question, numbers: (
            asked.append(numbers) or prompter.generator_prompt(question, numbers)
        ),
        ends=prompter.ends,
        decode=prompter.decode,
    )
    answer = pipeline.answer_all(questions[:1])[0]
    assert not answer.selection.valid
    assert asked == [(1, 2)]


def test_evaluation_reads_what_was_selected_and_scores_as_training_does(pipeline, lab, questions) -> None:
    """The answer's log-probability is the reward's: a sum, after the selected documents in their order."""
    pipeline.select_all = lambda asked: [Selection((3, 1), True)] * len(asked)
    asked: list[Sequence[int]] = []
    prompter = lab.prompters["generator"]
    lab.prompters["generator"] = SimpleNamespace(
        generator_prompt=lambda q, numbers: asked.append(tuple(numbers)) or prompter.generator_prompt(q, numbers),
        **{name: getattr(prompter, name) for name in ("ends", "decode", "completion")},
    )
    (result,) = evaluate(pipeline, questions[:1])
    assert asked == [(3, 1)] * 2  # to write, and to score
    assert result.selection == [3, 1]
    assert result.scores["answer_logp"] == pytest.approx(lab.answer_logps((3, 1), "heron").sum().item(), abs=1e-4)


def test_d4_results_belong_to_their_questions(pipeline, questions) -> None:
    """D4: predictions and gold answers were paired by place, their ids unchecked."""
    forwards, backwards = evaluate(pipeline, questions), evaluate(pipeline, questions[::-1])
    assert [result.id for result in forwards] == [question.id for question in questions]
    by_id = {result.id: result for result in backwards}
    for result in forwards:
        assert (result.prediction, result.selection) == (
            by_id[result.id].prediction,
            by_id[result.id].selection,
        )
        assert result.scores["answer_logp"] == pytest.approx(by_id[result.id].scores["answer_logp"], abs=1e-4)


@pytest.mark.parametrize("role", ["selector", "generator"])
def test_d5_labels_never_reach_a_prompt(lab, role: str) -> None:
    """D5: labelled passages were put first among the candidates, in a format of their own."""

    def ids(question: Question) -> tuple[int, ...]:
        if role == "selector":
            return lab.prompters[role].selector_prompt(question, K).ids
        return lab.prompters[role].generator_prompt(question, (2, 3)).ids

    for question in lab.questions:
        for supporting in ((), (question.documents[1].id,), tuple(d.id for d in question.documents)):
            assert ids(replace(question, supporting=supporting)) == ids(question)


@pytest.mark.parametrize("documents", ["gold", "mixed", "random"])
def test_d5_labelled_documents_do_not_stand_first_in_warm_up(lab, documents: str) -> None:
    """D5, and in its warm-up data: a generator taught to read the first document alone."""
    run, config = RunConfig(warmup_generator_documents=documents), lab.config(2)
    base = replace(lab.questions[0], supporting=tuple(d.id for d in lab.questions[0].documents[1:2]))
    if documents == "gold":
        base = replace(base, supporting=tuple(d.id for d in base.documents[1:3]))
    many = [replace(base, id=str(i)) for i in range(40)]
    firsts = [
        lab.prompters["generator"].decode(prompt).splitlines()[0].startswith("[1] Herons")
        for prompt, _ in generator_examples(many, lab.prompters["generator"], run, config)
    ]
    assert 4 <= sum(firsts) <= 36
