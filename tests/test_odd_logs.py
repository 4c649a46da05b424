"""Claims about rollout logs that are not as they should be, or hold what nobody expects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.cells import cell_len
from test_cli_rollouts import document, invoke, refusal, rollouts, write

from dro_rl.rollouts import log

VERSION = b"dro_rl.rollouts.version"


def part(run: Path) -> Path:
    write(run, 1, 0, 0, 0, [rollouts(0, [[1], [2]], [-1.0, -2.0], [0.7, 0.3])])
    return log.part_path(run, 1, 0)


ODD = {
    "foreign": (pa.table({"a": [1]}), "version none"),
    "of an older version": (log.SCHEMA.empty_table().replace_schema_metadata({VERSION: b"4"}), "version 4"),
    "of this version with other columns": (
        pa.table({"a": [1]}).replace_schema_metadata({VERSION: log.VERSION.encode()}),
        "other columns",
    ),
    "of this version with a column of another type": (
        log.SCHEMA.empty_table().set_column(0, "iteration", pa.array([], pa.string())).replace_schema_metadata(
            {VERSION: log.VERSION.encode()}
        ),
        "other columns",
    ),
}  # fmt: skip


@pytest.mark.parametrize("command", ["ls", "show", "top", "diff", "stats"])
@pytest.mark.parametrize("odd", ODD)
def test_a_file_that_is_no_log_of_this_version_is_named(tmp_path: Path, command: str, odd: str) -> None:
    table, said = ODD[odd]
    pq.write_table(table, part(tmp_path))
    message = refusal("rollouts", command, tmp_path)
    assert "iteration-00001-part-00000.parquet" in message
    assert said in message


def test_a_part_that_is_being_written_is_not_read(tmp_path: Path) -> None:
    part(tmp_path).with_name(".iteration-00002-part-00000.parquet.tmp").write_bytes(b"half")
    assert [item["iteration"] for item in document("rollouts", "ls", tmp_path)["iterations"]] == [1]


def test_a_log_without_rows_is_an_empty_page(tmp_path: Path) -> None:
    log.write(log.SCHEMA.empty_table(), log.part_path(tmp_path, 1, 0))
    for command in ("show", "top", "diff"):
        result = invoke("rollouts", command, tmp_path)
        assert result.exit_code == 0, (command, result.output, result.exception)
    for command in ("ls", "stats"):
        assert "no rollouts" in refusal("rollouts", command, tmp_path)


TEXTS = [
    "\u202egnol\u202c",
    "a\x1b[2Jb\x07",
    "[red]x[/red] [link=http://a]b[/link]",
    "שלום عليكم",
    "x" * 10**6,
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("columns", [30, 80])
def test_text_of_any_kind_is_readable(tmp_path: Path, text: str, columns: int) -> None:
    path = part(tmp_path)
    table = pq.read_table(path)
    place = table.column_names.index("question")
    log.write(table.set_column(place, log.SCHEMA.field("question"), pa.array([text] * 2)).cast(log.SCHEMA), path)
    for command in ("show", "top"):
        result: Any = invoke("rollouts", command, tmp_path, columns=columns)
        assert result.exit_code == 0, result.output
        assert not {"\u202e", "\x1b", "\x07"} & set(result.stdout)
        assert len(result.stdout) < 10_000
        assert max(map(cell_len, result.stdout.splitlines())) <= columns
        if "[red]" in text and columns == 80:
            assert "[red]" in result.stdout
