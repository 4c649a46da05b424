"""The loop: what moves, what does not, and that no arrangement of the same work changes the result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_world import largest_difference, launch, save_model, weights, world
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, MistralForCausalLM
from typer.testing import CliRunner

from dro_rl import likelihood, pipeline
from dro_rl.cli import app
from dro_rl.data import load_questions
from dro_rl.em import fast_path
from dro_rl.em.checkpoints import Checkpoints
from dro_rl.errors import InputError
from dro_rl.evaluation.evaluator import evaluate_stage
from dro_rl.evaluation.results import read_results
from dro_rl.evaluation.stages import read_stages
from dro_rl.job.assembly import build_prompters, load_models
from dro_rl.likelihood import completion_logps, packing
from dro_rl.models.loading import LoraSettings, add_adapter
from dro_rl.models.saving import export_role
from dro_rl.recipe import load_recipe
from dro_rl.roles import ROLES
from dro_rl.rollouts import log as rollout_log
from dro_rl.trainer import DROTrainer

Job = Callable[..., Path]


def trainer_of(job_folder: Path, **keys: Any) -> DROTrainer:
    recipe = load_recipe(world(job_folder), keys)
    questions = load_questions(recipe.run.dataset_name, "train")
    sources = {role: recipe.run.of(role).model for role in ROLES}
    return DROTrainer(load_models(recipe, sources), recipe.training, questions, None, build_prompters(recipe))


def base(run: Path, role: str) -> dict[str, torch.Tensor]:
    return load_file(run.parent / "world" / f"base-{role}" / "model.safetensors")


def test_every_parameter_of_both_models_moves(job: Job) -> None:
    run = job(load_best_model_at_end=False)
    for role in ROLES:
        trained = load_file(run / role / "model.safetensors")
        unmoved = [name for name, tensor in base(run, role).items() if torch.equal(tensor, trained[name])]
        assert not unmoved


def test_a_run_leaves_all_its_files(job: Job) -> None:
    run = job()
    for name in (
        "recipe.yaml",
        "selector/config.json",
        "generator/config.json",
        "selector/README.md",
        "generator/README.md",
        "trainer_state.json",
        "pipeline.json",
    ):
        assert (run / name).is_file(), name
    assert {path.name for path in (run / "evaluation").iterdir()} == {
        "summary.json", "curves.png", "base.parquet", "iteration-1.parquet", "iteration-2.parquet", "final.parquet",
    }  # fmt: skip
    assert len(rollout_log.part_paths(run)) == 2
    assert (run / "checkpoint-4").is_dir()
    assert not list(run.glob(".*"))


def test_the_listed_metrics_are_reported_at_every_step(job: Job) -> None:
    run = job()
    steps = [e for e in json.loads((run / "trainer_state.json").read_text())["log_history"] if "loss" in e]
    wanted = {
        "evidence_bound", "ess", "weight_entropy", "answer_logp", "selector_entropy", "rollouts/valid",
        "rollouts/duplicate", "rollouts/all_tie", "recall@1", "recall@3", "recall@5", "selector/loss", "generator/loss",
        "selector/grad_norm", "generator/grad_norm", "selector/learning_rate", "generator/learning_rate",
    }  # fmt: skip
    assert len(steps) == 4
    for step in steps:
        assert wanted <= set(step)
    fresh = [step for step in steps if "sampling/logp_difference_max" in step]
    assert len(fresh) == 2, "the engine is compared with the trainer where the weights are those that sampled"
    assert all(step["sampling/logp_difference_max"] < 1e-4 for step in fresh)


@pytest.mark.parametrize("frozen", ROLES)
def test_a_frozen_side_is_bit_identical_and_has_no_optimizer_state(job: Job, frozen: str) -> None:
    run = job(**{f"{frozen}_learning_rate": 0.0}, load_best_model_at_end=False)
    other = "generator" if frozen == "selector" else "selector"
    kept, moved = (load_file(run / role / "model.safetensors") for role in (frozen, other))
    assert all(torch.equal(tensor, kept[name]) for name, tensor in base(run, frozen).items())
    assert not all(torch.equal(tensor, moved[name]) for name, tensor in base(run, other).items())
    groups = torch.load(run / "checkpoint-4" / "optimizer.pt", weights_only=True)["param_groups"]
    assert sum(len(group["params"]) for group in groups) == len(base(run, other))


@pytest.mark.parametrize(
    "arrangement",
    [
        {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1},
        {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16},
        {"per_device_eval_batch_size": 1},
        {"shared_prefix": "off"},
        {"tokens_per_microbatch": 1},
        {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "tokens_per_microbatch": 250},
        {"gradient_checkpointing": True},
    ],
    ids=[
        "one micro-batch",
        "two",
        "groups split over micro-batches",
        "small inference batches",
        "plain",
        "each question alone",
        "as many questions as have room",
        "checkpointed",
    ],
)
def test_the_arrangement_of_the_work_does_not_change_the_weights(job: Job, arrangement: dict[str, Any]) -> None:
    assert largest_difference(weights(job("one")), weights(job("other", **arrangement))) < 2e-6


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"m_step_epochs": 2, "tokens_per_microbatch": 200},
        {"temperature": 1.3, "beta": 0.1, "entropy_coef": 0.01},
        {"target_ess": 0.7, "selector_baseline": "none", "shared_prefix": "off"},
    ],
    ids=["plain", "two epochs, by parts", "another proposal, regularised", "tempered, padded"],
)
def test_fusing_the_e_step_with_the_m_step_changes_nothing(job: Job, settings: dict[str, Any]) -> None:
    """Rollouts, weights, log and models are those of scoring first, without its passes."""
    online = {"questions_per_iteration": 4, "num_iterations": 3, **settings}
    fused, apart = job("fused", **online), job("apart", **online, fused_e_step="off")
    assert largest_difference(weights(fused), weights(apart)) < 2e-6
    tables = [rollout_log.read(rollout_log.part_paths(run)).to_pylist() for run in (fused, apart)]
    assert len(tables[0]) == 3 * 4 * 4
    for one, other in zip(*tables, strict=True):
        for name, value in other.items():
            expected = pytest.approx(value, abs=1e-4, nan_ok=True) if isinstance(value, float) else value
            assert one[name] == expected or name == "proposal_logps", name
    logs = [
        [entry for entry in json.loads((run / "trainer_state.json").read_text())["log_history"] if "loss" in entry]
        for run in (fused, apart)
    ]
    if "beta" not in settings:  # the initial selector is asked all the same
        assert not any("time/scoring" in entry for entry in logs[0])
    assert all("time/scoring" in entry for entry in logs[1][:: settings.get("m_step_epochs", 1)])
    for one, other in zip(*logs, strict=True):
        for name in set(other) - {"time/scoring", "tokens_per_second/scoring"}:
            if not name.startswith(("time/", "tokens_per_second/")):
                assert one[name] == pytest.approx(other[name], abs=1e-4, nan_ok=True), name


def test_a_prefix_tree_does_not_change_the_weights(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = weights(job("alone", prefix_tree=False))
    monkeypatch.setattr(packing, "WORTH_SHARING", 1)
    monkeypatch.setattr(packing, "WORTH_SAVING", 0.0)
    branches = 0
    lay_out = likelihood.lay_out

    def spy(rows: Any, **options: Any) -> Any:
        nonlocal branches
        layout = lay_out(rows, **options)
        branches += sum(len(segment.keys) > 1 for segment in layout.segments)
        return layout

    monkeypatch.setattr(likelihood, "lay_out", spy)
    assert largest_difference(weights(job("tree", prefix_tree=True)), alone) < 2e-6
    assert branches > 10


@pytest.mark.parametrize(("shared", "room"), [("auto", 250), ("off", 600)])
def test_a_pass_of_training_holds_no_more_than_its_tokens(tmp_path: Path, shared: str, room: int) -> None:
    """A question alone may have more. On the plain path each completion counts with its prompt."""
    trainer = trainer_of(
        tmp_path, per_device_train_batch_size=16, gradient_accumulation_steps=1, shared_prefix=shared,
        tokens_per_microbatch=room, verify_fast_path=False,
    )  # fmt: skip
    slots = [p * 4 + j for p in trainer.schedule.positions(0) for j in range(4)]
    rollouts = trainer.e_step(0)
    seen: list[int] = []
    for role in ROLES:
        embeddings = getattr(trainer.model, role).get_input_embeddings()
        embeddings.register_forward_hook(lambda _, args, __: seen.append(args[0].numel()))
    passed = trainer._micro_batches(rollouts, slots)
    trainer.current_gradient_accumulation_steps = 1
    for micro_batch in passed:
        seen.clear()
        trainer.compute_loss(trainer.model, micro_batch)
        slack = 1.0 if shared == "auto" else 1.2  # padding comes on top
        assert sum(seen) <= room * slack
    assert 1 < len(passed) <= 4


def test_where_dropout_disturbs_the_pass_the_e_step_comes_first(tmp_path: Path) -> None:
    online = {"questions_per_iteration": 4, "selector_lora_r": 2}
    assert trainer_of(tmp_path / "plain", **online).fused
    assert not trainer_of(tmp_path / "dropping", **online, lora_dropout=0.1).fused


def test_a_run_with_dropping_adapters_resumes(job: Job) -> None:
    """The check of the first step meets adapters that do something, and their dropout."""
    keys = {"selector_lora_r": 4, "generator_lora_r": 4, "lora_dropout": 0.1, "questions_per_iteration": 4}
    job("run", **keys, max_steps=2)
    run = job("run", **keys, resume_from_checkpoint="auto")
    assert (run / "selector" / "model.safetensors").is_file()


def test_a_run_is_resumed_with_steps_of_the_same_size_only(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice as many processes, say, which would count another place in the run."""
    twice = {"questions_per_step": 8, "num_questions": 12}
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "_steps_hold", lambda _: twice)
        run = job("run", max_steps=2)
    assert json.loads((run / "checkpoint-2" / "schedule.json").read_text()) == twice
    with pytest.raises(InputError, match="it had 8 of 12 questions a step, and has 4 of 12 now"):
        job("run", resume_from_checkpoint="auto")


def test_each_model_is_verified_on_its_first_turn(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    verified: list[str] = []
    monkeypatch.setattr(fast_path, "check", lambda role, found, dtype: verified.append(role))
    job(interleave="alternate")
    assert verified == ["selector", "generator"]


def test_a_window_too_narrow_to_pack_is_said(job: Job, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """Auto takes the plain path and says so; on is refused."""
    llama = LlamaConfig.from_pretrained(save_model(tmp_path / "narrow", 1)).to_dict()
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    kept += ("num_key_value_heads", "max_position_embeddings", "pad_token_id", "eos_token_id", "bos_token_id")
    config = MistralConfig(**{name: llama[name] for name in kept}, sliding_window=4)
    MistralForCausalLM(config).save_pretrained(tmp_path / "narrow")
    with caplog.at_level("WARNING", "dro_rl"):
        job(selector_model_name_or_path=str(tmp_path / "narrow"))
    assert [r.message for r in caplog.records if "a window of 4" in r.message and "plain path" in r.message]
    with pytest.raises(InputError, match="a window of 4"):
        job("on", selector_model_name_or_path=str(tmp_path / "narrow"), shared_prefix="on")


def test_training_moves_much_further_than_that_tolerance(job: Job) -> None:
    run = job()
    start = {f"{role}.{name}": tensor for role in ROLES for name, tensor in base(run, role).items()}
    assert largest_difference(weights(run), start) > 1e-3


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A recipe, and the weights that one process trains by it: it scores first.

    AdamW has a state to go on with. Its epsilon is large, since a small one turns rounding into whole steps.
    """
    folder = tmp_path_factory.mktemp("alone")
    recipe = world(
        folder / "world", questions_per_iteration=4, num_iterations=4, fused_e_step="off", optim="adamw_torch",
        adam_epsilon=1.0,
    )  # fmt: skip
    one = launch(recipe, folder / "one")
    assert one.returncode == 0, one.stderr[-3000:]
    return recipe, weights(folder / "one")


FUSED_BY_PARTS = ["--per_device_train_batch_size", "8", "--tokens_per_microbatch", "200", "--fused_e_step", "auto"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("ddp", ["--gradient_accumulation_steps", "1", *FUSED_BY_PARTS]),
        ("ddp", ["--per_device_train_batch_size", "2"]),
        ("fsdp2", ["--gradient_accumulation_steps", "1", *FUSED_BY_PARTS]),
        ("fsdp2", ["--per_device_train_batch_size", "2"]),
    ],
    ids=[
        "ddp, fused, by parts",
        "ddp, groups span processes",
        "fsdp2, fused, by parts",
        "fsdp2, groups span processes",
    ],
)
def test_two_processes_train_to_the_weights_of_one_and_resume(
    tmp_path: Path, alone: tuple[Path, dict[str, torch.Tensor]], config: str, options: list[str]
) -> None:
    """Two fuse, with as many parts as they have room for, and wait for each other."""
    recipe, expected = alone
    two = launch(recipe, tmp_path / "two", *options, processes=2, config=config)
    assert two.returncode == 0, two.stderr[-3000:]
    assert largest_difference(expected, weights(tmp_path / "two")) < 2e-6

    half = launch(recipe, tmp_path / "half", *options, "--max_steps", "2", processes=2, config=config)
    assert half.returncode == 0, half.stderr[-3000:]
    rest = launch(recipe, tmp_path / "half", *options, "--resume_from_checkpoint", "auto", processes=2, config=config)
    assert rest.returncode == 0, rest.stderr[-3000:]
    assert (tmp_path / "half" / "checkpoint-4").is_dir()
    assert largest_difference(weights(tmp_path / "two"), weights(tmp_path / "half")) == 0


def test_the_gradient_of_a_step_is_the_plain_formula(tmp_path: Path) -> None:
    """One micro-batch through the trainer against −(1/Q) Σ_q Σ_i c_i log p(z_i) and −(1/Q) Σ_q Σ_i w_i log p(y|d_z)."""
    trainer = trainer_of(tmp_path, per_device_train_batch_size=16, gradient_accumulation_steps=1)
    slots = [p * 4 + j for p in trainer.schedule.positions(0) for j in range(4)]
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer()
    trainer.training_step(trainer.model, slots)
    rollouts = [trainer.e_step(0).groups[slot // 4][slot % 4] for slot in slots]

    reference = trainer_of(tmp_path / "again").model
    for rollout in rollouts:
        question = trainer.train_questions[rollout.question]
        prompt = trainer.prompters["selector"].selector_prompt(question, 2).ids
        logp = completion_logps(reference.selector, prompt, [rollout.token_ids], shared_prefix=False)[0].sum()
        loss = -(rollout.weight - rollout.proposal_weight) * logp / 4
        if rollout.selection.valid:
            prompt = trainer.prompters["generator"].generator_prompt(question, rollout.selection.numbers).ids
            answer = trainer.prompters["generator"].completion(question.answers[0])
            logp = completion_logps(reference.generator, prompt, [answer], shared_prefix=False)[0].sum()
            loss = loss - rollout.weight * logp / 4
        loss.backward()
    assert any(not rollout.selection.valid for rollout in rollouts)
    assert any(rollout.selection.valid for rollout in rollouts)
    for (name, mine), (_, plain) in zip(trainer.model.named_parameters(), reference.named_parameters(), strict=True):
        assert mine.grad is not None
        assert plain.grad is not None
        torch.testing.assert_close(mine.grad, plain.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_each_model_has_its_learning_rate_and_its_clip(tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path, selector_learning_rate=0.3, generator_learning_rate=0.7, max_grad_norm=0.5,
        per_device_train_batch_size=16, gradient_accumulation_steps=1,
    )  # fmt: skip
    trainer.create_optimizer()
    rates = {
        role: {g["lr"] for g in trainer.optimizer.param_groups if any(p is q for p in g["params"] for q in own)}
        for role in ROLES
        for own in [list(getattr(trainer.model, role).parameters())]
    }
    assert rates == {"selector": {0.3}, "generator": {0.7}}
    trainer.current_gradient_accumulation_steps = 1
    trainer.training_step(trainer.model, [p * 4 + j for p in trainer.schedule.positions(0) for j in range(4)])
    trainer._clip_grad_norm(trainer.model)
    for role in ROLES:
        norms = [p.grad.norm() for p in getattr(trainer.model, role).parameters() if p.grad is not None]
        torch.testing.assert_close(torch.stack(norms).norm(), torch.tensor(0.5), rtol=1e-3, atol=0)


def test_models_take_turns_with_a_period_each(job: Job) -> None:
    run = job(
        interleave="alternate", selector_steps=1, generator_steps=2, save_steps=1, save_total_limit=None,
        eval_iterations=10, weight_decay=0.0,
    )  # fmt: skip
    before = {role: base(run, role) for role in ROLES}
    moved = []
    for step in range(1, 5):
        now = {role: load_file(run / f"checkpoint-{step}" / role / "model.safetensors") for role in ROLES}
        moved.append([role for role in ROLES if not all(torch.equal(now[role][n], t) for n, t in before[role].items())])
        before = now
    assert moved == [["selector"], ["generator"], ["generator"], ["selector"]]


def test_one_e_step_can_cover_the_whole_set_and_several_epochs(job: Job) -> None:
    run = job(questions_per_iteration=None, m_step_epochs=2)
    table = rollout_log.read(rollout_log.part_paths(run, 1)).to_pydict()
    assert sorted(set(table["question_index"])) == list(range(12))
    assert (run / "checkpoint-12").is_dir(), "two iterations, two epochs, three steps each"


def test_adapters_train_alone_and_are_merged_to_serve(job: Job) -> None:
    run = job(selector_lora_r=4, generator_lora_r=4, load_best_model_at_end=False)
    for role in ROLES:
        merged = AutoModelForCausalLM.from_pretrained(run / role)
        start = AutoModelForCausalLM.from_pretrained(run.parent / "world" / f"base-{role}")
        untouched = {"model.embed_tokens.weight", "model.norm.weight"}
        state = merged.state_dict()
        assert all(torch.equal(state[name], start.state_dict()[name]) for name in untouched)
        assert not torch.equal(state["model.layers.0.self_attn.q_proj.weight"],
                               start.state_dict()["model.layers.0.self_attn.q_proj.weight"])  # fmt: skip
        assert (run / role / "adapter" / "adapter_model.safetensors").is_file()
        assert {path.name for path in (run / "checkpoint-4" / role).glob("*.safetensors")} == {
            "adapter_model.safetensors"
        }


def test_merging_goes_by_the_weights_in_memory(make_model, tokenizer, tmp_path: Path) -> None:
    """The base may have come from another revision, or from remote code: reading it again would merge into others."""
    model = add_adapter(make_model(), LoraSettings(r=4, alpha=8, dropout=0.0, target_modules=None))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if "lora_B" in name else 0.01))
    model.get_base_model().config._name_or_path = "nowhere"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_role(model, tokenizer, tmp_path / "selector")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "selector")
    ids = torch.arange(2, 12).unsqueeze(0)
    with torch.no_grad():
        expected = model.eval()(ids).logits
        torch.testing.assert_close(merged(ids).logits, expected, rtol=0, atol=1e-4)
        with model.disable_adapter():
            assert (model(ids).logits - expected).abs().max() > 0.01


def test_a_run_with_adapters_resumes_bit_for_bit(job: Job) -> None:
    keys = {"selector_lora_r": 4, "generator_lora_r": 2, "optim": "adamw_torch"}
    whole = job("whole", **keys)
    job("half", **keys, max_steps=2)
    half = job("half", **keys, resume_from_checkpoint="auto")
    assert largest_difference(weights(whole), weights(half)) == 0


def test_bfloat16_trains_close_to_float32_and_not_in_it(job: Job) -> None:
    """Weights stay in float32; what is computed in between is rounded, and nearly the same."""
    half, whole = weights(job("half", bf16=True)), weights(job("whole"))
    assert {tensor.dtype for tensor in half.values()} == {torch.float32}
    assert 1e-5 < largest_difference(half, whole) < 0.05


def test_a_proposal_other_than_p_is_corrected_and_logged(job: Job) -> None:
    run = job(temperature=1.7, top_k=12)
    rows = rollout_log.read(rollout_log.part_paths(run, 1)).to_pylist()
    assert any(abs(row["selection_logp"] - row["proposal_logp"]) > 0.1 for row in rows)
    group = [row for row in rows if row["position"] == 0 and row["valid"]]
    logits = torch.tensor([r["answer_logp"] + min(r["selection_logp"] - r["proposal_logp"], 2.0) for r in group])
    torch.testing.assert_close(
        torch.tensor([row["weight"] for row in group]), logits.softmax(0).float(), rtol=1e-4, atol=1e-6
    )


def test_regularisers_keep_the_selector_near_its_start(job: Job) -> None:
    free, held = job("free"), job("held", beta=5.0)

    def distance(run: Path) -> float:
        trained = load_file(run / "selector" / "model.safetensors")
        return sum((trained[name] - tensor).square().sum().item() for name, tensor in base(run, "selector").items())

    assert distance(held) < distance(free)
    rows = rollout_log.read(rollout_log.part_paths(held, 1)).to_pylist()
    assert all(abs(row["reference_logp"] - row["selection_logp"]) < 1e-3 for row in rows), "it starts at the reference"


def test_uniform_weights_look_at_no_answer(job: Job) -> None:
    """The control of the weighting: valid rollouts tie, whatever their answers' likelihoods; invalid ones have none."""
    run = job(weighting="uniform", selector_baseline="none")
    rows = rollout_log.read(rollout_log.part_paths(run)).to_pylist()
    groups = [rows[i : i + 4] for i in range(0, len(rows), 4)]
    assert any(len({row["answer_logp"] for row in group if row["valid"]}) > 1 for group in groups)
    for group in groups:
        valid = sum(row["valid"] for row in group)
        assert [row["weight"] for row in group] == pytest.approx([row["valid"] / max(valid, 1) for row in group])


def test_one_rollout_has_weight_one_and_the_control_variate_leaves_nothing(job: Job) -> None:
    """The control m = 1: the selector gets no signal."""
    run = job(num_generations=1, allow_single_generation=True, per_device_train_batch_size=2)
    rows = rollout_log.read(rollout_log.part_paths(run)).to_pylist()
    assert {row["weight"] for row in rows if row["valid"]} == {1.0}
    assert {row["proposal_weight"] for row in rows} == {1.0}


def test_the_saved_pair_answers_as_it_was_evaluated(job: Job) -> None:
    import pyarrow.parquet as pq

    run = job()
    rag = pipeline.RAGPipeline.from_pretrained(run)
    for row, question in zip(
        pq.read_table(run / "evaluation" / "final.parquet").to_pylist(),
        load_questions(str(run.parent / "world"), "dev"),
        strict=True,
    ):
        answer = rag.answer(question.question, question.documents)
        assert answer.text == row["prediction"]
        assert list(answer.selection.numbers) == row["selection"]
        assert answer.logp == pytest.approx(row["prediction_logp"], abs=1e-4)


def test_a_trained_pair_can_be_asked_from_the_command_line(job: Job, tmp_path: Path) -> None:
    run = job()
    question = load_questions(str(run.parent / "world"), "dev")[0]
    documents = tmp_path / "documents.jsonl"
    documents.write_text("\n".join(json.dumps({"id": d.id, "text": d.text}) for d in question.documents))
    asked = CliRunner().invoke(app, ["ask", str(run), question.question, "--documents", str(documents), "--json"])
    assert asked.exit_code == 0, asked.output
    expected = pipeline.RAGPipeline.from_pretrained(run).answer(question.question, question.documents)
    assert json.loads(asked.stdout)["answer"] == expected.text


def test_training_stops_when_dev_no_longer_improves(job: Job) -> None:
    run = job(early_stopping_patience=1, num_iterations=20, learning_rate=0.0001)
    stages = [stage["stage"] for stage in read_stages(run)]
    assert stages == ["base", "iteration-1", "final"]


@pytest.mark.parametrize(
    ("best", "lost", "measured"),
    [
        (False, None, ["base", "iteration-1", "iteration-2"]),  # as they were at the end
        (False, "iteration-2", ["base", "iteration-1", "iteration-2", "final"]),  # its file is gone
        (True, None, ["base", "iteration-1", "iteration-2", "final"]),  # loaded again
    ],
)
def test_what_is_kept_is_evaluated_once(
    job: Job,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    best: bool,
    lost: str | None,
    measured: list[str],
) -> None:
    """Defect: the line of the last evaluation was printed twice where it was made once."""
    stages: list[str] = []

    def recorded(*args: Any, stage: str, **kwargs: Any) -> dict[str, Any]:
        stages.append(stage)
        summary = evaluate_stage(*args, stage=stage, **kwargs)
        if stage == lost:
            (Path(kwargs["output_dir"]) / "evaluation" / f"{stage}.parquet").unlink()
        return summary

    monkeypatch.setattr("dro_rl.trainer.evaluate_stage", recorded)
    monkeypatch.setattr("dro_rl.job.assembly.evaluate_stage", recorded)
    run = job(num_iterations=2, early_stopping_patience=None, load_best_model_at_end=best)
    assert stages == measured
    assert capsys.readouterr().out.count("  dev: em ") == len(measured)
    results, conditions = read_results(run / "evaluation" / "final.parquet")
    assert conditions.stage == read_stages(run)[-1]["stage"] == "final"
    questions = load_questions(str(run.parent / "world"), "dev")
    assert [r.prediction for r in results] == [
        answer.text for answer in pipeline.RAGPipeline.from_pretrained(run).answer_all(questions)
    ]
