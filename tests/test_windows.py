"""Windows that slide over more candidates than are shown at once: a rollout is the product of its windows.

Where everything can be listed, all ways through two windows are.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from test_cli_rollouts import document, invoke, refusal
from training_world import largest_difference, questions, weights, world

from dro_rl import likelihood
from dro_rl.em.e_step import Asked, EStep
from dro_rl.em.m_step import Group, MicroBatch
from dro_rl.em.method import Method
from dro_rl.engines.decoding import Decoder
from dro_rl.engines.protocol import GenerationRequest
from dro_rl.engines.selecting import Selecting
from dro_rl.errors import InputError
from dro_rl.job.assembly import build_prompters, load_models
from dro_rl.job.examples import selector_examples
from dro_rl.job.preflight import prepare
from dro_rl.likelihood import completion_logps, packing, row_logps
from dro_rl.likelihood.packing import Row
from dro_rl.pipeline import PipelineSettings, RAGPipeline, read_settings, save_settings
from dro_rl.prompts.rows import answer_row
from dro_rl.proposal import Completion, SamplingParams
from dro_rl.recipe import load_recipe
from dro_rl.records import Question, Rollout
from dro_rl.resources.work import rows_of, windows_of
from dro_rl.rollouts import log as rollout_log
from dro_rl.rollouts.diagnostics import columns, summarize
from dro_rl.rollouts.read import columns_of
from dro_rl.selection import SelectionSpec, format_selection
from dro_rl.selection.constraint import allowed_for
from dro_rl.selection.windows import Slide, Windows

Job = Callable[..., Path]

SLIDING = {"window_size": 3, "num_selected": 1}
"""Two windows over the five candidates of the tests' world: 3, 4, 5, then 1, 2 and what was picked."""


# The slide --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "stride", "most", "count", "windows"),
    [(20, None, 5, 100, 7), (20, 10, 5, 100, 9), (20, None, 5, 20, 1), (20, None, 5, 3, 1), (3, None, 1, 5, 2),
     (4, 1, 2, 9, 6)],
)  # fmt: skip
def test_every_candidate_is_shown_and_what_is_picked_goes_on(
    size: int, stride: int | None, most: int, count: int, windows: int
) -> None:
    sliding = Windows.of(size, stride, most)
    assert sliding is not None
    slide, seen, picked = Slide.begin(sliding, count), [], ()
    while True:
        shown = slide.shown or tuple(range(1, count + 1))
        assert len(shown) == len(set(shown)) == min(size, count)
        assert set(picked) <= set(shown)
        seen.append(shown)
        picked = shown[-most:]
        if slide.last:
            break
        slide = slide.after(picked)
    assert len(seen) == windows == sliding.count(count)
    assert set().union(*seen) == set(range(1, count + 1))


def test_a_window_shows_new_candidates_and_then_those_that_were_picked() -> None:
    slide = Slide.begin(Windows.of(4, None, 2), 8)
    assert slide.shown == (5, 6, 7, 8)
    slide = slide.after((8, 6))
    assert slide.shown == (3, 4, 8, 6)
    slide = slide.after((6,))
    assert slide.shown == (1, 2, 6, 3), "fewer were picked, and the next in order fill the window"
    assert slide.last
    assert Slide.begin(Windows.of(4, 1, 2), 5, (5, 4, 3, 2, 1)).shown == (4, 3, 2, 1)


@pytest.mark.parametrize(
    ("size", "stride", "place"), [(5, None, "window_size"), (4, None, "window_size"), (20, 16, "window_stride"),
                                  (20, 0, "window_stride"), (None, 5, "window_stride")],
)  # fmt: skip
def test_windows_that_carry_nothing_new_or_never_end_are_refused(
    size: int | None, stride: int | None, place: str
) -> None:
    with pytest.raises(InputError, match=place):
        Windows.of(size, stride, 5)


# Exactness: all ways through two windows --------------------------------------------------------------------


class EveryWay:
    """Lists every way through two windows of three candidates, of which one is picked, each as likely as any other."""

    def __init__(self, prompter: Any) -> None:
        self.prompter, self.asked = prompter, 0

    def generate(self, request: GenerationRequest) -> list[list[Completion]]:
        ways = list(itertools.product((1, 2, 3), repeat=2))
        written = [self.prompter.completion(format_selection([way[self.asked]])) for way in ways]
        logps = [(*[0.0] * (len(ids) - 1), -torch.tensor(3.0).log().item()) for ids in written]
        completions = [Completion(*pair) for pair in zip(written, logps, strict=True)]
        self.asked += 1
        return [completions] if request.num_generations == 9 else [[each] for each in completions]


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A recipe whose selector has three choices in each of two windows, with its models."""
    keys = {**SLIDING, "num_generations": 9, "per_device_train_batch_size": 9, "gradient_accumulation_steps": 1,
            "constrain_selection": True, "max_log_ratio": 100.0, "questions_per_iteration": None}  # fmt: skip
    recipe = load_recipe(world(tmp_path_factory.mktemp("exact")), keys)
    sources = {"selector": recipe.run.of("selector").model, "generator": recipe.run.of("generator").model}
    return recipe, load_models(recipe, sources).eval(), build_prompters(recipe)


def listed(exact: Any, question: Question, method: Method) -> tuple[EStep, Asked, Any]:
    _, models, prompters = exact
    from contextlib import nullcontext

    e_step = EStep(None, lambda role: nullcontext(getattr(models, role)), None, prompters, method)  # type: ignore[arg-type]
    asked = Asked([0], [question], [7], 1000.0)
    selecting = e_step.selecting(asked).run(EveryWay(prompters["selector"]).generate)
    return e_step, asked, e_step.read(asked, selecting, on_policy=False)


def plain_ways(exact: Any, question: Question) -> tuple[torch.Tensor, torch.Tensor]:
    """(9,) log p of each way, window by window, and log p of the answer, on the plain path, with gradients."""
    _, models, prompters = exact
    prompter = prompters["selector"]
    constraint = prompter.constraint(3, 1, 1)
    picks = [prompter.completion(format_selection([n])) for n in (1, 2, 3)]

    def logps(shown: Sequence[int]) -> torch.Tensor:
        documents = tuple(question.documents[n - 1] for n in shown)
        prompt = prompter.selector_prompt(replace(question, documents=documents), 1).ids
        row = Row(prompt, picks, allowed_for(constraint, picks))
        return torch.stack([each.sum() for each in row_logps(models.selector, [row], shared_prefix=False)[0]])

    ways, answers = [], []
    first = logps((3, 4, 5))
    for i, carried in enumerate((3, 4, 5)):
        second = logps((1, 2, carried))
        ways += [first[i] + second[j] for j in range(3)]
        for number in (1, 2, carried):
            row = answer_row(prompters["generator"], question, [number], "first")
            scored = completion_logps(models.generator, row.prompt, row.completions, shared_prefix=False)
            answers.append(scored[0].sum())
    return torch.stack(ways), torch.stack(answers)


def gradients(models: Any) -> dict[str, torch.Tensor]:
    found = {name: each.grad.clone() for name, each in models.named_parameters() if each.grad is not None}
    models.zero_grad()
    return found


@pytest.mark.parametrize("baseline", ["none", "mean"])
@pytest.mark.parametrize("fresh", [False, True], ids=["weighed", "weighed by its own pass"])
def test_over_all_ways_value_and_gradient_are_those_of_the_evidence(exact: Any, baseline: str, fresh: bool) -> None:
    """Weights are the posterior of the ways, and what both models climb is log p(y|x) itself."""
    recipe, models, prompters = exact
    question, method = questions(2)[1], Method.of(recipe.training)
    method = replace(method, weighting=replace(method.weighting, baseline=baseline))
    ways, answers = plain_ways(exact, question)
    assert ways.exp().sum().item() == pytest.approx(1, abs=1e-5), "the ways are a distribution"
    evidence = (ways + answers).logsumexp(0)
    evidence.backward()
    expected = gradients(models)
    posterior = (ways + answers - evidence).detach().exp()

    e_step, asked, sampled = listed(exact, question, method)
    rollouts = e_step.weigh(asked, sampled)
    torch.testing.assert_close(torch.tensor([each.weight for each in rollouts]), posterior, rtol=1e-4, atol=1e-6)
    for rollout, logp in zip(rollouts, ways.tolist(), strict=True):
        assert rollout.selection_logp == pytest.approx(logp, abs=1e-4)
        assert rollout.proposal_logp == pytest.approx(-torch.tensor(9.0).log().item())
    figures = summarize(columns([rollouts], [question]))
    assert figures.evidence_bound == pytest.approx(evidence.item(), abs=1e-4), "the bound is tight"
    assert figures.selector_entropy == pytest.approx(-(ways.exp() * ways).sum().item(), abs=1e-4)

    group = Group(
        sampled.samples if fresh else rollouts, range(9), question, prompters, method, ("selector", "generator")
    )
    batch = MicroBatch(
        [group], method, ["selector", "generator"], on_policy=False, unmoved=True, eos_token_id=1
    )  # fmt: skip
    losses = models(batch=batch, scoring=method.scoring).losses
    if baseline == "none":
        assert losses["selector"].item() == pytest.approx(-(posterior * ways).sum().item(), abs=1e-4)
    assert losses["generator"].item() == pytest.approx(-(posterior * answers).sum().item(), abs=1e-4)
    torch.stack([*losses.values()]).sum().backward()
    found = gradients(models)
    assert set(found) == set(expected)
    for name, gradient in found.items():
        torch.testing.assert_close(-gradient, expected[name], rtol=1e-3, atol=1e-5, msg=name)


def test_rows_of_windows_are_those_of_distinct_lists(exact: Any) -> None:
    """The first window is one row of three picks; the second is a row of three for each that was carried."""
    recipe, _, prompters = exact
    method = Method.of(recipe.training)
    _, _, sampled = listed(exact, questions(1)[0], method)
    group = Group(sampled.samples, range(9), questions(1)[0], prompters, method, ["selector"])
    assert [len(row.completions) for row in group.rows["selector"]] == [3, 3, 3, 3]
    assert [order for order, _ in group.samples[::3]] == [(3, 4, 5), (1, 2, 3), (1, 2, 4), (1, 2, 5)]


# Drawing ----------------------------------------------------------------------------------------------------


def test_all_rollouts_take_a_window_together(exact: Any) -> None:
    _, models, prompters = exact
    requests: list[GenerationRequest] = []
    decoder = Decoder(models.selector, prompters["selector"].ends.stops)

    def generate(request: GenerationRequest) -> list[list[Completion]]:
        requests.append(request)
        return decoder.generate(request)

    lists = [(question, ()) for question in [*questions(3), *questions(1, documents=3)]]
    sampling = SamplingParams(4)
    args = (prompters["selector"], lists, SelectionSpec(1, 1, True), Windows(3, 2), 4, sampling, [1, 2, 3, 4])
    together = Selecting(*args).run(generate)
    assert [(len(each.prompts), each.num_generations) for each in requests] == [(4, 4), (12, 1)]
    assert [len(drawn.windows) for drawn in together.drawn] == [2] * 12 + [1] * 4
    for place, (each, seed) in enumerate(zip(lists, (1, 2, 3, 4), strict=True)):
        alone = Selecting(args[0], [each], *args[2:6], [seed]).run(decoder.generate)
        assert [d.selection for d in alone.drawn] == [d.selection for d in together.drawn[place * 4 : place * 4 + 4]]


def test_a_window_that_names_nothing_ends_its_rollout_which_is_invalid(exact: Any) -> None:
    _, _, prompters = exact
    prompter, question = prompters["selector"], questions(1)[0]
    written = {"lost": "where ?", "right": "[2]"}
    answers = iter([[written["lost"], written["right"]], [written["right"]]])

    def generate(request: GenerationRequest) -> list[list[Completion]]:
        texts = next(answers)
        return [[Completion(prompter.completion(text), (-0.5, -0.25)) for text in texts]]

    spec = SelectionSpec(1, 1)
    lost, right = (
        Selecting(prompter, [(question, ())], spec, Windows(3, 2), 2, SamplingParams(4), [0]).run(generate).drawn
    )
    assert not lost.selection.valid
    assert lost.selection.numbers == ()
    assert set(lost.selection.problems) == {"format", "too_few"}
    assert [window.order for window in lost.windows] == [(3, 4, 5)]
    assert [window.order for window in right.windows] == [(3, 4, 5), (1, 2, 4)]
    assert right.selection.numbers == (2,)
    assert right.windows[0].numbers == (4,)


def test_serving_slides_as_one_question_at_a_time_would(exact: Any) -> None:
    recipe, models, prompters = exact
    from contextlib import nullcontext

    settings = PipelineSettings.of(recipe.training, {})
    assert (settings.window_size, settings.windows) == (3, Windows(3, 2))
    pipeline = RAGPipeline(lambda role: nullcontext(getattr(models, role)), prompters, settings)
    asked = questions(4, seed=8)
    for question, selection in zip(asked, pipeline.select_all(asked), strict=True):
        carried = 5
        for shown in ((3, 4), (1, 2)):
            part = [*shown, carried]
            documents = tuple(question.documents[n - 1] for n in part)
            whole = RAGPipeline(pipeline.open_role, prompters, replace(settings, window_size=None))
            (read,) = whole.select_all([replace(question, documents=documents)])
            carried = part[read.numbers[0] - 1]
        assert selection.numbers == (carried,)


def test_a_saved_pair_knows_its_windows(tmp_path: Path) -> None:
    settings = PipelineSettings(5, 128, 6, 4, {}, window_size=20, window_stride=10)
    save_settings(tmp_path, settings)
    assert read_settings(tmp_path) == settings
    assert settings.slid(10, None).windows == Windows(10, 5)
    assert settings.slid(None, 4).windows == Windows(20, 4)
    saved = json.loads((tmp_path / "pipeline.json").read_text())
    for change, place in (({"window_stride": 0}, "window_stride"), ({"window_size": 5}, "window_size")):
        (tmp_path / "pipeline.json").write_text(json.dumps({**saved, **change}))
        with pytest.raises(InputError, match=place):
            read_settings(tmp_path)
    older = {name: value for name, value in saved.items() if not name.startswith("window")}
    (tmp_path / "pipeline.json").write_text(json.dumps(older))
    assert read_settings(tmp_path).windows is None


# Training ---------------------------------------------------------------------------------------------------


def drawn(run: Path) -> list[Rollout]:
    return rollout_log.to_rollouts(rollout_log.read(rollout_log.part_paths(run)))


def test_one_window_is_todays_path_bit_for_bit(job: Job) -> None:
    whole, one = job("whole", num_iterations=1), job("one", num_iterations=1, window_size=5)
    assert largest_difference(weights(whole), weights(one)) == 0
    assert repr(drawn(whole)) == repr(drawn(one))


PROPOSED = {**SLIDING, "temperature": 1.3, "beta": 0.1, "num_iterations": 2, "questions_per_iteration": 4}
"""One step an iteration, of another proposal than the policy, with the reference's divergence."""


def test_rollouts_are_scored_as_products_and_every_arrangement_trains_alike(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "WORTH_SHARING", 1)
    monkeypatch.setattr(packing, "WORTH_SAVING", 0.0)
    branches, lay_out = [], likelihood.lay_out

    def spy(rows: Any, **options: Any) -> Any:
        layout = lay_out(rows, **options)
        branches.append(sum(len(segment.keys) > 1 for segment in layout.segments))
        return layout

    monkeypatch.setattr(likelihood, "lay_out", spy)
    run = job("fused", **PROPOSED, load_best_model_at_end=False)
    assert sum(branches) > 10, "windows of a question begin alike"
    apart = job("apart", **PROPOSED, load_best_model_at_end=False, fused_e_step="off", shared_prefix="off",
                per_device_train_batch_size=1, gradient_accumulation_steps=16)  # fmt: skip
    assert largest_difference(weights(run), weights(apart)) < 2e-6
    for role in ("selector", "generator"):
        base = load_file(run.parent / "world" / f"base-{role}" / "model.safetensors")
        assert not any(torch.equal(tensor, weights(run)[f"{role}.{name}"]) for name, tensor in base.items())
    rollouts, made = drawn(run), questions(12)
    recipe = load_recipe(run.parent / "fused.yaml")
    sources = {"selector": recipe.run.of("selector").model, "generator": recipe.run.of("generator").model}
    selector, prompter = load_models(recipe, sources).selector, build_prompters(recipe)["selector"]
    for rollout in rollouts[:16]:
        total = 0.0
        for window in rollout.all_windows:
            prompt = prompter.selector_prompt(made[rollout.question].shown(window.order), 1).ids
            total += completion_logps(selector, prompt, [window.token_ids], shared_prefix=False)[0].sum().item()
        assert rollout.selection_logp == pytest.approx(total, abs=1e-4)
        assert rollout.reference_logp == pytest.approx(total, abs=1e-4)
        assert len(rollout.windows) == 1 or not rollout.selection.valid
    assert any(rollout.windows for rollout in rollouts)
    shown = columns([rollouts[i : i + 4] for i in range(0, len(rollouts), 4)], made)
    table = rollout_log.read(rollout_log.part_paths(run))
    assert columns_of(table).shown.tolist() == shown.shown.tolist()
    assert set(shown.shown.tolist()) == {0}
    assert summarize(shown).first == (), "places of a window are of what was picked before"
    _is_shown(run)


def _is_shown(run: Path) -> None:
    """`rollouts show` says what was shown and picked in each window, and an older log is read as one without."""
    (question,) = document("rollouts", "show", run, "--limit", "1")["questions"]
    heaviest = question["rollouts"][0]
    assert [window["shown"][:2] for window in heaviest["windows"]] == [[3, 4], [1, 2]]
    assert heaviest["windows"][0]["picked"] == heaviest["windows"][1]["shown"][2:]
    assert "3-5 →" in invoke("rollouts", "show", run).output
    for path in rollout_log.part_paths(run):
        table = pq.read_table(path)
        older = {b"dro_rl.rollouts.version": b"6"}
        pq.write_table(table.drop_columns(["windows"]).replace_schema_metadata(older), path)
    assert not any(rollout.windows for rollout in drawn(run))
    assert "3-5 →" not in invoke("rollouts", "show", run).output


def test_a_run_resumes_bit_for_bit(job: Job) -> None:
    keys = {**SLIDING, "optim": "adamw_torch", "num_iterations": 2, "questions_per_iteration": 4, "candidate_orders": 2}
    whole = job("whole", **keys)
    job("half", **keys, max_steps=1)
    half = job("half", **keys, resume_from_checkpoint="auto")
    assert largest_difference(weights(whole), weights(half)) == 0
    assert repr(drawn(whole)) == repr(drawn(half))
    assert {len(rollout.all_windows) for rollout in drawn(whole) if rollout.selection.valid} == {2}


# Around it --------------------------------------------------------------------------------------------------


REFUSED = {
    "larger than any list": ({"window_size": 6, "num_selected": 2}, "window_size: 6"),
    "no larger than K": ({"window_size": 2, "num_selected": 2}, "window_size: 2"),
    "as large as a range's most": ({"window_size": 3, "num_selected": {"min": 1, "max": 3}}, "window_size: 3"),
    "a stride without room for what is carried": (
        {"window_size": 4, "num_selected": 2, "window_stride": 3}, "window_stride: 3"),
    "a step that never ends": ({"window_size": 4, "num_selected": 2, "window_stride": 0}, "window_stride: 0"),
    "a step backwards": ({"window_size": 4, "num_selected": 2, "window_stride": -1}, "window_stride: -1"),
    "a stride alone": ({"window_stride": 1}, "window_stride: 1"),
    "listed": ({**SLIDING, "rollout_engine": "enumeration", "constrain_selection": True, "max_log_ratio": 100.0,
                "temperature": 1000.0}, "window_size: 3.*enumeration"),
    "ahead of time": ({**SLIDING, "rollout_engine": "vllm", "vllm_mode": "server", "overlap_rollouts": True},
                      "window_size: 3.*ahead"),
}  # fmt: skip


@pytest.mark.parametrize("keys", REFUSED)
def test_windows_that_cannot_be_are_refused_before_a_model_is_loaded(tmp_path: Path, keys: str) -> None:
    given, said = REFUSED[keys]
    with pytest.raises(InputError, match=said):
        prepare(load_recipe(world(tmp_path), given), 1)


def test_more_candidates_than_a_tokenizer_has_numbers_for_are_refused_by_the_way_out() -> None:
    keys = {"dataset_config": "100", "max_train_samples": 16, "max_eval_samples": 2}
    with pytest.raises(InputError, match=r"window_size: .*\[21\].*Use 20 or less"):
        prepare(load_recipe("quickstart", keys), 1)


def test_a_warm_up_imitates_every_window(tmp_path: Path) -> None:
    recipe = load_recipe(world(tmp_path), {**SLIDING, "warmup": "selector", "warmup_selector_order": "labels"})
    prompter = build_prompters(recipe)["selector"]
    question = next(each for each in questions(12) if each.supporting_numbers == (4,))
    pairs = list(selector_examples([question], prompter, recipe.run, recipe.training))
    shown = [(3, 4, 5), (1, 2, 4)]
    assert [prompt for prompt, _ in pairs] == [prompter.selector_prompt(question.shown(each), 1).ids for each in shown]
    assert [completion for _, completion in pairs] == [prompter.completion("[2]"), prompter.completion("[3]")]


def test_a_plan_counts_the_windows(tmp_path: Path) -> None:
    recipe = load_recipe(world(tmp_path), SLIDING)
    made = questions(4)
    assert windows_of(recipe.training, made) == 2
    for rows in rows_of(recipe.training, made, build_prompters(recipe)):
        assert len(rows["selector"]) > 1
        assert all(len(row.completions) <= 4 for row in rows["selector"])


def test_a_hundred_candidates_train_evaluate_and_are_asked(tmp_path: Path) -> None:
    """The toy world with a hundred documents a question, by the shipped model, which has numbers for twenty."""
    from dro_rl.train import main

    run = tmp_path / "run"
    keys = {"dataset_config": '"100"', "window_size": 20, "num_iterations": 1, "questions_per_iteration": 2,
            "num_generations": 2, "per_device_train_batch_size": 4, "max_train_samples": 2, "max_eval_samples": 2,
            "output_dir": run, "report_to": "none", "warmup_steps": 0}  # fmt: skip
    main(["quickstart", *(word for key, value in keys.items() for word in (f"--{key}", str(value)))])
    rollouts = drawn(run)
    assert len(rollouts) == 4
    for rollout in rollouts:
        assert len(rollout.all_windows) == 6, "20, and 17 new ones each"
        assert all(len(window.order) == 20 for window in rollout.all_windows)
        assert set().union(*(window.order for window in rollout.all_windows)) == set(range(1, 101))
        assert rollout.selection.valid
    assert any(rollout.weight > 0 for rollout in rollouts)
    data = ["--data", "toy", "--config", "100", "--split", "test", "--limit", "2"]
    assert "in windows of 20 that slide by 17: 6" in invoke("evaluate", run, *data).output
    assert "--window-size: 101" in refusal("evaluate", run, *data, "--window-size", "101")
    assert "window_stride: 18" in refusal("evaluate", run, *data, "--window-stride", "18")
    again = document(
        "evaluate", run, *data, "--window-size", "10", "--window-stride", "5", "--output", tmp_path / "ten"
    )
    assert again["conditions"]["window_size"] == 10
