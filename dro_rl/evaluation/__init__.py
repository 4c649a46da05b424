"""Evaluation: metrics of one question. Everything here is pure and is 0..1."""

from dro_rl.evaluation.metrics import answer_recall_at_k, exact_match, f1, normalize_answer, recall_at_k

__all__ = ["answer_recall_at_k", "exact_match", "f1", "normalize_answer", "recall_at_k"]
