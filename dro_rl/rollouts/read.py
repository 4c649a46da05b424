"""Reading a run's rollout log: which iterations there are, and their figures.

One iteration is in memory at a time, and of it the columns that are asked for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from dro_rl.errors import InputError, Phrase
from dro_rl.rollouts import log
from dro_rl.rollouts.diagnostics import Columns, summarize
from dro_rl.rollouts.signals import Iteration

COLUMNS = (
    "iteration",
    "step",
    "position",
    "sample",
    "selection",
    "valid",
    "problems",
    "supporting",
    "num_documents",
    "num_supporting",
    "answer_logp",
    "selection_logp",
    "proposal_logp",
    "reference_logp",
    "reward",
    "weight",
    "ess",
    "weight_temperature",
    "prompt_cut",
    "temperature",
)
"""What the figures of an iteration are made of."""


def iterations(run: str | Path) -> list[int]:
    """The iterations that a run has logged, ascending.

    Args:
        run: the run's `output_dir`.

    Raises:
        InputError: there is no such folder, or it holds no rollouts.
    """
    run = Path(run)
    if not run.is_dir():
        raise InputError(str(run), Phrase("no such folder"), "a run is the output_dir of a training", "Check the path.")
    names = (re.match(r"iteration-(\d+)-part-", path.name) for path in log.part_paths(run))
    found = sorted({int(name[1]) for name in names if name})
    if not found:
        if log.part_paths(run.parent):
            fix = f"Pass the folder above it: {run.parent}"
        else:
            fix = "Pass the output_dir of a run that has finished an E-step."
        raise InputError(
            str(run),
            Phrase("no rollouts"),
            "a run holds rollouts/iteration-*.parquet once it has sampled",
            fix,
        )
    return found


def read_iteration(run: str | Path, iteration: int, columns: Sequence[str] | None = None) -> pa.Table:
    """All rows of one iteration.

    Raises:
        InputError: the iteration was not logged, or a part of it is broken.
    """
    logged = iterations(run)
    if iteration not in logged:
        raise InputError(
            f"{run}: iteration",
            iteration,
            f"this run has logged {ranges(logged)}",
            "Choose one of them.",
        )
    return log.read(log.part_paths(run, iteration), columns)


def history(run: str | Path, last: int | None = None) -> list[Iteration]:
    """The iterations of a run in order, or the `last` ones, with their figures.

    Raises:
        InputError: see `iterations` and `dro_rl.rollouts.log.read`.
    """
    chosen = iterations(run)[-last:] if last else iterations(run)
    tables = (log.read(log.part_paths(run, iteration), COLUMNS) for iteration in chosen)
    limit = _max_log_ratio(Path(run) / "recipe.yaml")
    return [summarize_iteration(table, limit) for table in tables if table.num_rows]


def follow(run: str | Path, pause: Callable[[], None]) -> Iterator[Iteration]:
    """Iterations as they are sampled, those that are there first.

    An iteration has been sampled when a later one has begun, or when a pause has added nothing to it.

    Args:
        pause: waits before the next look.
    """
    limit = _max_log_ratio(Path(run) / "recipe.yaml")
    done, before = 0, -1
    while True:
        logged = [number for number in iterations(run) if number > done]
        for number in logged:
            parts = log.part_paths(run, number)
            if number == logged[-1] and len(parts) != before:
                before = len(parts)
                break
            yield summarize_iteration(log.read(parts, COLUMNS), limit)
            done, before = number, -1
        pause()


def _max_log_ratio(recipe: Path) -> float:
    """Where a run truncates its ratios, nats; NaN where its recipe does not say."""
    try:
        return float(yaml.safe_load(recipe.read_text(encoding="utf-8"))["max_log_ratio"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return math.nan


def summarize_iteration(table: pa.Table, max_log_ratio: float = math.nan) -> Iteration:
    """One iteration's figures. `table` has its rows, in any order, and at least `COLUMNS`."""
    steps = _numbers(table, "step")
    return Iteration(
        number=int(_numbers(table, "iteration")[0]),
        first_step=int(steps.min()),
        last_step=int(steps.max()),
        rollouts=summarize(columns_of(in_order(table)), max_log_ratio=max_log_ratio),
    )


def in_order(table: pa.Table) -> pa.Table:
    """The rows of one iteration with groups together, in the order of sampling."""
    position = _numbers(table, "position")
    if (position[1:] >= position[:-1]).all():
        return table
    return table.sort_by([("position", "ascending"), ("sample", "ascending")])


def columns_of(table: pa.Table) -> Columns:
    """Rows of the log, `in_order`, as `dro_rl.rollouts.diagnostics` takes them."""
    position = _numbers(table, "position")
    start = np.flatnonzero(np.diff(position, prepend=position[:1] - 1))
    counted = pc.value_counts(_flat(table, "problems")).to_pylist()
    length = pc.list_value_length(table["selection"]).to_numpy()
    return Columns(
        size=np.diff(start, append=len(position)),
        num_documents=_numbers(table, "num_documents")[start],
        num_supporting=_numbers(table, "num_supporting")[start],
        ess=_numbers(table, "ess")[start],
        weight_temperature=_numbers(table, "weight_temperature")[start],
        prompt_cut=_numbers(table, "prompt_cut")[start],
        valid=_numbers(table, "valid"),
        clean=pc.list_value_length(table["problems"]).to_numpy() == 0,
        answer_logp=_numbers(table, "answer_logp"),
        selection_logp=_numbers(table, "selection_logp"),
        proposal_logp=_numbers(table, "proposal_logp"),
        reference_logp=_numbers(table, "reference_logp"),
        reward=_numbers(table, "reward"),
        weight=_numbers(table, "weight"),
        temperature=_numbers(table, "temperature"),
        length=length,
        numbers=_flat(table, "selection").to_numpy(),
        supporting=_flat(table, "supporting").to_numpy(zero_copy_only=False).astype(bool),
        problems={item["values"]: item["counts"] for item in counted},
    )


# Columns ----------------------------------------------------------------------------------------------------


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    return table[name].to_numpy()


def _flat(table: pa.Table, name: str) -> pa.Array:
    return pc.list_flatten(table[name].combine_chunks())


def ranges(numbers: Sequence[int]) -> str:
    """`iteration 3`, or `iterations 1-5, 7`; cut after a few."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    texts = [str(low) if low == high else f"{low}-{high}" for low, high in spans]
    shown = ", ".join(texts[:8]) + (", …" if len(texts) > 8 else "")
    return f"iteration{'s' if len(numbers) > 1 else ''} {shown}"
