"""The warm-up: what each role imitates, where the loss falls, and that nothing is trained twice."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from training_world import questions, save_model, tokenizer, world

from dro_rl import train
from dro_rl.evaluation.stages import read_stages
from dro_rl.files import damage, folder_written_whole
from dro_rl.job import warmup
from dro_rl.job.examples import generator_examples, selection_order, selector_examples
from dro_rl.job.warmup import WarmUp, warm_up
from dro_rl.locks import owned
from dro_rl.models.loading import load_model
from dro_rl.prompts import Prompter
from dro_rl.recipe import Recipe, load_recipe
from dro_rl.records import Document, Question
from dro_rl.roles import ROLES, Role
from dro_rl.selection import parse_selection


def recipe_with(home: Path, **keys: Any) -> Recipe:
    return load_recipe(home / "recipe.yaml", {"output_dir": str(home / "run"), "warmup": "both", **keys})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("warmup")
    world(folder)
    return folder


def prompter(home: Path, role: Role) -> Prompter:
    return Prompter(tokenizer(), str(home / f"{role[0]}.jinja"))


def targets(home: Path, made: list[Question], **keys: Any) -> list[list[int]]:
    """The numbers that the selector is shown."""
    recipe = recipe_with(home, **keys)
    asks = prompter(home, "selector")
    pairs = selector_examples(made, asks, recipe.run, recipe.training)
    texts = [asks.decode(completion) for _, completion in pairs]
    return [
        list(parse_selection(text, len(question.documents), recipe.training.spec.most).numbers)
        for text, question in zip(texts, made, strict=True)
    ]


# The selector


@pytest.mark.parametrize("order", ["labels", "retriever", "ranking", "random"])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_selector_is_shown_exactly_k_distinct_numbers(home: Path, tmp_path: Path, order: str, k: int) -> None:
    keys: dict[str, Any] = {"warmup_selector_order": order, "num_selected": k}
    if order == "ranking":
        path = tmp_path / "ranking.jsonl"
        path.write_text("\n".join(json.dumps({"id": f"q{n}", "ranking": ["d3", "d0"]}) for n in range(12)))
        keys["warmup_selector_ranking"] = str(path)
    shown = targets(home, questions(12), **keys)
    assert all(len(numbers) == len(set(numbers)) == k for numbers in shown)
    assert {number for numbers in shown for number in numbers} <= {1, 2, 3, 4, 5}


def test_labelled_documents_come_first_then_the_retrievers_order(home: Path) -> None:
    made = questions(12)
    made[0] = replace(made[0], supporting=("d4", "d2"))
    shown = targets(home, made, warmup_selector_order="labels", num_selected=5)
    assert shown[0] == [3, 5, 1, 2, 4]
    for numbers, question in zip(shown, made, strict=True):
        gold = list(question.supporting_numbers)
        assert numbers == gold + [n for n in range(1, 6) if n not in gold]


def test_a_question_without_labels_gives_the_retrievers_order(home: Path) -> None:
    made = [replace(questions(1)[0], supporting=())]
    assert targets(home, made, warmup_selector_order="labels", num_selected=3) == [[1, 2, 3]]


def test_the_retrievers_order_is_the_order_of_the_candidates(home: Path) -> None:
    assert targets(home, questions(3), warmup_selector_order="retriever", num_selected=4) == [[1, 2, 3, 4]] * 3


def test_a_ranking_comes_first_and_what_it_leaves_out_last(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "ranking.jsonl"
    path.write_text('{"id": "q0", "ranking": ["d3", "d9", "d1"]}\n{"id": "q1", "ranking": ["d4"]}\n')
    keys = {"warmup_selector_order": "ranking", "warmup_selector_ranking": str(path), "num_selected": 5}
    assert targets(home, questions(2), **keys) == [[4, 2, 1, 3, 5], [5, 1, 2, 3, 4]]


def test_chance_depends_on_the_seed_and_the_id_alone(home: Path) -> None:
    run = recipe_with(home, warmup_selector_order="random").run
    made = questions(40)
    shown = [selection_order(run, 3)(question) for question in made]
    assert all(sorted(numbers) == [1, 2, 3, 4, 5] for numbers in shown)
    assert len({tuple(numbers) for numbers in shown}) > 10
    assert [selection_order(run, 3)(question) for question in reversed(made)] == shown[::-1]
    assert selection_order(run, 3)(replace(made[0], question="another?", supporting=())) == shown[0]
    assert [selection_order(run, 4)(question) for question in made] != shown
    assert any(selection_order(run, 3)(replace(made[0], id=f"other{n}")) != shown[0] for n in range(5))


# The generator


class Recorder(Prompter):
    """Remembers which documents it was asked to show."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.shown: list[list[int]] = []

    def generator_prompt(self, question: Question, numbers: Any) -> Any:
        self.shown.append(list(numbers))
        return super().generator_prompt(question, numbers)


def read(home: Path, made: list[Question], mode: str, k: int = 3, **keys: Any) -> list[list[int]]:
    recipe = recipe_with(home, warmup_generator_documents=mode, num_selected=k, **keys)
    recorder = Recorder(tokenizer(), str(home / "g.jinja"))
    list(generator_examples(made, recorder, recipe.run, recipe.training))
    return recorder.shown


def test_retrieved_are_the_first_k_in_their_order(home: Path) -> None:
    assert read(home, questions(4), "retrieved") == [[1, 2, 3]] * 4


def test_gold_is_the_labelled_documents_alone(home: Path) -> None:
    made = questions(8)
    assert read(home, made, "gold") == [list(question.supporting_numbers) for question in made]


def test_gold_falls_back_on_the_first_k_where_a_question_has_no_labels(home: Path) -> None:
    made = [replace(questions(1)[0], supporting=())]
    assert sorted(read(home, made, "gold")[0]) == [1, 2, 3]


@pytest.mark.parametrize("mode", ["mixed", "random"])
def test_k_distinct_documents_are_read(home: Path, mode: str) -> None:
    shown = read(home, questions(50), mode)
    assert all(len(numbers) == len(set(numbers)) == 3 for numbers in shown)
    assert {number for numbers in shown for number in numbers} == {1, 2, 3, 4, 5}


def test_the_labelled_document_stands_in_every_place_as_often(home: Path) -> None:
    made = questions(600)
    shown = read(home, made, "mixed")
    places = Counter(numbers.index(q.supporting_numbers[0]) for q, numbers in zip(made, shown, strict=True))
    assert set(places) == {0, 1, 2}
    assert all(150 < count < 250 for count in places.values()), "a third of 600 each, within four deviations"


def test_several_labelled_documents_stand_in_either_order(home: Path) -> None:
    made = [replace(question, supporting=("d1", "d3")) for question in questions(100)]
    orders = Counter(tuple(numbers) for numbers in read(home, made, "gold"))
    assert set(orders) == {(2, 4), (4, 2)}
    assert min(orders.values()) > 25


def test_chance_names_the_labelled_document_as_often_as_any(home: Path) -> None:
    made = questions(600)
    hits = sum(q.supporting_numbers[0] in numbers for q, numbers in zip(made, read(home, made, "random"), strict=True))
    assert 300 < hits < 420, "three of five: 360 of 600, within five deviations"


def test_more_labels_than_k_are_cut_to_k(home: Path) -> None:
    made = [replace(questions(1)[0], supporting=("d0", "d1", "d2", "d3"))]
    assert sorted(read(home, made, "gold", k=2)[0]) == [1, 2]
    assert sorted(read(home, made, "mixed", k=2)[0]) == [1, 2]


def test_the_answer_is_the_first_accepted_one_and_the_end(home: Path) -> None:
    recipe = recipe_with(home)
    made = [replace(question, answers=(*question.answers, "quito")) for question in questions(5)]
    for (_, completion), question in zip(
        generator_examples(made, prompter(home, "generator"), recipe.run, recipe.training), made, strict=True
    ):
        words = tokenizer().convert_ids_to_tokens(list(completion))
        assert words == [question.answers[0], "</s>"]


# The loss


def test_the_loss_falls_on_the_completion_alone(home: Path, tmp_path: Path) -> None:
    recipe = recipe_with(home)
    for role, examples in (("selector", selector_examples), ("generator", generator_examples)):
        pairs = list(examples(questions(6), prompter(home, role), recipe.run, recipe.training))
        warmup.write_examples([[pair] for pair in pairs], tmp_path / f"{role}.arrow")
        written = Dataset.from_file(str(tmp_path / f"{role}.arrow"))
        for row, (prompt, completion) in zip(written, pairs, strict=True):
            assert row["input_ids"] == [*prompt, *completion]
            assert row["labels"] == [-100] * len(prompt) + list(completion)


def test_no_gradient_comes_from_the_prompt(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the trainer is given, through its own collator: labels survive, padding has none."""
    seen: list[dict[str, torch.Tensor]] = []
    original = warmup.trl.SFTTrainer.compute_loss

    def spy(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append({name: tensor.clone() for name, tensor in inputs.items() if torch.is_tensor(tensor)})
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(warmup.trl.SFTTrainer, "compute_loss", spy)
    recipe = recipe_with(home, warmup_cache_dir=str(tmp_path), warmup_batch_size=4)
    warm_up(job(home), questions(8), recipe.run, recipe.training)
    pairs = selector_examples(questions(8), prompter(home, "selector"), recipe.run, recipe.training)
    wanted = {(*prompt, *completion): completion for prompt, completion in pairs}
    for batch in seen:
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
            learned = tuple(labels[labels != -100].tolist())
            assert learned == wanted[tuple(ids[mask.bool()].tolist())]


def test_logits_are_made_where_something_is_learned_and_nothing_changes_by_it(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's head is given labelled tokens alone; the plain way, in which it is given all, trains the same model."""
    given: list[tuple[int, int]] = []
    head = warmup.utils._ChunkedLogProbFunction

    class Counting:
        @staticmethod
        def apply(hidden: torch.Tensor, *arguments: Any) -> Any:
            given.append((len(hidden), len(arguments[2])))
            return head.apply(hidden, *arguments)

    monkeypatch.setattr(warmup.utils, "_ChunkedLogProbFunction", Counting)
    before = warmup.utils._use_triton
    folders = []
    for name in ("alone", "all"):
        recipe = recipe_with(home, warmup_cache_dir=str(tmp_path / name), warmup_batch_size=4)
        if name == "all":
            monkeypatch.setattr(warmup, "_logits_of_what_is_learned", nullcontext)
        folders.append(warm_up(job(home), questions(8), recipe.run, recipe.training))
        assert warmup.utils._use_triton is before
    pairs = list(selector_examples(questions(8), prompter(home, "selector"), recipe.run, recipe.training))
    learned = sum(len(completion) for _, completion in pairs)
    assert sum(rows for rows, _ in given[: len(given) // 2]) == learned
    assert sum(rows for rows, _ in given[len(given) // 2 :]) > 3 * learned
    alone, everything = (load_model(folder) for folder in folders)
    for one, other in zip(alone.parameters(), everything.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_a_step_of_several_passes_is_one_of_as_many_questions(home: Path, tmp_path: Path) -> None:
    """Questions differ in tokens, each of which weighs the same."""
    trained = []
    for batch, passes in ((4, 1), (2, 2), (1, 4)):
        recipe = recipe_with(
            home, warmup_cache_dir=str(tmp_path / str(batch)), warmup_batch_size=batch,
            warmup_gradient_accumulation_steps=passes,
        )  # fmt: skip
        trained.append(load_model(warm_up(job(home), questions(8), recipe.run, recipe.training)))
    for other in trained[1:]:
        for one, two in zip(trained[0].parameters(), other.parameters(), strict=True):
            assert torch.allclose(one, two, atol=1e-6)


# The cache


def job(home: Path, role: Role = "selector", **settings: Any) -> WarmUp:
    made = WarmUp(
        role=role, model=str(home / f"base-{role}"), model_kwargs={}, lora=None, prompter=prompter(home, role),
        steps=2, learning_rate=1e-2,
    )  # fmt: skip
    return replace(made, **settings)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that a warm-up was trained into, with training replaced by a marker."""
    folders: list[Path] = []

    def stand_in(job: WarmUp, pairs: Any, run: Any, training: Any, folder: Path) -> None:
        with folder_written_whole(folder, sealed=True) as beside:
            (beside / "config.json").write_text("{}")
            (beside / "model.safetensors").write_bytes(b"weights")
        folders.append(folder)

    monkeypatch.setattr(warmup, "train_supervised", stand_in)
    return folders


def test_the_second_time_trains_nothing(home: Path, tmp_path: Path, counted: list[Path]) -> None:
    recipe = recipe_with(home, warmup_cache_dir=str(tmp_path))
    first = warm_up(job(home), questions(8), recipe.run, recipe.training)
    assert warm_up(job(home), questions(8), recipe.run, recipe.training) == first
    assert counted == [Path(first)]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize("spoil", [Path.unlink, cut, lambda path: path.write_bytes(b"garbage")])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "files.json"])
def test_a_damaged_warm_up_is_made_again(
    home: Path, tmp_path: Path, counted: list[Path], spoil: Callable[[Path], Any], name: str
) -> None:
    recipe = recipe_with(home, warmup_cache_dir=str(tmp_path))
    first = warm_up(job(home), questions(8), recipe.run, recipe.training)
    spoil(Path(first) / name)
    assert warm_up(job(home), questions(8), recipe.run, recipe.training) == first
    assert len(counted) == 2
    assert damage(Path(first)) is None


def test_who_shares_the_cache_waits_for_who_makes_it(
    home: Path, tmp_path: Path, counted: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run finds what the first was making, and trains nothing."""
    recipe = recipe_with(home, warmup_cache_dir=str(tmp_path))
    first = warm_up(job(home), questions(8), recipe.run, recipe.training)
    waited: list[float] = []
    owner = owned(Path(first).with_name(f".{Path(first).name}.lock"), "another run")
    owner.__enter__()

    def done(seconds: float) -> None:
        waited.append(seconds)
        owner.__exit__(None, None, None)

    monkeypatch.setattr(warmup.time, "sleep", done)
    assert warm_up(job(home), questions(8), recipe.run, recipe.training) == first
    assert len(waited) == 1
    assert len(counted) == 1


def test_what_is_found_is_not_made_again(
    home: Path, tmp_path: Path, counted: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokenising a large set takes minutes, so a few questions at most are for the hash."""
    made: list[Question] = []
    original = Prompter.selector_prompt

    def spy(self: Prompter, question: Question, *k: int) -> Any:
        made.append(question)
        return original(self, question, *k)

    monkeypatch.setattr(Prompter, "selector_prompt", spy)
    recipe = recipe_with(home, warmup_cache_dir=str(tmp_path))
    many = questions(40)
    warm_up(job(home), many, recipe.run, recipe.training)
    assert len(made) == warmup.CANARIES + 40
    made.clear()
    warm_up(job(home), many, recipe.run, recipe.training)
    assert len(made) == warmup.CANARIES < 40


KEYS = {
    "the seed": {"seed": 4},
    "the order": {"warmup_selector_order": "random"},
    "K": {"num_selected": 3},
    "the batch size": {"warmup_batch_size": 2},
    "the passes of a step": {"warmup_gradient_accumulation_steps": 2},
    "weight decay": {"weight_decay": 0.5},
    "the clip": {"max_grad_norm": 0.5},
}


@pytest.mark.parametrize("change", KEYS)
def test_another_setting_is_another_warm_up(home: Path, tmp_path: Path, counted: list[Path], change: str) -> None:
    for keys in ({}, KEYS[change]):
        recipe = recipe_with(home, warmup_cache_dir=str(tmp_path), **keys)
        warm_up(job(home), questions(8), recipe.run, recipe.training)
    assert len(set(counted)) == 2


@pytest.mark.parametrize("settings", [{"steps": 3}, {"learning_rate": 1e-3}], ids=["steps", "learning rate"])
def test_another_schedule_is_another_warm_up(
    home: Path, tmp_path: Path, counted: list[Path], settings: dict[str, Any]
) -> None:
    recipe = recipe_with(home, warmup_cache_dir=str(tmp_path))
    warm_up(job(home), questions(8), recipe.run, recipe.training)
    warm_up(job(home, **settings), questions(8), recipe.run, recipe.training)
    assert len(set(counted)) == 2


def test_another_room_for_a_prompt_is_another_warm_up(home: Path, tmp_path: Path, counted: list[Path]) -> None:
    recipe = recipe_with(home, warmup_cache_dir=str(tmp_path))
    for asks in (prompter(home, "selector"), replace(prompter(home, "selector"), max_prompt_length=60)):
        warm_up(job(home, prompter=asks), questions(8), recipe.run, recipe.training)
    assert len(set(counted)) == 2


def test_another_question_is_another_warm_up(home: Path, tmp_path: Path, counted: list[Path]) -> None:
    recipe = recipe_with(home, warmup_cache_dir=str(tmp_path))
    made = questions(8)
    documents = (Document("d0", "", "ada lives in oslo"), *made[0].documents[1:])
    for other in (made, [*made[:7]], [replace(made[0], documents=documents), *made[1:]]):
        warm_up(job(home), other, recipe.run, recipe.training)
    assert len(set(counted)) == 3


def test_other_weights_are_another_warm_up_and_another_place_is_not(
    home: Path, tmp_path: Path, counted: list[Path]
) -> None:
    recipe = recipe_with(home, warmup_cache_dir=str(tmp_path / "cache"))
    same, other = save_model(tmp_path / "same", 1), save_model(tmp_path / "other", 9)
    for model in (home / "base-selector", same, other):
        warm_up(job(home, model=str(model)), questions(8), recipe.run, recipe.training)
    assert len(counted) == 2


def test_what_does_not_matter_is_not_another_warm_up(home: Path, tmp_path: Path, counted: list[Path]) -> None:
    for keys in ({}, {"num_iterations": 9, "num_generations": 8, "learning_rate": 0.3, "logging_steps": 5}):
        recipe = recipe_with(home, warmup_cache_dir=str(tmp_path), **keys)
        warm_up(job(home), questions(8), recipe.run, recipe.training)
    assert len(counted) == 1


# Through the job


def run_with(home: Path, output: Path, warm: str, *options: str) -> Path:
    train.main(
        [
            str(home / "recipe.yaml"), "--output_dir", str(output), "--warmup", warm, "--num_iterations", "1",
            "--warmup_cache_dir", str(output.parent / "cache"), "--warmup_batch_size", "4",
            "--warmup_selector_learning_rate", "0.02", "--warmup_generator_learning_rate", "0.02", *options,
        ]
    )  # fmt: skip
    return output


@pytest.mark.slow
def test_a_run_reports_the_models_before_and_after_the_warm_up(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_with(home, tmp_path / "run", "both")
    assert [stage["stage"] for stage in read_stages(run)] == ["base", "warmup", "iteration-1", "final"]
    warmed = sorted((tmp_path / "cache").iterdir())
    assert [folder.name.split("-")[0] for folder in warmed] == ["generator", "selector"]
    for folder in warmed:
        before = load_file(home / f"base-{folder.name.split('-')[0]}" / "model.safetensors")
        after = load_file(folder / "model.safetensors")
        assert any(not torch.equal(before[name], after[name]) for name in before)

    monkeypatch.setattr(warmup, "train_supervised", lambda *args: pytest.fail("trained again"))
    run_with(home, tmp_path / "again", "both", "--learning_rate", "0.01")


def test_a_run_without_warm_up_starts_from_the_base(home: Path, tmp_path: Path) -> None:
    run = run_with(home, tmp_path / "run", "none")
    assert [stage["stage"] for stage in read_stages(run)] == ["base", "iteration-1", "final"]
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("role", ROLES)
def test_one_role_may_be_warmed_up_alone(home: Path, tmp_path: Path, role: str) -> None:
    run_with(home, tmp_path / "run", role, "--max_steps", "1")
    assert [folder.name.split("-")[0] for folder in (tmp_path / "cache").iterdir()] == [role]


def test_a_warmed_up_selector_writes_selections(home: Path, tmp_path: Path) -> None:
    run = run_with(home, tmp_path / "run", "selector", "--warmup_selector_steps", "60", "--max_steps", "1")
    base, warmed = read_stages(run)[:2]
    assert warmed["valid"] == 100
    assert warmed["valid"] > base["valid"] or warmed["recall@1"] > base["recall@1"]
