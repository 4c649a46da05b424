"""A checkpoint is whole or passed over, whatever happened to it; of several evaluations the best is kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from training_world import weights, world

from dro_rl import train
from dro_rl.em.best import ranked
from dro_rl.em.checkpoints import find_checkpoint
from dro_rl.errors import InputError
from dro_rl.files import damage, folder_written_whole
from dro_rl.runs import checkpoints_of


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps with a checkpoint after each, in the middle of its second iteration at the last."""
    folder = tmp_path_factory.mktemp("checkpoints")
    recipe = world(
        folder, optim="adamw_torch", learning_rate=1e-3, save_steps=1, save_total_limit=None, m_step_epochs=2,
        questions_per_iteration=4, max_steps=3, load_best_model_at_end=False,
    )  # fmt: skip
    train.main([str(recipe)])
    assert [place.name for place in checkpoints_of(folder / "run")] == [f"checkpoint-{n}" for n in (1, 2, 3)]
    return folder / "run"


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


HARMS: dict[str, Callable[[Path], Any]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut": cut,
    "one byte flipped": flip,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}
FILES = (
    "files.json", "trainer_state.json", "schedule.json", "optimizer.pt", "scheduler.pt", "rng_state.pth",
    "evaluation/summary.json", "rollouts/iteration-00002-part-00000.parquet", "selector/config.json",
    "selector/model.safetensors", "selector/tokenizer.json", "generator/config.json", "generator/model.safetensors",
)  # fmt: skip


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_passed_over_in_a_line(
    copy: Path, name: str, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    last = copy / "checkpoint-3"
    HARMS[harm](last / name)
    found = find_checkpoint(copy, "auto")
    assert found == copy / "checkpoint-2"
    (line,) = [record.message for record in caplog.records]
    assert line.startswith("checkpoint-3 is damaged (")
    assert line.endswith("): going on from checkpoint-2")
    assert name in line or "files.json" in line
    with pytest.raises(InputError, match=r"resume_from_checkpoint: .*Use auto, which takes the last whole one\.$"):
        find_checkpoint(copy, str(last))


def test_a_file_too_many_is_damage_and_a_hidden_one_is_none(copy: Path) -> None:
    (copy / "checkpoint-3" / ".DS_Store").write_text("")
    assert damage(copy / "checkpoint-3") is None
    shutil.copy(copy / "checkpoint-3/selector/model.safetensors", copy / "checkpoint-3/selector/model-2.safetensors")
    assert damage(copy / "checkpoint-3") == "selector/model-2.safetensors is not of it"


def test_no_whole_checkpoint_is_an_error_and_none_at_all_is_a_beginning(copy: Path) -> None:
    for place in checkpoints_of(copy):
        cut(place / "optimizer.pt")
    with pytest.raises(InputError, match=r"checkpoint-3 is damaged \(optimizer.pt has .*there is none"):
        find_checkpoint(copy, "auto")
    for place in checkpoints_of(copy):
        shutil.rmtree(place)
    assert find_checkpoint(copy, "auto") is None


@pytest.mark.parametrize("wanted", ["", "checkpoint-7", "selector", "rollouts"])
def test_what_is_no_checkpoint_is_said_to_be_none(copy: Path, wanted: str) -> None:
    with pytest.raises(InputError, match=r"a run|no checkpoint"):
        find_checkpoint(copy, str(copy / wanted))


def resumed(run: Path, copy: Path, **keys: Any) -> Path:
    """The copy, gone on in to its end."""
    recipe = copy.parent / "recipe.yaml"
    values = yaml.safe_load((run.parent / "recipe.yaml").read_text())
    changed = {"output_dir": str(copy), "resume_from_checkpoint": "auto", **keys}
    recipe.write_text(yaml.safe_dump({**values, **changed}))
    train.main([str(recipe)])
    return copy


def test_what_is_gone_on_from_the_checkpoint_before_ends_where_the_run_ended(run: Path, copy: Path) -> None:
    flip(copy / "checkpoint-3" / "optimizer.pt")
    resumed(run, copy)
    expected, found = weights(run), weights(copy)
    assert all(bool((expected[name] == found[name]).all()) for name in expected)
    assert damage(copy / "checkpoint-3") is None
    assert not (copy / ".lock").exists()


RUN_FILES = (
    "recipe.yaml", "run.json", "trainer_state.json", "pipeline.json", "evaluation/summary.json",
    "evaluation/base.parquet", "rollouts/iteration-00001-part-00000.parquet",
    "rollouts/iteration-00002-part-00000.parquet", "selector/model.safetensors",
)  # fmt: skip


@pytest.mark.parametrize("name", RUN_FILES)
def test_a_damaged_file_of_the_run_is_refused_or_changes_no_result(run: Path, copy: Path, name: str) -> None:
    """What resuming needs it has from the checkpoint; else it says in a line what is wrong."""
    for place in ("checkpoint-1", "checkpoint-2"):
        shutil.rmtree(copy / place)
    cut(copy / name)
    with suppress(InputError):
        resumed(run, copy)
        expected, found = weights(run), weights(copy)
        assert all(bool((expected[name] == found[name]).all()) for name in expected)


def test_a_full_disk_leaves_the_checkpoint_before_and_no_rest(tmp_path: Path) -> None:
    with folder_written_whole(tmp_path / "checkpoint-1", sealed=True) as beside:
        (beside / "weights").write_text("old")

    def fill() -> None:
        with folder_written_whole(tmp_path / "checkpoint-1", sealed=True) as beside:
            (beside / "weights").write_text("new")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        fill()
    assert damage(tmp_path / "checkpoint-1") is None
    assert (tmp_path / "checkpoint-1" / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def evaluations(*values: float | None) -> list[dict[str, Any]]:
    return [{"step": 2 * i, "eval_f1": value} for i, value in enumerate(values)] + [{"step": 9, "loss": 1.0}]


@pytest.mark.parametrize(
    ("values", "greater", "best"),
    [
        ((50, 40, 45), True, 0),
        ((50, 60, 70), True, 4),
        ((50, 60, 60), True, 2),
        ((50, 50, 40), True, 2),
        ((50, 40, 45), False, 2),
        ((None, 10), True, 2),
    ],
    ids=["all worse", "the last", "the earliest of equals", "the start last of equals", "less is better", "undefined"],
)
def test_the_best_evaluation_is_ranked_first(values: tuple[Any, ...], greater: bool, best: int) -> None:
    assert ranked(evaluations(*values), "f1", greater)[0] == best
