"""Natural Questions: DPR's retriever JSON and qa CSV, NQ-open, and retrieved passages as DPR and FiD write them.

None of these has ids of its own questions: the id is the dataset, the split and the row's number in the file.
"""

from __future__ import annotations

from collections.abc import Iterator

from dro_rl.data.readers.fields import Fields, Passage, Source, documents, hash_order, unique
from dro_rl.errors import InputError
from dro_rl.records import Question, check_text
from dro_rl.rows.spelled import spelled


def dpr(row: Fields, source: Source) -> Iterator[Question]:
    """`nq-train.json`: `question, answers, positive_ctxs, negative_ctxs, hard_negative_ctxs`, contexts of
    `title, text, passage_id`.

    Candidates are the positive and the hard negative contexts, supporting the positive ones. The file puts these
    first; here their order is that of a hash. Ids are those of the passages in `psgs_w100.tsv`. Plain negatives,
    passages of other questions, are left.
    """
    positive = [_context(context, True) for context in row.objects("positive_ctxs")]
    negative = [_context(context) for context in row.objects("hard_negative_ctxs")]
    identifier = _identifier(row, source)
    found, supporting = documents([*positive, *negative])
    yield Question(
        id=identifier,
        question=row.text("question"),
        answers=row.answers("answers"),
        documents=hash_order(identifier, found),
        supporting=supporting,
        dataset=source.dataset,
    )


def retrieved(row: Fields, source: Source) -> Iterator[Question]:
    """What DPR's retriever writes and FiD reads: `question, answers, ctxs`, contexts of `id, title, text`, best first.

    `isgold`, where a context has it, marks the supporting ones; `hasanswer` is no label.
    """
    found, supporting = documents(
        _context(context, context.value.get("isgold") is True) for context in row.objects("ctxs")
    )
    yield Question(
        id=row.identifier("id", "q_id") if "id" in row or "q_id" in row else _identifier(row, source),
        question=row.text("question"),
        answers=row.answers("answers"),
        documents=found,
        supporting=supporting,
        dataset=source.dataset,
    )


def nq_open(row: Fields, source: Source) -> Iterator[Question]:
    """`NQ-open.train.jsonl`: `question, answer`, a list. No candidates."""
    yield Question(_identifier(row, source), row.text("question"), row.answers("answer"), (), dataset=source.dataset)


def dpr_csv(row: tuple[str, list[str]], source: Source) -> Iterator[Question]:
    """`nq-test.csv`: a question, a tab, and its answers as a Python list. No candidates."""
    place, values = row
    if len(values) != 2:
        raise InputError(place, values, "each line is a question, a tab and a list of answers", "Correct the line.")
    answers = spelled(values[1])
    if not isinstance(answers, list) or not answers:
        raise InputError(f"{place}: answers", values[1], "this is a list, ['…', '…']", "Correct the line.")
    yield Question(
        id=f"{source.dataset}-{source.split}-{place.rpartition(' ')[2]}",
        question=check_text(values[0], f"{place}: question"),
        answers=unique(check_text(answer, f"{place}: answers") for answer in answers),
        documents=(),
        dataset=source.dataset,
    )


def _context(context: Fields, supporting: bool = False) -> Passage:
    names = [name for name in ("passage_id", "psg_id", "id") if name in context]
    identifier = context.identifier(*names) if names else ""
    return Passage(context.title(), context.text("text"), supporting, identifier.removeprefix("wiki:"))


def _identifier(row: Fields, source: Source) -> str:
    return f"{source.dataset}-{source.split}-{row.number}"
