"""Each wrong input is one error naming place, value, rule and fix, before models load: exit code 2, nothing lost."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
import yaml
from training_world import launch, questions, save_model, tokenizer, weights, world, write_questions
from transformers import AutoModelForCausalLM

from dro_rl import train
from dro_rl.errors import InputError, is_full_disk
from dro_rl.job import model_checks, preflight
from dro_rl.rollouts import log as rollout_log
from dro_rl.trainer import DROTrainer

Refuse = Callable[..., str]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad-input")
    world(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*args: Any, **kwargs: Any) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)


@pytest.fixture
def refuse(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_models: None) -> Refuse:
    """Runs the job with some keys changed over the folder of another run; returns the one error line."""

    def run(*options: str, recipe: Path = home / "recipe.yaml", claims: bool = False, **keys: Any) -> str:
        other = tmp_path / "other-run"
        (other / "checkpoint-4").mkdir(parents=True, exist_ok=True)
        (other / "recipe.yaml").write_text("seed: 7\n")
        (other / "checkpoint-4" / "trainer_state.json").write_text("{}")
        before = contents(other)
        if not claims:
            keys["output_dir"] = other
        changed = [part for key, value in keys.items() for part in (f"--{key}", yaml.safe_dump(value) if isinstance(
            value, list | dict | bool | None) else str(value))]  # fmt: skip
        assert train.run_job([str(recipe), *changed, *options]) == 2
        assert contents(other) == before
        errors = capsys.readouterr().err
        assert "Traceback" not in errors
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, errors
        assert errors.rstrip().endswith(lines[0]), "nothing is said after the error"
        return lines[0]

    return run


def says(error: str, *parts: str) -> bool:
    """Place, value, rule and fix, in that order."""
    position = 0
    for part in parts:
        position = error.find(part, position)
        if position < 0:
            raise AssertionError(f"{part!r} is not, or not in its place, in {error}")
        position += len(part)
    return True


# The recipe

SETTINGS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "an unknown key": (
        ["--num_generation", "4"],
        ("error: num_generation", "4", "no such key", "Did you mean num_generations?"),
    ),
    "a key like no other": (["--no-such-key"], ("error: no_such_key", "True", "there is no such key", "recipe keys")),
    "a wrong type": (
        ["--num_generations", "many"],
        ("error: num_generations", "'many'", "a whole number", "Correct"),
    ),
    "a number that is none": (["--beta", ".nan"], ("error: beta", "nan", "a number", "Correct")),
    "no rollouts": (["--num_generations", "0"], ("error: num_generations", "0", "at least 1", "Use 1 or more")),
    "one rollout": (
        ["--num_generations", "1"],
        ("error: num_generations", "1", "no selection signal", "Use 2 or more"),
    ),
    "a prompt beyond the model's positions": (
        ["--max_prompt_length", "255"],
        ("error: max_prompt_length", "255", "the selector's 256 positions", "Lower it"),
    ),
    "K above N": (
        ["--num_selected", "6"],
        ("error: num_selected", "6", "question q0 has 5 documents", "Lower num_selected"),
    ),
    "a batch that does not divide": (
        ["--per_device_train_batch_size", "3", "--gradient_accumulation_steps", "1"],
        ("error: per_device_train_batch_size", "3", "whole groups of num_generations = 4", "multiple"),
    ),
    "a broken iteration": (
        ["--questions_per_iteration", "7"],
        ("error: questions_per_iteration", "7", "whole steps of 4", "Use a multiple of 4"),
    ),
    "more questions than there are": (
        ["--questions_per_iteration", "16"],
        ("error: questions_per_iteration", "16", "has 12 questions", "Lower it"),
    ),
    "an unknown metric": (
        ["--metric_for_best_model", "bleu"],
        ("error: metric_for_best_model", "'bleu'", "one of em, f1", "Use one"),
    ),
    "a tracker that is not installed": (
        ["--report_to", "comet"],
        ("error: report_to", "'comet'", "a tracker that is installed", "dro_rl[report]"),
    ),
    "an attention that is not there": (
        ["--attn_implementation", "magic"],
        ("error: attn_implementation", "'magic'", "has it here", "Use sdpa"),
    ),
    "adapters on no layer": (
        ["--selector_lora_r", "4", "--lora_target_modules", "[q_proj, c_attn]"],
        ("error: lora_target_modules", "'c_attn'", "layers of the selector", "q_proj", "Take it off"),
    ),
    "adapters that drop everything": (
        ["--lora_dropout", "1"],
        ("error: lora_dropout", "1", "in [0, 1)", "Use 0.05"),
    ),
    "a dataset that is not there": (
        ["--dataset_name", "nowhere/train.jsonl"],
        ("error: dataset_name", "'nowhere/train.jsonl'", "a question file or folder exists", "Check the path"),
    ),
    "a dev set that is not there": (
        ["--eval_dataset_name", "nowhere/dev.jsonl"],
        ("error: eval_dataset_name", "'nowhere/dev.jsonl'", "a question file or folder exists", "Check the path"),
    ),
    "a split that is not there": (
        ["--dataset_eval_split", "kept"],
        ("0 files for split kept", "a folder has one of kept.jsonl", "Name the file"),
    ),
    "a hub dataset out of reach": (
        ["--dataset_name", "nobody/nothing"],
        ("error: dataset_name", "'nobody/nothing'", "a hub dataset with split train", "the network"),
    ),
    "a hub model out of reach": (
        ["--generator_model_name_or_path", "nobody/nothing"],
        ("error: generator_model_name_or_path", "'nobody/nothing'", "a model folder or a hub name", "the network"),
    ),
    "a model folder that is not there": (
        ["--selector_model_name_or_path", "/nowhere/model"],
        ("error: selector_model_name_or_path", "'/nowhere/model'", "a model folder", "Check the name"),
    ),
    "a template that is not there": (
        ["--selector_prompt_template", "selectr"],
        ("prompt template", "'selectr'", "a template is one of dialogue_generator", "Check the name"),
    ),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_wrong_setting_is_refused(refuse: Refuse, case: str) -> None:
    options, parts = SETTINGS[case]
    assert says(refuse(*options), *parts)


RECIPES = {
    "a list": (b"- seed: 1\n", ("list", "`key: value` lines", "Write some")),
    "nothing": (b"", ("NoneType", "`key: value` lines", "Write some")),
    "broken YAML": (b"seed: 1\nlearning_rate: [1\n", ("line 3", "a recipe is YAML", "Correct it")),
    "a key twice": (b"seed: 1\nseed: 2\n", ("line 2", "'seed'", "a key stands once", "Remove one")),
    "Latin-1": (
        "run_name: caf\xe9\n".encode("latin-1"),
        ("invalid continuation", "UTF-8 text", "Convert the file"),
    ),
    "control characters": (b"run_name: \x00\n", ("x0000", "UTF-8 text", "Convert the file")),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_file_that_is_no_recipe_is_refused(refuse: Refuse, tmp_path: Path, case: str) -> None:
    text, parts = RECIPES[case]
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text)
    assert says(refuse(recipe=path), f"error: {path}", *parts)


def test_a_recipe_that_is_not_there_is_refused(refuse: Refuse, tmp_path: Path) -> None:
    assert says(refuse(recipe=tmp_path / "no.yaml"), "no.yaml", "no such file", "a YAML file", "Check the path")


# Questions


def without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda row: {name: value for name, value in row.items() if name != key}


ROWS: dict[str, tuple[Callable[[dict[str, Any]], Any], tuple[str, ...]]] = {
    "a broken line": (lambda row: '{"id": "q1", ', ('\'{"id"', "one JSON object", "Write each object whole")),
    "a line that is no object": (lambda row: [row], ("each line is a JSON object", "Write one object")),
    "no id": (without("id"), ("id: missing", "a question has id", "Add the field")),
    "no question": (without("question"), ("question: missing", "a question has", "Add the field")),
    "no answers": (without("answers"), ("answers: missing", "a question has", "Add the field")),
    "no documents": (without("documents"), ("documents: missing", "a question has", "Add the field")),
    "an empty answer": (lambda row: {**row, "answers": [" "]}, ("answers[1]: ' '", "not empty", "Fill it in")),
    "no answer": (lambda row: {**row, "answers": []}, ("answers: empty list", "at least one answer", "Add one")),
    "an empty list of documents": (
        lambda row: {**row, "documents": []},
        ("documents: empty list", "candidates to select from", "Retrieve some"),
    ),
    "a duplicate id": (lambda row: {**row, "id": "q0"}, ("id: 'q0': ids are unique", "or that of line 1.")),
    "a supporting id that does not exist": (
        lambda row: {**row, "supporting": ["d9"]},
        ("supporting: 'd9'", "ids of this question's documents", "Add the document"),
    ),
    "an answer that is a number": (lambda row: {**row, "answers": [7]}, ("answers[1]: 7", "text", "Write a JSON")),
    "answers that are a string": (lambda row: {**row, "answers": "rome"}, ("answers: 'rome'", "a list", "Write a")),
}


@pytest.mark.parametrize("split", ["train", "dev"])
@pytest.mark.parametrize("case", ROWS)
def test_a_wrong_question_is_refused_with_its_line(refuse: Refuse, tmp_path: Path, case: str, split: str) -> None:
    change, parts = ROWS[case]
    rows = [json.loads(json.dumps(asdict(question))) for question in questions(12)]
    wrong = change(rows[1])
    lines = [json.dumps(row) for row in rows]
    lines[1] = wrong if isinstance(wrong, str) else json.dumps(wrong)
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(lines))
    key = "dataset_name" if split == "train" else "eval_dataset_name"
    assert says(refuse(**{key: path}), f"error: {path}: line 2", *parts)


def test_training_questions_are_not_evaluated_on(refuse: Refuse, home: Path, tmp_path: Path) -> None:
    alone = write_questions(tmp_path / "alone.jsonl", questions(12))
    error = refuse(dataset_name=alone)
    assert says(error, "error: eval_dataset_name", "12 of 12 dev questions", "not trained on", "Name another file")
    error = refuse(dataset_eval_split="train")
    assert says(error, "error: dataset_eval_split", "12 of 12 dev questions", "not trained on", "Name another")


def test_one_training_question_in_the_dev_split_is_named(refuse: Refuse, tmp_path: Path) -> None:
    leak = write_questions(tmp_path / "dev.jsonl", [*questions(3, seed=1), questions(12)[7]])
    error = refuse(eval_dataset_name=leak)
    assert says(error, "error: eval_dataset_name", "1 of 4 dev questions", "'q7'", "not trained on", "take them out")


def test_row_numbers_may_be_ids_in_both_splits() -> None:
    train_split, dev = questions(12), questions(4, seed=1)
    assert {question.id for question in dev} < {question.id for question in train_split}
    preflight.check_splits(preflight.RunConfig(dataset_name="folder"), train_split, dev)


def test_a_question_longer_than_a_prompt_is_named(refuse: Refuse) -> None:
    error = refuse(max_prompt_length=8)
    assert says(error, "error: question q0", "tokens", "max_prompt_length = 8", "never cut", "Raise max_prompt_length")


# Model folders


def copy_of(home: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(home / "base-selector", tmp_path / "model"))


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def encoder(folder: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16
    )
    transformers.BertModel(config).save_pretrained(folder)


def larger_tokenizer(folder: Path) -> None:
    other = tokenizer()
    other.add_tokens([f"extra{n}" for n in range(3)])
    other.save_pretrained(folder)


def no_eos(folder: Path) -> None:
    other = tokenizer()
    other.eos_token = None
    other.save_pretrained(folder)


def wider_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))


def index_without_its_files(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


FOLDERS: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), ("holds a config.json", "Check the path")),
    "a broken config": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "llama",'),
        ("not a valid JSON", "Check the name"),
    ),
    "a config of no model": (lambda folder: (folder / "config.json").write_text("{}"), ("model_type", "Check")),
    "a config that is a list": (lambda folder: (folder / "config.json").write_text("[]"), ("a model folder", "Check")),
    "an encoder": (encoder, ("(bert)", "a causal language model", "Use a decoder-only model")),
    "a sequence-to-sequence model": (
        lambda folder: transformers.T5Config(vocab_size=40).save_pretrained(folder),
        ("(t5)", "a causal language model", "Use a decoder-only model"),
    ),
    "an encoder and a decoder": (
        lambda folder: transformers.BartConfig(vocab_size=40).save_pretrained(folder),
        ("(bart)", "a causal language model", "Use a decoder-only model"),
    ),
    "no tokenizer": (no_tokenizer, ("token", "Check")),
    "half of a tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text('{"version": "1.0",'),
        ("a model folder", "Check"),
    ),
    "a tokenizer with more tokens than embeddings": (
        larger_tokenizer,
        ("29 tokens, 26 embeddings", "every token of the tokenizer has an embedding", "resize its embeddings"),
    ),
    "a tokenizer without an end": (no_eos, ("has an end-of-sequence token", "Set eos_token")),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        ("holds its weights, and model.safetensors is missing", "Copy the folder again"),
    ),
    "an index without its files": (
        index_without_its_files,
        ("holds its weights, and model-00001-of-00002.safetensors is missing", "Copy the folder again"),
    ),
    "an index that is none": (
        lambda folder: (
            (folder / "model.safetensors").unlink(),
            (folder / "model.safetensors.index.json").write_text("{"),
        ),
        ("model.safetensors.index.json", "the index of the folder's weights", "Copy the folder again"),
    ),
    "half of the weights": (truncated, ("model.safetensors", "a whole safetensors file", "Copy the file again")),
    "empty weights": (
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        ("model.safetensors", "a whole safetensors file", "Copy the file again"),
    ),
    "another model's config": (
        wider_config,
        ("the shapes of config.json", "has (32, 64) for (32, 128)", "its config and its weights together"),
    ),
    "a config that describes no model": (
        lambda folder: (folder / "config.json").write_text(
            json.dumps({**json.loads((folder / "config.json").read_text()), "hidden_act": "magic"})
        ),
        ("its config.json describes a model", "Copy the folder again"),
    ),
}


@pytest.mark.parametrize("role", ["selector", "generator"])
@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_is_no_model_is_refused(refuse: Refuse, home: Path, tmp_path: Path, case: str, role: str) -> None:
    spoil, parts = FOLDERS[case]
    folder = copy_of(home, tmp_path)
    spoil(folder)
    key = f"{role}_model_name_or_path"
    assert says(refuse(**{key: folder}), f"error: {key}", str(folder), *parts)


def test_weights_in_parts_and_pickled_weights_are_accepted(home: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(home / "base-selector")
    model.save_pretrained(tmp_path / "parts", max_shard_size="10kB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    model_checks.check_weights(tmp_path / "parts", model, "selector_model_name_or_path")
    (tmp_path / "pickled").mkdir()
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    model_checks.check_weights(tmp_path / "pickled", model, "selector_model_name_or_path")


def test_tied_weights_are_accepted(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "tied", 1, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert "lm_head.weight" not in safetensors.torch.load_file(folder / "model.safetensors")
    model_checks.check_weights(folder, model, "selector_model_name_or_path")


# Templates

TEMPLATES = {
    "broken": (b"{{ question }}\n{% for d in documents %}", ("line 2", "valid Jinja", "Correct it")),
    "an unknown variable": (
        b"{{ passages }} {{ question }}",
        ("renders from question", "'passages' is undef", "Correct"),
    ),
    "an unknown field": (
        b"{% for d in documents %}{{ d.body }}{% endfor %}",
        ("renders from question and documents", "'body'", "Correct the template"),
    ),
    "wrong arithmetic": (b"{{ question + 1 }}", ("renders from question", "Correct the template")),
    "Latin-1": (b"caf\xe9 {{ question }}", ("byte 3 is not UTF-8", "UTF-8 text", "Convert")),
}


@pytest.mark.parametrize("role", ["selector", "generator"])
@pytest.mark.parametrize("case", TEMPLATES)
def test_a_template_that_does_not_render_is_refused(refuse: Refuse, tmp_path: Path, case: str, role: str) -> None:
    text, parts = TEMPLATES[case]
    path = tmp_path / "mine.jinja"
    path.write_bytes(text)
    assert says(refuse(**{f"{role}_prompt_template": path}), "error: ", str(path), *parts)


# Warm-up


def rankings(path: Path, order: Callable[[int], Any], count: int = 12) -> Path:
    path.write_text("\n".join(json.dumps({"id": f"q{n}", "ranking": order(n)}) for n in range(count)))
    return path


@pytest.mark.parametrize(
    ("order", "count", "parts"),
    [
        (lambda n: ["d1", "d0"], 11, ("ranking.jsonl", "'q11'", "every training question has a ranking", "Add its")),
        (lambda n: "d1 d0", 12, ("ranking.jsonl: line 1", "{id, ranking: [document ids]}", "Correct it")),
        (lambda n: ["p1"], 12, ("ranking.jsonl: id q0", "['p1']", "names candidates", "Rank the documents")),
    ],
    ids=["a question without ranking", "text for a list", "documents of another set"],
)
def test_a_ranking_that_does_not_fit_the_questions_is_refused(
    refuse: Refuse, tmp_path: Path, order: Callable[[int], Any], count: int, parts: tuple[str, ...]
) -> None:
    path = rankings(tmp_path / "ranking.jsonl", order, count)
    error = refuse(warmup="selector", warmup_selector_order="ranking", warmup_selector_ranking=path)
    assert says(error, *parts)


def test_a_ranking_that_is_not_there_is_refused(refuse: Refuse, tmp_path: Path) -> None:
    path = tmp_path / "ranking.jsonl"
    error = refuse(warmup="selector", warmup_selector_order="ranking", warmup_selector_ranking=path)
    assert says(error, "error: warmup_selector_ranking", str(path), "the file exists", "Check the path")


def test_labels_are_not_imitated_where_there_are_none(refuse: Refuse, tmp_path: Path) -> None:
    rows = [{**asdict(question), "supporting": []} for question in questions(12)]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    dev = write_questions(tmp_path / "dev.jsonl", questions(4, seed=1))
    data = {"dataset_name": path, "eval_dataset_name": dev}
    error = refuse(**data, warmup="both")
    assert says(error, "error: warmup_selector_order", "'labels'", "no training question has any", "Use retriever")
    for documents in ("gold", "mixed"):
        error = refuse(**data, warmup="generator", warmup_generator_documents=documents)
        assert says(
            error, "error: warmup_generator_documents", f"'{documents}'", "no training question", "Use retrieved"
        )


def test_recall_by_labels_does_not_decide_where_there_are_none(refuse: Refuse, tmp_path: Path) -> None:
    rows = [{**asdict(question), "supporting": []} for question in questions(4, seed=1)]
    path = tmp_path / "dev.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    error = refuse(eval_dataset_name=path, metric_for_best_model="recall@5")
    assert says(error, "error: metric_for_best_model", "'recall@5'", "needs labels", "Use f1")


def test_a_warm_up_has_a_place_to_be_kept(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    error = refuse(warmup="both", warmup_cache_dir=tmp_path / "file" / "cache")
    assert says(error, "error: warmup_cache_dir", str(tmp_path / "file"), "are kept there", "Use another")


# The output folder


def test_a_folder_that_holds_another_run_is_left_alone(refuse: Refuse, tmp_path: Path) -> None:
    assert says(refuse(), "error: output_dir", "other-run", "holds a run", "--resume_from_checkpoint auto")
    error = refuse(resume_from_checkpoint="auto")
    assert says(error, "other-run", "a resumed run computes what it began", "another output_dir")


def test_a_folder_that_holds_other_things_is_left_alone(refuse: Refuse, tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.tex").write_text("It was a dark night.")
    error = refuse(claims=True, output_dir=folder)
    assert says(error, "error: output_dir", str(folder), "empty or holds this run", "Use another folder")
    assert contents(folder) == {"chapter.tex": b"It was a dark night."}


@pytest.mark.parametrize("below", ["", "run"], ids=["the file itself", "below it"])
def test_a_file_in_the_way_is_left_alone(refuse: Refuse, tmp_path: Path, below: str) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    error = refuse(claims=True, output_dir=path / below)
    assert says(error, "error: output_dir", str(path), "files can be written and locked there", "Use another")
    assert path.read_text() == "mine"


def test_what_is_resumed_is_a_checkpoint(refuse: Refuse, tmp_path: Path, home: Path) -> None:
    error = refuse(claims=True, output_dir=tmp_path / "new", resume_from_checkpoint=home / "base-selector")
    assert says(error, "error: resume_from_checkpoint", "base-selector", "a whole checkpoint", "Leave it out, to begin")
    assert not (tmp_path / "new").exists()


def test_a_recipe_of_a_run_that_is_damaged_is_named(refuse: Refuse, tmp_path: Path) -> None:
    run = tmp_path / "damaged"
    run.mkdir()
    (run / "recipe.yaml").write_text("seed: [1\n")
    error = refuse(claims=True, output_dir=run, resume_from_checkpoint="auto")
    assert says(error, str(run / "recipe.yaml"), "a recipe is YAML", "Correct it")


# The disk


def test_a_disk_without_room_for_the_checkpoints_is_refused(
    refuse: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type(shutil.disk_usage(tmp_path))(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    error = refuse(claims=True, output_dir=tmp_path / "new" / "run")
    assert says(error, "error: output_dir", "1,000 B free", "checkpoints of both models take", "Free some")
    assert not (tmp_path / "new").exists()


def full(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def half_written_then_full(table: Any, path: Any, **kwargs: Any) -> None:
    Path(path).write_bytes(b"PAR1 and no more")
    full()


FULL = {
    "the rollouts of the second iteration": ("dro_rl.rollouts.log.pq.write_table", half_written_then_full),
    "a model of the second checkpoint": ("dro_rl.trainer.save_role", full),
    "the evaluation": ("dro_rl.evaluation.evaluator.write_results", full),
}


@pytest.mark.parametrize("case", FULL)
def test_a_disk_that_fills_up_ends_the_run_with_its_checkpoints_whole(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    run = tmp_path / "run"
    job = [str(home / "recipe.yaml"), "--output_dir", str(run)]
    first = "checkpoint-2"
    place, fails = FULL[case]
    original = DROTrainer._save_checkpoint

    def save_then_fill(self: Any, *args: Any) -> None:
        original(self, *args)
        if self.state.global_step:
            broken.setattr(place, fails)

    with monkeypatch.context() as broken:
        broken.setattr("dro_rl.trainer.DROTrainer._save_checkpoint", save_then_fill)
        assert train.run_job(job) == 3, "the machine lacks room"
    errors = capsys.readouterr().err
    assert errors.count("error: ") == 1
    assert "Traceback" not in errors
    error = next(line for line in errors.splitlines() if line.startswith("error: "))
    assert says(error, "No space left on device", "a run has room", "--resume_from_checkpoint auto")
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-0", first]

    assert train.run_job([*job, "--resume_from_checkpoint", "auto"]) == 0
    unbroken = [str(home / "recipe.yaml"), "--output_dir", str(tmp_path / "unbroken")]
    assert train.run_job(unbroken) == 0
    expected, actual = weights(tmp_path / "unbroken"), weights(run)
    assert all(torch.equal(tensor, actual[name]) for name, tensor in expected.items())
    assert len(rollout_log.part_paths(run)) == len(rollout_log.part_paths(tmp_path / "unbroken"))
    assert not list(run.rglob(".*.tmp"))


def test_a_full_disk_is_known_by_what_each_library_says() -> None:
    assert is_full_disk(OSError(errno.ENOSPC, "No space left on device"))
    assert is_full_disk(safetensors.SafetensorError("I/O error: No space left on device (os error 28)"))
    assert is_full_disk(RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"))
    assert is_full_disk(RuntimeError("basic_ios::clear: iostream error"))
    assert not is_full_disk(FileNotFoundError(errno.ENOENT, "No such file"))
    assert not is_full_disk(RuntimeError("PytorchStreamReader failed reading zip archive"))


def test_an_error_that_is_not_the_users_is_raised(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(preflight, "load_questions", bug)
    with pytest.raises(RuntimeError, match="a bug of ours"):
        train.run_job([str(home / "recipe.yaml")])


# From outside


def test_the_job_exits_with_two_and_without_a_traceback(home: Path, tmp_path: Path) -> None:
    finished = launch(home / "recipe.yaml", tmp_path / "run", "--num_selected", "9")
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert finished.stderr.count("error: ") == 1
    assert says(finished.stderr, "error: num_selected: 9", "question q0 has 5 documents", "Lower num_selected")
    assert "Traceback" not in finished.stderr
    assert not (tmp_path / "run").exists()


def test_the_error_is_one_line() -> None:
    assert "\n" not in str(InputError("place", "two\nlines", "a rule", "A fix."))
