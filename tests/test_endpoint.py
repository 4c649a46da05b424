"""A frozen generator behind an HTTP endpoint gives what one in the process gives; each way to fail is one line."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml
from answering_server import AnsweringServer, served
from safetensors.torch import load_file
from training_world import questions, save_model, world
from typer.testing import CliRunner

from dro_rl.cli import app
from dro_rl.config import DROConfig
from dro_rl.engines import endpoint
from dro_rl.engines.answers import ModelAnswerer
from dro_rl.engines.endpoint import KEY, EndpointAnswerer, EndpointSettings
from dro_rl.engines.requests import at_once
from dro_rl.errors import InputError
from dro_rl.job.preflight import prepare
from dro_rl.likelihood import Scoring
from dro_rl.pipeline import RAGPipeline
from dro_rl.prompts import Prompter
from dro_rl.prompts.rows import answer_row
from dro_rl.proposal import SamplingParams
from dro_rl.recipe import load_recipe, read_keys
from dro_rl.rollouts import log as rollout_log

GREEDY = SamplingParams(4, temperature=0.0)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder as `world` makes it, whose generator is also what the server serves."""
    world(tmp_path / "world")
    return tmp_path / "world"


@pytest.fixture
def server(base: Path) -> Iterator[AnsweringServer]:
    with served(base / "base-generator") as behaviour:
        yield behaviour


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries without the pauses that a real server is given."""
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.01)
    monkeypatch.delenv(KEY, raising=False)


def asked(server: AnsweringServer, **settings: Any) -> EndpointSettings:
    return EndpointSettings(server.url, **{"timeout": 0.5, "request_timeout": 20.0, **settings})


def prompter_of(server: AnsweringServer, base: Path) -> Prompter:
    return Prompter(server.tokenizer, str(base / "g.jinja"))


def answerer(server: AnsweringServer, base: Path, needs: bool = True, **settings: Any) -> EndpointAnswerer:
    return EndpointAnswerer(asked(server, **settings), prompter_of(server, base), needs_likelihoods=needs)


def recipe_keys(server: AnsweringServer, **keys: Any) -> dict[str, Any]:
    """What sends a recipe's generator to the endpoint."""
    return {"generator_endpoint": server.url, "generator_endpoint_timeout": 0.5, **keys}


def refusal(base: Path, **keys: Any) -> InputError:
    """What a job ends in before anything is loaded."""
    with pytest.raises(InputError) as refused:
        prepare(load_recipe(base / "recipe.yaml", keys), 1)
    assert "\n" not in str(refused.value)
    return refused.value


def logged(run: Path) -> list[dict[str, Any]]:
    return rollout_log.read(rollout_log.part_paths(run)).to_pylist()


# Values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("concurrency", [1, 5])
def test_answers_score_as_in_the_process(server: AnsweringServer, base: Path, concurrency: int) -> None:
    """Several accepted answers of several prompts, in order whatever arrives first."""
    prompter = prompter_of(server, base)
    rows = [answer_row(prompter, question, numbers, "first") for question in questions(3) for numbers in [(1, 2), (3,)]]
    rows[0] = type(rows[0])(rows[0].prompt, [prompter.completion("rome"), prompter.completion("oslo lima"), (1,)])
    here = ModelAnswerer(lambda: nullcontext(server.model), prompter, Scoring())
    there = answerer(server, base, concurrency=concurrency)
    for one, other in zip(here.score(rows), there.score(rows), strict=True):
        assert [each.tolist() for each in other] == [pytest.approx(each.tolist(), abs=1e-4) for each in one]


def test_answers_are_written_as_in_the_process(server: AnsweringServer, base: Path) -> None:
    prompter = prompter_of(server, base)
    prompts = [prompter.generator_prompt(question, (2, 1)).ids for question in questions(4)]
    here = ModelAnswerer(lambda: nullcontext(server.model), prompter, Scoring())
    seeds = [7, 8, 9, 10]
    for sampling in (GREEDY, SamplingParams(4, temperature=1.5)):
        one, other = (each.write(prompts, sampling, seeds) for each in (here, answerer(server, base)))
        assert [each.text for each in other] == [each.text for each in one]
        assert [each.logp for each in other] == [pytest.approx(each.logp, abs=1e-4) for each in one]


def test_requests_say_all_that_a_server_would_fill_in(server: AnsweringServer, base: Path) -> None:
    """A model's own generation config, such as a repetition penalty, has no part in an answer."""
    answerer(server, base).write([(5, 6)], SamplingParams(3, temperature=0.7), [2**40 + 5])
    assert server.requests[-1] == {
        "model": "tiny", "prompt": [5, 6], "max_tokens": 3, "temperature": 0.7, "seed": 5, "logprobs": 1,
        "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0,
    }  # fmt: skip


# Training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reward", ["likelihood", {"f1": 2.0, "likelihood": 0.5}])
def test_a_training_is_the_one_whose_frozen_generator_is_in_the_process(
    job: Callable[..., Path], server: AnsweringServer, reward: Any
) -> None:
    """The same rewards, and a selector that has moved to the same place; no generator is loaded or left behind."""
    keys = {"reward": reward, "selector_learning_rate": 0.1, "generator_learning_rate": 0.0, "num_iterations": 1}
    here, there = job("here", **keys), job("there", **{**keys, **recipe_keys(server)})
    names = ("reward", "answer_logp", "answer_logp_sum", "answer_logp_mean", "weight")
    for one, other in zip(logged(here), logged(there), strict=True):
        assert [other[name] for name in names] == [pytest.approx(one[name], abs=1e-4, nan_ok=True) for name in names]
        assert (other["answer"], other["selection"]) == (one["answer"], one["selection"])
        assert dict(other["rewards"]) == pytest.approx(dict(one["rewards"]), abs=1e-4)
    weights = [load_file(run / "selector" / "model.safetensors") for run in (here, there)]
    assert max((weights[0][name] - weights[1][name]).abs().max().item() for name in weights[0]) < 1e-4
    start = load_file(here.parent / "world" / "base-selector" / "model.safetensors")
    assert max((start[name] - weights[1][name]).abs().max().item() for name in start) > 1e-3
    assert not [*there.rglob("generator/*.safetensors")]
    summaries = [json.loads((run / "evaluation" / "summary.json").read_text())["stages"] for run in (here, there)]
    for one, other in zip(*summaries, strict=True):
        assert other["f1"] == one["f1"]
        assert other["answer_logp"] == pytest.approx(one["answer_logp"], abs=1e-3)
    made = questions(3, seed=5)
    pairs = [RAGPipeline.from_pretrained(run).answer_all(made) for run in (here, there)]
    assert [each.text for each in pairs[1]] == [each.text for each in pairs[0]]


def test_a_run_whose_endpoint_goes_away_loses_nothing(job: Callable[..., Path], server: AnsweringServer) -> None:
    """It ends in a line that says how to go on, and then comes to where it would have been."""
    keys = recipe_keys(
        server, save_steps=1, selector_learning_rate=0.1, questions_per_iteration=4, load_best_model_at_end=False
    )
    whole = job("whole", **keys)
    server.good = len(server.requests) * 2 // 3
    server.requests.clear()
    with pytest.raises(InputError, match=r"gone.*--resume_from_checkpoint auto"):
        job("killed", **keys)
    steps = [place.name for place in (whole.parent / "killed").glob("checkpoint-*")]
    assert steps
    server.good = -1
    killed = job("killed", **keys, resume_from_checkpoint="auto")
    one, other = (load_file(run / "selector" / "model.safetensors") for run in (whole, killed))
    assert all(one[name].equal(other[name]) for name in one)


@pytest.mark.parametrize("echo", ["refused", "written"])
@pytest.mark.parametrize("objective", ["dro", "grpo"])
def test_answers_alone_train_a_selector(
    job: Callable[..., Path], server: AnsweringServer, echo: str, objective: str
) -> None:
    """Where a server has no log-probabilities of a prompt the likelihood is not known, and that is said."""
    server.echo = echo
    keys = {"reward": "f1", "objective": objective, "selector_baseline": "none", "selector_learning_rate": 0.5}
    run = job(**recipe_keys(server, num_iterations=1, **keys))
    rows = [row for row in logged(run) if row["valid"]]
    assert all(math.isnan(row["answer_logp"]) for row in rows)
    assert all(row["reward"] == row["rewards"][0][1] for row in rows)
    assert sum(row["weight"] for row in logged(run)) > 1
    moved = load_file(run / "selector" / "model.safetensors")
    start = load_file(run.parent / "world" / "base-selector" / "model.safetensors")
    assert any(not start[name].equal(moved[name]) for name in start)
    final = json.loads((run / "evaluation" / "summary.json").read_text())["stages"][-1]
    assert final["answer_logp"] is None
    assert final["f1"] is not None
    told = CliRunner().invoke(app, ["evaluate", str(run), "--data", str(run.parent / "world" / "dev.jsonl")])
    assert told.exit_code == 0, told.output


# What goes wrong ---------------------------------------------------------------------------------------------


def test_an_endpoint_that_stumbles_is_asked_again(server: AnsweringServer, base: Path) -> None:
    there = answerer(server, base, timeout=20.0)
    server.failing = 3
    assert there.score([answer_row(prompter_of(server, base), questions(1)[0], (1,), "first")])


WRONG: dict[str, tuple[Callable[[AnsweringServer], Any], dict[str, Any], tuple[str, ...]]] = {
    "unreachable": (
        lambda server: None,
        {"generator_endpoint": "http://127.0.0.1:9/v1"},
        ("generator_endpoint: ", "no answer for 0.5 s", "Start it, or correct the address."),
    ),
    "always busy": (lambda server: setattr(server, "failing", -1), {}, ("no answer for 0.5 s", "503", "loading")),
    "another path": (lambda server: setattr(server, "url", server.url[:-3]), {}, ("404", "ends in /v1 as a rule")),
    "an absent model": (
        lambda server: None,
        {"generator_endpoint_model": "tinny"},
        ("generator_endpoint_model: 'tinny'", "serves tiny", "Did you mean tiny?"),
    ),
    "one of several models": (
        lambda server: setattr(server, "names", ["a", "b"]),
        {},
        ("generator_endpoint_model: None", "serves a, b", "Name one of them."),
    ),
    "echo is refused": (
        lambda server: setattr(server, "echo", "refused"),
        {},
        ("answered 400", "Only no echo", "echo and logprobs", "use a reward without likelihood"),
    ),
    "log-probabilities of what is written alone": (
        lambda server: setattr(server, "echo", "written"),
        {},
        ("an echo without log-probabilities of the prompt", "use a reward without likelihood"),
    ),
    "they are needed to choose the best": (
        lambda server: setattr(server, "echo", "written"),
        {"reward": "f1", "metric_for_best_model": "answer_logp"},
        ("an echo without log-probabilities",),
    ),
    "a token before each prompt": (
        lambda server: setattr(server, "begins", True),
        {},
        ("generator_model_name_or_path: ", "tokens where", "names the tokenizer of the model that the endpoint serves"),
    ),
    "another vocabulary": (
        lambda server: server.spells.update({number: f"w{number}" for number in range(3, 40)}),
        {},
        ("generator_model_name_or_path: ", "there and", "here"),
    ),
    "a short context of prompts that nothing cuts": (
        lambda server: setattr(server, "length", 20),
        {"max_answer_length": 8, "max_prompt_length": None},
        ("max_prompt_length: None", "the generator has 19 tokens (max_model_len"),
    ),
    "a short context": (
        lambda server: setattr(server, "length", 132),
        {"max_answer_length": 8},
        ("max_prompt_length: 128", "with 8 tokens to write", "at most the generator's 131 tokens (max_model_len"),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_would_not_carry_a_run_is_refused_before_it_begins(server: AnsweringServer, base: Path, case: str) -> None:
    break_it, keys, said = WRONG[case]
    break_it(server)
    text = str(refusal(base, **{**recipe_keys(server), **keys}))
    for part in said:
        assert part in text, text


def test_the_first_error_ends_the_others() -> None:
    """Whoever's it is: the first item waits until it is told to stop."""
    stopped = threading.Event()

    def ask(item: int) -> int:
        if item == 1:
            raise KeyError(item)
        assert stopped.wait(20)
        return item

    with pytest.raises(KeyError):
        at_once(ask, [0, 1], 2, stopped.set)
    assert at_once(lambda item: -item, [3, 1, 2], 2) == [-3, -1, -2]
    assert at_once(ask, [], 2) == []


def test_the_key_is_the_environments_alone(
    server: AnsweringServer, base: Path, job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is sent, and stands in no error, recipe or log, though the server repeats it."""
    server.key = "sk-right-and-secret"
    assert KEY in str(refusal(base, **recipe_keys(server)))
    monkeypatch.setenv(KEY, "sk-wrong-but-secret")
    text = str(refusal(base, **recipe_keys(server)))
    assert "401" in text
    assert "secret" not in text
    monkeypatch.setenv(KEY, server.key)
    run = job(**recipe_keys(server, num_iterations=1, max_steps=1))
    for path in run.rglob("*"):
        assert not path.is_file() or b"secret" not in path.read_bytes(), path


def test_an_answer_of_another_shape_is_one_line(server: AnsweringServer, base: Path) -> None:
    for said in ({}, {"data": []}, {"data": "none"}, [1], "text", None):
        server.answer = lambda path, key, body, said=said: (200, said)  # type: ignore[method-assign]
        assert "it answers as OpenAI's does" in str(refusal(base, **recipe_keys(server)))


@pytest.mark.parametrize(
    ("keys", "place"),
    [
        ({"generator_learning_rate": 1e-5}, "generator_learning_rate"),
        ({"warmup": "both"}, "warmup"),
        ({"warmup": "generator"}, "warmup"),
        ({"generator_lora_r": 8}, "generator_lora_r"),
        ({"interleave": "alternate"}, "interleave"),
        ({"selector_learning_rate": 0}, "learning_rate"),
        ({"generator_endpoint": None, "generator_endpoint_model": "tiny"}, "generator_endpoint_model"),
        ({"generator_endpoint": "127.0.0.1:8001"}, "generator_endpoint"),
        ({"generator_endpoint": "http://me:key@127.0.0.1:8001/v1"}, "generator_endpoint"),
        ({"generator_endpoint": "http://127.0.0.1:8001/v1?key=secret"}, "generator_endpoint"),
        ({"generator_endpoint": "http://127.0.0.1:0/v1"}, "generator_endpoint"),
        ({"generator_endpoint_concurrency": 0}, "generator_endpoint_concurrency"),
    ],
)
def test_what_would_mean_nothing_is_refused(tmp_path: Path, keys: dict[str, Any], place: str) -> None:
    path = tmp_path / "recipe.yaml"
    values = {"dataset_name": "toy", "selector_model_name_or_path": "toy", "generator_model_name_or_path": "toy"}
    given = {"generator_endpoint": "http://127.0.0.1:8001/v1", "output_dir": str(tmp_path / "run"), **values, **keys}
    path.write_text(yaml.safe_dump(given))
    with pytest.raises(InputError) as refused:
        read_keys(path)
    assert refused.value.place == place


def test_a_frozen_generator_elsewhere_needs_no_rate_of_zero() -> None:
    config = DROConfig(output_dir="unused", report_to="none", generator_endpoint="https://host.example/openai/v1/")
    assert config.role_learning_rate("generator") == 0
    assert config.roles == ("selector",)


def test_only_a_tokenizer_and_a_config_are_read_here(server: AnsweringServer, base: Path) -> None:
    """Weights may be missing, or quantised: they are the endpoint's."""
    folder = base / "base-generator"
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    assert prepare(load_recipe(base / "recipe.yaml", recipe_keys(server)), 1).train
    assert "generator_model_name_or_path" in str(refusal(base))


def test_another_model_under_the_tokenizer_is_scored_as_it_is(base: Path, tmp_path: Path) -> None:
    """Larger than what would be loaded here, for all that anybody knows."""
    with served(save_model(tmp_path / "other", 9, hidden_size=64)) as behaviour:
        row = answer_row(prompter_of(behaviour, base), questions(1)[0], (1,), "first")
        here = ModelAnswerer(lambda: nullcontext(behaviour.model), prompter_of(behaviour, base), Scoring())
        there = answerer(behaviour, base)
        assert there.score([row])[0][0].tolist() == pytest.approx(here.score([row])[0][0].tolist(), abs=1e-4)
