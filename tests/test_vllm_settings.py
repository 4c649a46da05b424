"""Claims about vLLM's settings that need no vLLM: which engine, what is refused, the server's command, the request."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import random
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from training_world import launch, world
from transformers import LlamaConfig, MambaConfig
from typer.testing import CliRunner

from dro_rl import engines
from dro_rl.cli import app
from dro_rl.config import DROConfig
from dro_rl.engines import answers, serve, vllm_common, vllm_server, vllm_weights
from dro_rl.engines.protocol import GenerationRequest
from dro_rl.engines.vllm_colocate import numbers_of, origin
from dro_rl.engines.vllm_common import (
    cpu_cache_bytes,
    engine_dtype,
    random_state_kept,
    request_options,
    token_cache_bytes,
)
from dro_rl.engines.vllm_server import Server, ServerEngine, load_everywhere
from dro_rl.errors import InputError, LackError
from dro_rl.models.loading import LoraSettings, add_adapter
from dro_rl.proposal import SamplingParams, rollout_seed
from dro_rl.recipe import load_recipe
from dro_rl.train import run_job


@pytest.fixture
def without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without it."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "vllm" else found(name, *a))


def config(tmp_path: Path, **settings: object) -> DROConfig:
    return DROConfig(output_dir=str(tmp_path), report_to="none", **settings)


ANSWERS = {"answer_engine": "vllm", "reward": "f1"}
SERVED = {**ANSWERS, "vllm_mode": "server", "vllm_answer_server_base_url": "http://127.0.0.1:8001/"}


# What writes answers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"answer_engine": "vllm"}, "answer_engine"),
        ({"answer_engine": "vlm", "reward": "f1"}, "answer_engine"),
        ({**ANSWERS, "generator_endpoint": "http://127.0.0.1:9/v1"}, "answer_engine"),
        ({**ANSWERS, "vllm_answer_server_base_url": "http://127.0.0.1:8001"}, "vllm_answer_server_base_url"),
        ({"vllm_answer_server_base_url": "http://127.0.0.1:8001"}, "vllm_answer_server_base_url"),
        ({**SERVED, "vllm_answer_server_base_url": None}, "vllm_answer_server_base_url"),
        ({**SERVED, "vllm_answer_server_base_url": "127.0.0.1"}, "vllm_answer_server_base_url"),
        ({**SERVED, "vllm_server_base_url": "http://127.0.0.1:8001"}, "vllm_answer_server_base_url"),
    ],
)
def test_an_engine_of_answers_that_would_mean_nothing_is_refused(tmp_path: Path, settings: dict, key: str) -> None:
    with pytest.raises(InputError) as refused:
        config(tmp_path, **settings)
    assert refused.value.place == key


def test_two_engines_of_one_process_do_not_sleep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's allocator is one a process: what puts one engine to sleep takes the other's memory."""
    settings = config(tmp_path, **ANSWERS, rollout_engine="vllm")
    settings.vllm_enable_sleep_mode, settings.use_cpu = True, False
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InputError, match="sleeps at once"):
        settings.check()


def test_an_engine_of_answers_is_told_their_lengths_and_its_own_servers(tmp_path: Path) -> None:
    whole = config(tmp_path, **SERVED, max_answer_length=9, constrain_selection=True, vllm_max_model_length=5000)
    told = answers.settings_for_answers(whole)
    assert (told.engine, told.max_completion_length, told.constrain_selection) == ("vllm", 9, False)
    assert told.vllm_servers == ["http://127.0.0.1:8001"]
    assert vllm_common.engine_length(told, None) == 4096 + 9
    assert (whole.max_completion_length, whole.vllm_servers) == (64, ["http://127.0.0.1:8000"])


def test_errors_of_an_engine_of_answers_name_its_keys(tmp_path: Path, without_vllm: None) -> None:
    with pytest.raises(LackError, match=r"^answer_engine: 'vllm': this needs vLLM") as refused:
        engines.check(config(tmp_path, **ANSWERS, rollout_engine="transformers"))
    assert "answer_engine: transformers" in refused.value.fix
    served = config(tmp_path, **SERVED, rollout_engine="transformers", vllm_server_timeout=0.2)
    served.vllm_answer_server_base_url = "http://127.0.0.1:9"
    with pytest.raises(InputError, match=r"^vllm_answer_server_base_url: .*--role generator"):
        engines.check(served)


def test_serve_rollouts_serves_the_generator_at_its_own_address(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    recipe = load_recipe(world(tmp_path, **SERVED, constrain_selection=True))
    arguments = serve.server_command(recipe, role="generator").arguments
    options = dict(itertools.pairwise(arguments))
    assert options["--model"] == recipe.run.of("generator").model
    assert (options["--port"], options["--max-model-len"]) == ("8001", str(128 + 4))
    assert "--logits-processors" not in arguments
    with pytest.raises(InputError, match="vllm_answer_server_base_url names 1"):
        serve.server_command(recipe, role="generator", replica=2)


# Which engine -----------------------------------------------------------------------------------------------


def test_auto_takes_the_transformers_engine_without_cuda(tmp_path: Path) -> None:
    assert config(tmp_path).engine == "transformers"


def test_auto_takes_vllm_where_it_is_installed_beside_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(tmp_path)
    settings.use_cpu = False
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert settings.engine == "vllm"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert settings.engine == "transformers"


def test_who_names_server_mode_gets_vllm(tmp_path: Path) -> None:
    assert config(tmp_path, vllm_mode="server").engine == "vllm"
    assert config(tmp_path, vllm_mode="server", rollout_engine="transformers").engine == "transformers"


# What is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "key", "fix"),
    [
        ({"vllm_server_base_url": "localhost:8000"}, "vllm_server_base_url", "http://127.0.0.1:8000"),
        ({"vllm_server_base_url": ["http://a:1", "http://b:2/v1"]}, "vllm_server_base_url", "http://127.0.0.1:8000"),
        ({"vllm_server_base_url": []}, "vllm_server_base_url", "http://127.0.0.1:8000"),
        ({"vllm_server_base_url": "http://localhost:80000"}, "vllm_server_base_url", "http://127.0.0.1:8000"),
        ({"vllm_server_base_url": "http://localhost:port"}, "vllm_server_base_url", "http://127.0.0.1:8000"),
        ({"rollout_engine": "vllm", "vllm_max_model_length": 4000}, "vllm_max_model_length", f"Use {4096 + 64}"),
        ({"vllm_server_timeout": 0.0}, "vllm_server_timeout", "positive"),
        ({"vllm_tensor_parallel_size": 0}, "vllm_tensor_parallel_size", "1 or more"),
        ({"vllm_gpu_memory_utilization": 1.5}, "vllm_gpu_memory_utilization", "0.3"),
        ({"rollout_engine": "vllm", "vllm_enable_sleep_mode": True}, "vllm_enable_sleep_mode", "on a CPU"),
        ({"vllm_mode": "server", "vllm_enable_sleep_mode": True}, "vllm_enable_sleep_mode", "colocate"),
        ({"overlap_rollouts": True}, "overlap_rollouts", "vllm_mode: server"),
        ({"vllm_mode": "server", "vllm_weight_sync": "nccl"}, "vllm_weight_sync", "Use folder"),
        (
            {"vllm_mode": "server", "vllm_weight_sync": "nccl", "vllm_server_base_url": ["http://a:1", "http://b:1"]},
            "vllm_weight_sync",
            "one server",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, settings: dict, key: str, fix: str) -> None:
    with pytest.raises(InputError) as error:
        config(tmp_path, **settings)
    assert error.value.place == key
    assert fix in error.value.fix


@pytest.mark.usefixtures("without_vllm")
def test_without_vllm_a_job_that_asks_for_it_names_the_extra_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_job([str(world(tmp_path, rollout_engine="vllm"))]) == 3
    assert "pip install 'dro_rl[vllm]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("without_vllm")
def test_the_server_cannot_be_started_without_vllm(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["serve-rollouts", str(world(tmp_path, vllm_mode="server"))])
    assert done.exit_code == 3
    assert "pip install 'dro_rl[vllm]'" in done.output


def test_an_unknown_version_of_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    for version, fits in (("0.22.0", True), ("0.31.0+cu129", True), ("0.21.9", False), ("0.32.0", False)):
        monkeypatch.setattr(vllm_common, "vllm_version", lambda version=version: version)
        if fits:
            vllm_common.check_installed("rollout_engine", "vllm")
        else:
            with pytest.raises(InputError, match=version):
                vllm_common.check_installed("rollout_engine", "vllm")


@pytest.mark.slow
def test_a_job_whose_server_is_away_ends_in_time_with_one_error_before_anything_is_loaded(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    recipe = world(tmp_path, vllm_mode="server", vllm_server_base_url=url, vllm_server_timeout=2.0)
    done = launch(recipe, tmp_path / "run")
    assert done.returncode == 2
    assert f"error: vllm_server_base_url: {url}, no answer for 2 s" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_server_that_takes_a_connection_and_never_answers_is_away_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        server = Server(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=2.0, request_timeout=1.0)
        started = time.monotonic()
        with pytest.raises(InputError, match="no answer for 2 s"):
            server.wait()
        assert time.monotonic() - started < 60


class Answers:
    """What a server says, by path: a list is said in turn. For what a real one says seldom."""

    def __init__(self, **said: object) -> None:
        self.said, self.asked = said, []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path.rpartition("/")[2]
        self.asked.append(path)
        answer = self.said.get(path, 200)
        answer = answer.pop(0) if isinstance(answer, list) else answer
        return httpx.Response(answer) if isinstance(answer, int) else httpx.Response(200, json=answer)

    def server(self, monkeypatch: pytest.MonkeyPatch, port: int = 1) -> Server:
        server = Server(f"http://127.0.0.1:{port}", timeout=0.1, request_timeout=1.0)
        monkeypatch.setattr(server, "_client", httpx.Client(base_url=server.url, transport=httpx.MockTransport(self)))
        monkeypatch.setattr(vllm_server, "PAUSE", 0.0)
        return server


def test_a_server_that_keeps_its_prefixes_is_asked_again_and_then_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = Answers(reset_prefix_cache=[{"success": False}, {"success": True}])
    answers.server(monkeypatch).load(Path("weights"))
    assert answers.asked == ["collective_rpc", "reset_prefix_cache", "reset_prefix_cache"]
    with pytest.raises(InputError, match="keeps its prefix cache"):
        Answers(reset_prefix_cache={"success": False}).server(monkeypatch).load(Path("weights"))


def test_the_folder_is_blamed_for_a_failed_read_unless_the_engine_has_died(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="vllm_weights_dir: 'weights'"):
        load_everywhere([Answers(collective_rpc=500).server(monkeypatch)], Path("weights"))
    dead = Answers(collective_rpc=500, health=[200, 503]).server(monkeypatch)
    with pytest.raises(InputError, match="while it read new weights") as error:
        load_everywhere([dead], Path("weights"))
    assert error.value.place == "vllm_server_base_url"
    assert "--resume_from_checkpoint auto" in error.value.fix


def test_processes_begin_with_different_replicas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each may have one question alone."""
    settings = config(tmp_path, vllm_mode="server", vllm_server_base_url=["http://a:1", "http://b:1", "http://c:1"])
    completions = {"choices": [{"index": 0, "logprobs": {"tokens": ["token_id:1"], "token_logprobs": [0.0]}}]}
    for rank in range(4):
        monkeypatch.setattr(DROConfig, "process_index", rank)
        engine = ServerEngine(settings, 1, lambda servers: None)
        replicas = [Answers(completions=completions) for _ in engine.servers]
        engine.servers = [replica.server(monkeypatch) for replica in replicas]
        engine.generate(GenerationRequest([[1]], 1, SamplingParams(1), [0]))
        assert [len(replica.asked) for replica in replicas] == [int(place == rank % 3) for place in range(3)]


# How weights travel -----------------------------------------------------------------------------------------


def accelerator_like(kind: str = "NO") -> Any:
    """An accelerator on CUDA, as far as the choice of a way looks at it."""
    return SimpleNamespace(
        device=torch.device("cuda"), is_main_process=True, distributed_type=SimpleNamespace(value=kind)
    )


@pytest.mark.usefixtures("without_vllm")
def test_weights_go_by_folder_where_the_trainer_has_no_vllm(tmp_path: Path) -> None:
    assert vllm_weights._sync(config(tmp_path, vllm_mode="server"), False, accelerator_like()) == "folder"


def test_adapters_of_a_sharded_selector_go_by_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(tmp_path, vllm_mode="server")
    assert vllm_weights._sync(settings, True, accelerator_like("FSDP")) == "folder"
    monkeypatch.setattr(settings, "vllm_weight_sync", "nccl")
    assert vllm_weights._sync(settings, True, accelerator_like()) == "nccl"
    with pytest.raises(InputError, match="Use folder"):
        vllm_weights._sync(settings, True, accelerator_like("FSDP"))


def test_runs_that_share_a_folder_keep_to_their_own_and_leave_no_older_push(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_weights, "load_everywhere", lambda servers, place, alone: None)

    def save(place: Path) -> None:
        place.mkdir(parents=True)

    runs = [vllm_weights.by_folder(tmp_path / "weights", save, Accelerator()) for _ in range(2)]
    first = [publish([]) for publish in runs]
    (first[0].parent / ".push-2.tmp").mkdir()  # an export that was killed
    last = runs[0]([])
    assert sorted((tmp_path / "weights").glob("*/*")) == sorted([last, first[1]])
    engine = ServerEngine(config(tmp_path, vllm_mode="server"), 1, lambda servers: None)
    for engine._weights in (last, first[1]):
        engine.close()
    assert not (tmp_path / "weights").exists()


def test_what_trls_client_raises_is_a_server_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    away, up = Answers(health=503).server(monkeypatch), Answers().server(monkeypatch)
    for server, problem in ((away, Exception("Request failed: 500")), (up, ConnectionError("refused"))):
        with pytest.raises(InputError, match="vllm_server_base_url"), vllm_weights._away_said(server):
            raise problem
    with pytest.raises(KeyError), vllm_weights._away_said(up):
        raise KeyError("a bug")


def test_vllm_in_process_loads_the_revision_and_trusts_the_code_that_the_trainer_did(make_model) -> None:
    model, tokenizer = make_model(), SimpleNamespace()
    assert origin(model, tokenizer) == {"revision": None, "trust_remote_code": False}
    model.config._commit_hash = "abc"
    model.__class__ = type("Own", (type(model),), {"__module__": "transformers_modules.some.modeling_own"})
    told = {"revision": "abc", "trust_remote_code": True}
    assert origin(model, tokenizer) == told
    assert origin(add_adapter(model, LoraSettings(4, 16, 0.0, None)), tokenizer) == told


def test_rollouts_are_sampled_ahead_for_iterations_of_one_step_alone(tmp_path: Path) -> None:
    settings = {"vllm_mode": "server", "overlap_rollouts": True, "per_device_train_batch_size": 8}
    config(tmp_path, **settings, questions_per_iteration=1).check_batch(1, 100)
    for other in ({}, {"questions_per_iteration": 2}, {"questions_per_iteration": 1, "m_step_epochs": 2}):
        with pytest.raises(InputError, match="Use questions_per_iteration: 1 and m_step_epochs: 1"):
            config(tmp_path, **settings, **other).check_batch(1, 100)


# The server's command ---------------------------------------------------------------------------------------


@pytest.fixture
def with_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its command can be made without it."""
    monkeypatch.setattr(serve, "check_installed", lambda *_: None)


@pytest.mark.usefixtures("with_vllm")
def test_the_command_has_the_flags_that_rollouts_need(tmp_path: Path) -> None:
    path = world(tmp_path, vllm_mode="server", vllm_server_base_url=["http://a:7001", "http://b:7002"])
    command = serve.server_command(load_recipe(path), replica=2, extra=["--max-num-seqs", "4"])
    words = command.arguments
    assert words[:3] == (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
    options = dict(itertools.pairwise(words))
    assert options["--model"] == str(tmp_path / "base-selector")
    assert options["--host"] == "127.0.0.1"
    assert options["--port"] == "7002"
    assert options["--dtype"] == "float32"
    assert options["--max-model-len"] == str(128 + 6)
    assert options["--logprobs-mode"] == "processed_logprobs"
    assert options["--generation-config"] == "vllm"
    assert words[-2:] == ("--max-num-seqs", "4")
    assert command.environment["VLLM_SERVER_DEV_MODE"] == "1"


@pytest.mark.usefixtures("with_vllm")
def test_a_replica_that_the_recipe_does_not_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--replica: 2"):
        serve.server_command(load_recipe(world(tmp_path, vllm_mode="server")), replica=2)


@pytest.mark.usefixtures("with_vllm")
def test_a_dry_run_prints_the_command(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["serve-rollouts", str(world(tmp_path, vllm_mode="server")), "--dry-run", "--", "--seed", "3"]
    )
    assert done.exit_code == 0, done.output
    assert done.output.startswith("VLLM_SERVER_DEV_MODE=1 ")
    assert done.output.endswith("--seed 3\n")


# Requests and weights ---------------------------------------------------------------------------------------


def test_a_request_says_every_parameter_and_a_seed_of_its_own() -> None:
    """What it left out would come from the model's generation_config.json."""
    sampling = SamplingParams(9, 0.7, 0.9, 50, 0.01)
    first, second = (
        request_options(GenerationRequest([], 4, sampling, []), rollout_seed(0, 1, i), 2) for i in range(2)
    )
    assert first["seed"] != second["seed"]
    assert 0 <= first["seed"] < 2**63 - 4
    del first["seed"]
    assert first == {
        "n": 4, "temperature": 0.7, "top_p": 0.9, "top_k": 50, "min_p": 0.01, "repetition_penalty": 1.0,
        "max_tokens": 9, "logprobs": 0, "ignore_eos": True, "stop_token_ids": [2],
    }  # fmt: skip


def test_vllm_computes_in_the_trainers_type_unless_told(tmp_path: Path) -> None:
    assert engine_dtype(config(tmp_path), "float32") == "float32"
    assert engine_dtype(config(tmp_path, bf16=True), "float32") == "bfloat16"
    assert engine_dtype(config(tmp_path, bf16=True, vllm_dtype="float16"), "float32") == "float16"


def test_generators_are_given_back_as_they_were() -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with random_state_kept():
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_numbers_of_are_those_that_peft_would_merge(tmp_path: Path, make_model) -> None:
    model = make_model()
    names = dict(model.named_parameters())
    adapted = add_adapter(copy.deepcopy(model), LoraSettings(4, 16, 0.0, None))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
    found = {name: tensor.clone() for name, tensor in numbers_of(adapted)}
    merged = dict(adapted.merge_and_unload().named_parameters())
    assert found.keys() == names.keys()
    assert any(not torch.equal(found[name], names[name]) for name in names)
    for name in names:
        assert torch.allclose(found[name], merged[name], atol=1e-6)


def test_a_small_model_asks_for_a_small_cache_and_a_large_one_for_four_gibibytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    small = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=64)
    token = token_cache_bytes(small, torch.float32)
    assert token == 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, width, bytes
    assert cpu_cache_bytes(token, 144) == 2**28, "the least"
    assert cpu_cache_bytes(token, 4096) == 256 * 4096 * token
    assert cpu_cache_bytes(token, 10**6) == cpu_cache_bytes(token, None) == 2**32, "the most"
    wide = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, hidden_size=64, head_dim=128, num_hidden_layers=2)
    assert token_cache_bytes(wide, torch.bfloat16) == 2 * 2 * 2 * 128 * 2
    assert token_cache_bytes(MambaConfig(), torch.float32) is None
    assert cpu_cache_bytes(None, 144) == 2**32, "what a state takes is not known"
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    assert cpu_cache_bytes(token, 144) == 3 * 2**30


@pytest.mark.parametrize("told", ["many", "0", "-1", "1.5", "4GiB", " ", "²"])
def test_a_cache_of_no_whole_gibibytes_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch, told: str) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", told)
    with pytest.raises(InputError, match=r"VLLM_CPU_KVCACHE_SPACE.*whole GiB"):
        cpu_cache_bytes(1024, 144)
