"""SQL over a run's rollout log, by DuckDB, which reads the Parquet as it lies and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds

from dro_rl.errors import InputError, LackError, Phrase, first_line
from dro_rl.rollouts import log
from dro_rl.rollouts.read import iterations

TABLE = "rollouts"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a statement gives: names of columns, and at most so many rows as were asked for."""

    columns: list[str]
    rows: list[tuple[Any, ...]]


def query(run: str | Path, statement: str, limit: int) -> Answer:
    """Run one statement on the table `rollouts`, whose columns are those of the log.

    Args:
        run: the run's `output_dir`.
        statement: SQL.
        limit: rows at most.

    Raises:
        InputError: DuckDB is not installed; no such run; or the statement is wrong, or reaches outside the log.
    """
    try:
        import duckdb
    except ImportError:
        raise LackError(
            "dro-rl rollouts sql",
            Phrase("DuckDB is not installed"),
            "SQL over the log is run by DuckDB",
            "Use pip install 'dro_rl[sql]'.",
        ) from None
    iterations(run)
    log.read(log.part_paths(run), ["sample"])  # refuses a part that is broken, or of a version that is not read
    connection = duckdb.connect(config={"enable_external_access": False, "lock_configuration": True})
    connection.register(TABLE, ds.dataset([str(path) for path in log.part_paths(run)], schema=log.SCHEMA))
    try:
        result = connection.execute(statement)
        return Answer([column[0] for column in result.description or []], result.fetchmany(limit))
    except duckdb.Error as error:
        raise InputError(
            "statement",
            statement,
            f"this is SQL over {TABLE} ({first_line(error)})",
            "Its columns are those of docs/rollout-log.md.",
        ) from None
    finally:
        connection.close()
