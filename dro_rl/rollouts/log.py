"""The rollout log: Parquet files under `output_dir/rollouts/`, one or more an iteration.

The command line, the report and resuming read the same files. Columns are described in `SCHEMA`; a file says its
version, and a reader refuses one that is not among `READ`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dro_rl.errors import InputError, Phrase, first_line
from dro_rl.files import write_json_lines, written_whole
from dro_rl.records import Question, Rollout, Selection, Window

VERSION = "7"


def _column(name: str, kind: pa.DataType, description: str) -> pa.Field:
    return pa.field(name, kind, metadata={"description": description})


WINDOW = pa.struct(
    {
        "order": pa.list_(pa.int32()),
        "selection": pa.list_(pa.int32()),
        "text": pa.string(),
        "token_ids": pa.list_(pa.int32()),
        "proposal_logps": pa.list_(pa.float64()),
    }
)
"""What was shown in a window and written there: as the columns of the same names say it of the last one."""

SCHEMA = pa.schema(
    [
        _column("iteration", pa.int32(), "1-based iteration: one E-step and its M-step"),
        _column("step", pa.int64(), "optimizer steps taken before the rollouts were sampled"),
        _column("position", pa.int32(), "0-based place of the question in the iteration"),
        _column("question_index", pa.int64(), "0-based place of the question in the training set"),
        _column("question_id", pa.string(), "id of the question"),
        _column("question", pa.string(), "text of the question"),
        _column("answers", pa.list_(pa.string()), "accepted answers; the first is trained on by default"),
        _column("sample", pa.int32(), "0..m-1 in the question's group"),
        _column("text", pa.string(), "what the selector wrote, without special tokens"),
        _column("token_ids", pa.list_(pa.int32()), "the sampled tokens, end-of-sequence included when reached"),
        _column("selection", pa.list_(pa.int32()), "1-based document numbers, best first"),
        _column(
            "order", pa.list_(pa.int32()), "document numbers as the selector was shown them; empty: in their order"
        ),
        _column("windows", pa.list_(WINDOW), "the windows before the last one drawn; empty: the list was shown whole"),
        _column("valid", pa.bool_(), "at least one valid document is named"),
        _column("problems", pa.list_(pa.string()), "format, out_of_range, repeated, too_few, too_many"),
        _column("document_ids", pa.list_(pa.string()), "ids of the selected documents"),
        _column("document_titles", pa.list_(pa.string()), "titles of the selected documents, or how their texts start"),
        _column("supporting", pa.list_(pa.bool_()), "whether each selected document is labelled as supporting"),
        _column("num_documents", pa.int32(), "candidates of the question (N)"),
        _column("num_supporting", pa.int32(), "labelled documents among the candidates; 0 where there are no labels"),
        _column("proposal_logps", pa.list_(pa.float64()), "log q of each sampled token, nats"),
        _column("proposal_logp", pa.float64(), "log q of the rollout, nats"),
        _column("selection_logp", pa.float64(), "log p of the rollout under the selector, nats"),
        _column(
            "reference_logp", pa.float64(), "log p of the rollout under the initial selector, nats; NaN without beta"
        ),
        _column("answer_logp", pa.float64(), "log p(answer | question, selected documents), nats; NaN when invalid"),
        _column("answer_logp_sum", pa.float64(), "the same as a sum over the answer's tokens, its end included"),
        _column("answer_logp_mean", pa.float64(), "the same as a mean over them"),
        _column("answer", pa.string(), "what the generator wrote; null where no reward looks at answers"),
        _column("rewards", pa.map_(pa.string(), pa.float64()), "each reward beside the likelihood, by name"),
        _column("reward", pa.float64(), "what the objective weighs; the answer's log-likelihood unless told"),
        _column("weight", pa.float64(), "importance weight, sums to 1 over the group"),
        _column("advantage", pa.float64(), "what moves the selector under grpo and rloo; NaN under the others"),
        _column("proposal_weight", pa.float64(), "the weight were all answers alike: p/q, sums to 1 over the group"),
        _column("ess", pa.float64(), "effective sample size of the group's weights, 0..m"),
        _column("weight_temperature", pa.float64(), "temperature of the group's weights"),
        _column("prompt_cut", pa.bool_(), "the selector read documents cut to fit max_prompt_length"),
        _column("temperature", pa.float64(), "sampling temperature of the rollout"),
        _column("draw", pa.int32(), "which draw for this place: 1, or more after draws that tied (resample_ties)"),
    ],
    metadata={"dro_rl.rollouts.version": VERSION},
)
READ = {VERSION: SCHEMA, "6": SCHEMA.remove(SCHEMA.get_field_index("windows"))}
"""The columns of the versions that are read, by their names. In version 6 every list was shown whole."""


def part_path(output_dir: str | Path, iteration: int, part: int) -> Path:
    """Where a part of an iteration's rollouts is kept."""
    return Path(output_dir) / "rollouts" / f"iteration-{iteration:05d}-part-{part:05d}.parquet"


def part_paths(output_dir: str | Path, iteration: int | None = None) -> list[Path]:
    """The parts on disk, in order: of one iteration, or of all."""
    pattern = "iteration-*.parquet" if iteration is None else f"iteration-{iteration:05d}-part-*.parquet"
    return sorted((Path(output_dir) / "rollouts").glob(pattern))


def parts(output_dir: str | Path) -> dict[int, list[Path]]:
    """The parts on disk by iteration, both in order."""
    found: dict[int, list[Path]] = {}
    for path in part_paths(output_dir):
        if name := re.match(r"iteration-(\d+)-part-", path.name):
            found.setdefault(int(name[1]), []).append(path)
    return found


def to_table(
    rollouts: Sequence[Rollout], questions: Sequence[Question], iteration: int, step: int, first_position: int, m: int
) -> pa.Table:
    """Rows of the log for whole groups of rollouts, in order: `rollouts[i]` is sample i % m of its question.

    Args:
        questions: the training set, indexed by `Rollout.question`.
        first_position: place of the first group in the iteration.
    """
    rows = []
    for i, rollout in enumerate(rollouts):
        question = questions[rollout.question]
        selected = [question.documents[number - 1] for number in rollout.selection.numbers]
        rows.append(
            {
                "iteration": iteration,
                "step": step,
                "position": first_position + i // m,
                "question_index": rollout.question,
                "question_id": question.id,
                "question": question.question,
                "answers": question.answers,
                "sample": rollout.sample,
                "text": rollout.text,
                "token_ids": rollout.token_ids,
                "selection": rollout.selection.numbers,
                "order": rollout.order,
                "windows": [
                    {
                        "order": window.order,
                        "selection": window.numbers,
                        "text": window.text,
                        "token_ids": window.token_ids,
                        "proposal_logps": window.proposal_logps,
                    }
                    for window in rollout.windows
                ],
                "valid": rollout.selection.valid,
                "problems": rollout.selection.problems,
                "document_ids": [document.id for document in selected],
                "document_titles": [document.title or document.text[:60] for document in selected],
                "supporting": [document.id in question.supporting for document in selected],
                "num_documents": len(question.documents),
                "num_supporting": len(question.supporting_numbers),
                "proposal_logps": rollout.proposal_logps,
                "proposal_logp": rollout.proposal_logp,
                "selection_logp": rollout.selection_logp,
                "reference_logp": rollout.reference_logp,
                "answer_logp": rollout.answer_logp,
                "answer_logp_sum": rollout.answer_logp_sum,
                "answer_logp_mean": rollout.answer_logp_mean,
                "answer": rollout.answer,
                "rewards": rollout.rewards,
                "reward": rollout.reward,
                "weight": rollout.weight,
                "advantage": rollout.advantage,
                "proposal_weight": rollout.proposal_weight,
                "ess": rollout.ess,
                "weight_temperature": rollout.weight_temperature,
                "prompt_cut": rollout.prompt_cut,
                "temperature": rollout.temperature,
                "draw": rollout.draw,
            }
        )
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def write(table: pa.Table, path: Path) -> None:
    """Write a part, whole."""
    with written_whole(path) as beside:
        pq.write_table(table, beside, compression="zstd")


def read(paths: Sequence[Path], columns: Sequence[str] | None = None) -> pa.Table:
    """Read parts into one table.

    Raises:
        InputError: for a file that is not Parquet, not of this version, or not a log's.
    """
    tables = []
    for path in paths:
        try:
            file = pq.ParquetFile(path)
            found = (file.schema_arrow.metadata or {}).get(b"dro_rl.rollouts.version", b"none").decode()
            if found not in READ:
                raise InputError(
                    str(path),
                    Phrase(f"version {found}"),
                    f"this release reads versions {' and '.join(sorted(READ))}",
                    "Use the release that wrote it.",
                )
            if not file.schema_arrow.equals(READ[found]):
                raise InputError(
                    str(path),
                    Phrase("other columns"),
                    "a rollout file has the columns of docs/rollout-log.md",
                    "Delete it and resume.",
                )
            wanted = list(SCHEMA.names if columns is None else columns)
            there = [name for name in wanted if name in READ[found].names]
            tables.append(_whole(file.read(columns=there, use_threads=False), wanted))
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                str(path),
                Phrase(first_line(error)),
                "a rollout file is whole Parquet",
                "Delete it and resume.",
            ) from None
    if not tables:
        return SCHEMA.empty_table()
    return pa.concat_tables(tables)


def _whole(table: pa.Table, columns: Sequence[str]) -> pa.Table:
    """A table with the columns that its version did not have, empty."""
    for name in [name for name in columns if name not in table.column_names]:
        kind = SCHEMA.field(name)
        table = table.append_column(kind, pa.repeat(pa.scalar([], kind.type), table.num_rows))
    return table.select(list(columns))


def export_rows(tables: Iterable[pa.Table], path: Path) -> int:
    """Write rows of the log, one table at a time, whole: as JSON lines, or as the Parquet that they were.

    Returns:
        How many.

    Raises:
        InputError: the file's name says neither.
    """
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        rows = (row for table in tables for row in table.to_pylist(maps_as_pydicts="strict"))
        return write_json_lines(path, ({name: _json(value) for name, value in row.items()} for row in rows))
    if path.suffix != ".parquet":
        raise InputError("--output", str(path), "this is a .jsonl, .jsonl.gz or .parquet file", "Give it such a name.")
    count = 0
    with written_whole(path) as beside, pq.ParquetWriter(beside, SCHEMA, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table)
            count += table.num_rows
    return count


def _json(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_rollouts(table: pa.Table) -> list[Rollout]:
    """The records that `to_table` was given, bit for bit."""
    return [
        Rollout(
            question=row["question_index"],
            sample=row["sample"],
            token_ids=tuple(row["token_ids"]),
            proposal_logps=tuple(row["proposal_logps"]),
            text=row["text"],
            selection=Selection(tuple(row["selection"]), row["valid"], tuple(row["problems"])),
            order=tuple(row["order"]),
            windows=tuple(
                Window(
                    order=tuple(window["order"]),
                    token_ids=tuple(window["token_ids"]),
                    proposal_logps=tuple(window["proposal_logps"]),
                    text=window["text"],
                    numbers=tuple(window["selection"]),
                )
                for window in row["windows"]
            ),
            selection_logp=row["selection_logp"],
            reference_logp=row["reference_logp"],
            answer_logp=row["answer_logp"],
            answer_logp_sum=row["answer_logp_sum"],
            answer_logp_mean=row["answer_logp_mean"],
            answer=row["answer"],
            rewards=tuple(row["rewards"]),
            reward=row["reward"],
            weight=row["weight"],
            advantage=row["advantage"],
            proposal_weight=row["proposal_weight"],
            ess=row["ess"],
            weight_temperature=row["weight_temperature"],
            prompt_cut=row["prompt_cut"],
            temperature=row["temperature"],
            draw=row["draw"],
        )
        for row in table.to_pylist()
    ]
