"""Claims about a model's twin that has learned nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

from dro_rl.cli import app
from dro_rl.errors import InputError
from dro_rl.models.loading import check_model, declared_ends, load_model
from dro_rl.models.scratch import write_scratch
from dro_rl.toy.world import TOY_BASE


def test_the_twin_has_the_shapes_and_the_tokenizer_and_none_of_the_weights(tmp_path: Path) -> None:
    write_scratch(str(TOY_BASE), tmp_path / "twin")
    twin, base = load_model(str(tmp_path / "twin")), load_model(str(TOY_BASE))
    theirs = base.state_dict()
    for name, weight in twin.state_dict().items():
        assert weight.shape == theirs[name].shape
        assert "norm" in name or not torch.equal(weight, theirs[name])
    vocabularies = [AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (tmp_path / "twin", TOY_BASE)]
    assert vocabularies[0] == vocabularies[1]
    assert declared_ends(str(tmp_path / "twin")) == declared_ends(str(TOY_BASE))
    check_model(str(tmp_path / "twin"), "selector_model_name_or_path")


def test_a_seed_gives_its_weights(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_scratch(str(TOY_BASE), tmp_path / name, seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(InputError, match="a folder of its own"):
        write_scratch(str(TOY_BASE), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_the_command_says_how_many_weights(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["model", "scratch", "toy", str(tmp_path / "twin")])
    assert result.exit_code == 0
    assert "random weights" in result.output
