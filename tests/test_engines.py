"""Claims about the list of engines: a new one is a class and its line, and nothing that uses engines names one."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import dro_rl
from dro_rl import engines
from dro_rl.config import DROConfig
from dro_rl.engines.protocol import GenerationRequest, TrainedSelector
from dro_rl.errors import InputError
from dro_rl.proposal import Completion, SamplingParams
from dro_rl.rollouts import log as rollout_log

PACKAGE = Path(dro_rl.__file__).parent


class ToyEngine:
    """Writes document 2, then 1, at every step, as if each token were one of eight."""

    told: list[object] = []

    def __init__(self, selector: TrainedSelector) -> None:
        self.prompter = selector.prompter

    @classmethod
    def check(cls, config: DROConfig) -> None:
        cls.told.append("check")

    @classmethod
    def start(cls, config: DROConfig, selector: TrainedSelector) -> ToyEngine:
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
                assert room in {"protocol", "decoding", "serve"}, (path, node.module)
