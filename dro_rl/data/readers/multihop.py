"""HotpotQA, 2WikiMultihopQA and MuSiQue. Their candidates stand in the released order, which is a shuffled one."""

from __future__ import annotations

import re
from collections.abc import Iterator

from dro_rl.data.readers.fields import (
    Fields,
    Passage,
    Source,
    documents,
    labelled_paragraphs,
    unique,
)
from dro_rl.errors import InputError
from dro_rl.records import Question


def hotpotqa(row: Fields, source: Source) -> Iterator[Question]:
    """`hotpot_train_v1.1.json`, `hotpot_dev_{distractor,fullwiki}_v1.json` (`_id, question, answer, supporting_facts,
    context, type, level`), and the hub's columns of the same.

    Supporting are the paragraphs with a supporting fact's title. The retrieved paragraphs of fullwiki may lack them.
    """
    yield _with_context(row, source, (row.text("answer"),))


def two_wiki(row: Fields, source: Source) -> Iterator[Question]:
    """`train.json`, `dev.json` of 2WikiMultihopQA: HotpotQA's fields and `evidences`; `answer_id` in the release with
    ids, whose `id_aliases.json` gives further accepted answers.
    """
    source.answer_ids += "answer_id" in row
    aliases = source.aliases.get(str(row.value.get("answer_id")), ())
    yield _with_context(row, source, unique((row.text("answer"), *aliases)))


def musique(row: Fields, source: Source) -> Iterator[Question]:
    """`musique_{ans,full}_v1.0_{train,dev}.jsonl`: `id, question, answer, answer_aliases, paragraphs` of `title,
    paragraph_text, is_supporting`.

    The type is the number of hops, of which the id speaks. The unanswerable twins in the full release, which have the
    ids of the answerable ones, are left out and counted.
    """
    if row.value.get("answerable", True) is False:
        source.left_out["unanswerable"] += 1
        return
    passages = []
    for each in row.objects("paragraphs"):
        supporting = each.value.get("is_supporting", False)
        if not isinstance(supporting, bool):
            raise InputError(f"{each.place}: is_supporting", supporting, "this is true or false", "Correct the file.")
        passages.append(Passage(each.title(), each.text("paragraph_text"), supporting))
    found, supporting = documents(passages)
    aliases = row.texts("answer_aliases") if "answer_aliases" in row else ()
    identifier = row.identifier("id")
    hops = re.match(r"(\d)hop", identifier)
    yield Question(
        id=identifier,
        question=row.text("question"),
        answers=unique((row.text("answer"), *aliases)),
        documents=found,
        supporting=supporting,
        dataset=source.dataset,
        type=f"{hops[1]}-hop" if hops else "",
    )


def _with_context(row: Fields, source: Source, answers: tuple[str, ...]) -> Question:
    row.get("context"), row.get("supporting_facts")  # which FlashRAG's rows need not have
    found, supporting = documents(labelled_paragraphs(row))
    return Question(
        id=row.identifier("_id", "id"),
        question=row.text("question"),
        answers=answers,
        documents=found,
        supporting=supporting,
        dataset=source.dataset,
        type=row.text("type") if "type" in row else "",
    )
