"""One owner of a place at a time, whatever became of the one before; one piece of work in a folder."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dro_rl.errors import InputError
from dro_rl.locks import claim, owned

HOLDER = """
import sys, time
from pathlib import Path
from dro_rl.locks import owned
with owned(Path(sys.argv[1]), "output_dir"):
    print("owned", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / ".lock")], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"owned\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_told_in_a_line_who_is_at_work(tmp_path: Path, holder: Any) -> None:
    with pytest.raises(InputError, match=f"^output_dir: {tmp_path} is in use by process {holder.pid} on "):
        owned(tmp_path / ".lock", "output_dir").__enter__()


def test_a_killed_process_leaves_nothing_that_blocks(tmp_path: Path, holder: Any) -> None:
    holder.kill()
    holder.wait()
    with owned(tmp_path / ".lock", "output_dir"):
        pass
    assert not list(tmp_path.iterdir())


def test_who_waits_says_it_once_and_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    owner = owned(tmp_path / ".lock", "cache")
    owner.__enter__()
    tries = 0

    def wait() -> None:
        nonlocal tries
        tries += 1
        if tries == 3:
            owner.__exit__(None, None, None)

    with caplog.at_level(logging.INFO, "dro_rl"), owned(tmp_path / ".lock", "cache", wait):
        assert tries == 3
    assert [record.message.split(" on ")[0] for record in caplog.records] == [
        f"{tmp_path}: waiting for process {os.getpid()}"
    ]


def test_where_nothing_can_be_written_is_said_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"output_dir: .*: files can be written and locked there"):
        owned(tmp_path / "file" / ".lock", "output_dir").__enter__()


def other(key: str, was: Any, wanted: Any) -> InputError:
    return InputError(key, was, f"not {wanted}", "Use another.")


def test_the_same_work_goes_on_and_other_work_is_refused(tmp_path: Path) -> None:
    record = tmp_path / "work" / "work.json"
    assert not claim(record, {"seed": 1, "files": ("a",)}, other)
    (tmp_path / "work" / "part").write_text("")
    assert claim(record, {"seed": 1, "files": ("a",)}, other)
    with pytest.raises(InputError, match=r"^seed: 1: not 2"):
        claim(record, {"seed": 2, "files": ("a",)}, other)


def test_a_folder_of_something_else_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is empty or holds what was begun there"):
        claim(tmp_path / "work.json", {}, other)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00"])
def test_a_damaged_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "work.json").write_text(text)
    with pytest.raises(InputError):
        claim(tmp_path / "work.json", {"seed": 1}, other)
