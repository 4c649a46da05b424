"""One evaluation of the pair on a split: greedy selections, greedy answers, and what they are worth.

Leaves `evaluation/<stage>.parquet`, a row a question, and an entry in `evaluation/summary.json`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dro_rl.evaluation.metrics import answer_recall_at_k, exact_match, f1, recall_at_k
from dro_rl.files import written_whole
from dro_rl.likelihood import answer_logp, score_rows
from dro_rl.pipeline import RAGPipeline, read
from dro_rl.records import Question
from dro_rl.rollouts.micro_batch import answer_row

KS = (1, 3, 5)
METRICS = ("em", "f1", *(f"recall@{k}" for k in KS), *(f"answer_recall@{k}" for k in KS), "answer_logp", "valid")


@dataclass(frozen=True, slots=True)
class QuestionResult:
    """What became of one question. Shares are 0..1; `recall` is by supporting id, NaN where there are no labels."""

    id: str
    type: str
    question: str
    answers: list[str]
    prediction: str
    selection: list[int]
    valid: bool
    em: float
    f1: float
    recall: list[float]
    answer_recall: list[float]
    answer_logp: float
    prediction_logp: float


def evaluate(
    pipeline: RAGPipeline, questions: Sequence[Question], likelihood: str = "sum", aliases: str = "first"
) -> list[QuestionResult]:
    """Answer every question greedily and score the answers; `answer_logp` is of the accepted answer, as in training."""
    answers = pipeline.answer_all(questions)
    k = pipeline.settings.num_selected
    rows = [
        answer_row(pipeline.prompters["generator"], question, read(answer.selection, question, k), aliases)
        for question, answer in zip(questions, answers, strict=True)
    ]
    with pipeline.open_role("generator") as model:
        scored = score_rows(model, rows, shared_prefix=pipeline.shared_prefix)
    results = []
    for question, answer, logps in zip(questions, answers, scored, strict=True):
        numbers = answer.selection.numbers
        selected = [question.documents[number - 1] for number in numbers]
        results.append(
            QuestionResult(
                id=question.id,
                type=question.type,
                question=question.question,
                answers=list(question.answers),
                prediction=answer.text,
                selection=list(numbers),
                valid=answer.selection.valid,
                em=exact_match(answer.text, question.answers),
                f1=f1(answer.text, question.answers),
                recall=[recall_at_k(numbers, question.supporting_numbers, k) for k in KS],
                answer_recall=[answer_recall_at_k(selected, question.answers, k) for k in KS],
                answer_logp=answer_logp(logps, likelihood, aliases).item(),
                prediction_logp=answer.logp,
            )
        )
    return results


def summarise(results: Sequence[QuestionResult], stage: str, split: str) -> dict[str, Any]:
    """Means over a split: percent, and nats for log-probabilities; None where no question defines a metric."""
    types = sorted({result.type for result in results if result.type})
    by_type = {kind: _means([r for r in results if r.type == kind]) for kind in types}
    summary: dict[str, Any] = {"stage": stage, "split": split, **_means(results)}
    return {**summary, "by_type": by_type} if by_type else summary


def _means(results: Sequence[QuestionResult]) -> dict[str, Any]:
    columns: dict[str, list[float]] = {
        "em": [100 * r.em for r in results],
        "f1": [100 * r.f1 for r in results],
        "answer_logp": [r.answer_logp for r in results],
        "valid": [100.0 * r.valid for r in results],
    }
    for i, k in enumerate(KS):
        columns[f"recall@{k}"] = [100 * r.recall[i] for r in results]
        columns[f"answer_recall@{k}"] = [100 * r.answer_recall[i] for r in results]
    return {"n": len(results), **{name: _mean(columns[name]) for name in METRICS}}


def _mean(values: Sequence[float]) -> float | None:
    known = [value for value in values if not math.isnan(value)]
    return round(math.fsum(known) / len(known), 6) if known else None


def summary_path(output_dir: str | Path) -> Path:
    return Path(output_dir) / "evaluation" / "summary.json"


def read_stages(output_dir: str | Path) -> list[dict[str, Any]]:
    """The stages evaluated so far, in order."""
    path = summary_path(output_dir)
    return json.loads(path.read_text())["stages"] if path.is_file() else []


def write_stages(output_dir: str | Path, stages: Sequence[dict[str, Any]]) -> None:
    """Write `summary.json`, whole."""
    with written_whole(summary_path(output_dir)) as beside:
        beside.write_text(json.dumps({"stages": list(stages)}, indent=2) + "\n")


def write_results(output_dir: str | Path, stage: str, results: Sequence[QuestionResult]) -> None:
    """Write the per-question rows of a stage, whole."""
    with written_whole(summary_path(output_dir).with_name(f"{stage}.parquet")) as beside:
        pq.write_table(pa.Table.from_pylist([asdict(result) for result in results]), beside, compression="zstd")
