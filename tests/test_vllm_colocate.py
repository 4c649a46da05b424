"""Claims about vLLM in the trainer's process, on a real engine: draws, log q, and whose weights."""

from __future__ import annotations

import copy
import importlib
import json
import random
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, build_model, build_tokenizer
from training_world import changed, launch, save_model, world

pytest.importorskip("vllm", reason="vLLM is not installed: make setup-vllm")

from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from dro_rl import engines
from dro_rl.config import DROConfig
from dro_rl.engines.answers import EngineAnswerer, ModelAnswerer
from dro_rl.engines.decoding import truncate
from dro_rl.engines.protocol import GenerationRequest, TrainedSelector
from dro_rl.engines.vllm_adapters import runs_adapters
from dro_rl.engines.vllm_colocate import ColocatedEngine
from dro_rl.likelihood import Row, Scoring, completion_logps, score_rows
from dro_rl.likelihood.room import Room
from dro_rl.models import quantization
from dro_rl.models.loading import LoraSettings, add_adapter, load_model
from dro_rl.prompts import Prompter
from dro_rl.proposal import Completion, SamplingParams
from dro_rl.rollouts import log as rollout_log
from dro_rl.selection import parse_selection
from dro_rl.selection.constraint import SelectionConstraint, allowed_for

TOLERANCE = 1e-3
"""Nats a token between vLLM and transformers, both in float32: what docs/vllm.md states."""
PROMPTS = [[random.Random(f"{i}/{j}").randrange(2, VOCABULARY) for j in range(n)] for i, n in enumerate((90, 4, 33))]
SEEDS = [2**63 - 1, 22, 33]
SAMPLING = SamplingParams(max_completion_length=7)


def states() -> list[Any]:
    return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]


def adapted(model: Any, rank: int, seed: int) -> Any:
    """A copy of a model under adapters that do something."""
    model = add_adapter(copy.deepcopy(model), LoraSettings(rank, 8 * rank, 0.0, None))
    return moved(model, seed)


def moved(model: Any, seed: int) -> Any:
    """The same after a large update of its adapters, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


class World:
    """An engine over a model that tests may replace."""

    def __init__(self, folder: Path) -> None:
        build_model(hidden_size=64, seed=4).save_pretrained(folder)
        self.tokenizer = tokenizer = build_tokenizer()
        tokenizer.save_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        config = DROConfig(
            output_dir=str(folder / "run"),
            report_to="none",
            rollout_engine="vllm",
            max_prompt_length=120,
            max_completion_length=24,
            constrain_selection=True,  # starts vLLM with the constraint, for the requests that ask for it
        )
        self.states_before = states()
        self.engine = ColocatedEngine(lambda: self.model, Accelerator(), tokenizer, config)
        self.states_after = states()
        self.engine.push()

    def generate(self, m: int = 4, sampling: SamplingParams = SAMPLING) -> list[list[Completion]]:
        return self.engine.generate(GenerationRequest(PROMPTS, m, sampling, SEEDS))

    def difference(self) -> float:
        return difference(self.engine, self.model)


def difference(engine: ColocatedEngine, model: Any) -> float:
    """The largest |log q − log p| of a token."""
    largest = 0.0
    for prompt, group in zip(PROMPTS, engine.generate(GenerationRequest(PROMPTS, 4, SAMPLING, SEEDS)), strict=True):
        for sample, logps in zip(group, completion_logps(model, prompt, [s.ids for s in group]), strict=True):
            largest = max(largest, (torch.tensor(sample.logps) - logps.detach()).abs().max().item())
    return largest


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One engine for this file: starting one takes half a minute.

    numba is there first, as with first-stage retrieval: vLLM's own start fails beside it.
    """
    importlib.import_module("numba")
    yield World(tmp_path_factory.mktemp("selector"))
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


def ids(groups: list[list[Completion]]) -> list[tuple[int, ...]]:
    return [sample.ids for sample in chain(*groups)]


@pytest.mark.slow
def test_starting_the_engine_leaves_every_generator_as_it_was(vllm: World) -> None:
    """vLLM seeds python's, numpy's and torch's: a run would otherwise not depend on its own seed."""
    assert vllm.states_before == vllm.states_after


def test_sampling_leaves_every_generator_as_it_was(vllm: World) -> None:
    before = states()
    vllm.generate()
    assert before == states()


def test_log_q_is_the_trainers_log_p_to_rounding(vllm: World) -> None:
    assert vllm.difference() < TOLERANCE


def test_without_a_push_log_q_is_not_that_of_the_new_weights_and_with_one_it_is(
    vllm: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check that tells stale weights: far outside the tolerance before, within it after."""
    with vllm.engine.at(0):
        pass
    monkeypatch.setattr(vllm, "model", changed(vllm.model))
    with vllm.engine.at(0):  # no update since: nothing to push
        assert vllm.difference() > 1000 * TOLERANCE
    with vllm.engine.at(1):
        assert vllm.difference() < TOLERANCE
    monkeypatch.undo()
    vllm.engine.forget()  # as after a resume: the step is the same, the weights are not
    with vllm.engine.at(1):
        assert vllm.difference() < TOLERANCE


def test_prefixes_that_old_weights_computed_are_forgotten(vllm: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same prompts before and after: with a cache that stays, their log-probabilities are of both weights."""
    vllm.generate()
    monkeypatch.setattr(vllm, "model", changed(vllm.model))
    vllm.engine.push()
    assert vllm.difference() < TOLERANCE
    monkeypatch.undo()
    vllm.engine.push()


def test_the_samples_of_a_group_differ(vllm: World) -> None:
    """All but a short one that is likely enough to come twice."""
    for group in vllm.generate(m=8):
        assert len({sample.ids for sample in group}) > 5


def test_a_prompt_and_its_seed_decide_what_is_drawn(vllm: World) -> None:
    """Whatever else is in the batch, and in any order: runs resume with the rollouts they would have had."""
    together = vllm.generate()
    assert ids(together) == ids(vllm.generate())
    backwards = vllm.engine.generate(GenerationRequest(PROMPTS[::-1], 4, SAMPLING, SEEDS[::-1]))
    assert ids(together) == ids(backwards[::-1])
    alone = vllm.engine.generate(GenerationRequest(PROMPTS[1:2], 4, SAMPLING, SEEDS[1:2]))
    assert ids(together[1:2]) == ids(alone)


def test_another_seed_draws_something_else(vllm: World) -> None:
    first, second = (
        vllm.engine.generate(GenerationRequest(PROMPTS[:1], 4, SAMPLING, [seed]))[0] for seed in (1, 2**40)
    )
    assert [sample.ids for sample in first] != [sample.ids for sample in second]


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(7, 0.6),
        SamplingParams(7, 1.4, top_p=0.8),
        SamplingParams(7, top_k=5),
        SamplingParams(7, min_p=0.1),
    ],
    ids=str,
)
def test_log_q_is_that_of_the_distribution_drawn_from(vllm: World, sampling: SamplingParams) -> None:
    """With a temperature and truncations: recomputed from the model's logits, and −inf where vLLM should not draw."""
    for prompt, group in zip(PROMPTS, vllm.generate(sampling=sampling), strict=True):
        for sample in group:
            with torch.no_grad():
                logits = vllm.model(torch.tensor([[*prompt, *sample.ids]])).logits[0, len(prompt) - 1 : -1]
            q = truncate(logits / sampling.temperature, sampling).log_softmax(-1)
            expected = q.gather(-1, torch.tensor(sample.ids)[:, None])[:, 0]
            assert sample.logps == pytest.approx(expected.tolist(), abs=TOLERANCE)


def test_the_end_of_sequence_ends_a_completion_and_belongs_to_it(vllm: World, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = SamplingParams(12)
    drawn = list(chain(*ids(vllm.generate(16, sampling))))
    frequent = max(set(drawn), key=drawn.count)
    monkeypatch.setattr(vllm.engine, "_ends", (frequent, 1))
    ended = [sample for sample in chain(*vllm.generate(16, sampling)) if frequent in sample.ids]
    assert len({len(sample.ids) for sample in ended}) > 3
    for sample in ended:
        assert sample.ids.index(frequent) == len(sample.ids) - 1
        assert len(sample.logps) == len(sample.ids)


@pytest.mark.parametrize("least", [4, 1], ids=["four", "one to four"])
def test_under_the_constraint_every_selection_is_valid_and_log_q_is_the_constrained_log_p(
    vllm: World, least: int
) -> None:
    """Numbers of one and of several tokens, 4 of 12, a thousand samples; with and without a temperature."""
    constraint = SelectionConstraint(vllm.tokenizer, 12, 4, least=least)
    for sampling in (SamplingParams(24), SamplingParams(24, 1.5)):
        groups = vllm.engine.generate(GenerationRequest(PROMPTS, 170, sampling, SEEDS, [constraint] * len(PROMPTS)))
        for prompt, group in zip(PROMPTS, groups, strict=True):
            samples = list(dict.fromkeys(sample.ids for sample in group))
            for ids in samples:
                assert not parse_selection(vllm.tokenizer.decode(ids, skip_special_tokens=True), 12, 4, least).problems
            if sampling.on_policy:
                allowed = allowed_for(constraint, samples)
                known = dict(zip(samples, score_rows(vllm.model, [Row(prompt, samples, allowed)], 1)[0], strict=True))
                for sample in group:
                    assert sample.logps == pytest.approx(known[sample.ids].tolist(), abs=TOLERANCE)


def test_beside_constrained_requests_others_are_not_constrained(vllm: World) -> None:
    assert vllm.difference() < TOLERANCE


def test_a_process_without_questions_has_no_rollouts(vllm: World) -> None:
    assert vllm.engine.generate(GenerationRequest([], 4, SAMPLING, [])) == []


def test_adapters_are_pushed_and_the_base_is_not_touched(vllm: World, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(vllm.model, 4, seed=1)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    monkeypatch.setattr(vllm, "model", model)
    assert vllm.difference() > 1000 * TOLERANCE
    vllm.engine.push()
    assert vllm.difference() < TOLERANCE
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    monkeypatch.undo()
    vllm.engine.push()
    assert vllm.difference() < TOLERANCE, "a model without adapters comes after one with them"


def test_answers_are_the_generators_own_before_and_after_an_update(
    vllm: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Greedy ones, token by token; new weights are taken when there have been more updates."""
    updates = [0]
    prompter = Prompter(vllm.tokenizer, "toy_generator")
    trained = TrainedSelector(
        lambda: nullcontext(vllm.model), lambda: vllm.model, lambda place: None, prompter, Accelerator(), tmp_path
    )
    there = EngineAnswerer(trained, Scoring(), vllm.engine, lambda: updates[0])
    greedy = SamplingParams(max_completion_length=9, temperature=0.0)
    vllm.engine.forget()
    for _ in range(2):
        here = ModelAnswerer(trained.open, prompter, Scoring())
        one, other = (each.write(PROMPTS, greedy, SEEDS) for each in (here, there))
        assert [each.text for each in other] == [each.text for each in one]
        assert [each.logp for each in other] == [pytest.approx(each.logp, abs=9 * TOLERANCE) for each in one]
        monkeypatch.setattr(vllm, "model", changed(vllm.model))
        updates[0] += 1
    monkeypatch.undo()
    vllm.engine.push()
    vllm.engine.forget()


class Lora:
    """One engine for two roles, whose adapters of ranks 4 and 9 go over one base; beside the one of the file."""

    def __init__(self, vllm: World) -> None:
        self.models = {"selector": adapted(vllm.model, 4, seed=1), "generator": adapted(vllm.model, 9, seed=2)}
        config = DROConfig(**BOTH, output_dir="", max_completion_length=24, max_answer_length=40)
        roles = [
            TrainedSelector(
                lambda: nullcontext(None), partial(self.models.__getitem__, role), lambda place: None,
                Prompter(vllm.tokenizer, "toy_generator"), Accelerator(), Path(),
            )
            for role in self.models
        ]  # fmt: skip
        self.selector: Any = engines.start(config, *roles)
        answerer: Any = engines.answerer(config, roles[1], lambda: 0, Room(1024), self.selector)
        self.generator: Any = answerer._engine

    def differences(self) -> list[float]:
        engines = (self.selector, self.generator)
        return [difference(engine, model) for engine, model in zip(engines, self.models.values(), strict=True)]


BOTH: dict[str, Any] = {
    "rollout_engine": "vllm", "answer_engine": "vllm", "reward": "f1", "max_prompt_length": 120, "report_to": "none",
    "vllm_lora_sync": "adapter",
}  # fmt: skip


@pytest.fixture(scope="module")
def lora(vllm: World) -> Lora:
    return Lora(vllm)


def test_vllm_says_which_architectures_have_lora(vllm: World) -> None:
    llama, gpt2 = (SimpleNamespace(architectures=[name]) for name in ("LlamaForCausalLM", "GPT2LMHeadModel"))
    assert runs_adapters(llama, "auto")
    assert not runs_adapters(gpt2, "auto")
    assert runs_adapters(gpt2, "transformers")


def test_two_roles_adapters_go_alone_over_one_base(lora: Lora) -> None:
    """One vLLM, as long as the longer of them asks, started for the higher rank."""
    assert lora.selector._llm is lora.generator._llm
    settings = lora.selector._llm.llm_engine.vllm_config
    assert (settings.lora_config.max_lora_rank, settings.lora_config.max_loras) == (16, 2)
    assert settings.model_config.max_model_len == 120 + 40


def test_log_q_under_adapters_sent_alone_is_log_p_after_every_push_and_stale_without_one(lora: Lora) -> None:
    """The same prompts each time: prefixes that older adapters, or the other role's, computed would show."""
    for step in range(3):
        for engine in (lora.selector, lora.generator):
            with engine.at(step):
                pass
        assert max(lora.differences()) < TOLERANCE
        moved(lora.models["selector"], seed=10 + step)
        with lora.selector.at(step):  # no update since: nothing to push
            selector, generator = lora.differences()
        assert (selector > 1000 * TOLERANCE, generator < TOLERANCE) == (True, True)
    lora.selector.forget()
    with lora.selector.at(2):  # as after a resume
        assert max(lora.differences()) < TOLERANCE


def test_an_engine_of_merged_weights_beside_one_of_adapters_keeps_its_own(lora: Lora, vllm: World) -> None:
    for seed in (20, 21):
        for engine in (lora.selector, vllm.engine, lora.generator):
            engine.push()
        assert max(vllm.difference(), *lora.differences()) < TOLERANCE
        moved(lora.models["generator"], seed)
    lora.generator.push()
    assert max(vllm.difference(), *lora.differences()) < TOLERANCE


def test_adapters_leave_nothing_on_the_disk(lora: Lora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    lora.selector.push()
    assert lora.differences()[0] < TOLERANCE
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("sync", ["adapter", "merged"])
def test_adapters_over_a_base_in_four_bits_are_sampled_over_its_numbers(tmp_path: Path, sync: str) -> None:
    """vLLM loads the base as it was before it was rounded; alone, adapters go over what the codes stand for."""
    pytest.importorskip("bitsandbytes")
    build_model(hidden_size=64, seed=4).save_pretrained(tmp_path)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    model = load_model(str(tmp_path), **quantization.settings_of("nf4", torch.float32))
    model = moved(add_adapter(model, LoraSettings(4, 32, 0.0, None)), seed=1)
    settings = {"output_dir": "", "report_to": "none", "max_prompt_length": 120, "rollout_engine": "vllm"}
    config = DROConfig(**settings, vllm_lora_sync=sync, max_completion_length=24)
    selector = TrainedSelector(
        lambda: nullcontext(model), lambda: model, lambda place: None, Prompter(tokenizer, "toy_generator"),
        Accelerator(), tmp_path,
    )  # fmt: skip
    engine: Any = engines.start(config, selector)
    for step in range(2):
        with engine.at(step):
            assert difference(engine, model) < TOLERANCE
        moved(model, seed=2 + step)
    assert difference(engine, model) > 1000 * TOLERANCE


@pytest.mark.slow
def test_a_training_has_an_engine_of_selections_and_one_of_answers_in_its_process(tmp_path: Path) -> None:
    keys = {"rollout_engine": "vllm", "answer_engine": "vllm", "reward": {"f1": 5.0, "likelihood": 1.0}}
    recipe = world(tmp_path, **keys, learning_rate=1.0, vllm_gpu_memory_utilization=0.1)
    for role, seed in (("selector", 5), ("generator", 6)):
        save_model(tmp_path / f"base-{role}", seed, hidden_size=64)
    done = launch(recipe, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    rows = rollout_log.read(rollout_log.part_paths(tmp_path / "run")).to_pylist()
    assert {row["iteration"] for row in rows} == {1, 2}
    assert all((row["answer"] is not None) == row["valid"] for row in rows)


@pytest.mark.slow
def test_a_selector_that_vllm_cannot_run_is_refused_before_training(tmp_path: Path) -> None:
    """Heads of 16 numbers load on a CPU, and fail with the first token."""
    refused = launch(world(tmp_path, rollout_engine="vllm"), tmp_path / "run")
    assert refused.returncode == 2, refused.stderr
    (error,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: rollout_engine: 'vllm': vLLM runs the selector here (")
    assert "head_dim=16" in error
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
def test_a_training_samples_with_vllm_and_its_log_says_how_far_the_two_are_apart(tmp_path: Path) -> None:
    """Two iterations: after the first update the weights have been pushed, or the difference would show it. Candidates
    are shown in two windows: a rollout's log q is what vLLM says of both."""
    recipe = world(tmp_path, rollout_engine="vllm", learning_rate=1.0, window_size=3, num_selected=1)
    save_model(tmp_path / "base-selector", 5, hidden_size=64)  # vLLM's attention on a CPU takes heads of 32 and more
    done = launch(recipe, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    steps = [line for line in history if "sampling/logp_difference_max" in line]
    assert {line["step"] for line in steps} == {1, 2, 3, 4}
    for line in steps:
        assert 0 < line["sampling/logp_difference_max"] < 6 * TOLERANCE
        assert abs(line["sampling/log_ratio_max"]) < 6 * TOLERANCE
    rollouts = rollout_log.to_rollouts(rollout_log.read(rollout_log.part_paths(tmp_path / "run")))
    valid = [rollout for rollout in rollouts if rollout.selection.valid]
    assert valid
    assert {len(rollout.all_windows) for rollout in valid} == {2}
    assert "differ from the trainer's" not in done.stderr
    assert "Traceback" not in done.stderr
