"""Claims about the list of engines: a new one is a class and its line, and nothing that uses engines names one."""

from __future__ import annotations

import ast
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from training_world import questions, world

import dro_rl
from dro_rl import engines
from dro_rl.config import DROConfig
from dro_rl.engines.protocol import GenerationRequest, TrainedSelector
from dro_rl.engines.transformers_engine import TransformersEngine
from dro_rl.errors import InputError
from dro_rl.job.preflight import check_questions
from dro_rl.proposal import Completion, SamplingParams
from dro_rl.recipe import load_recipe
from dro_rl.rollouts import log as rollout_log
from dro_rl.rollouts.read import read_iteration, summarize_iteration

PACKAGE = Path(dro_rl.__file__).parent


class ToyEngine:
    """Writes document 2, then 1, at every step, as if each token were one of eight."""

    told: list[object] = []

    def __init__(self, selector: TrainedSelector) -> None:
        self.prompter = selector.prompter

    @classmethod
    def check(cls, config: DROConfig, adapters: object = None) -> None:
        cls.told.append("check")

    @classmethod
    def start(cls, config: DROConfig, selector: TrainedSelector, generator: TrainedSelector | None = None) -> ToyEngine:
        return cls(selector)

    def at(self, step: int) -> ToyEngine:
        self.told.append(step)
        return self

    def __enter__(self) -> ToyEngine:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def generate(self, request: GenerationRequest) -> list[list[Completion]]:
        ids = self.prompter.completion("[2] > [1]")
        return [[Completion(ids, (-2.08,) * len(ids))] * request.num_generations for _ in request.prompts]

    def samples_policy(self, sampling: SamplingParams) -> bool:
        return False

    def forget(self) -> None:
        self.told.append("forget")

    def close(self) -> None:
        self.told.append("close")


def test_a_new_engine_is_a_class_and_a_line(job, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is checked, asked for the weights of each iteration's first step, corrected by p/q, and closed."""
    monkeypatch.setitem(engines.ENGINES, "toy", f"{__name__}:ToyEngine")
    monkeypatch.setattr(ToyEngine, "told", [])
    run = job(rollout_engine="toy")
    rows = rollout_log.read(rollout_log.part_paths(run)).to_pylist()
    assert {tuple(row["selection"]) for row in rows} == {(2, 1)}
    assert all(row["selection_logp"] != row["proposal_logp"] for row in rows)
    assert ToyEngine.told[0] == "check"
    assert [step for step in ToyEngine.told if isinstance(step, int)] == [0, 2]
    assert ToyEngine.told[-1] == "close"


def test_an_engine_that_there_is_not_is_refused_with_the_nearest(tmp_path: Path) -> None:
    config = DROConfig(output_dir=str(tmp_path), report_to="none", rollout_engine="transfomers")
    with pytest.raises(InputError, match=r"rollout_engine: 'transfomers'.*Did you mean transformers"):
        engines.check(config)


def test_nothing_outside_their_room_names_an_engine() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name == "engines":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dro_rl.engines."):
                room = node.module.removeprefix("dro_rl.engines.")
                assert room in {"protocol", "answers", "decoding", "selecting", "serve", "vllm_common", "vllm_start"}, (
                    path,
                    node.module,
                )


# Enumeration ------------------------------------------------------------------------------------------------

LISTED = {
    "rollout_engine": "enumeration", "constrain_selection": True, "max_log_ratio": 100, "temperature": 1000,
    "num_generations": 20, "per_device_train_batch_size": 40, "gradient_accumulation_steps": 1,
    "questions_per_iteration": 8, "num_iterations": 1,
}  # fmt: skip


def test_an_e_step_over_all_selections_is_exact(job) -> None:
    """Each of the 20 selections of 2 of 5 once; their probabilities sum to one; weights are the posterior."""
    rows = read_iteration(job(**LISTED), 1).to_pylist()
    groups = [rows[first : first + 20] for first in range(0, len(rows), 20)]
    assert len(groups) == 8
    for group in groups:
        assert len({tuple(row["selection"]) for row in group}) == 20
        assert sum(math.exp(row["selection_logp"]) for row in group) == pytest.approx(1, abs=1e-5)
        joint = np.array([row["selection_logp"] + row["answer_logp"] for row in group])
        posterior = np.exp(joint - np.logaddexp.reduce(joint))
        assert [row["weight"] for row in group] == pytest.approx(posterior, abs=1e-6)


def test_the_bound_over_all_selections_is_the_evidence_itself(job) -> None:
    table = read_iteration(job(**LISTED), 1)
    rows = table.to_pylist()
    joint = np.array([row["selection_logp"] + row["answer_logp"] for row in rows]).reshape(8, 20)
    evidence = np.logaddexp.reduce(joint, axis=1).mean()
    assert summarize_iteration(table).rollouts.evidence_bound == pytest.approx(evidence, abs=1e-5)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("constrain_selection", False, "Set constrain_selection: true"),
        ("max_log_ratio", 2.0, "max_log_ratio: 2.0: an exact posterior has whole ratios"),
        ("temperature", 1.0, "temperature: 1.0: listed selections"),
        ("num_generations", 10, "lists all 20 selections of 2 of 5 documents, of question q0. Use 20"),
        ("num_selected", 1, "lists all 5 selections of 1 of 5 documents, of question q0. Use 5"),
    ],
)
def test_what_cannot_be_listed_whole_is_refused(job, capsys, key: str, value: object, said: str) -> None:
    with pytest.raises(InputError) as error:
        job(**{**LISTED, key: value})
    assert said in str(error.value)


def test_a_question_of_another_size_is_refused_before_a_model_loads(tmp_path: Path) -> None:
    recipe = load_recipe(world(tmp_path, **LISTED))
    check_questions(recipe, questions(12), questions(4, seed=1))
    short = questions(12)
    short[3] = replace(short[3], documents=short[3].documents[:4])
    with pytest.raises(InputError, match=r"lists all 12 selections of 2 of 4 documents, of question q3"):
        check_questions(recipe, short, questions(4, seed=1))
    check_questions(
        recipe, questions(12), [replace(short[3], id="x", question="which ?")]
    )  # answers are greedy: nothing is listed


@pytest.mark.parametrize("rate", [0.1, 0.0])
def test_an_engine_of_answers_is_the_generators_and_takes_each_update(
    job, monkeypatch: pytest.MonkeyPatch, rate: float
) -> None:
    """What stands for vLLM here is the engine of transformers: the same answers, and the steps that it was asked at."""
    keys = {"reward": "f1", "objective": "rloo", "selector_baseline": "none", "generator_learning_rate": rate}
    asked: list[tuple[str, int]] = []
    at = TransformersEngine.at

    def recorded(self: TransformersEngine, step: int) -> object:
        asked.append((self._selector.prompter.template.rpartition("/")[2], step))
        return at(self, step)

    one = job("one", **keys)
    monkeypatch.setitem(engines.ENGINES, "vllm", "dro_rl.engines.transformers_engine:TransformersEngine")
    monkeypatch.setattr(TransformersEngine, "at", recorded)
    other = job("other", **keys, rollout_engine="transformers", answer_engine="vllm")
    rows = [rollout_log.read(rollout_log.part_paths(run)).to_pylist() for run in (one, other)]
    assert [row["answer"] for row in rows[0]] == [row["answer"] for row in rows[1]]
    assert [step for template, step in asked if template == "s.jinja"] == [0, 2]
    assert [step for template, step in asked if template == "g.jinja"] == ([0, 2] if rate else [0, 0])
