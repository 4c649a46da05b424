"""Claims about `solvable`: questions are kept by how often the first models answer them, counted and cached."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from training_world import questions, world

from dro_rl.engines.decoding import Decoder
from dro_rl.errors import InputError
from dro_rl.job import solvable
from dro_rl.metrics import exact_match
from dro_rl.recipe import load_recipe, parse_command_line
from dro_rl.rollouts.read import read_iteration

ASKED: dict[str, Any] = {"num_iterations": 1, "questions_per_iteration": 4, "constrain_selection": True}


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Untrained models never answer: here some of what they write counts as right, told by the text and the answer."""
    monkeypatch.setattr(solvable, "exact_match", lambda text, answers: float(sum(map(ord, text + answers[0])) % 3 == 0))


def shares_of(run: Path) -> dict[str, float]:
    """What the cache of the job's world holds."""
    cache = Path(yaml.safe_load((run / "recipe.yaml").read_text())["warmup_cache_dir"])
    (path,) = cache.glob("solvable-*.jsonl")
    return {row["id"]: row["share"] for row in map(json.loads, path.read_text().splitlines())}


def test_what_is_answered_sometimes_is_trained_on_and_the_rest_is_counted(
    job, judged, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "dro_rl")
    run = job(**{**ASKED, "num_iterations": 3}, solvable=[0.25, 0.75])
    shares = shares_of(run)
    assert list(shares) == [question.id for question in questions(12)]
    assert all(share * 4 == int(share * 4) for share in shares.values())
    kept = {name for name, share in shares.items() if 0.25 <= share <= 0.75}
    below, above = (sum(share < 0.25 for share in shares.values()), sum(share > 0.75 for share in shares.values()))
    assert 0 < len(kept) < 12
    trained = {row["question_id"] for iteration in (1, 2, 3) for row in read_iteration(run, iteration).to_pylist()}
    assert trained == kept or (trained < kept and len(kept) > 8)
    (said,) = [record.message for record in caplog.records if record.message.startswith("solvable:")]
    assert f"keeps {len(kept)} of 12 training questions; {below} are answered less often" in said
    assert f"and {above} more often" in said

    monkeypatch.setattr(solvable, "measure", None)
    again = job("again", **ASKED, solvable=[0.0, 0.75])
    assert shares_of(again) == shares, "another range asks no model"


def test_none_that_is_kept_is_an_error_that_says_on_which_side_they_fell(job) -> None:
    """By the true rule: untrained models answer nothing."""
    with pytest.raises(InputError, match=r"solvable: \[0.1, 1\]: .*of 12 12 are answered less often and 0 more often"):
        job(**ASKED, solvable=[0.1, 1])


def test_too_few_for_the_steps_are_refused(job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solvable, "measure", lambda *_: [1.0] * 3 + [0.0] * 9)
    with pytest.raises(InputError, match="questions_per_iteration: 4: the training set has 3 questions"):
        job(**ASKED, solvable=[0.5, 1.0])


def test_what_the_shares_depend_on_makes_them_anew(tmp_path: Path) -> None:
    from dro_rl.job.assembly import build_prompters

    home = world(tmp_path)

    def name(made: list[Any] | None = None, **keys: Any) -> str:
        recipe = load_recipe(home, keys)
        sources = {"selector": recipe.run.of("selector").model, "generator": recipe.run.of("generator").model}
        return solvable.fingerprint(recipe, sources, made or questions(12), build_prompters(recipe))

    same = name()
    assert same == name(solvable=[0.2, 0.3]) == name(learning_rate=0.5)
    others = [name(num_selected=1), name(num_generations=2), name(temperature=1.5), name(seed=4),
              name(questions(11)), name(generator_model_name_or_path=str(tmp_path / "base-selector"))]  # fmt: skip
    others += [name(quantization="nf4", selector_lora_r=4), name(selector_lora_r=4), name(attn_implementation="eager"),
               name(candidate_orders=2), name(dtype="bfloat16")]  # fmt: skip
    assert len({same, *others}) == 12


def test_candidates_are_shown_in_the_orders_of_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dro_rl.job.assembly import build_prompters

    recipe = load_recipe(world(tmp_path), {"num_generations": 4, "candidate_orders": 2})
    sources = {"selector": recipe.run.of("selector").model, "generator": recipe.run.of("generator").model}
    requests, generate = [], Decoder.generate

    def spy(self: Decoder, request: Any) -> Any:
        requests.append(request)
        return generate(self, request)

    monkeypatch.setattr(Decoder, "generate", spy)
    shares = solvable.measure(recipe, sources, questions(3), build_prompters(recipe))
    assert len(shares) == 3
    assert len(requests[0].prompts) == 6, "two orders of each question"
    assert requests[0].num_generations == 2


def test_it_is_the_metric_of_evaluation_and_off_unless_asked() -> None:
    assert solvable.exact_match is exact_match


@pytest.mark.parametrize(
    "value", [[0.1], [0.5, 0.2], [-0.1, 1], [0, 1.5], [0.1, 0.5, 0.9], [], ["a", "b"], 0.5, {"low": 0, "high": 1}]
)
def test_what_is_no_range_of_shares_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(InputError, match="solvable: "):
        load_recipe(world(tmp_path), {"solvable": value})


def test_the_command_line_says_it_as_a_recipe_does(tmp_path: Path) -> None:
    for said in (["[0.1, 0.9]"], ["0.1", "0.9"]):
        _, given = parse_command_line(["r.yaml", "--solvable", *said])
        assert load_recipe(world(tmp_path), given).run.solvable == [0.1, 0.9]
    assert load_recipe(world(tmp_path)).run.solvable is None
