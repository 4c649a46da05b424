"""Answer and selection metrics, one question at a time. Pure: no models, no files.

Normalisation, exact match and F1 are those of the official SQuAD v1.1 script, which KILT uses too, for dialogue as for
questions; ROUGE-L is KILT's. So figures compare with published ones.
"""

from __future__ import annotations

import math
import re
import string
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from dro_rl.records import Document

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_DELETE_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower-case, delete ASCII punctuation, drop a, an and the, collapse white space: SQuAD v1.1.

    Punctuation is deleted, not replaced by a space ("U.S." becomes "us"), and before the articles are looked
    for ("the-end" becomes "theend"). Punctuation outside ASCII stays, as in the official script.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_DELETE_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction equals any accepted answer after `normalize_answer`, else 0.0.

    Two texts that both normalise to nothing ("The" and "a") are equal, as in the official script.

    Raises:
        ValueError: no accepted answer.
    """
    normalized = normalize_answer(prediction)
    return max(float(normalized == normalize_answer(answer)) for answer in _accepted(answers))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Token F1 of the normalised prediction, 0..1: the best over all accepted answers.

    Tokens are counted with their multiplicity. Without a common token it is 0, also where prediction and
    answer both normalise to nothing: there the official script gives an exact match of 1 and an F1 of 0, and
    so do we.

    Raises:
        ValueError: no accepted answer.
    """
    predicted = normalize_answer(prediction).split()
    return max(_token_f1(predicted, normalize_answer(answer).split()) for answer in _accepted(answers))


def contains(prediction: str, answers: Sequence[str]) -> float:
    """1 when an accepted answer stands in the prediction, as a run of whole words, both normalised; else 0."""
    words = f" {normalize_answer(prediction)} "
    return float(any(f" {known} " in words for answer in _accepted(answers) if (known := normalize_answer(answer))))


def rouge_l(prediction: str, answers: Sequence[str]) -> float:
    """ROUGE-L as KILT computes it, 0..1: the best over all accepted answers, by the `rouge` package that KILT calls.

    Texts are not normalised: case and punctuation count. A perfect answer scores 0.999999995, since the package adds
    1e-8 to a denominator. A prediction without a word scores 0.

    Raises:
        ValueError: no accepted answer.
    """
    return max(_rouge_l(prediction, answer) for answer in _accepted(answers))


def precision_at_k(numbers: Sequence[int], supporting_numbers: Sequence[int], k: int) -> float:
    """Share of the first k places that hold a supporting document: |supporting ∩ first k| / k.

    The standard precision of information retrieval, 0..1: places that a short selection leaves empty count against it.

    Args:
        numbers: the selection, 1-based document numbers, best first.
        supporting_numbers: 1-based numbers of the documents labelled as supporting, in any order.
        k: how many places count, from 1.

    Returns:
        The share; NaN where nothing is labelled.

    Raises:
        ValueError: k is below 1.
    """
    _check_k(k)
    supporting = set(supporting_numbers)
    return len(supporting.intersection(numbers[:k])) / k if supporting else math.nan


def precision_of(numbers: Sequence[int], supporting_numbers: Sequence[int]) -> float:
    """Share of the selected documents that are supporting, 0..1: what a selector that decides how many is judged by.

    0.0 when nothing is selected; NaN where nothing is labelled. Arguments as in `precision_at_k`.
    """
    return precision_at_k(numbers, supporting_numbers, max(1, len(numbers)))


def recall_at_k(numbers: Sequence[int], supporting_numbers: Sequence[int], k: int) -> float:
    """Share of the supporting documents among the first k selected: |supporting ∩ first k| / |supporting|.

    The standard recall of information retrieval, 0..1: with two of three supporting documents among the first
    k it is 2/3. With one supporting document it is 0 or 1, as in the paper, whose own definition is
    `answer_recall_at_k`. 0.0 when nothing is selected.

    Args:
        numbers: the selection, 1-based document numbers, best first.
        supporting_numbers: 1-based numbers of the documents labelled as supporting, in any order.
        k: how many of the selected documents count, from 1.

    Returns:
        The share; NaN where nothing is labelled, since recall of nothing is undefined: leave such questions
        out of a mean.

    Raises:
        ValueError: k is below 1.
    """
    _check_k(k)
    supporting = set(supporting_numbers)
    if not supporting:
        return math.nan
    return len(supporting.intersection(numbers[:k])) / len(supporting)


def answer_recall_at_k(documents: Sequence[Document], answers: Sequence[str], k: int) -> float:
    """1.0 if any accepted answer stands in the first k selected documents, else 0.0: the paper's Recall@K.

    An answer stands in a document when its normalised tokens are consecutive tokens of the document's
    normalised title and text: "art" does not stand in "Bartók". Answers that normalise to nothing stand
    nowhere.

    Args:
        documents: the selected documents, best first.
        answers: the accepted answers.
        k: how many of the selected documents count, from 1.

    Raises:
        ValueError: k is below 1, or there is no accepted answer.
    """
    _check_k(k)
    wanted = [f" {normalized} " for answer in _accepted(answers) if (normalized := normalize_answer(answer))]
    for document in documents[:k]:
        read = f" {normalize_answer(f'{document.title} {document.text}')} "
        if any(answer in read for answer in wanted):
            return 1.0
    return 0.0


def _token_f1(predicted: list[str], accepted: list[str]) -> float:
    common = (Counter(predicted) & Counter(accepted)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted), common / len(accepted)
    return 2 * precision * recall / (precision + recall)


@cache
def _rouge() -> Any:
    from rouge import Rouge

    return Rouge(metrics=["rouge-l"])


def _rouge_l(prediction: str, answer: str) -> float:
    with _deeper(len(prediction.split()) + len(answer.split())):  # the package takes a call a word of a sentence
        try:
            return _rouge().get_scores(prediction, answer)[0]["rouge-l"]["f"]
        except ValueError:  # one of the two has no sentence
            return 0.0


@contextmanager
def _deeper(calls: int) -> Iterator[None]:
    """Room for so many more calls within each other than Python allows."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + calls)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


def _accepted(answers: Sequence[str]) -> Sequence[str]:
    if isinstance(answers, str):
        raise TypeError(f"answers is a list of texts, not the text {answers!r}: write [{answers!r}]")
    if not answers:
        raise ValueError("answers is empty: a question has at least one accepted answer")
    return answers


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k is {k}: recall looks at the first k selected documents, k from 1")
