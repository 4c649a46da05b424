"""Claims about adapters that vLLM is sent alone: when they are, what is refused, and a real server that takes them.

In the trainer's process: `test_vllm_colocate.py`.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from training_world import launch, save_model, tokenizer, world
from transformers import AutoModelForCausalLM

from dro_rl import engines
from dro_rl.config import DROConfig
from dro_rl.engines import serve, vllm_adapters, vllm_server
from dro_rl.engines.protocol import TrainedSelector
from dro_rl.engines.vllm_adapters import Adapters, of_model, of_recipe
from dro_rl.engines.vllm_colocate import ColocatedEngine
from dro_rl.engines.vllm_server import LOAD, Server, adapter_name
from dro_rl.engines.vllm_start import have_one_engine
from dro_rl.errors import InputError
from dro_rl.models.loading import LoraSettings, add_adapter
from dro_rl.prompts import Prompter
from dro_rl.recipe import load_recipe

TOLERANCE = 1e-3
"""Nats a token, as in test_vllm_server.py."""
SERVER = {"vllm_mode": "server", "selector_lora_r": 12}


def moved(model: Any, seed: int) -> Any:
    """A PEFT model after a large update of its adapters, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def config(folder: Path, **settings: Any) -> DROConfig:
    return DROConfig(output_dir=str(folder), report_to="none", **settings)


# Whether they are sent alone --------------------------------------------------------------------------------


def test_a_recipe_says_whether_adapters_go_alone(tmp_path: Path) -> None:
    recipe = load_recipe(world(tmp_path, **SERVER))
    found = of_recipe(recipe, recipe.training, "selector", on_cpu=True)
    assert found == Adapters(12, str(tmp_path / "base-selector"), "main")
    assert found.max_rank == 16
    assert of_recipe(recipe, recipe.training, "generator", on_cpu=True) is None
    merged = load_recipe(world(tmp_path, **SERVER, vllm_lora_sync="merged"))
    assert of_recipe(merged, merged.training, "selector", on_cpu=True) is None


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"selector_lora_r": 0}, "the model has none"),
        ({"selector_lora_r": 513}, "vLLM takes LoRA to rank 512, and these have 513"),
        ({"quantization": "nf4"}, "a server holds the model's own numbers"),
        ({"warmup": "selector"}, "a warm-up without share_base moves its weights"),
    ],
)
def test_what_cannot_go_alone_is_merged_or_refused_by_name_before_anything_loads(
    tmp_path: Path, keys: dict, why: str
) -> None:
    recipe = load_recipe(world(tmp_path, **{**SERVER, "generator_lora_r": 4, **keys}))
    assert of_recipe(recipe, recipe.training, "selector", on_cpu=True) is None
    recipe.training.vllm_lora_sync = "adapter"
    with pytest.raises(InputError, match=why) as refused:
        engines.check(recipe.training, recipe)
    assert refused.value.place == "vllm_lora_sync"
    assert "\n" not in str(refused.value)


def test_over_nccl_weights_are_merged(tmp_path: Path) -> None:
    recipe = load_recipe(world(tmp_path, **SERVER))
    recipe.training.vllm_weight_sync = "nccl"
    assert of_recipe(recipe, recipe.training, "selector", on_cpu=True) is None


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({}, None),
        ({"use_rslora": True}, None),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias=all"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "adapters of embeddings"),
    ],
)
def test_what_vllm_does_not_know_of_peft_is_merged(
    tmp_path: Path, settings: dict, why: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """A library's user may train any PEFT model; what vLLM reads past would leave it with another one."""
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(save_model(tmp_path, 1))
    model = get_peft_model(
        base, LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | settings)
    )
    served = config(tmp_path, vllm_mode="server")
    with caplog.at_level("INFO"):
        found = of_model(served, model, Accelerator())
    assert found == (None if why else Adapters(4, str(tmp_path)))
    assert (why or "") in caplog.text
    served.vllm_lora_sync = "adapter"
    with pytest.raises(InputError, match=why) if why else nullcontext():
        of_model(served, model, Accelerator())


def test_a_sharded_selector_and_an_architecture_without_lora_in_vllm_are_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = AutoModelForCausalLM.from_pretrained(save_model(tmp_path, 1))
    model = add_adapter(base, LoraSettings(4, 8, 0.0, None))
    sharded: Any = SimpleNamespace(distributed_type=SimpleNamespace(value="FSDP"))
    assert of_model(config(tmp_path, vllm_mode="server"), model, sharded) is None
    monkeypatch.setattr(vllm_adapters, "runs_adapters", lambda *_: False)
    assert of_model(config(tmp_path), model, Accelerator()) is None


@pytest.mark.parametrize(
    ("model", "revision", "fits"),
    [
        ("org/base", None, True),
        ("org/base", "main", True),
        ("org/base", "v2", False),
        ("org/other", None, False),
        ("/cache/models--org--base/snapshots/1f0c", None, True),
        ("/cache/models--org--base-large/snapshots/1f0c", None, False),
    ],
)
def test_a_servers_model_is_the_adapters_base_or_is_not(model: str, revision: str | None, fits: bool) -> None:
    assert Adapters(4, "org/base", "main").trained_over(model, revision) == fits


def test_both_roles_have_one_engine_where_both_adapters_go_over_one_base(tmp_path: Path) -> None:
    base = str(save_model(tmp_path / "base-selector", 1))
    both = {"selector_lora_r": 4, "generator_lora_r": 9, "reward": "f1", "answer_engine": "vllm"}
    shared = {**both, "generator_model_name_or_path": base}
    for keys, one in (
        (shared, True),
        (both, False),
        ({**shared, "warmup": "selector"}, False),
        ({**shared, "warmup": "selector", "share_base": True}, True),
        ({**shared, "generator_lora_r": 0}, False),
        ({**shared, "vllm_lora_sync": "merged"}, False),
    ):
        assert have_one_engine(load_recipe(world(tmp_path, **keys)), on_cpu=False) == one, keys


def test_asleep_an_engine_of_adapters_keeps_its_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's way drops the weights, which are sent again; here they are not. vLLM sleeps on a GPU alone: its calls."""
    called: list[Any] = []
    engine: Any = object.__new__(ColocatedEngine)
    engine._config, engine._alone, engine._pushed = SimpleNamespace(vllm_enable_sleep_mode=True), True, None
    engine._llm = SimpleNamespace(
        wake_up=lambda tags: called.append(tags), sleep=lambda level: called.append(f"sleep {level}")
    )
    monkeypatch.setattr(ColocatedEngine, "push", lambda self: called.append("push"))
    for _ in range(2):
        with engine.at(0):
            called.append("open")
    assert called == 2 * [["weights"], "push", ["kv_cache"], "open", "sleep 1"]


# Servers ----------------------------------------------------------------------------------------------------


def settings(**lora: Any) -> dict[str, Any]:
    return {
        "model_config": {
            "model": "org/base", "revision": None, "logprobs_mode": "processed_logprobs", "max_model_len": 9999,
            "logits_processors": [],
        },
        "lora_config": lora or None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("told", "adapters", "why", "fix"),
    [
        (settings(), Adapters(12, "org/base"), None, None),
        (settings(), Adapters(12, "org/base", required=True), "no LoRA", "--enable-lora --max-lora-rank 16"),
        (settings(max_lora_rank=16), None, "the place of the base", "Start it without"),
        (settings(max_lora_rank=16), Adapters(12, "org/other"), "holds org/base", "Start it with that model"),
        (settings(max_lora_rank=16), Adapters(12, "org/base", "v2"), "org/base, revision v2", "with that model"),
        (settings(max_lora_rank=8), Adapters(12, "org/base"), "the adapters' rank is 12", "--max-lora-rank 16"),
        (settings(max_lora_rank=16), Adapters(12, "org/base"), "no call to load", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
    ],
)  # fmt: skip
def test_a_server_that_cannot_take_what_it_would_be_sent_is_refused(
    monkeypatch: pytest.MonkeyPatch, told: dict, adapters: Adapters | None, why: str | None, fix: str | None
) -> None:
    server = Server("http://127.0.0.1:1", 1.0, 1.0)
    monkeypatch.setattr(server, "_client", SimpleNamespace(post=lambda *a, **k: SimpleNamespace(status_code=404)))
    if why is None:
        server._check_lora(told, adapters)
        return
    with pytest.raises(InputError, match=why) as refused:
        server._check_lora(told, adapters)
    assert fix in refused.value.fix
    assert refused.value.place == "vllm_server_base_url"


@pytest.mark.parametrize("lora", [True, False])
def test_adapters_go_alone_where_all_servers_were_started_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: bool
) -> None:
    told = iter([{"lora_config": {}}, {"lora_config": {} if lora else None}])
    monkeypatch.setattr(Server, "settings", lambda self: next(told))
    served = config(tmp_path, vllm_mode="server", vllm_server_base_url=["http://a:1", "http://b:1"])
    adapters = Adapters(4, "org/base")
    assert vllm_server.taken_by_servers(served, adapters) == (replace(adapters, required=True) if lora else None)


@pytest.mark.parametrize("sync", ["adapter", "auto", "merged"])
def test_serve_rollouts_starts_a_server_for_adapters_where_they_go_alone(tmp_path: Path, sync: str) -> None:
    """Under `auto` not on a CPU, where vLLM is slow with them."""
    pytest.importorskip("vllm")
    command = serve.server_command(load_recipe(world(tmp_path, **SERVER, vllm_lora_sync=sync)))
    options, alone = dict(itertools.pairwise(command.arguments)), sync == "adapter"
    assert options.get("--max-lora-rank") == ("16" if alone else None)
    assert ("--enable-lora" in command.arguments) == alone
    assert command.environment.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING") == ("1" if alone else None)


def test_on_a_cpu_auto_merges_in_the_trainers_process(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = add_adapter(AutoModelForCausalLM.from_pretrained(save_model(tmp_path, 1)), LoraSettings(4, 8, 0.0, None))
    with caplog.at_level("INFO"):
        assert of_model(config(tmp_path, vllm_model_impl="transformers"), model, Accelerator()) is None
    assert "on a CPU" in caplog.text


class Served:
    """A real server, started for the recipe's adapters, and an engine that pushes to it."""

    def __init__(self, folder: Path) -> None:
        from test_vllm_server import World

        self.world = World(folder, selector_lora_r=4, lora_alpha=32, vllm_lora_sync="adapter")
        base = self.world.model
        self.model = self.world.model = moved(add_adapter(copy.deepcopy(base), LoraSettings(4, 32, 0.0, None)), 1)
        self.weights = folder / "weights"

    def engine(self, model: Any = None, **overrides: Any) -> Any:
        def refuse(place: Path) -> None:
            raise AssertionError("the whole model is not written")

        settings = {"vllm_weights_dir": str(self.weights), "vllm_lora_sync": "adapter", **overrides}
        config = self.world.config(**settings)  # settings forget the accelerator that there was
        selector = TrainedSelector(
            lambda: nullcontext(None), lambda: model or self.model, refuse, Prompter(tokenizer(), "toy_generator"),
            Accelerator(), self.weights.parent,
        )  # fmt: skip
        return engines.start(config, selector)

    def names(self) -> list[str]:
        return [each["id"] for each in self.world.server.call("GET", "/v1/models")["data"]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server for this file: starting one takes half a minute."""
    pytest.importorskip("vllm", reason="vLLM is not installed: make setup-vllm")
    made = Served(tmp_path_factory.mktemp("server"))
    yield made
    made.world.process.kill()


@pytest.mark.slow
def test_log_q_under_adapters_on_a_server_is_log_p_after_every_push_and_stale_without_one(served: Served) -> None:
    """The same prompts each time: a prefix cache that mixes pushes would show. One push is on the server at a time."""
    engine, before = served.engine(), served.names()
    for step in range(3):
        with engine.at(step):
            assert served.world.difference(engine) < TOLERANCE
        moved(served.model, seed=10 + step)
        with engine.at(step):  # no update since: nothing to push
            assert served.world.difference(engine) > 1000 * TOLERANCE
        (folder,) = served.weights.glob("*/*")
        assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
        assert served.names() == [*before, adapter_name(folder)]
    engine.close()
    assert served.names() == before
    assert not served.weights.exists()


@pytest.mark.slow
def test_two_runs_share_a_server_each_with_its_adapters(served: Served) -> None:
    other = moved(copy.deepcopy(served.model), seed=30)
    mine, theirs = served.engine(), served.engine(other)
    for step in range(2):
        with mine.at(step), theirs.at(step):
            for _ in range(2):  # there is room for one at a time: the other's are read again
                assert served.world.difference(mine) < TOLERANCE
                assert served.world.difference(theirs, other) < TOLERANCE
        moved(served.model, seed=40 + step)
    mine.close()
    theirs.close()


@pytest.mark.slow
def test_adapters_of_another_base_or_too_high_a_rank_or_none_are_refused_by_the_server_at_hand(served: Served) -> None:
    base = served.model.get_base_model()
    for name, rank, why in ((str(served.world.folder), 4, "adapters are of their base"), (None, 9, "rank is 9")):
        model = copy.deepcopy(base)
        model.name_or_path = name or model.name_or_path
        with pytest.raises(InputError, match=why):
            served.engine(add_adapter(model, LoraSettings(rank, 8, 0.0, None)))
    with pytest.raises(InputError, match="the place of the base"):
        served.engine(vllm_lora_sync="merged")


@pytest.mark.slow
def test_a_server_that_knows_the_adapters_no_longer_is_given_them_again(served: Served) -> None:
    """As after it was started again between two requests: it has never heard of their name."""
    engine = served.engine()
    with engine.at(0):
        (folder,) = served.weights.glob("*/*")
        served.world.server.unload(folder)
        assert adapter_name(folder) not in served.names()
        assert served.world.difference(engine) < TOLERANCE
        assert adapter_name(folder) in served.names()
    engine.close()


@pytest.mark.slow
def test_a_training_on_such_a_server_is_sent_adapters_and_samples_its_own_policy(served: Served) -> None:
    """Two iterations at a rate that moves them far, by `dro-rl train`'s own script."""
    run = served.world.folder / "run"
    done = launch(served.world.recipe, run, "--learning_rate", "1.0", "--vllm_lora_sync", "adapter")
    assert done.returncode == 0, done.stderr
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    steps = [line["sampling/logp_difference_max"] for line in history if "sampling/logp_difference_max" in line]
    assert len(steps) == 4
    assert max(steps) < 6 * TOLERANCE
    assert not (run / "vllm_weights").exists()


def test_a_server_that_has_the_adapters_by_another_address_or_from_before_has_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A name is loaded once, and stands for one push: vLLM refuses it the second time."""
    server, there = Server("http://127.0.0.1:1", 1.0, 1.0), ["base", "run-1-push-2"]

    def call(method: str, path: str, **body: Any) -> Any:
        if path == LOAD:
            raise InputError("vllm_server_base_url", "400", "it takes a name once", "")
        return {"data": [{"id": name} for name in there]}

    monkeypatch.setattr(server, "call", call)
    monkeypatch.setattr(server, "problem", lambda: None)
    server.load(Path("/weights/run-1/push-2"), alone=True)
    with pytest.raises(InputError, match="vllm_weights_dir"):
        server.load(Path("/weights/run-1/push-3"), alone=True)
