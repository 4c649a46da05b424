"""A run computes what it began, ends where it says, and keeps nothing that is not finite."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from training_world import weights, world

from dro_rl.cli.runs import show
from dro_rl.em.optimizer import align, role_factors
from dro_rl.errors import InputError
from dro_rl.job import identity, preflight
from dro_rl.job.console import kept
from dro_rl.job.identity import git_state, inputs_of
from dro_rl.job.output import claimed_output_dir
from dro_rl.job.preflight import check_disk, prepare
from dro_rl.recipe import load_recipe

Job = Callable[..., Path]


# What a run reads


def begin(folder: Path) -> None:
    """Claim the run's folder as the job does, on the files as they are now."""
    options = {"output_dir": str(folder / "run"), "resume_from_checkpoint": "auto"}
    recipe = load_recipe(folder / "recipe.yaml", options)
    job = prepare(recipe, 1)
    with claimed_output_dir(recipe, lambda: inputs_of(recipe, job.train, job.dev, job.prompters)):
        pass


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    world(tmp_path)
    begin(tmp_path)
    return tmp_path


def edit(name: str, old: str, new: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        path = folder / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return change


def one_weight(folder: Path) -> None:
    path = folder / "base-generator" / "model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, path)


TRAIN, DEV, SELECTOR = "dataset_name", "dataset_eval_split", "selector_model_name_or_path"
CHANGES = {
    "answers of training": (edit("train.jsonl", '"answers": ["', '"answers": ["old '), TRAIN, "answers"),
    "a question of training": (edit("train.jsonl", '"question": "where', '"question": "who'), TRAIN, "questions"),
    "labels of training": (edit("train.jsonl", '"supporting": ["d', '"supporting": ["d0", "d'), TRAIN, "labels"),
    "a document of dev": (edit("dev.jsonl", "lives in rome", "dwells in rome"), DEV, "documents"),
    "the selector's template": (edit("s.jinja", "{{ q", "Q: {{ q"), "selector_prompt_template", "template"),
    "the generator's template": (edit("g.jinja", "{{ d", "- {{ d"), "generator_prompt_template", "template"),
    "a weight": (one_weight, "generator_model_name_or_path", "model.safetensors"),
    "the tokenizer": (
        edit("base-selector/tokenizer_config.json", "{", '{"added": 1, '), SELECTOR, "tokenizer_config.json"
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_resumed_run_refuses_what_has_changed_and_names_it(begun: Path, change: str) -> None:
    do, key, part = CHANGES[change]
    begin(begun)
    do(begun)
    with pytest.raises(InputError) as refused:
        begin(begun)
    assert refused.value.place == key
    assert part in str(refused.value.value)
    assert "has changed since the run" in refused.value.rule


def test_what_computes_is_kept_of_every_start_and_another_version_is_said(
    begun: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    begin(begun)
    assert not caplog.records
    version = identity._version
    monkeypatch.setattr(identity, "_version", lambda name: "0.0.1" if name == "torch" else version(name))
    begin(begun)
    (line,) = [record.message for record in caplog.records]
    assert line == f"the run goes on under other versions than it had: torch {version('torch')} → 0.0.1"
    sessions = json.loads((begun / "run" / "run.json").read_text())["sessions"]
    assert [session["versions"]["torch"] for session in sessions] == [version("torch")] * 2 + ["0.0.1"]
    assert all({"started", "command", "machine"} <= set(session) for session in sessions)


def test_tokens_do_not_stand_in_the_command_that_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", "--hub_token", "hf_secret", "--tokens_per_microbatch", "64"])
    assert identity.this_session()["command"] == "train.py --hub_token … --tokens_per_microbatch 64"


def test_no_checkout_has_no_state(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None


# Learning rates

FLOORS = {
    "cosine_with_min_lr": {"min_lr": 1e-6},
    "polynomial": {"lr_end": 1e-6},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-6},
}


def settings(tmp_path: Path, **keys: Any) -> Any:
    return load_recipe(world(tmp_path), keys).training


@pytest.mark.parametrize("kind", FLOORS)
def test_an_absolute_floor_is_the_same_for_both_models(tmp_path: Path, kind: str) -> None:
    args = settings(tmp_path, lr_scheduler_type=kind, lr_scheduler_kwargs=FLOORS[kind])
    rates = (1e-5, 1e-3)
    factors = role_factors(args, rates, steps=100_000)
    ends = [rate * factor(100_000) for rate, factor in zip(rates, factors, strict=True)]
    assert ends == pytest.approx([1e-6, 1e-6], rel=1e-3)
    assert [factor(0) for factor in factors] == pytest.approx([1, 1])


@pytest.mark.parametrize(
    ("kind", "kwargs"),
    [
        ("cosine_with_min_lr", {"min_lr": 0.5}),
        ("polynomial", {"lr_end": 0.5}),
        ("cosine_with_min_lr", {}),
        ("cosine", {"no_such_thing": 1}),
    ],
    ids=["a floor above a rate", "an end above a rate", "no floor", "an unknown setting"],
)
def test_a_schedule_that_cannot_be_made_is_refused_before_a_model_is_loaded(
    tmp_path: Path, kind: str, kwargs: dict[str, float]
) -> None:
    recipe = load_recipe(world(tmp_path), {"lr_scheduler_type": kind, "lr_scheduler_kwargs": kwargs})
    with pytest.raises(InputError, match=r"^lr_scheduler_kwargs: "):
        prepare(recipe, 1)


def test_a_longer_run_has_its_own_schedule_from_where_it_goes_on(tmp_path: Path) -> None:
    """At the old end the rate had come to zero."""
    args = settings(tmp_path, lr_scheduler_type="linear")

    def scheduler(steps: int) -> LambdaLR:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
        return LambdaLR(optimizer, role_factors(args, [0.1], steps))

    old, same, longer = scheduler(4), scheduler(4), scheduler(8)
    for _ in range(4):
        old.optimizer.step()
        old.step()
    assert old.get_last_lr() == [0.0]
    for each in (same, longer):
        each.load_state_dict(old.state_dict())
        each.optimizer.load_state_dict(old.optimizer.state_dict())
    assert not align(same)
    assert align(longer)
    assert longer.get_last_lr() == [longer.optimizer.param_groups[0]["lr"]] == [pytest.approx(0.05)]


def test_going_on_past_the_end_trains_and_says_so(job: Job, caplog: pytest.LogCaptureFixture) -> None:
    keys = {
        "lr_scheduler_type": "linear", "optim": "adamw_torch", "learning_rate": 1e-3, "load_best_model_at_end": False,
    }  # fmt: skip
    run = job(num_iterations=1, **keys)
    before = weights(run)
    with caplog.at_level(logging.WARNING, "dro_rl"):
        job(num_iterations=2, **keys, resume_from_checkpoint="auto")
    assert any("the run ends at step 4 now" in record.message for record in caplog.records)
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    rates = {entry["step"]: entry["learning_rate"] for entry in history if "learning_rate" in entry}
    assert rates[3] == pytest.approx(0.5e-3)
    assert any((before[name] != tensor).any() for name, tensor in weights(run).items())
    with pytest.raises(InputError, match=r"^num_iterations: 1: .*comes after step 4 of 2"):
        job(num_iterations=1, **keys, resume_from_checkpoint="auto")


# The end


def test_a_run_that_made_dev_worse_keeps_what_it_started_from(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    run = job(learning_rate=30.0, metric_for_best_model="answer_logp", num_iterations=1)
    for role in ("selector", "generator"):
        base = load_file(run.parent / "world" / f"base-{role}" / "model.safetensors")
        found = load_file(run / role / "model.safetensors")
        assert all(torch.equal(tensor, found[name]) for name, tensor in base.items())
    said = capsys.readouterr().out
    assert "kept        base, with answer_logp" in said
    show(run)
    assert said.endswith(again := capsys.readouterr().out), "`runs show` prints the end again"
    assert again.lstrip().startswith("where the time went")


def stages(*values: float) -> list[dict[str, Any]]:
    names = ["base", *(f"iteration-{n}" for n in range(1, len(values))), "final"]
    return [{"stage": name, "f1": value} for name, value in zip(names, [*values, values[-1]], strict=True)]


@pytest.mark.parametrize(
    ("values", "stage", "line"),
    [
        ((50, 60, 55), "iteration-1", "iteration-1, of 2 evaluated, with f1 60.00; base had 50.00"),
        (
            (50, 60, 60),
            "iteration-1",
            "iteration-1, of 2 evaluated, with f1 60.00; base had 50.00; as good: iteration-2",
        ),
        ((50, 40, 45), "base", "base, with f1 50.00: no iteration was as good"),
        ((50, 40, 45), "iteration-2", "iteration-2, of 2 evaluated, with f1 45.00; base had 50.00, which is better"),
    ],
)
def test_the_end_says_what_was_kept_and_where_it_stands(values: tuple[float, ...], stage: str, line: str) -> None:
    assert kept(stages(*values), stage, "f1", greater_is_better=True) == line


# Numbers that are not finite


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"learning_rate": 1e38}, r"a weight|the loss|the gradient's norm|log-probability"),
        ({"learning_rate": 1e38, "max_grad_norm": 1e30}, r"a weight|the loss|the gradient's norm|log-probability"),
    ],
    ids=["a rate", "no clip"],
)
def test_a_run_that_diverges_stops_and_exports_nothing(
    job: Job, tmp_path: Path, keys: dict[str, Any], what: str
) -> None:
    with pytest.raises(InputError, match=rf"^step \d+: .*({what}).*lower .*_learning_rate") as stopped:
        job(**keys)
    assert "max_grad_norm" in stopped.value.fix
    assert "checkpoint-0 is the last good checkpoint" in stopped.value.rule
    assert not (tmp_path / "run" / "selector").exists()
    for place in (tmp_path / "run").glob("checkpoint-*/*/model.safetensors"):
        assert all(bool(tensor.isfinite().all()) for tensor in load_file(place).values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_holds_no_numbers_is_refused_before_it_trains(job: Job, tmp_path: Path, value: float) -> None:
    path = tmp_path / "world" / "base-selector" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = value
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"^step 1: a weight of the selector is (nan|inf)"):
        job()


# The disk, and lengths


def test_checkpoints_that_are_there_have_their_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(world(tmp_path), {"output_dir": str(tmp_path / "run")})
    models = {role: nn.Linear(1000, 1000) for role in ("selector", "generator")}
    for model in models.values():
        model.num_parameters = lambda: 1_000_000  # type: ignore[assignment]
    usage = shutil.disk_usage(tmp_path)._replace(free=31 * 2**20)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda place: usage)
    with pytest.raises(InputError, match=r"31\.0 MiB free at .*: .* take about 76\.3 MiB more"):
        check_disk(recipe, models)  # type: ignore[arg-type]
    for step in (2, 4):
        place = tmp_path / "run" / f"checkpoint-{step}" / "optimizer.pt"
        place.parent.mkdir(parents=True)
        with place.open("wb") as file:
            file.truncate(24_000_000)
    check_disk(recipe, models)  # type: ignore[arg-type]


@pytest.mark.parametrize(("k", "length", "fits"), [(2, 3, False), (2, 4, True), (1, 1, False), (1, 2, True)])
def test_a_length_that_no_selection_fits_is_refused(tmp_path: Path, k: int, length: int, fits: bool) -> None:
    recipe = load_recipe(world(tmp_path), {"num_selected": k, "max_completion_length": length})
    if fits:
        prepare(recipe, 1)
    else:
        with pytest.raises(InputError, match=rf"^max_completion_length: {length}: a selection of {k} documents fits"):
            prepare(recipe, 1)


def test_the_last_checkpoint_stays_when_one_is_kept(job: Job) -> None:
    """Beside the best, which is another: a longer run goes on from where this one ended."""
    run = job("run", save_total_limit=1, load_best_model_at_end=False)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
