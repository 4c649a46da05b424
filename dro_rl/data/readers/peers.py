"""KILT, and the files of peers: FlashRAG, Search-R1, rank_llm, and the first implementation of the method."""

from __future__ import annotations

import re
from collections.abc import Iterator

from dro_rl.data.corpus import split_contents
from dro_rl.data.readers.fields import (
    Fields,
    Passage,
    Source,
    documents,
    hash_order,
    labelled_paragraphs,
    unique,
)
from dro_rl.errors import InputError, Phrase
from dro_rl.records import Question, check_text


def kilt(row: Fields, source: Source) -> Iterator[Question]:
    """`nq-dev-kilt.jsonl` and its like: `id, input, output`, a list of `answer, provenance`. No candidates.

    The provenance names pages of KILT's own Wikipedia, not passages of a corpus, and makes no labels. A test file has
    no output and is refused.
    """
    answers = unique(each.text("answer") for each in row.objects("output") if "answer" in each)
    if not answers:
        raise InputError(
            f"{row.place}: output",
            Phrase("no answer"),
            "a question has at least one answer",
            "A split without answers cannot be used.",
        )
    yield Question(row.identifier("id"), row.text("input"), answers, (), dataset=source.dataset)


def flashrag(row: Fields, source: Source) -> Iterator[Question]:
    """FlashRAG's JSONL: `id, question, golden_answers, metadata`. Candidates where the metadata has HotpotQA's or
    2WikiMultihopQA's `context`; the type where it has one.
    """
    metadata = row.within("metadata") if "metadata" in row else Fields({}, row.place)
    found, supporting = documents(labelled_paragraphs(metadata))
    yield Question(
        id=row.identifier("id"),
        question=row.text("question"),
        answers=row.answers("golden_answers"),
        documents=found,
        supporting=supporting,
        dataset=source.dataset,
        type=metadata.text("type") if isinstance(metadata.value.get("type"), str) else "",
    )


def search_r1(row: Fields, source: Source) -> Iterator[Question]:
    """Search-R1's Parquet, in verl's columns: `data_source, prompt, reward_model, extra_info`, with `id, question,
    golden_answers` where they were kept. No candidates.

    One file mixes data sets whose ids collide: the id begins with `data_source`.
    """
    dataset = row.text("data_source")
    if "golden_answers" in row:
        answers = row.answers("golden_answers")
    else:
        truth = row.within("reward_model").within("ground_truth")
        single = isinstance(truth.value.get("target"), str)
        answers = (truth.text("target"),) if single else truth.answers("target")
    if "id" in row:
        number = row.identifier("id")
    else:
        about = row.within("extra_info")
        number = f"{about.value.get('split') or source.split}_{about.identifier('index')}"
    yield Question(
        id=f"{dataset}-{number}",
        question=row.text("question") if "question" in row else _asked_in_prompt(row),
        answers=answers,
        documents=(),
        dataset=dataset,
    )


def _asked_in_prompt(row: Fields) -> str:
    """The question of a chat prompt: what its last message says after the last `Question:`."""
    messages = list(row.objects("prompt"))
    said = messages[-1].text("content") if messages else ""
    _, mark, question = said.rpartition("Question:")
    if not mark or not question.strip():
        raise InputError(
            f"{row.place}: prompt", said[-60:], "the last message ends in 'Question: …'", "Keep the column question."
        )
    return question.strip()


def rank_llm(row: Fields, source: Source) -> Iterator[Question]:
    """rank_llm's requests: `query` of `qid, text`, `candidates` of `docid, score, doc`, best first.

    A request has no answers: they come from a file beside it, by qid.
    """
    query = row.within("query")
    identifier = query.identifier("qid")
    if identifier not in source.answers:
        raise InputError(
            f"{row.place}: query: qid",
            identifier,
            "requests have no answers, and the answers file has none for this id",
            "Give --answers FILE, JSON lines of {id, answers}.",
        )
    found, _ = documents(candidate(each) for each in row.objects("candidates"))
    yield Question(identifier, query.text("text"), source.answers[identifier], found, dataset=source.dataset)


def candidate(row: Fields) -> Passage:
    """A candidate of rank_llm's: `docid`, `doc`; the text of `doc` has one of several names."""
    doc = row.within("doc")
    name, _ = doc.get("text", "contents", "segment", "passage", "content", "body")
    title, text = doc.title(), doc.text(name)
    if name == "contents" and not title:
        title, text = split_contents(text)
    return Passage(title, text, id=row.identifier("docid"))


PASSAGE = re.compile(r'Title: (?:"(?P<quoted>.*?)" Text: |(?P<plain>.*?)\s?\. ?Content: )(?P<text>.*)', re.DOTALL)
"""A passage of the first implementation: `Title: X. Content: …` where gold, `Title: "X" Text: …` where retrieved."""


def first_implementation(row: Fields, source: Source) -> Iterator[Question]:
    """The first implementation's JSON: `question, answer, positive, retrieval, query_id`, passages as text.

    Candidates are the retrieved passages in their order, supporting those among the positive ones. Positive passages
    that were not retrieved are candidates too, and all then stand in the order of a hash, so that neither place nor
    spelling tells them.
    """
    positive = [_passage(text, True) for text in row.texts("positive")]
    gold = {(passage.title, passage.text) for passage in positive}
    retrieved = [_passage(text) for text in row.texts("retrieval")]
    retrieved = [passage._replace(supporting=(passage.title, passage.text) in gold) for passage in retrieved]
    identifier = row.identifier("query_id")
    found, supporting = documents([*retrieved, *positive])
    if gold - {(passage.title, passage.text) for passage in retrieved}:
        found = hash_order(identifier, found)
    yield Question(
        id=identifier,
        question=row.text("question"),
        answers=row.answers("answers") if "answers" in row else (row.text("answer"),),
        documents=found,
        supporting=supporting,
        dataset=row.text("dataset") if "dataset" in row else source.dataset,
    )


def _passage(text: str, supporting: bool = False) -> Passage:
    match = PASSAGE.fullmatch(text)
    if match is None or not match["text"].strip():
        return Passage("", text, supporting)
    return Passage(match["quoted"] or match["plain"] or "", check_text(match["text"].strip(), "text"), supporting)
