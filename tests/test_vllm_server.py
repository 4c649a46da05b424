"""Claims about vLLM as a server, on a real one on loopback: the same draws' rules, weights by folder, going away."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from training_world import ROOT, changed, launch, questions, save_model, tokenizer, world

pytest.importorskip("vllm", reason="vLLM is not installed: make setup-vllm")

from accelerate import Accelerator
from transformers import AutoModelForCausalLM, PreTrainedModel

from dro_rl.config import DROConfig
from dro_rl.engines.answers import EngineAnswerer, ModelAnswerer
from dro_rl.engines.endpoint import KEY, EndpointAnswerer, EndpointSettings
from dro_rl.engines.protocol import GenerationRequest, TrainedSelector
from dro_rl.engines.vllm_server import Server, ServerEngine, check_servers, load_everywhere
from dro_rl.errors import InputError
from dro_rl.likelihood import Row, Scoring, completion_logps, score_rows
from dro_rl.prompts import Prompter
from dro_rl.prompts.rows import answer_row
from dro_rl.proposal import Completion, SamplingParams
from dro_rl.rollouts.log import part_paths, read, to_rollouts
from dro_rl.selection import parse_selection
from dro_rl.selection.constraint import SelectionConstraint, allowed_for

pytestmark = pytest.mark.slow

TOLERANCE = 1e-3
"""Nats a token between vLLM and transformers, both in float32: what docs/vllm.md states."""
PROMPTS = [
    [random.Random(f"{i}/{j}").randrange(2, len(tokenizer())) for j in range(n)] for i, n in enumerate((90, 4, 33))
]
SEEDS = [2**63 - 1, 22, 33]
SAMPLING = SamplingParams(max_completion_length=7)
UP = 400.0
"""Seconds that a server may take to start on a busy machine."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Process:
    """A server, started as a user would: `dro-rl serve-rollouts RECIPE`, which becomes vLLM."""

    def __init__(self, recipe: Path, log: Path) -> None:
        command = [str(Path(sys.executable).with_name("dro-rl")), "serve-rollouts", str(recipe)]
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
        with log.open("ab") as stream:
            self.process = subprocess.Popen(
                [*command, "--", "--disable-uvicorn-access-log"],
                stdout=stream, stderr=stream, env=environment, cwd=ROOT, start_new_session=True,
            )  # fmt: skip

    def kill(self) -> None:
        """End it, and the engine that it started, as a machine that goes away does."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def kill_engine(self) -> None:
        """End the engine alone, as a kernel short of memory does. The server answers for a moment, then ends too."""
        (engine,) = [
            child for child in psutil.Process(self.process.pid).children(recursive=True) if "Engine" in child.name()
        ]
        engine.kill()


class World:
    """A server over a model's folder, with an engine over both of its addresses."""

    def __init__(self, folder: Path, **keys: Any) -> None:
        self.folder, self.port = folder, free_port()
        save_model(folder / "selector", 5, hidden_size=64, initializer_range=0.4)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder / "selector", dtype=torch.float32).eval()
        self.recipe = world(
            folder / "job",
            selector_model_name_or_path=str(folder / "selector"),
            vllm_mode="server",
            vllm_server_base_url=f"http://127.0.0.1:{self.port}",
            vllm_server_timeout=5.0,
            constrain_selection=True,
            **keys,
        )
        self.pushes = 0
        self.process = Process(self.recipe, folder / "server.log")
        self.server = Server(f"http://127.0.0.1:{self.port}", UP, 60, os.environ["DRO_RL_SERVER_KEY"])
        try:
            self.server.wait()
        except InputError:
            self.process.kill()
            raise

    def config(self, **overrides: Any) -> DROConfig:
        settings: dict[str, Any] = {
            "output_dir": str(self.folder / "run"),
            "report_to": "none",
            "vllm_mode": "server",
            "vllm_server_base_url": [f"http://127.0.0.1:{self.port}", f"http://localhost:{self.port}/"],
            "vllm_server_timeout": UP,
            "max_prompt_length": 120,
            "max_completion_length": 8,
            "constrain_selection": True,
        }
        return DROConfig(**{**settings, **overrides})

    def engine(self, **overrides: Any) -> ServerEngine:
        def publish(servers: Sequence[Server]) -> Path:
            self.pushes += 1
            place = self.folder / f"push-{self.pushes}"
            self.model.save_pretrained(place)
            load_everywhere(servers, place)
            return place

        return ServerEngine(self.config(**overrides), 1, publish)

    def difference(self, engine: ServerEngine, model: PreTrainedModel | None = None) -> float:
        """The largest |log q − log p| of a token."""
        largest = 0.0
        for prompt, group in zip(PROMPTS, engine.generate(GenerationRequest(PROMPTS, 4, SAMPLING, SEEDS)), strict=True):
            scored = completion_logps(model or self.model, prompt, [sample.ids for sample in group])
            for sample, logps in zip(group, scored, strict=True):
                largest = max(largest, (torch.tensor(sample.logps) - logps.detach()).abs().max().item())
        return largest


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One server for this file: starting one takes a minute."""
    made = World(tmp_path_factory.mktemp("server"))
    yield made
    made.process.kill()


def ids(groups: list[list[Completion]]) -> list[tuple[int, ...]]:
    return [sample.ids for sample in chain(*groups)]


def test_a_server_that_serve_rollouts_started_is_as_rollouts_need_it(vllm: World) -> None:
    check_servers(vllm.config())


def test_it_listens_on_loopback_alone(vllm: World) -> None:
    """Development mode lets whoever reaches the port steer the server."""
    listening = (Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()).splitlines()
    places = [line.split()[1] for line in listening if line.split()[3] == "0A"]
    assert [place.split(":")[0] for place in places if place.endswith(f":{vllm.port:04X}")] == ["0100007F"]


def test_who_has_not_the_key_or_is_a_page_in_a_browser_does_not_steer_it(vllm: World) -> None:
    url, key = f"http://127.0.0.1:{vllm.port}", {"Authorization": f"Bearer {os.environ['DRO_RL_SERVER_KEY']}"}
    for path in ("/collective_rpc", "/reset_prefix_cache", "/v1/completions"):
        assert httpx.post(url + path, json={}).status_code == 401
        assert httpx.post(url + path, json={}, headers={**key, "Origin": "https://example.org"}).status_code == 403
    assert httpx.get(f"{url}/server_info", params={"config_format": "json"}, headers=key).status_code == 200


def test_a_server_too_short_for_the_prompts_is_refused(vllm: World) -> None:
    with pytest.raises(InputError, match="--max-model-len") as error:
        check_servers(vllm.config(max_prompt_length=4096))
    assert f"Start it with --max-model-len {4096 + 8}" in str(error.value)


def test_as_an_endpoint_it_scores_and_writes_as_the_process_does(vllm: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `generator_endpoint` asks, of a real vLLM: tokens as they were sent, log-probabilities of the echo."""
    vllm.engine().at(0).__enter__()
    monkeypatch.setenv(KEY, os.environ["DRO_RL_SERVER_KEY"])
    prompter = Prompter(tokenizer(), str(vllm.recipe.parent / "g.jinja"))
    here = ModelAnswerer(lambda: nullcontext(vllm.model), prompter, Scoring())
    settings = EndpointSettings(f"http://127.0.0.1:{vllm.port}/v1", timeout=5.0)
    there = EndpointAnswerer(settings, prompter, needs_likelihoods=True)
    rows = [answer_row(prompter, question, (2, 1), "first") for question in questions(5)]
    there.check(rows[0])
    assert there.positions()[0] == 128 + 6 - 1
    for (one,), (other,) in zip(here.score(rows), there.score(rows), strict=True):
        assert other.tolist() == pytest.approx(one.tolist(), abs=TOLERANCE)
    greedy = SamplingParams(4, temperature=0.0)
    one, other = (each.write([row.prompt for row in rows], greedy, [0] * 5) for each in (here, there))
    assert [each.text for each in other] == [each.text for each in one]
    assert [each.logp for each in other] == [pytest.approx(each.logp, abs=4 * TOLERANCE) for each in one]


def test_as_a_server_of_answers_it_writes_the_generators_own(
    vllm: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Greedy ones, before and after an update, which is pushed."""
    prompter = Prompter(tokenizer(), str(vllm.recipe.parent / "g.jinja"))
    trained = TrainedSelector(
        lambda: nullcontext(vllm.model), lambda: vllm.model, lambda place: None, prompter, Accelerator(), tmp_path
    )
    updates = [0]
    there = EngineAnswerer(trained, Scoring(), vllm.engine(), lambda: updates[0])
    here = ModelAnswerer(trained.open, prompter, Scoring())
    prompts = [prompter.generator_prompt(question, (3, 1)).ids for question in questions(5)]
    greedy = SamplingParams(4, temperature=0.0)
    for _ in range(2):
        one, other = (each.write(prompts, greedy, [0] * 5) for each in (here, there))
        assert [each.text for each in other] == [each.text for each in one]
        assert [each.logp for each in other] == [pytest.approx(each.logp, abs=4 * TOLERANCE) for each in one]
        monkeypatch.setattr(vllm, "model", changed(vllm.model))
        updates[0] += 1
    monkeypatch.undo()
    there.write(prompts[:1], greedy, [0])  # gives the server its weights back


def test_log_q_is_the_trainers_log_p_to_rounding(vllm: World) -> None:
    assert vllm.difference(vllm.engine()) < TOLERANCE


def test_the_samples_of_a_group_differ(vllm: World) -> None:
    """All but a short one that is likely enough to come twice."""
    for group in vllm.engine().generate(GenerationRequest(PROMPTS, 8, SAMPLING, SEEDS)):
        assert len({sample.ids for sample in group}) > 5


def test_a_prompt_and_its_seed_decide_what_is_drawn(vllm: World) -> None:
    """Whatever else is asked for, in any order, and by whichever replica."""
    engine = vllm.engine()
    together = ids(engine.generate(GenerationRequest(PROMPTS, 4, SAMPLING, SEEDS)))
    backwards = engine.generate(GenerationRequest(PROMPTS[::-1], 4, SAMPLING, SEEDS[::-1]))
    assert together == ids(backwards[::-1])
    assert together[:4] != ids(engine.generate(GenerationRequest(PROMPTS[:1], 4, SAMPLING, [7])))


def test_questions_are_shared_by_the_replicas(vllm: World, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = vllm.engine()
    asked: list[str] = []
    call = Server.call
    monkeypatch.setattr(Server, "call", lambda self, *a, **k: (asked.append(self.url), call(self, *a, **k))[1])
    engine.generate(GenerationRequest(PROMPTS, 2, SAMPLING, SEEDS))
    assert sorted(asked) == [f"http://127.0.0.1:{vllm.port}"] * 2 + [f"http://localhost:{vllm.port}"]


def test_without_a_push_log_q_is_not_that_of_the_new_weights_and_with_one_it_is(
    vllm: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a folder. The same prompts before and after: a prefix cache that stayed would show as well."""
    engine = vllm.engine()
    with engine.at(0):
        assert vllm.difference(engine) < TOLERANCE
    monkeypatch.setattr(vllm, "model", changed(vllm.model))
    with engine.at(0):  # no update since: nothing to push
        assert vllm.difference(engine) > 1000 * TOLERANCE
    with engine.at(1):
        assert vllm.difference(engine) < TOLERANCE
    monkeypatch.undo()
    engine.forget()
    with engine.at(1):
        assert vllm.difference(engine) < TOLERANCE


def test_under_the_constraint_every_selection_is_valid_and_log_q_is_the_constrained_log_p(vllm: World) -> None:
    """Selections of 3 of 5, scored by the trainer among what the constraint allows."""
    constraint = SelectionConstraint(tokenizer(), 5, 3)
    groups = vllm.engine().generate(
        GenerationRequest(PROMPTS, 64, SamplingParams(8), SEEDS, [constraint] * len(PROMPTS))
    )
    for prompt, group in zip(PROMPTS, groups, strict=True):
        samples = list(dict.fromkeys(sample.ids for sample in group))
        for text in map(tokenizer().decode, samples):
            assert not parse_selection(text.removesuffix("</s>"), 5, 3).problems
        ((*scored,),) = score_rows(vllm.model, [Row(prompt, samples, allowed_for(constraint, samples))], 1)
        known = dict(zip(samples, scored, strict=True))
        for sample in group:
            assert sample.logps == pytest.approx(known[sample.ids].tolist(), abs=TOLERANCE)


def test_what_is_wrong_with_a_request_is_said_in_the_servers_words(vllm: World) -> None:
    with pytest.raises(InputError, match="context length"):
        vllm.engine().generate(GenerationRequest([[5] * 4000], 1, SAMPLING, [1]))


def test_a_server_that_comes_back_is_given_the_weights_again(vllm: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts with those of its own folder; the questions that it left are asked again under the pushed ones. What
    dies is its engine alone: the server itself answers, with an error, until it has noticed."""
    engine = vllm.engine()
    monkeypatch.setattr(vllm, "model", changed(vllm.model))

    def start_again() -> None:
        vllm.process.process.wait(60)
        vllm.process = Process(vllm.recipe, vllm.folder / "server.log")

    with engine.at(1):
        vllm.process.kill_engine()
        again = threading.Thread(target=start_again, daemon=True)
        again.start()
        assert vllm.difference(engine) < TOLERANCE
    again.join()


def test_a_server_that_was_started_again_between_two_requests_is_given_the_weights_again(
    vllm: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No request failed, and the step is the one that was pushed: a frozen selector's always is."""
    engine = vllm.engine()
    monkeypatch.setattr(vllm, "model", changed(vllm.model))
    with engine.at(0):
        pass
    pushes = vllm.pushes
    with engine.at(0):
        assert vllm.pushes == pushes
    vllm.process.kill()
    vllm.process = Process(vllm.recipe, vllm.folder / "server.log")
    vllm.server.wait()
    with engine.at(0):
        assert vllm.difference(engine) < TOLERANCE
    assert vllm.pushes == pushes + 1


def test_a_killed_server_ends_the_run_in_one_error_in_time_and_the_resumed_run_finishes(vllm: World) -> None:
    """Killed when the first iteration's rollouts are there; the second needs it again."""
    run = vllm.folder / "run"
    killed: list[float] = []

    def kill_after_the_first_iteration() -> None:
        while not list(run.glob("rollouts/*.parquet")):
            time.sleep(0.01)
        killed.append(time.monotonic())
        vllm.process.kill()

    watcher = threading.Thread(target=kill_after_the_first_iteration, daemon=True)
    watcher.start()
    ended = launch(vllm.recipe, run)
    assert killed, ended.stderr
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    (error,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert error.startswith(f"error: vllm_server_base_url: http://127.0.0.1:{vllm.port}, no answer for 5 s")
    assert "--resume_from_checkpoint auto" in error

    vllm.process = Process(vllm.recipe, vllm.folder / "server.log")
    vllm.server.wait()
    done = launch(vllm.recipe, run, "--resume_from_checkpoint", "auto")
    assert done.returncode == 0, done.stderr
    assert (run / "selector" / "model.safetensors").is_file()
    assert not (run / "vllm_weights").exists()
    rollouts = to_rollouts(read(part_paths(run)))
    assert len(rollouts) == 2 * 8 * 4
    assert not any(rollout.selection.problems for rollout in rollouts)
    assert max(abs(rollout.selection_logp - rollout.proposal_logp) for rollout in rollouts) < 6 * TOLERANCE


def test_rollouts_sampled_ahead_are_one_step_old_and_corrected(vllm: World) -> None:
    """Iterations of one step, at a rate that moves the weights far: all but the first lag by one update."""
    run = vllm.folder / "overlap"
    options = {"overlap_rollouts": True, "questions_per_iteration": 4, "num_iterations": 4, "learning_rate": 3.0}
    arguments = [word for key, value in options.items() for word in (f"--{key}", str(value).lower())]
    done = launch(vllm.recipe, run, *arguments)
    assert done.returncode == 0, done.stderr
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    steps = [line for line in history if "sampling/staleness" in line]
    assert [line["sampling/staleness"] for line in steps] == [0, 1, 1, 1]
    rollouts = to_rollouts(read(part_paths(run)))
    for t in range(4):
        ratios = [r.selection_logp - r.proposal_logp for r in rollouts[t * 16 : (t + 1) * 16]]
        assert (max(map(abs, ratios)) < 6 * TOLERANCE) == (t == 0)


def test_a_server_that_is_not_in_development_mode_is_refused_with_the_fix(vllm: World) -> None:
    """Told from the missing page: /v1/server_info is none."""
    server = Server(f"http://127.0.0.1:{vllm.port}/v1", 5, 5, os.environ["DRO_RL_SERVER_KEY"])
    with pytest.raises(InputError, match="VLLM_SERVER_DEV_MODE=1"):
        server.settings()
