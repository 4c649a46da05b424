"""Claims about recipes that lie over others, about what differs between two, and about what reproduces a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from dro_rl.cli import app
from dro_rl.errors import InputError
from dro_rl.evaluation.shape import shape_of
from dro_rl.keys.reference import KEYS
from dro_rl.recipe import load_recipe, read_keys
from dro_rl.recipe.difference import differences
from dro_rl.recipe.files import DEEPEST, read_recipe
from dro_rl.study.plan import read_study

MODELS = "selector_model_name_or_path: s\ngenerator_model_name_or_path: g\n"
BASE = f"output_dir: runs/base\ndataset_name: toy\n{MODELS}num_generations: 8\nseed: 3\nnum_documents: 12\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "base.yaml").write_text(BASE)
    return tmp_path


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "100"})


# extends ----------------------------------------------------------------------------------------------------


def test_a_file_goes_over_the_one_that_it_extends(folder: Path) -> None:
    """Seen from its own folder, not from where the command is given."""
    mine = written(folder / "teams" / "mine.yaml", "extends: ../shared/base.yaml\nseed: 4\nnum_documents: null\n")
    run, training = read_keys(mine)
    assert (training.seed, training.num_generations, run.dataset_name) == (4, 8, "toy")
    assert run.num_documents is None, "null unsets what is below"
    assert read_keys(mine, {"seed": 5})[1].seed == 5, "the command line is uppermost"


def test_a_shipped_recipe_is_extended_by_its_name_even_by_a_file_of_that_name(folder: Path) -> None:
    mine = written(folder / "quickstart.yaml", "extends: quickstart\nseed: 77\n")
    assert read_recipe(mine) == {**read_recipe("quickstart"), "seed": 77} != read_recipe("quickstart")
    assert mine.samefile("quickstart.yaml")


def test_several_files_lie_over_one_another(folder: Path) -> None:
    written(folder / "shared" / "middle.yaml", "extends: base.yaml\nseed: 5\nnum_generations: 4\n")
    top = written(folder / "top.yaml", "extends: shared/middle.yaml\nseed: 6\n")
    assert {key: read_recipe(top)[key] for key in ("seed", "num_generations", "num_documents")} == {
        "seed": 6,
        "num_generations": 4,
        "num_documents": 12,
    }


def test_everything_that_reads_a_recipe_sees_what_it_extends(folder: Path) -> None:
    """Training, validation, studies, and the shape that an evaluation takes from a recipe."""
    mine = written(folder / "mine.yaml", "extends: shared/base.yaml\nseed: 4\n")
    assert load_recipe(mine).values["num_generations"] == 8
    assert shape_of(folder, mine, None, None).num_documents == 12
    checked = invoke("recipe", "validate", mine, "--keys-only", "--json")
    assert json.loads(checked.stdout)["recipes"][0]["num_generations"] == 8
    study = written(folder / "study.yaml", "base: mine.yaml\nseeds: [0]\nvariants: {plain: {}, few: {beta: 0.1}}\n")
    assert Path(read_study(study).base).samefile(mine)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("extends: nowhere.yaml", "'nowhere.yaml': this is a file, seen from"),
        ("extends: shared", "'shared': this is a file, seen from"),  # a folder
        ("extends: mine.yaml", "a recipe lies over others, never over itself"),
        ("extends: shared/../mine.yaml", "a recipe lies over others, never over itself"),
        ("extends: shared/circle.yaml", "a recipe lies over others, never over itself"),
        ("extends: [a, b]", "this is one file, or one shipped name"),
        ("extends: ''", "this is one file, or one shipped name"),
        ("extends: shared/broken.yaml", "broken.yaml"),
    ],
)
def test_what_cannot_be_extended_is_one_line_with_its_place(folder: Path, text: str, said: str) -> None:
    written(folder / "shared" / "circle.yaml", "extends: ../mine.yaml\n")
    written(folder / "shared" / "broken.yaml", "a: [")
    with pytest.raises(InputError) as caught:
        read_recipe(written(folder / "mine.yaml", f"{text}\nseed: 1\n"))
    assert said in str(caught.value)
    if "broken" not in text:
        assert "extends" in caught.value.place


def test_files_over_one_another_are_few(folder: Path) -> None:
    for number in range(DEEPEST + 1):
        written(folder / f"{number}.yaml", f"extends: {number + 1}.yaml\n")
    written(folder / f"{DEEPEST + 1}.yaml", BASE)
    assert read_recipe(folder / "2.yaml")["seed"] == 3
    with pytest.raises(InputError, match=f"more than {DEEPEST} files"):
        read_recipe(folder / "0.yaml")


def test_the_command_line_extends_nothing(folder: Path) -> None:
    with pytest.raises(InputError, match="a recipe's file says what it extends"):
        read_keys(folder / "shared" / "base.yaml", {"extends": "quickstart"})


def test_a_copy_still_extends_the_same_file(folder: Path) -> None:
    written(folder / "mine.yaml", "# mine\nextends: shared/base.yaml\nseed: 4\n")
    assert invoke("recipe", "cp", "mine.yaml", "far/away/copy.yaml").exit_code == 0
    assert read_recipe("far/away/copy.yaml") == read_recipe("mine.yaml")
    assert Path("far/away/copy.yaml").read_text().startswith("# mine\nextends: ")


# diff -------------------------------------------------------------------------------------------------------


def differing(folder: Path, a: str, b: str) -> dict[str, tuple[Any, Any, str]]:
    written(folder / "a.yaml", f"extends: shared/base.yaml\n{a}")
    written(folder / "b.yaml", f"extends: shared/base.yaml\n{b}")
    result = invoke("recipe", "diff", "a.yaml", "b.yaml", "--json")
    assert result.exit_code == 0, result.output
    return {each["key"]: (each["a"], each["b"], each["kind"]) for each in json.loads(result.stdout)["differences"]}


@pytest.mark.parametrize(
    ("a", "b", "found"),
    [
        ("seed: 4", "seed: 5", {"seed": (4, 5, "changed")}),
        ("beta: 0.1", "", {"beta": (0.1, 0.0, "b_default")}),
        ("", "target_ess: 0.5", {"target_ess": (None, 0.5, "a_default")}),
        ("learning_rate: 1e-5", "learning_rate: 0.00001", {}),
        ("temperature: 1", "temperature: 1.0", {}),
        (f"beta: {KEYS['beta'].default}", "", {}),  # a default that is written is no other
        ("seed: 3\nnum_documents: 12", "# a comment\n", {}),
    ],
)
def test_a_difference_is_one_of_meaning(folder: Path, a: str, b: str, found: dict[str, Any]) -> None:
    assert differing(folder, a, b) == found


def test_diff_says_what_is_a_default_and_what_would_be_another_run(folder: Path) -> None:
    written(folder / "a.yaml", "extends: shared/base.yaml\nbeta: 0.1\nlogging_steps: 5\n")
    text = invoke("recipe", "diff", "a.yaml", "shared/base.yaml").stdout
    assert "0.0 (default)" in text
    assert text.count("another run") == 1
    assert "2 keys differ; 1 of them a resumed run may not change" in text
    assert "no key differs" in invoke("recipe", "diff", "a.yaml", "a.yaml", "--exit-code").stdout
    assert invoke("recipe", "diff", "a.yaml", "shared/base.yaml", "--exit-code").exit_code == 1


def test_a_recipe_differs_from_itself_in_nothing() -> None:
    run, training = read_keys("musique")
    assert differences({**vars(run), **vars(training)}, {**vars(run), **vars(training)}) == []


# resolve ----------------------------------------------------------------------------------------------------


def record(folder: Path, **inputs: dict[str, str]) -> Path:
    """A run's folder with its record."""
    run, training = read_keys("quickstart", {"output_dir": str(folder)})
    written(folder / "recipe.yaml", yaml.safe_dump({**vars(run), **vars(training)}))
    sessions = [{"versions": {"torch": "0"}}, {"versions": {"torch": "1", "python": "3"}}]
    written(folder / "run.json", json.dumps({"inputs": inputs, "sessions": sessions}))
    return folder


def test_resolve_of_a_run_is_a_recipe_with_what_it_had_in_comments(tmp_path: Path) -> None:
    run = record(tmp_path / "run", dataset_name={"questions": "f00d"})
    text = invoke("recipe", "resolve", run).stdout
    assert text.startswith("# torch 1\n# python 3\n# dataset_name, questions: f00d\n")
    again = written(tmp_path / "resolved.yaml", text)
    assert [vars(part) for part in read_keys(again)] == [vars(part) for part in read_keys(run)]


def test_resolve_of_a_recipe_has_every_key_and_the_versions_of_here(folder: Path) -> None:
    mine = written(folder / "mine.yaml", "extends: shared/base.yaml\n")
    found = json.loads(invoke("recipe", "resolve", mine, "--seed", "9", "--keys-only", "--json").stdout)["recipe"]
    assert set(found["keys"]) == set(KEYS)
    assert found["keys"]["seed"] == 9
    assert {"dro_rl", "torch", "transformers"} <= set(found["versions"])
    assert found["inputs"] == {}


def test_resolve_against_a_run_says_in_what_it_would_be_another(tmp_path: Path) -> None:
    """Keys that a resumed run may change, and the folder, are no matter."""
    run = record(tmp_path / "run", dataset_name={"questions": "f00d", "labels": "1"})
    same = record(tmp_path / "same", dataset_name={"questions": "f00d", "labels": "1"})
    other = record(tmp_path / "other", dataset_name={"questions": "beef", "labels": "1"})
    assert invoke("recipe", "resolve", same, "--against", run).exit_code == 0
    result = invoke("recipe", "resolve", other, "--against", run)
    assert (result.exit_code, result.stdout) == (1, "dataset_name: other questions\n")


@pytest.mark.parametrize("damage", ["{}", "[", '{"inputs": {"a": 1}, "sessions": [{"versions": {}}]}'])
def test_a_record_that_is_damaged_is_one_line(tmp_path: Path, damage: str) -> None:
    run = record(tmp_path / "run")
    (run / "run.json").write_text(damage)
    result = invoke("recipe", "resolve", run)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {run / 'run.json'}")
    assert result.stderr.count("\n") == 1
