"""Claims about rewards: what each is worth, mixtures, functions of one's own, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from dro_rl.config import DROConfig
from dro_rl.errors import InputError
from dro_rl.metrics import contains
from dro_rl.records import Document, Question
from dro_rl.rewards import Read, Reward, check_functions, parse_reward, score
from dro_rl.rollouts import log as rollout_log

QUESTION = Question("q7", "where ?", ("New York", "NYC"), (Document("d1", "", "a"), Document("d2", "", "b")))


def read(answer: str, likelihood: float = -1.5) -> Read:
    return Read(QUESTION, QUESTION.documents[:1], answer, likelihood)


def long_and_likely(batch: list[Read]) -> list[float]:
    return [len(each.answer) + each.likelihood for each in batch]


def one_too_few(batch: list[Read]) -> list[float]:
    return [0.0] * (len(batch) - 1)


def not_a_number(batch: list[Read]) -> list[float]:
    return [float("nan")] * len(batch)


def raises(batch: list[Read]) -> list[float]:
    raise KeyError("judge")


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [("It is New York, I think.", 1.0), ("new york", 1.0), ("York", 0.0), ("The NYCers", 0.0), ("", 0.0)],
)
def test_contains_looks_for_whole_words(prediction: str, expected: float) -> None:
    assert contains(prediction, QUESTION.answers) == expected


def test_an_answer_of_no_words_is_contained_in_nothing() -> None:
    assert contains("anything", ("the",)) == 0.0


def test_scores_are_those_of_evaluation() -> None:
    (found,) = score(("em", "f1", "contains", "rouge_l"), [read("in New York")])
    assert dict(found) == pytest.approx({"em": 0.0, "f1": 0.8, "contains": 1.0, "rouge_l": 0.8}, abs=1e-3)


def test_a_function_sees_question_documents_answer_and_likelihood() -> None:
    name = f"{__name__}:long_and_likely"
    assert score((name,), [read("four", -0.5), read("", -2.0)]) == [((name, 3.5),), ((name, -2.0),)]


def test_a_mixture_is_a_sum_with_factors() -> None:
    reward = parse_reward({"f1": 10, "likelihood": 0.5})
    assert reward.names == ("f1", "likelihood")
    assert reward.others == ("f1",)
    assert reward.total(-4.0, {"f1": 0.25}) == pytest.approx(0.5)
    assert parse_reward("likelihood") == Reward()
    assert not parse_reward({"likelihood": 2}).is_likelihood


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("f2", "Use one of them"),
        ("rogue_l", "Did you mean rouge_l"),
        ("likelyhood", "Did you mean likelihood"),
        ("", "em, f1, contains"),
        ({}, "names with factors"),
        (3, "names with factors"),
        ({"f1": 0}, "other than 0"),
        ({"f1": "much"}, "finite number"),
        ({"f1": float("inf")}, "finite number"),
        ({"em": True}, "finite number"),
        ("module:", "package.module:function"),
    ],
)
def test_what_is_no_reward_is_refused(value: object, says: str) -> None:
    with pytest.raises(InputError, match=says):
        parse_reward(value)


@pytest.mark.parametrize("name", ["no_such_module:f", f"{__name__}:no_such_function", f"{__name__}:QUESTION"])
def test_a_function_that_is_not_there_is_refused_before_models_load(name: str) -> None:
    with pytest.raises(InputError, match="reward"):
        check_functions(parse_reward(name))


def test_naming_a_function_does_not_import_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe that came from elsewhere can be read and checked: its code runs when it is trained."""
    (tmp_path / "effect.py").write_text("raise SystemExit('ran')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert parse_reward("effect:f").others == ("effect:f",)


@pytest.mark.parametrize(
    ("function", "says"), [("one_too_few", "1 values of 2"), ("not_a_number", "question q7"), ("raises", "KeyError")]
)
def test_a_function_that_fails_names_the_question(function: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        score((f"{__name__}:{function}",), [read("a"), read("b")])


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"objective": "best_of_m", "beta": 0.1}, "beta"),
        ({"objective": "best_of_m", "entropy_coef": 0.1}, "entropy_coef"),
        ({"objective": "grpo", "selector_baseline": "mean"}, "selector_baseline"),
        ({"objective": "rloo", "epsilon": 0.2}, "epsilon"),
        ({"objective": "maxrl", "weight_temperature": 2.0}, "objective"),
        ({"objective": "maxrl", "reward": {"f1": 1, "likelihood": 1}}, "reward"),
        ({"objective": "rloo", "weighting": "uniform"}, "weighting"),
        ({"generator_weights": "uniform"}, "generator_weights"),
        ({"reward": "f1", "answer_likelihood": "mean"}, "answer_likelihood"),
        ({"answer_temperature": 0.7}, "answer_temperature"),
        ({"reward": "bleu"}, "reward"),
    ],
)
def test_what_would_mean_nothing_together_is_refused(settings: dict, key: str) -> None:
    with pytest.raises(InputError) as refused:
        DROConfig(output_dir="unused", report_to="none", **settings)
    assert refused.value.place == key


@pytest.mark.parametrize("fused", ["auto", "off"])
@pytest.mark.parametrize("likelihood", ["sum", "mean"])
@pytest.mark.parametrize("aliases", ["first", "max"])
def test_the_log_has_the_likelihood_both_ways(job, aliases: str, likelihood: str, fused: str) -> None:
    """In the world's answers a word and the end are two tokens, whichever pass scored them."""
    keys = {"answer_likelihood": likelihood, "answer_aliases": aliases, "fused_e_step": fused}
    run = job(**keys, num_iterations=1, questions_per_iteration=4, max_steps=1)
    rows = rollout_log.read(rollout_log.part_paths(run)).to_pylist()
    valid = [row for row in rows if row["valid"]]
    assert valid
    for row in valid:
        assert row["answer_logp"] == row[f"answer_logp_{likelihood}"]
        assert row["answer_logp_sum"] == pytest.approx(2 * row["answer_logp_mean"], rel=1e-6)
    assert all(row["answer_logp_mean"] != row["answer_logp_mean"] for row in rows if not row["valid"])


@pytest.mark.parametrize("objective", ["grpo", "rloo", "maxrl", "best_of_m", "dro"])
def test_a_job_trains_by_each_objective_on_a_mixture_of_rewards(job, objective: str) -> None:
    """The log keeps the answer and each reward; what moves the selector follows from them."""
    own = f"{__name__}:long_and_likely"
    reward = {"f1": 1.0, "contains": 0.5} if objective == "maxrl" else {"f1": 1.0, own: 0.1}
    run = job(objective=objective, reward=reward, selector_baseline="none", num_iterations=1)
    rows = rollout_log.read(rollout_log.part_paths(run)).to_pylist()
    valid = [row for row in rows if row["valid"]]
    assert valid
    for row in valid:
        parts = dict(row["rewards"])
        assert set(parts) == set(reward)
        assert row["reward"] == pytest.approx(sum(reward[name] * parts[name] for name in parts))
        assert row["answer"] is not None
    advantages = [row["advantage"] for row in rows]
    if objective in ("grpo", "rloo"):
        assert all(value == value for value in advantages)
        assert any(advantages)
    else:
        assert all(value != value for value in advantages)
    assert (run / "selector" / "model.safetensors").is_file()
