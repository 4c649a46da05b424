"""One evaluation of the pair on a split: greedy selections, greedy answers, and what they are worth.

A stage of training leaves `evaluation/<stage>.parquet`, a row a question, and an entry in `evaluation/summary.json`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from dro_rl.data.manifest import questions_hash
from dro_rl.evaluation.results import (
    KS,
    METRICS,
    Conditions,
    QuestionResult,
    candidates_hash,
    metric_values,
    read_results,
    results_by_type,
    write_results,
)
from dro_rl.evaluation.stages import read_stages, summary_path, with_stage, write_stages
from dro_rl.likelihood import answer_logp
from dro_rl.metrics import answer_recall_at_k, exact_match, f1, precision_at_k, precision_of, recall_at_k, rouge_l
from dro_rl.pipeline import RAGPipeline, read
from dro_rl.processes import told_by_main
from dro_rl.progress import Progress
from dro_rl.prompts.rows import answer_row
from dro_rl.records import Question, Selection


def evaluate(
    pipeline: RAGPipeline,
    questions: Sequence[Question],
    likelihood: str = "sum",
    aliases: str = "first",
    selections: Sequence[Selection] | None = None,
) -> list[QuestionResult]:
    """Answer every question greedily and score the answers.

    Args:
        pipeline: the pair.
        questions: with their candidates.
        likelihood, aliases: what `answer_logp` is, as `answer_likelihood` and `answer_aliases` in training.
        selections: what the generator reads in place of the selector's own choice: a control.
    """
    answers = pipeline.answer_all(questions, selections)
    most = pipeline.settings.spec.most
    rows = [
        answer_row(pipeline.prompters["generator"], question, read(answer.selection, question, most), aliases)
        for question, answer in zip(questions, answers, strict=True)
    ]
    scored = pipeline.answerer.score(rows)
    return [
        QuestionResult(
            id=question.id,
            type=question.type,
            question=question.question,
            answers=list(question.answers),
            prediction=answer.text,
            prediction_logp=answer.logp,
            selection=list(answer.selection.numbers),
            scores={
                **_scores(question, answer.text, answer.selection),
                "answer_logp": answer_logp(logps, likelihood, aliases).item(),
                "tokens_read": float(len(row.prompt)),
            },
        )
        for question, answer, row, logps in zip(questions, answers, rows, scored, strict=True)
    ]


def _scores(question: Question, prediction: str, selection: Selection) -> dict[str, float]:
    numbers, supporting = selection.numbers, question.supporting_numbers
    selected = [question.documents[number - 1] for number in numbers]
    return {
        "em": exact_match(prediction, question.answers),
        "f1": f1(prediction, question.answers),
        "rouge_l": rouge_l(prediction, question.answers),
        **{f"precision@{k}": precision_at_k(numbers, supporting, k) for k in KS},
        "precision": precision_of(numbers, supporting),
        **{f"recall@{k}": recall_at_k(numbers, supporting, k) for k in KS},
        **{f"answer_recall@{k}": answer_recall_at_k(selected, question.answers, k) for k in KS},
        "valid": float(selection.valid),
        "num_selected": float(len(numbers)),
    }


def evaluate_stage(
    pipeline: RAGPipeline,
    questions: Sequence[Question],
    *,
    stage: str,
    split: str,
    output_dir: str | Path,
    likelihood: str,
    aliases: str,
) -> dict[str, Any]:
    """Evaluate a stage of training, each process its share, and write it. Returns its summary on every process."""
    state = PartialState()
    rank, world = state.process_index, state.num_processes
    mine: list[tuple[int, QuestionResult]] = []
    with Progress(len(questions), f"evaluation, {stage}", quiet=not state.is_main_process) as progress:
        for part in _parts(questions, world * pipeline.batch_size):  # as many on each process, who may share parameters
            own = part[rank::world]
            mine += zip(own, evaluate(pipeline, [questions[i] for i in own], likelihood, aliases), strict=True)
            progress.update(len(part))
    results = [result for _, result in sorted(gather_object(mine), key=lambda item: item[0])]
    conditions = Conditions(
        stage=stage,
        split=split,
        num_questions=len(questions),
        questions_hash=questions_hash(questions),
        candidates_hash=candidates_hash(questions),
        num_documents=max(len(question.documents) for question in questions),
        num_selected=pipeline.settings.num_selected,
        answer_likelihood=likelihood,
        answer_aliases=aliases,
        window_size=pipeline.settings.window_size,
        window_stride=pipeline.settings.window_stride,
    )
    return told_by_main(lambda: _write_stage(results, conditions, output_dir))


def evaluated_before(output_dir: str | Path, stage: str, name: str) -> dict[str, Any] | None:
    """Write an evaluated stage again, as another: its weights have not changed since.

    Returns its summary on every process; None where its file is missing, and there is nothing to write.
    """

    def again() -> dict[str, Any] | None:
        path = _results_path(output_dir, stage)
        if not path.is_file():
            return None
        results, conditions = read_results(path)
        return _write_stage(results, replace(conditions, stage=name), output_dir)

    return told_by_main(again)


def _write_stage(results: Sequence[QuestionResult], conditions: Conditions, output_dir: str | Path) -> dict[str, Any]:
    summary = summarise(results, conditions)
    write_results(_results_path(output_dir, conditions.stage), results, conditions)
    write_stages(output_dir, with_stage(read_stages(output_dir), summary))
    return summary


def _results_path(output_dir: str | Path, stage: str) -> Path:
    return summary_path(output_dir).with_name(f"{stage}.parquet")


def _parts(questions: Sequence[Question], size: int) -> list[list[int]]:
    """The places of all questions in parts of a size, the longest first, so that those of a part are as long."""
    order = sorted(range(len(questions)), key=lambda i: -sum(len(d.text) for d in questions[i].documents))
    return [order[first : first + size] for first in range(0, len(order), size)]


def summarise(results: Sequence[QuestionResult], conditions: Conditions) -> dict[str, Any]:
    """Means over a split: percent, or in the units of `UNITS`; None where no question defines a metric."""
    summary: dict[str, Any] = {
        "stage": conditions.stage,
        "split": conditions.split,
        "questions_hash": conditions.questions_hash,
        **_means(results),
    }
    by_type = {kind: _means(of_type) for kind, of_type in results_by_type(results).items()}
    return {**summary, "by_type": by_type} if by_type else summary


def _means(results: Sequence[QuestionResult]) -> dict[str, Any]:
    return {"n": len(results), **{name: _mean(metric_values(results, name)) for name in METRICS}}


def _mean(values: Sequence[float]) -> float | None:
    known = [value for value in values if not math.isnan(value)]
    return round(math.fsum(known) / len(known), 6) if known else None
