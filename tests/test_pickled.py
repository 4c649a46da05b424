"""Claims about pickled weights: tensors are read, whatever else a file holds is refused before it runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_world import save_model
from transformers import AutoConfig, AutoModelForCausalLM

from dro_rl.errors import InputError
from dro_rl.job.model_checks import check_weights
from dro_rl.models.loading import load_model


class RunsCode:
    def __reduce__(self) -> Any:
        return os.mkdir, (f"{os.environ['PICKLED_PLACE']}/ran",)


def pickled(folder: Path, write: Callable[[Path, dict[str, Any]], None]) -> Path:
    """A model's folder with `pytorch_model.bin` in place of its safetensors."""
    save_model(folder, 1)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    write(folder / "pytorch_model.bin", tensors)
    return folder


def half(path: Path, tensors: dict[str, Any]) -> None:
    torch.save(tensors, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


REFUSED: dict[str, Callable[[Path, dict[str, Any]], None]] = {
    "code": lambda path, tensors: torch.save({**tensors, "x": RunsCode()}, path),
    "code, as older releases wrote it": lambda path, tensors: torch.save(
        {**tensors, "x": RunsCode()}, path, _use_new_zipfile_serialization=False
    ),
    "a whole model": lambda path, tensors: torch.save(torch.nn.Linear(2, 2), path),
    "half a file": half,
    "no pickle": lambda path, tensors: path.write_bytes(b"x" * 100),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_pickle_of_more_than_tensors_is_one_line_and_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setenv("PICKLED_PLACE", str(tmp_path))
    folder = pickled(tmp_path / "model", REFUSED[case])
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    with pytest.raises(InputError, match="holds tensors alone") as refused:
        check_weights(folder, model, "selector_model_name_or_path")
    assert refused.value.place == "selector_model_name_or_path"
    with pytest.raises(Exception) as error:
        load_model(str(folder))
    assert case == "half a file" or isinstance(error.value, InputError)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_of_tensors_is_read(tmp_path: Path, zipped: bool) -> None:
    folder = pickled(tmp_path, lambda path, tensors: torch.save(tensors, path, _use_new_zipfile_serialization=zipped))
    model = load_model(str(folder))
    check_weights(folder, model, "selector_model_name_or_path")
    assert torch.equal(model.lm_head.weight, AutoModelForCausalLM.from_pretrained(folder).lm_head.weight)
