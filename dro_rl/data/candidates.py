"""What may be done to a question's candidates on purpose: cut, shuffled, gold put in. Pure, and a function of the seed.

Nothing of this happens unless it is asked for, and what was done is written down: in the recipe of a run, in the
manifest of a file.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from dro_rl.records import Document, Question


def shape_candidates(
    questions: Sequence[Question], count: int | None = None, *, keep_gold: bool = False, shuffle_seed: int | None = None
) -> list[Question]:
    """Candidates cut to `count`, then shuffled by the seed; None leaves either out."""
    shaped = list(questions)
    if count is not None:
        shaped = [cut_candidates(question, count, keep_gold=keep_gold) for question in shaped]
    if shuffle_seed is not None:
        shaped = [shuffle_candidates(question, shuffle_seed) for question in shaped]
    return shaped


def cut_candidates(question: Question, count: int, *, keep_gold: bool = False) -> Question:
    """The first so many candidates.

    Args:
        question: with its candidates, in the retriever's order.
        count: how many are kept; all of them where there are fewer.
        keep_gold: keep the supporting documents among the others, in their order, in place of the last that are not.

    Returns:
        The question. Supporting documents that were cut off are its `missed` ones.
    """
    gold = set(question.supporting) if keep_gold else set()
    room = max(count - sum(document.id in gold for document in question.documents), 0)
    kept: list[Document] = []
    for document in question.documents:
        if document.id in gold:
            kept.append(document)
        elif room:
            kept.append(document)
            room -= 1
    return with_candidates(question, kept[:count])


def shuffle_candidates(question: Question, seed: int) -> Question:
    """The candidates in an order that is a function of the seed and the question's id."""
    documents = list(question.documents)
    random.Random(f"shuffle {seed} {question.id}").shuffle(documents)
    return replace(question, documents=tuple(documents))


def insert_gold(question: Question, gold: Sequence[Document], seed: int) -> Question:
    """Put the missed supporting documents among the candidates, in place of the last that are not supporting.

    Where each one stands is a function of the seed and the question's id: at the end, its place would give it away.

    Args:
        question: with its candidates.
        gold: its `missed` documents.
        seed: of the places.
    """
    supporting = {*question.supporting, *(document.id for document in gold)}
    documents = list(question.documents)
    for _ in gold:
        others = [place for place, document in enumerate(documents) if document.id not in supporting]
        if others:
            del documents[others[-1]]
    draw = random.Random(f"gold {seed} {question.id}")
    for document in gold:
        documents.insert(draw.randint(0, len(documents)), document)
    return with_candidates(question, documents)


def with_candidates(question: Question, documents: Sequence[Document]) -> Question:
    """The question with these candidates: what of its gold is among them is `supporting`, the rest is `missed`."""
    known = {document.id for document in documents}
    gold = dict.fromkeys((*question.supporting, *question.missed))
    return replace(
        question,
        documents=tuple(documents),
        supporting=tuple(identifier for identifier in gold if identifier in known),
        missed=tuple(identifier for identifier in gold if identifier not in known),
    )
