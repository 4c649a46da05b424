"""Evaluation: a pair on a question file, reports, comparisons. Here stand the metrics of one question, each 0..1."""

from dro_rl.metrics import (
    answer_recall_at_k,
    exact_match,
    f1,
    normalize_answer,
    precision_at_k,
    recall_at_k,
    rouge_l,
)

__all__ = [
    "answer_recall_at_k",
    "exact_match",
    "f1",
    "normalize_answer",
    "precision_at_k",
    "recall_at_k",
    "rouge_l",
]
