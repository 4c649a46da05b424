"""Reading a run's rollout log: which iterations there are, and their figures.

One file is in memory at a time, and of it the columns that are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dro_rl.errors import InputError, Phrase
from dro_rl.flat_yaml import read_yaml
from dro_rl.rollouts import log
from dro_rl.rollouts.diagnostics import Columns, pooled, summarize
from dro_rl.rollouts.signals import Iteration

COLUMNS = (
    "iteration",
    "step",
    "position",
    "sample",
    "selection",
    "order",
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
    "draw",
)
"""What the figures of an iteration are made of."""


def parts_of(run: str | Path) -> dict[int, list[Path]]:
    """The files of a run's log, by iteration, ascending.

    Args:
        run: the run's `output_dir`.

    Raises:
        InputError: there is no such folder, or it holds no rollouts.
    """
    run = Path(run)
    if not run.is_dir():
        raise InputError(str(run), Phrase("no such folder"), "a run is the output_dir of a training", "Check the path.")
    found = log.parts(run)
    if not found:
        if log.part_paths(run.parent):
            fix = f"Pass the folder above it: {run.parent}"
        else:
            fix = "Pass the output_dir of a run that has finished an E-step."
        raise _without_rollouts(run, fix)
    return found


def _without_rollouts(run: Path, fix: str) -> InputError:
    rule = "a run holds rollouts/iteration-*.parquet once it has sampled"
    return InputError(str(run), Phrase("no rollouts"), rule, fix)


def iterations(run: str | Path) -> list[int]:
    """The iterations that a run has logged, ascending. Arguments and errors as in `parts_of`."""
    return list(parts_of(run))


def read_iteration(run: str | Path, iteration: int, columns: Sequence[str] | None = None) -> pa.Table:
    """All rows of one iteration.

    Raises:
        InputError: the iteration was not logged, or a part of it is broken.
    """
    return log.read(chosen_parts(run, iteration)[iteration], columns)


def chosen_parts(run: str | Path, iteration: int | Sequence[int] | None) -> dict[int, list[Path]]:
    """The files of the iterations that are asked for: one, several, or the last.

    Raises:
        InputError: see `parts_of`; or one was not logged.
    """
    logged = parts_of(run)
    wanted = [max(logged)] if iteration is None else [iteration] if isinstance(iteration, int) else list(iteration)
    for number in wanted:
        if number not in logged:
            raise InputError(
                f"{run}: iteration", number, f"this run has logged {ranges(list(logged))}", "Choose one of them."
            )
    return {number: logged[number] for number in wanted}


def history(run: str | Path, last: int | None = None) -> list[Iteration]:
    """The iterations of a run in order, or the `last` ones, with their figures.

    Raises:
        InputError: see `iterations` and `dro_rl.rollouts.log.read`.
    """
    logged = list(parts_of(run).values())
    limit = _max_log_ratio(run)
    found = (_summarize_parts(paths, limit) for paths in (logged[-last:] if last else logged))
    kept = [iteration for iteration in found if iteration is not None]
    if not kept:
        raise _without_rollouts(Path(run), "Pass the output_dir of a run that has finished an E-step.")
    return kept


def _summarize_parts(paths: Sequence[Path], max_log_ratio: float) -> Iteration | None:
    """An iteration's figures, a file after another; None where it has no rows. Groups are whole in a file."""
    tables = (log.read([path], COLUMNS) for path in paths)
    found = [summarize_iteration(table, max_log_ratio) for table in tables if table.num_rows]
    if len(found) < 2:
        return found[0] if found else None
    return Iteration(
        number=found[0].number,
        first_step=min(part.first_step for part in found),
        last_step=max(part.last_step for part in found),
        rollouts=pooled([part.rollouts for part in found]),
    )


def follow(run: str | Path, pause: Callable[[], None]) -> Iterator[Iteration]:
    """Iterations as they are sampled, those that are there first.

    An iteration has been sampled when a later one has begun, or when a pause has added nothing to it.

    Args:
        pause: waits before the next look.
    """
    limit = _max_log_ratio(run)
    done, before = 0, -1
    while True:
        logged = {number: parts for number, parts in parts_of(run).items() if number > done}
        for number, parts in logged.items():
            if number == max(logged) and len(parts) != before:
                before = len(parts)
                break
            if (iteration := _summarize_parts(parts, limit)) is not None:
                yield iteration
            done, before = number, -1
        pause()


def recipe_value(run: str | Path, key: str) -> Any:
    """What a run's recipe says of a key; None where it does not say, or cannot be read."""
    try:
        return read_yaml(Path(run) / "recipe.yaml").get(key)
    except InputError:
        return None


def _max_log_ratio(run: str | Path) -> float:
    """Where a run truncates its ratios, nats; NaN where its recipe does not say."""
    value = recipe_value(run, "max_log_ratio")
    return float(value) if isinstance(value, int | float) else math.nan


def summarize_iteration(table: pa.Table, max_log_ratio: float = math.nan) -> Iteration:
    """One iteration's figures. `table` has its rows, in any order, and at least `COLUMNS`."""
    steps = column(table, "step")
    return Iteration(
        number=int(column(table, "iteration")[0]),
        first_step=int(steps.min()),
        last_step=int(steps.max()),
        rollouts=summarize(columns_of(in_order(table)), max_log_ratio=max_log_ratio),
    )


def in_order(table: pa.Table) -> pa.Table:
    """The rows of one iteration with groups together, in the order of sampling."""
    position = column(table, "position")
    if (position[1:] >= position[:-1]).all():
        return table
    return table.sort_by([("position", "ascending"), ("sample", "ascending")])


def columns_of(table: pa.Table) -> Columns:
    """Rows of the log, `in_order`, as `dro_rl.rollouts.diagnostics` takes them; what is not there is empty."""
    position = column(table, "position")
    start = np.flatnonzero(np.diff(position, prepend=position[:1] - 1))
    problems = _flat(table, "problems")

    def a_rollout(name: str) -> np.ndarray:
        return column(table, name) if name in table.column_names else np.empty(0)

    def a_question(name: str) -> np.ndarray:
        return column(table, name)[start] if name in table.column_names else np.empty(0)

    return Columns(
        size=np.diff(start, append=len(position)),
        num_documents=a_question("num_documents"),
        num_supporting=a_question("num_supporting"),
        ess=a_question("ess"),
        weight_temperature=a_question("weight_temperature"),
        prompt_cut=a_question("prompt_cut"),
        valid=a_rollout("valid"),
        clean=_lengths(table, "problems") == 0,
        answer_logp=a_rollout("answer_logp"),
        selection_logp=a_rollout("selection_logp"),
        proposal_logp=a_rollout("proposal_logp"),
        reference_logp=a_rollout("reference_logp"),
        reward=a_rollout("reward"),
        weight=a_rollout("weight"),
        temperature=a_rollout("temperature"),
        length=_lengths(table, "selection"),
        numbers=_as_numpy(_flat(table, "selection")),
        shown=_shown(table),
        supporting=_as_numpy(_flat(table, "supporting")).astype(bool),
        problems={item["values"]: item["counts"] for item in pc.value_counts(problems).to_pylist()},
        draw=a_question("draw"),
    )


# Columns ----------------------------------------------------------------------------------------------------


def column(table: pa.Table, name: str) -> np.ndarray:
    """A column of numbers, or of true and false."""
    return _as_numpy(table[name].combine_chunks())


def _as_numpy(array: pa.Array) -> np.ndarray:
    """The array as numpy has it. `to_numpy` would import pandas, if it is there: seconds for a table on a terminal."""
    if pa.types.is_boolean(array.type):
        return np.from_dlpack(array.cast(pa.uint8())).astype(bool)
    return np.from_dlpack(array)


def _shown(table: pa.Table) -> np.ndarray:
    """For each document selected, its place in the list that the selector saw, from 1; 0 where that was a window."""
    numbers, order = _as_numpy(_flat(table, "selection")), _as_numpy(_flat(table, "order"))
    length, size = _lengths(table, "selection"), _lengths(table, "order")
    if not size.any():
        return numbers
    whole = size == column(table, "num_documents")
    begin = np.cumsum(size) - size
    place = np.empty(len(order), dtype=int)
    listed = np.repeat(whole, size)  # each of them holds all numbers, once
    at = np.arange(len(order)) - np.repeat(begin, size)
    place[(np.repeat(begin, size) + order - 1)[listed]] = at[listed] + 1
    ordered = np.repeat(whole, length)
    shown = np.where(np.repeat(size > 0, length), 0, numbers)
    shown[ordered] = place[(np.repeat(begin, length) + numbers - 1)[ordered]]
    return shown


def as_arrow(values: np.ndarray) -> pa.Array:
    """An array of whole numbers, or of true and false. `pa.array` would import pandas too."""
    if values.dtype == bool:
        return pa.Array.from_buffers(
            pa.bool_(), len(values), [None, pa.py_buffer(np.packbits(values, bitorder="little"))]
        )
    return pa.Array.from_buffers(pa.int64(), len(values), [None, pa.py_buffer(values.astype(np.int64))])


def is_text(array: pa.ChunkedArray, text: str) -> pa.ChunkedArray:
    """Where a column of texts is a text."""
    content = text.encode("utf-8", "surrogatepass")
    offsets = pa.py_buffer(np.array([0, len(content)], dtype=np.int32))
    return pc.equal(array, pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(content)])[0])


def _flat(table: pa.Table, name: str) -> pa.Array:
    if name not in table.column_names:
        return pa.nulls(0, log.SCHEMA.field(name).type.value_type)
    return pc.list_flatten(table[name].combine_chunks())


def _lengths(table: pa.Table, name: str) -> np.ndarray:
    if name not in table.column_names:
        return np.empty(0, dtype=int)
    return _as_numpy(pc.list_value_length(table[name].combine_chunks()))


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
