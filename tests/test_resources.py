"""Claims about plans: what is counted is what a run does, what is kept is what autograd keeps, and advice helps."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import trainer_of
from training_world import questions, save_model, world
from typer.testing import CliRunner

from dro_rl.cli import app
from dro_rl.em.schedule import Schedule
from dro_rl.em.timing import known_card
from dro_rl.errors import InputError
from dro_rl.job.assembly import build_prompters
from dro_rl.likelihood import row_logps
from dro_rl.models import quantization
from dro_rl.models.loading import LoraSettings, add_adapter, load_model
from dro_rl.recipe import load_recipe
from dro_rl.resources.calibration import Calibration, calibrate, seconds
from dro_rl.resources.costs import Counts, Done, by_card, operations
from dro_rl.resources.machine import Machine, machine, parse_size
from dro_rl.resources.memory import Settings, peak, phases
from dro_rl.resources.models import RoleSize, size_of
from dro_rl.resources.plan import Plan, make_plan
from dro_rl.resources.work import Work, rows_of, work_of
from dro_rl.toy.world import TOY_BASE, make_world

GIB = 2**30
CPU = Machine("cpu", 1, 16 * GIB, None, here=True)
QUICKSTART = {"output_dir": "nowhere", "max_train_samples": 64, "max_eval_samples": 8}
SIZE = RoleSize(
    parameters=1000,
    trained=1000,
    weight_bytes=4000,
    trained_bytes=4000,
    forward=2000.0,
    step=6000.0,
    layers=2,
    width=8,
    vocabulary=16,
    attention=8,
    cache_bytes=64,
    packed=True,
    kept=100.0,
    kept_recomputing=20.0,
    casts=0,
    adapted=False,
    drops_out=False,
)
WORK = Work(
    prompt=10.0,
    selection=2.0,
    reading=5.0,
    answer=1.0,
    distinct=4.0,
    longest_prompt=12,
    longest_reading=6,
    longest_answer=2,
    tokens={"selector": 18.0, "generator": 24.0},
    pass_tokens={"selector": 100, "generator": 200},
    passes=1,
    predicting={"selector": 8, "generator": 4},
)
SETTINGS = Settings(
    devices=1,
    sharding="none",
    half=None,
    recomputes=False,
    optim="adamw_torch",
    accumulates=True,
    scores=False,
    reuses=False,
    shares_base=False,
    reference=False,
    warms=(),
    warmup_batch=1,
    engine="transformers",
    sampled_at_once=4,
    num_generations=4,
    decoded=3,
    constrained=True,
    vllm=0.0,
    vllm_sleeps=False,
    process=7.0,
)


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def plan_of(recipe: str | Path, changes: dict[str, Any], machine: Machine, sharding: Any = None) -> Plan:
    return make_plan(load_recipe(recipe, changes), machine, sharding)


def training_phase(settings: Settings, size: RoleSize = SIZE) -> Any:
    return next(
        each for each in phases(settings, {"selector": size, "generator": size}, WORK) if each.name == "training"
    )


# Sizes and devices


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GB", 80 * GIB), ("80 GiB", 80 * GIB), ("24g", 24 * GIB), ("1.5G", 3 * GIB // 2), ("512MB", 2**29)],
)
def test_sizes_are_powers_of_1024(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "80", "GB", "-1GB", "0GB", "80 bananas", "1e3GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--memory"):
        parse_size(text)


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("h100", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA L40S", "L40S"),
        ("RTX 9", None),
    ],
)
def test_a_card_is_known_by_any_of_its_names(name: str, card: str | None) -> None:
    assert known_card(name) == card


def test_gpus_elsewhere_need_a_size_and_a_known_name() -> None:
    assert machine(8, "80GB", "A100") == Machine("cuda", 8, 80 * GIB, "A100", here=False)
    with pytest.raises(InputError, match="--memory"):
        machine(8)
    with pytest.raises(InputError, match=r"--card: 'Z9000'.*H100"):
        machine(1, "80GB", "Z9000")


def test_processes_on_a_cpu_share_its_memory() -> None:
    assert machine(memory="8GB", on_cpu=True, processes=4).memory_of_a_process == 2 * GIB


# What is counted


def test_a_model_is_as_large_as_it_is_when_it_is_loaded() -> None:
    recipe = load_recipe("quickstart", QUICKSTART)
    model = load_model(str(TOY_BASE))
    size = size_of(recipe, "selector", None, [[*_rows(recipe)[0]["selector"]]])
    assert size.parameters == size.trained == sum(weight.numel() for weight in model.parameters())
    assert size.weight_bytes == 4 * size.parameters
    assert size.packed


@pytest.mark.parametrize("held", ["nf4", "int8"])
def test_a_base_in_codes_is_as_large_as_bitsandbytes_holds_it(held: str, tmp_path: Path) -> None:
    """Scales and their scales with it; embeddings and head stay numbers."""
    base = save_model(tmp_path / "base", 1, hidden_size=256, intermediate_size=512)
    keys = {"selector_lora_r": 4, "quantization": held}
    recipe = load_recipe(world(tmp_path / "w", selector_model_name_or_path=str(base), **keys))
    model = load_model(str(base), **quantization.settings_of(held, torch.float32))
    size = sum(p.nbytes for p in add_adapter(model, LoraSettings(4, 8, 0.0, None)).parameters())
    for layer in filter(quantization.is_quantised, model.modules()):
        state: Any = getattr(layer.weight, "quant_state", None)
        size += layer.weight.SCB.nbytes if state is None else state.absmax.nbytes + state.state2.absmax.nbytes
    rows = rows_of(recipe.training, questions(4), build_prompters(recipe))
    assert size_of(recipe, "selector", None, [rows[0]["selector"]]).weight_bytes == size


@pytest.mark.parametrize("role", ["selector", "generator"])
def test_what_autograd_keeps_is_counted_as_a_real_pass_keeps_it(role: Any) -> None:
    """The same rows through the loaded model, with every stored tensor added up once."""
    recipe = load_recipe("quickstart", QUICKSTART)
    rows = _rows(recipe)[0][role]
    model, kept = load_model(str(TOY_BASE)).train(), {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        row_logps(model, rows, prefix_tree=True)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    measured = sum(storage.nbytes() for place, storage in kept.items() if place not in weights)
    counted = size_of(recipe, role, None, [rows]).kept * sum(map(len, rows))
    assert counted == pytest.approx(measured, rel=0.1)  # the head's few rows apart


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"gradient_checkpointing": True}, {}),
        ({"selector_lora_r": 4}, {"trained": 4}),
        ({"selector_learning_rate": 0}, {"trained": 0}),
        ({"dtype": "bfloat16", "selector_lora_r": 4, "generator_lora_r": 4}, {"bytes": 2}),
    ],
)
def test_a_recipe_says_what_trains_and_in_what_it_is_held(changes: dict[str, Any], expected: dict[str, int]) -> None:
    recipe = load_recipe("quickstart", {**QUICKSTART, **changes})
    size = size_of(recipe, "selector", None, [_rows(recipe)[0]["selector"]])
    whole = sum(weight.numel() for weight in load_model(str(TOY_BASE)).parameters())
    if expected.get("trained") == 0:
        assert size.trained == 0
    elif "trained" in expected:
        assert 0 < size.trained == size.parameters - whole
    if "bytes" in expected:
        assert size.weight_bytes == pytest.approx(2 * whole, rel=0.5)
    assert size.kept_recomputing < size.kept / 5


def test_half_precision_keeps_less_and_holds_casts() -> None:
    recipe = load_recipe("quickstart", QUICKSTART)
    rows = [_rows(recipe)[0]["selector"]]
    single, half = (size_of(recipe, "selector", kind, rows) for kind in (None, torch.bfloat16))
    assert half.kept < single.kept
    assert (single.casts, half.cache_bytes) == (0, single.cache_bytes // 2)
    assert 1.9 * half.parameters < half.casts <= 2 * half.parameters


def _rows(recipe: Any) -> list[Any]:
    return rows_of(recipe.training, make_world("train", 4), build_prompters(recipe))


def test_the_fullest_pass_is_bounded_by_its_key_and_never_less_than_a_question() -> None:
    recipe = load_recipe("quickstart", QUICKSTART)
    rows = _rows(recipe)
    packed = {"selector": True, "generator": True}
    whole = work_of(recipe.training, rows, packed)
    assert whole.passes == 1
    one = sum(whole.tokens.values())
    assert sum(whole.pass_tokens.values()) == pytest.approx(16 * one, rel=0.05)
    cut = work_of(load_recipe("quickstart", {**QUICKSTART, "tokens_per_microbatch": 1000}).training, rows, packed)
    assert 1000 - one <= sum(cut.pass_tokens.values()) <= 1000
    assert cut.passes == math.ceil(16 / (1000 // one))
    alone = work_of(load_recipe("quickstart", {**QUICKSTART, "tokens_per_microbatch": 1}).training, rows, packed)
    assert sum(alone.pass_tokens.values()) == pytest.approx(one, rel=0.1)
    assert alone.passes == 16


# Memory


@pytest.mark.parametrize(
    ("optim", "bytes_a_weight"), [("adamw_torch_fused", 8), ("adamw_8bit", 2), ("sgd", 0), ("adagrad", 4)]
)
def test_an_optimizer_keeps_so_many_bytes(optim: str, bytes_a_weight: int) -> None:
    assert training_phase(replace(SETTINGS, optim=optim)).optimizer == 2 * 1000 * bytes_a_weight


def test_a_training_pass_holds_weights_gradients_moments_and_what_autograd_keeps() -> None:
    phase = training_phase(SETTINGS)
    assert (phase.weights, phase.gradients, phase.optimizer, phase.other) == (8000, 8000, 16000, 7)
    assert phase.activations == 300 * 100 + 200 * 100 / 2  # both models' tokens, and the larger pass's layer


@pytest.mark.parametrize(
    ("sharding", "weights", "gradients", "optimizer"),
    [
        ("ddp", 8000, 16000, 16000),
        ("fsdp2", 2000, 2000, 4000),
        ("zero2", 4000, 1000, 6000),
        ("zero3", 1000, 1000, 6000),
    ],
)
def test_sharding_divides_what_it_shards_by_the_devices(
    sharding: Any, weights: float, gradients: float, optimizer: float
) -> None:
    phase = training_phase(replace(SETTINGS, devices=4, sharding=sharding))
    assert (phase.weights, phase.gradients, phase.optimizer) == (weights, gradients, optimizer)


def test_a_frozen_model_has_weights_alone() -> None:
    phase = training_phase(SETTINGS, replace(SIZE, trained=0, trained_bytes=0))
    assert (phase.gradients, phase.optimizer, phase.activations) == (0, 0, 200 * 100 / 2)


def test_a_shared_base_is_held_once_and_is_the_reference_of_its_adapters() -> None:
    adapted = replace(SIZE, trained=10, trained_bytes=40, adapted=True)
    apart, shared, held_near = (
        training_phase(replace(SETTINGS, shares_base=shares, reference=near), adapted).weights
        for shares, near in ((False, False), (True, False), (True, True))
    )
    assert (apart, shared, held_near) == (8000, 4040, 4080)
    assert training_phase(replace(SETTINGS, reference=True)).weights == 12000


def test_vllm_asleep_leaves_its_memory_to_training() -> None:
    awake, asleep = (training_phase(replace(SETTINGS, engine="vllm", vllm=5e5, vllm_sleeps=on)) for on in (False, True))
    assert awake.total - asleep.total == 5e5


def test_recomputation_and_the_fullest_phase() -> None:
    found = phases(replace(SETTINGS, scores=True, warms=("selector",)), {"selector": SIZE, "generator": SIZE}, WORK)
    assert [each.name for each in found] == ["warm-up selector", "sampling", "scoring", "training", "optimizer step"]
    assert peak(found).name == "training"
    assert training_phase(replace(SETTINGS, recomputes=True)).total < training_phase(SETTINGS).total


def test_a_generator_that_is_elsewhere_takes_nothing_here() -> None:
    found = phases(replace(SETTINGS, scores=True), {"selector": SIZE}, WORK)
    assert [each.name for each in found] == ["sampling", "training", "optimizer step"]
    assert peak(found).weights == 4000
    done = operations({"selector": SIZE}, WORK, counts(), scores=True, reuses=False, recomputes=False)
    assert [each.phase for each in done] == ["rollout", "selector", "evaluation"]


# Work and time


def counts(**changes: Any) -> Counts:
    schedule = Schedule(64, 8, 4, 1, 3, 4, 0)
    known: dict[str, Any] = {"schedule": schedule, "steps": 6, "iterations": 3, "evaluations": 5, "dev": 10}
    known |= {"checkpoints": 2, "warmup_steps": {}, "warmup_batch": 2}
    return Counts(**{**known, **changes})


def test_operations_are_two_a_weight_and_token_forward_and_four_backward() -> None:
    size = replace(SIZE, attention=0, width=0)
    done = {
        each.phase: each
        for each in operations(
            {"selector": size, "generator": size}, WORK, counts(), scores=True, reuses=False, recomputes=False
        )
    }
    assert done["rollout"].operations == 24 * (10 + 4 * 2) * 2000
    assert done["scoring"].operations == 24 * 24 * 2000
    assert done["selector"].operations == 24 * 18 * 6000
    assert done["generator"].tokens == 24 * 24


def test_a_prompt_that_is_read_once_goes_forward_in_sampling_alone() -> None:
    size = replace(SIZE, attention=0, width=0)
    twice, once = (
        operations({"selector": size}, WORK, counts(), scores=False, reuses=reuses, recomputes=False)[1].operations
        for reuses in (False, True)
    )
    assert twice - once == 24 * (18 - WORK.distinct * WORK.selection) * 2000
    held = [training_phase(replace(SETTINGS, reuses=reuses)).activations for reuses in (False, True)]
    assert held[1] - held[0] == 100 * SIZE.cache_bytes + SIZE.casts


def test_a_card_does_its_share_of_the_peak_and_reads_all_weights_for_each_decoded_token() -> None:
    device = Machine("cuda", 2, 80 * GIB, "H100", here=False)
    sizes = {"selector": SIZE, "generator": SIZE}
    found = by_card([Done("selector", 1.0, 989e12), Done("rollout", 1.0, 0.0)], sizes, WORK, counts(), device, 12)
    assert found[0].seconds == pytest.approx(1 / (0.4 * 2))
    assert found[1].seconds == pytest.approx(24 / 12 * 2 * 2 * 1000 / (3.35e12 * 2))


def test_a_short_run_s_pace_is_the_whole_run_s() -> None:
    pace = Calibration({"rollout": 0.5}, {"selector": 2.0}, 0.1, 3.0, {"selector": 0.25}, {"selector": 1.0}, 7.0, 6)
    found = seconds([Done("rollout", 5.0, 6.0)], pace, counts(warmup_steps={"selector": 8}))
    assert {each.phase: each.seconds for each in found} == {
        "rollout": 12.0,
        "selector": 12.0,
        "evaluation": 5.0,
        "checkpoint": 6.0,
        "warm-up selector": 3.0,
        "before and after": 7.0,
    }
    assert (found[0].tokens, found[0].operations) == (5.0, 6.0)


@pytest.mark.slow
def test_calibration_runs_the_job_and_leaves_nothing(tmp_path: Path) -> None:
    recipe = world(tmp_path / "w", warmup="selector", warmup_selector_steps=20)
    found = calibrate(load_recipe(recipe).values, 2, 4)
    assert found.steps == 6
    assert {"selector", "generator", "optimizer"} <= found.of_a_step.keys()
    assert found.of_a_question["rollout"] > 0
    assert found.evaluation > 0
    assert found.checkpoint > 0
    assert set(found.warmup_step) == {"selector"}
    assert not (tmp_path / "w" / "run").exists()
    assert not (tmp_path / "w" / "cache").exists()


def test_a_wrong_input_found_in_another_process_says_the_same() -> None:
    import pickle

    error = InputError("key", ["a", 1], "this is a rule", "Do that.")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


# Plans


def test_a_plan_counts_what_the_job_does(tmp_path: Path) -> None:
    recipe = world(tmp_path / "w")
    plan = plan_of(recipe, {}, CPU)
    assert (plan.counts.steps, plan.counts.iterations, plan.rollouts) == (4, 2, 64)
    assert plan.counts.evaluations == 4  # the start, after each of two iterations, and the end
    assert plan.counts.checkpoints == 3
    assert plan.fits
    assert plan.seconds is None
    stopped = plan_of(recipe, {"max_steps": 3, "eval_iterations": 5, "warmup": "both"}, CPU)
    assert (stopped.counts.steps, stopped.counts.iterations, stopped.counts.evaluations) == (3, 2, 4)
    assert stopped.counts.warmup_steps == {"selector": 2, "generator": 2}  # an epoch of 12 questions by 8


def test_a_warm_up_on_quotes_is_planned_by_its_conversations(tmp_path: Path) -> None:
    """They are longer than the prompts that selections are imitated on."""
    recipe = world(tmp_path / "w", warmup="selector")
    orders = {order: plan_of(recipe, {"warmup_selector_order": order}, CPU) for order in ("labels", "quotes")}
    longer = orders["quotes"].work.longest_conversation / orders["labels"].work.longest_prompt
    assert longer > 1.5
    assert orders["labels"].work.longest_conversation == 0
    tokens = {
        order: next(each for each in plan.done if each.phase == "warm-up selector").tokens
        for order, plan in orders.items()
    }
    assert tokens["quotes"] > 1.5 * tokens["labels"]
    held = {order: plan.phases[0].activations for order, plan in orders.items()}
    assert held["quotes"] > 1.5 * held["labels"]


def test_a_plan_scores_apart_where_the_trainer_does(tmp_path: Path) -> None:
    """Twelve questions by eight a step: an iteration of all whole steps is one step, whose pass weighs too."""
    recipe, once = world(tmp_path / "w"), {"questions_per_iteration": None, "per_device_train_batch_size": 8}
    for changes, fused in (({}, False), (once, True), (once | {"selector_lora_r": 4, "lora_dropout": 0.1}, False)):
        plan = plan_of(recipe, changes, CPU)
        assert ("scoring" not in [phase.name for phase in plan.phases]) == fused
        assert ("scoring" not in [done.phase for done in plan.done]) == fused
        assert trainer_of(tmp_path / str(len(changes)), **changes).fused == fused


def test_a_plan_for_gpus_is_of_their_steps_and_their_precision() -> None:
    plan = plan_of(
        "quickstart",
        {**QUICKSTART, "questions_per_iteration": 128, "max_train_samples": 128},
        machine(8, "80GB", "A100"),
        "fsdp2",
    )
    assert plan.counts.schedule.questions_per_step == 128
    assert plan.precision == "bfloat16"
    assert plan.seconds is not None


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({}, "tokens_per_microbatch"),
        ({"tokens_per_microbatch": 1024, "per_device_eval_batch_size": 1}, "gradient_checkpointing"),
    ],
)
def test_advice_makes_it_fit(changes: dict[str, Any], key: str) -> None:
    """Room for a little less than the plan takes: the first key that is enough is named, and it is enough."""
    changes = {**QUICKSTART, "rollout_engine": "transformers", **changes}
    room = machine(1, "80GB", None)
    tight = replace(room, memory=int(plan_of("quickstart", changes, room).peak.total) - 2**20)
    plan = plan_of("quickstart", changes, tight)
    assert not plan.fits
    assert plan.advice is not None
    assert list(plan.advice.changes) == [key]
    assert plan_of("quickstart", changes | plan.advice.changes, tight).fits


def test_a_warm_up_of_fewer_questions_a_pass_has_as_many_a_step() -> None:
    """Where its passes are what does not fit."""
    changes = {
        **QUICKSTART, "rollout_engine": "transformers", "warmup": "selector", "warmup_batch_size": 256,
        "warmup_gradient_accumulation_steps": 2, "tokens_per_microbatch": 1024, "per_device_eval_batch_size": 1,
    }  # fmt: skip
    room = machine(1, "80GB", None)
    tight = replace(room, memory=int(plan_of("quickstart", changes, room).peak.total) - 2**20)
    plan = plan_of("quickstart", changes, tight)
    assert plan.advice is not None
    assert plan.advice.changes == {"warmup_batch_size": 1, "warmup_gradient_accumulation_steps": 512}
    assert plan_of("quickstart", changes | plan.advice.changes, tight).fits
    assert plan_of("quickstart", changes | plan.advice.changes, tight).counts.warmup_batch == plan.counts.warmup_batch


def test_where_nothing_helps_the_plan_says_so() -> None:
    plan = plan_of("quickstart", QUICKSTART, Machine("cuda", 1, GIB // 2, None, here=False))
    assert plan.advice is not None
    assert not plan.advice.fits


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        (("--gpus", "1"), "--memory"),
        (("--memory", "much"), "--memory"),
        (("--gpus", "1", "--memory", "80GB", "--card", "toaster"), "--card"),
        (("--sharding", "zero3"), "--sharding"),
        (("--gpus", "2", "--memory", "80GB", "--calibrate", "--questions_per_iteration", "32"), "--calibrate"),
        (("--num_selected", "13"), "num_selected"),
        (("--max_steps", "99999"), "max_steps"),
        (("--max_completion_length", "3"), "max_completion_length"),
        (("--metric_for_best_model", "nonsense"), "metric_for_best_model"),
        (("--dataset_name", "nowhere.jsonl"), "dataset_name"),
        (("--generator_model_name_or_path", "no/model"), "generator_model_name_or_path"),
        (("--nonsense", "1"), "nonsense"),
    ],
)
def test_what_cannot_be_planned_is_a_line_and_status_2(
    arguments: tuple[str, ...], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = run("plan", "quickstart", *arguments)
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith(f"error: {place}")
    assert len(done.stderr.splitlines()) == 1


def test_the_plan_is_printed_and_as_json_and_its_status_says_whether_it_fits(tmp_path: Path) -> None:
    keys = (
        "quickstart",
        "--output_dir",
        tmp_path / "run",
        "--max_train_samples",
        "64",
        "--rollout_engine",
        "transformers",
    )
    done = run("plan", *keys)
    assert done.exit_code == 0
    assert "fits" in done.stdout
    assert max(map(len, done.stdout.splitlines())) < 200
    told = json.loads(run("plan", *keys, "--json").stdout)
    assert told["steps"] == told["iterations"] == 160
    assert told["peak"]["bytes"] == max(phase["total"] for phase in told["phases"])
    small = run("plan", *keys, "--gpus", "1", "--memory", "900MB")
    assert small.exit_code == 1
    assert "tokens_per_microbatch" in small.stdout


def test_a_dry_run_prints_the_plan_and_trains_nothing(tmp_path: Path) -> None:
    done = run("train", "quickstart", "--dry-run", "--output_dir", tmp_path / "run", "--launch", "--config_file cpu")
    assert done.exit_code == 0, done.output
    assert "160 steps of 16" in done.stdout
    assert not (tmp_path / "run").exists()
