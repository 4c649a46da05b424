"""What an evaluation leaves for each question: a Parquet file whose metadata say what was asked, and how.

Training stages and `dro-rl evaluate` write the same file, and `dro-rl compare` reads it. Columns are described in
`SCHEMA`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dro_rl import __version__
from dro_rl.errors import InputError, Phrase, first_line
from dro_rl.files import written_whole
from dro_rl.records import Question
from dro_rl.rows.small import record
from dro_rl.rows.strict_json import decode

VERSION = "2"
KS = (1, 3, 5)
UNITS = {"answer_logp": "nats", "num_selected": "documents", "tokens_read": "tokens"}
"""The metrics that have one; all others are shares, 0..1 a question and percent in a mean."""


def _column(name: str, kind: pa.DataType, description: str) -> pa.Field:
    return pa.field(name, kind, metadata={"description": description})


def _at(name: str, description: str) -> list[pa.Field]:
    return [_column(f"{name}@{k}", pa.float64(), description.format(k=k)) for k in KS]


SCORES = [
    _column("em", pa.float64(), "exact match with any accepted answer after normalisation (SQuAD, KILT)"),
    _column("f1", pa.float64(), "F1 of normalised tokens, the best over the accepted answers (SQuAD, KILT)"),
    _column("rouge_l", pa.float64(), "ROUGE-L, the best over the accepted answers (KILT)"),
    *_at("precision", "supporting documents among the first {k} selected, over {k}; NaN without labels"),
    *_at(
        "recall", "supporting documents among the first {k} selected, over all among the candidates; NaN without labels"
    ),
    _column("precision", pa.float64(), "supporting documents among all selected, over these; NaN without labels"),
    *_at("answer_recall", "an accepted answer stands in the first {k} selected documents (the paper's Recall@{k})"),
    _column("answer_logp", pa.float64(), "log p(accepted answer | question, selected documents), nats"),
    _column("valid", pa.float64(), "the selector named at least one document"),
    _column("num_selected", pa.float64(), "documents that the selector named"),
    _column("tokens_read", pa.float64(), "tokens of the generator's prompt"),
]
METRICS = tuple(field.name for field in SCORES)
SCHEMA = pa.schema(
    [
        _column("id", pa.string(), "id of the question"),
        _column("type", pa.string(), "hops or question type; empty where unknown"),
        _column("question", pa.string(), "text of the question"),
        _column("answers", pa.list_(pa.string()), "accepted answers"),
        _column("prediction", pa.string(), "what the generator wrote, greedily"),
        _column("prediction_logp", pa.float64(), "log-probability of the prediction under the generator, nats"),
        _column("selection", pa.list_(pa.int32()), "1-based document numbers, best first"),
        *SCORES,
    ]
)


@dataclass(frozen=True, slots=True)
class QuestionResult:
    """What became of one question. `scores` holds every metric of `METRICS`: shares 0..1, or in the units
    of `UNITS`; NaN where undefined."""

    id: str
    type: str
    question: str
    answers: list[str]
    prediction: str
    prediction_logp: float
    selection: list[int]
    scores: dict[str, float]


@dataclass(frozen=True)
class Conditions:
    """What was asked, and how. It stands in every file of an evaluation.

    Args:
        stage: the evaluation's name: a stage of training, or the split that `dro-rl evaluate` was given.
        split: name of the split.
        num_questions: questions of the split.
        questions_hash: `dro_rl.data.manifest.questions_hash` of them: results are comparable when it is the same.
        candidates_hash: hash of their candidates, in order.
        num_documents: N, the most that a question has.
        num_selected: K, or {min: 1, max: 5}, as in the recipe.
        answer_likelihood, answer_aliases: what `answer_logp` is, as in the recipe.
        control: what stands in for the selector; `none` for the selector itself.
        seed: of `control: random`.
        window_size, window_stride: how longer lists were shown, as in the recipe; None for whole.
        decoding: how selections and answers are written.
        dro_rl: the version that evaluated.
    """

    stage: str
    split: str
    num_questions: int
    questions_hash: str
    candidates_hash: str
    num_documents: int
    num_selected: int | dict[str, int]
    answer_likelihood: str = "sum"
    answer_aliases: str = "first"
    control: str = "none"
    seed: int = 0
    decoding: str = "greedy"
    dro_rl: str = __version__
    window_size: int | None = None
    window_stride: int | None = None


def candidates_hash(questions: Iterable[Question]) -> str:
    """Hash of the candidates of some questions, in order."""
    digest = hashlib.sha256()
    for question in questions:
        rows = [[document.id, document.title, document.text] for document in question.documents]
        digest.update(json.dumps(rows, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()


def write_results(path: Path, results: Sequence[QuestionResult], conditions: Conditions) -> None:
    """Write per-question rows, whole."""
    rows = []
    for result in results:
        row = asdict(result)
        rows.append({**row, **row.pop("scores")})
    about = {"dro_rl.evaluation.version": VERSION, "dro_rl.evaluation": json.dumps(asdict(conditions))}
    with written_whole(path) as beside:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA.with_metadata(about)), beside, compression="zstd")


def read_results(path: Path) -> tuple[list[QuestionResult], Conditions]:
    """Read what `write_results` wrote.

    Raises:
        InputError: the file is missing, is not Parquet, or is not an evaluation of this version.
    """
    if not path.is_file():
        raise InputError(str(path), Phrase("no such file"), "this is the result of an evaluation", "Check the path.")
    try:
        table = pq.read_table(path)
        about = table.schema.metadata or {}
        found = about.get(b"dro_rl.evaluation.version", b"none").decode()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(
            str(path), Phrase(first_line(error)), "results are whole Parquet files", "Evaluate again."
        ) from None
    if found != VERSION:
        raise InputError(
            str(path), Phrase(f"version {found}"), f"this release reads version {VERSION}", "Evaluate again."
        )
    if not table.schema.equals(SCHEMA) or any(column.null_count for column in table.columns):
        raise InputError(
            str(path),
            Phrase("other columns, or holes"),
            f"its columns are {', '.join(SCHEMA.names)}",
            "Evaluate again.",
        )
    place = f"{path}: conditions"
    try:
        values = decode(about[b"dro_rl.evaluation"].decode())
    except (ValueError, KeyError) as error:
        raise InputError(place, Phrase(first_line(error)), "they are JSON", "Evaluate again.") from None
    return [_result(row) for row in table.to_pylist()], record(
        Conditions, values, place, "what was asked", "Evaluate again."
    )


def results_by_type(results: Sequence[QuestionResult]) -> dict[str, list[QuestionResult]]:
    """The results of each number of hops or question type; nothing where none is known."""
    types = sorted({result.type for result in results if result.type})
    return {kind: [result for result in results if result.type == kind] for kind in types}


def metric_values(results: Sequence[QuestionResult], metric: str) -> list[float]:
    """A metric of each question, in the unit of its mean: percent, or that of `UNITS`. NaN where it is undefined."""
    scale = 1.0 if metric in UNITS else 100.0
    return [scale * result.scores[metric] for result in results]


def _result(row: Mapping[str, object]) -> QuestionResult:
    values = dict(row)
    scores = {name: values.pop(name) for name in METRICS}
    return QuestionResult(**values, scores=scores)  # type: ignore[arg-type]
