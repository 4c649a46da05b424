"""Claims about a selector that decides how many: the end of the list is a choice, in sampling, scoring, weights,
evaluation and serving; and what a document costs is off its rollout's reward."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_constraint import written_from
from test_proposal import EOS, PROMPT, reference_logps, steps
from training_world import largest_difference, questions, weights, world

from dro_rl.config import DROConfig
from dro_rl.em.weighing import weigh
from dro_rl.engines.decoding import Decoder
from dro_rl.engines.protocol import GenerationRequest
from dro_rl.errors import InputError
from dro_rl.evaluation.evaluator import read_stages
from dro_rl.evaluation.results import read_results
from dro_rl.likelihood import row_logps
from dro_rl.likelihood.packing import Row
from dro_rl.metrics import precision_of
from dro_rl.objective import Weighting
from dro_rl.pipeline import RAGPipeline
from dro_rl.prompts import Prompter
from dro_rl.proposal import SamplingParams
from dro_rl.recipe import load_recipe, parse_command_line
from dro_rl.records import Sample, Selection
from dro_rl.rewards import Reward
from dro_rl.rollouts.read import read_iteration, summarize_iteration
from dro_rl.selection.constraint import SelectionConstraint, allowed_for
from dro_rl.toy.world import TOY_BASE

RANGE = {"min": 1, "max": 3}
FREE: dict[str, Any] = {"num_selected": RANGE, "constrain_selection": True}


# Probabilities ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "plain"])
@pytest.mark.parametrize(("n", "least", "most"), [(2, 1, 2), (4, 1, 3), (4, 2, 4), (11, 1, 2)])
def test_probabilities_of_all_lists_of_each_length_sum_to_one(
    make_model, tokenizer, n: int, least: int, most: int, shared: bool
) -> None:
    constraint = SelectionConstraint(tokenizer, n, most, least=least)
    completions = written_from(tokenizer, n, least, most)
    (scored,) = row_logps(
        make_model(), [Row(PROMPT, completions, allowed_for(constraint, completions))], shared_prefix=shared
    )
    assert sum(logps.sum().exp().item() for logps in scored) == pytest.approx(1, abs=1e-5)


def test_log_q_of_a_sample_is_log_p_of_its_list_with_its_end(make_model, tokenizer) -> None:
    """Where the end is a choice it has a probability of its own; after the last that may come it has one."""
    model, constraint = make_model(), SelectionConstraint(tokenizer, 11, 3, least=1)
    (group,) = Decoder(model, EOS).generate(GenerationRequest([PROMPT], 64, SamplingParams(24), [5], [constraint]))
    ends: dict[bool, list[float]] = {True: [], False: []}
    for sample in group:
        expected = reference_logps(model, sample.ids, constraint)
        assert sample.logps == pytest.approx(expected.tolist(), abs=1e-4)
        ends[constraint.allowed(sample.ids[:-1]) == (constraint.end,)].append(sample.logps[-1])
    assert min(map(len, ends.values())) > 0
    assert max(ends[False]) < 0
    assert ends[True] == pytest.approx([0.0] * len(ends[True]))


def test_lists_are_drawn_as_often_as_they_are_likely(make_model, tokenizer) -> None:
    model, constraint = make_model(), SelectionConstraint(tokenizer, 3, 2, least=1)
    drawn = 4000
    (group,) = Decoder(model, EOS).generate(GenerationRequest([PROMPT], drawn, SamplingParams(12), [5], [constraint]))
    for ids in written_from(tokenizer, 3, 1, 2):
        p = reference_logps(model, ids, constraint).sum().exp().item()
        share = sum(sample.ids == ids for sample in group) / drawn
        assert abs(share - p) < 4.5 * math.sqrt(p * (1 - p) / drawn)


# What it is asked ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["selector", "dialogue_selector"])
def test_the_prompt_says_how_many_there_may_be(tokenizer, template: str) -> None:
    prompter, (question,) = Prompter(tokenizer, template), questions(1)
    text = prompter.decode(prompter.selector_prompt(question, 3, 1).ids)
    assert "Name 1 to 3 of the 5 documents" in text
    assert "[3] > [2] > [1]" in text
    assert "Name exactly 3 of the 5 documents" in prompter.decode(prompter.selector_prompt(question, 3).ids)
    assert prompter.selector_prompt(question, 3, 3) == prompter.selector_prompt(question, 3)


def test_the_toy_prompt_says_it_in_words_that_the_toy_model_knows() -> None:
    from dro_rl.models.loading import load_tokenizer
    from dro_rl.toy.world import make_world

    prompter = Prompter(load_tokenizer(str(TOY_BASE)), "toy_selector")
    (question,) = make_world("dev", 1)
    ids = prompter.selector_prompt(question, 3, 1).ids
    assert "select 1 : 3 in" in prompter.decode(ids)
    assert prompter.tokenizer.unk_token_id not in ids


def test_a_template_of_ones_own_that_says_k_says_the_range(tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("{{ question }} / {{ k }} / {{ least }}-{{ most }}")
    (question,) = questions(1)
    prompter = Prompter(tokenizer, str(path))
    assert prompter.decode(prompter.selector_prompt(question, 4, 2).ids).endswith("/ 2 to 4 / 2-4")
    assert prompter.decode(prompter.selector_prompt(question, 4).ids).endswith("/ 4 / 4-4")


# The job ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True], ids=["scored first", "fused"])
def test_a_run_is_consistent_from_the_first_rollout_to_serving(job, fused: bool) -> None:
    run = job(**FREE, document_cost=0.2, questions_per_iteration=4 if fused else 8)
    assert {step["rollouts/clean"] for step in steps(run)} == {1.0}
    fresh = [step["sampling/logp_difference_max"] for step in steps(run) if "sampling/logp_difference_max" in step]
    assert max(fresh) < 1e-4, "what the trainer scores is what the engine sampled from"
    rows = read_iteration(run, 1).to_pylist()
    assert {len(row["selection"]) for row in rows} == {1, 2, 3}
    assert all(row["reward"] == pytest.approx(row["answer_logp"] - 0.2 * len(row["selection"])) for row in rows)
    mean = np.mean([len(row["selection"]) for row in rows])
    assert summarize_iteration(read_iteration(run, 1)).rollouts.documents == pytest.approx(mean)
    stages = read_stages(run)
    assert all(1 <= stage["num_selected"] <= 3 and stage["tokens_read"] > 0 for stage in stages)
    results, conditions = read_results(run / "evaluation" / "final.parquet")
    assert conditions.num_selected == RANGE
    assert [result.scores["num_selected"] for result in results] == [len(result.selection) for result in results]
    settings = json.loads((run / "pipeline.json").read_text())
    assert settings["num_selected"] == RANGE
    served = RAGPipeline.from_pretrained(run).select_all(questions(4, seed=1))
    assert [list(selection.numbers) for selection in served] == [result.selection for result in results]


def test_without_a_constraint_any_number_within_the_range_is_as_asked(job) -> None:
    rows = read_iteration(job(num_selected=RANGE), 1).to_pylist()
    of_length = {n: [row for row in rows if len(row["selection"]) == n] for n in (0, 1, 2, 3)}
    assert all(not {"too_few"} & set(row["problems"]) for n in (1, 2, 3) for row in of_length[n])
    assert all("too_few" in row["problems"] for row in of_length[0])
    assert sum(bool(of_length[n]) for n in (1, 2, 3)) >= 2


def test_the_cost_of_documents_moves_the_weights_and_the_training(job) -> None:
    cheap, dear = job("cheap", **FREE), job("dear", **FREE, document_cost=3.0)
    first, other = (read_iteration(run, 1).to_pylist() for run in (cheap, dear))
    assert [row["text"] for row in first] == [row["text"] for row in other], "the same rollouts"
    for rows, cost in ((first, 0.0), (other, 3.0)):
        for start in range(0, len(rows), 4):
            group = rows[start : start + 4]
            logits = np.array([row["answer_logp"] - cost * len(row["selection"]) for row in group])
            expected = np.exp(logits - np.logaddexp.reduce(logits))
            assert [row["weight"] for row in group] == pytest.approx(expected, abs=1e-6)
    assert largest_difference(weights(cheap), weights(dear)) > 1e-4


def test_every_list_of_each_length_is_the_exact_e_step(job) -> None:
    run = job(
        rollout_engine="enumeration", constrain_selection=True, num_selected={"min": 1, "max": 2}, num_generations=25,
        per_device_train_batch_size=100, gradient_accumulation_steps=1, temperature=1000.0, max_log_ratio=100.0,
    )  # fmt: skip
    rows = read_iteration(run, 1).to_pylist()
    joint = np.array([row["selection_logp"] + row["answer_logp"] for row in rows]).reshape(8, 25)
    prior = np.array([row["selection_logp"] for row in rows]).reshape(8, 25)
    assert np.logaddexp.reduce(prior, axis=1) == pytest.approx(np.zeros(8), abs=1e-5)
    posterior = np.exp(joint - np.logaddexp.reduce(joint, axis=1, keepdims=True))
    assert np.array([row["weight"] for row in rows]).reshape(8, 25) == pytest.approx(posterior, abs=1e-6)
    assert sorted(len(row["selection"]) for row in rows[:25]) == [1] * 5 + [2] * 20


# The cost of a document, by hand ------------------------------------------------------------------------------


def weighed(objective: str, cost: float, **keys: Any) -> list[Any]:
    answers = [((1,), -2.0), ((2, 3), -1.0), ((4, 5, 1), -0.5), ((), math.nan)]
    samples = [
        Sample(0, i, (i,), (-1.0,), "", Selection(numbers, bool(numbers)), answer_logp_sum=logp)
        for i, (numbers, logp) in enumerate(answers)
    ]
    policy = torch.full((1, 4), -1.0, dtype=torch.float64)
    rule = Weighting(objective, **keys)  # type: ignore[arg-type]
    return weigh(samples, policy, rule, Reward(document_cost=cost), likelihood="sum", on_policy=True)


@pytest.mark.parametrize("objective", ["dro", "maxrl"])
def test_under_weights_the_cost_is_off_the_log_likelihood(objective: str) -> None:
    found = weighed(objective, 0.5)
    assert [rollout.reward for rollout in found[:3]] == [-2.5, -2.0, -2.0]
    expected = np.exp([-2.5, -2.0, -2.0])
    assert [rollout.weight for rollout in found] == pytest.approx([*expected / expected.sum(), 0.0])
    assert [rollout.answer_logp for rollout in found[:3]] == [-2.0, -1.0, -0.5], "the evidence is without it"


@pytest.mark.parametrize("objective", ["grpo", "rloo"])
def test_under_advantages_the_generators_weights_are_without_the_cost(objective: str) -> None:
    free, dear = weighed(objective, 0.0), weighed(objective, 5.0)
    assert [rollout.weight for rollout in dear] == [rollout.weight for rollout in free]
    assert free[2].advantage > free[0].advantage
    assert dear[0].advantage > dear[2].advantage


def test_the_best_of_m_is_the_best_after_the_cost() -> None:
    assert [rollout.weight for rollout in weighed("best_of_m", 0.0)] == [0, 0, 1, 0]
    assert [rollout.weight for rollout in weighed("best_of_m", 5.0)] == [1, 0, 0, 0]


# Metrics ------------------------------------------------------------------------------------------------------


def test_precision_is_over_what_was_selected() -> None:
    assert precision_of([3, 1], [1, 2]) == 0.5
    assert precision_of([1], [1, 2]) == 1.0
    assert precision_of([], [1]) == 0.0
    assert math.isnan(precision_of([1], []))


# Warm-up ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    world(folder)
    return folder


def shown(home: Path, order: str, supporting: Callable[[int], tuple[str, ...]]) -> list[list[int]]:
    from dataclasses import replace

    from test_warmup import targets

    made = [replace(question, supporting=supporting(n)) for n, question in enumerate(questions(12))]
    return targets(home, made, warmup_selector_order=order, num_selected={"min": 2, "max": 4})


def test_the_selector_is_shown_as_many_as_are_labelled_within_the_range(home: Path) -> None:
    labels = [("d4",), ("d4", "d2"), ("d4", "d2", "d0"), ("d0", "d1", "d2", "d3", "d4"), ()]
    found = shown(home, "labels", lambda n: labels[n % 5])
    assert found[:5] == [[5, 1], [3, 5], [1, 3, 5], [1, 2, 3, 4], [1, 2, 3, 4]]


def test_in_the_retrievers_order_all_that_there_may_be_and_by_chance_any_number(home: Path) -> None:
    assert shown(home, "retriever", lambda n: ()) == [[1, 2, 3, 4]] * 12
    assert {len(numbers) for numbers in shown(home, "random", lambda n: ())} == {2, 3, 4}


def test_the_generator_learns_to_read_any_number_and_every_labelled_document(home: Path) -> None:
    from test_warmup import read

    keys: dict[str, Any] = {"k": {"min": 1, "max": 4}}
    for mode in ("retrieved", "mixed", "random"):
        assert {len(numbers) for numbers in read(home, questions(40), mode, **keys)} == {1, 2, 3, 4}
    made = questions(40)
    for numbers, question in zip(read(home, made, "mixed", **keys), made, strict=True):
        assert set(question.supporting_numbers) <= set(numbers)


# Recipes ------------------------------------------------------------------------------------------------------


def test_the_command_line_says_a_range_as_a_recipe_does(home: Path) -> None:
    _, given = parse_command_line(["r.yaml", "--num_selected", "{min: 1, max: 4}", "--document_cost", "0.1"])
    training = load_recipe(home / "recipe.yaml", given).training
    assert (training.spec.least, training.spec.most) == (1, 4)
    assert training.reward_rule.document_cost == 0.1


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"num_selected": {"min": 3, "max": 2}}, "num_selected: .*1 <= min <= max. Use 5, or {min: 1, max: 5}"),
        ({"num_selected": {"min": 0, "max": 2}}, "num_selected: .*1 <= min <= max"),
        ({"num_selected": {"min": 1}}, "num_selected: .*1 <= min <= max"),
        ({"num_selected": {"min": 1, "max": 2, "mean": 1}}, "num_selected: .*1 <= min <= max"),
        ({"num_selected": [1, 2]}, "num_selected: .*a whole number or a dictionary"),
        ({"num_selected": 0}, "num_selected: 0: this is at least 1"),
        ({"num_selected": {"min": 1, "max": 6}, "num_documents": 5}, "num_selected: .*num_documents: 5 are there"),
        ({"document_cost": 0.5}, "document_cost: 0.5: what every selection costs alike"),
        ({"document_cost": 0.5, "num_selected": {"min": 2, "max": 2}}, "document_cost: 0.5: what every selection"),
        ({"document_cost": -1.0, "num_selected": RANGE}, "document_cost: -1.0: this is at least 0"),
        ({"document_cost": 1.0, "num_selected": RANGE, "weighting": "uniform"}, "document_cost: 1.0: uniform"),
        (
            {"document_cost": 1.0, "num_selected": RANGE, "objective": "maxrl", "reward": "em"},
            "document_cost: 1.0: maxrl takes logarithms",
        ),
    ],
)
def test_nonsense_is_refused_by_name_before_torch_is_there(home: Path, keys: dict[str, Any], said: str) -> None:
    from dro_rl.recipe import read_keys

    with pytest.raises(InputError, match=said):
        read_keys(home / "recipe.yaml", keys)


def test_more_than_a_question_has_is_refused_with_the_question() -> None:
    config = DROConfig(output_dir="unused", report_to="none", num_selected={"min": 1, "max": 5})
    config.check_documents(5, "q0")
    with pytest.raises(InputError, match=r"num_selected: .*question q1 has 4 documents"):
        config.check_documents(4, "q1")


def test_a_length_that_does_not_hold_the_longest_list_is_refused(job) -> None:
    with pytest.raises(InputError, match="max_completion_length: 4: "):
        job(**FREE, max_completion_length=4)
