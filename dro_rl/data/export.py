"""Questions as peers read them: FlashRAG's JSONL, Search-R1's Parquet, rank_llm's requests. They are of a question
file, or of a run's rollouts, with the candidates that were selected first. `data.readers.peers` reads each back."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from dro_rl.errors import InputError
from dro_rl.files import write_json_lines, written_whole
from dro_rl.records import Question

Peer = Literal["flashrag", "search-r1", "rank-llm"]
ENDINGS: Mapping[Peer, tuple[str, ...]] = {
    "flashrag": (".jsonl", ".jsonl.gz"),
    "search-r1": (".parquet",),
    "rank-llm": (".jsonl", ".jsonl.gz"),
}
ROWS = 10_000
"""Of a part of a Parquet file: that many questions are in memory."""
PROMPT = "Answer the question, and search for what you do not know.\nQuestion: {}"
"""Of Search-R1's rows. Who trains with another prompt makes it of the column `question`."""
STRINGS = pa.list_(pa.string())
SEARCH_R1 = pa.schema(
    [
        ("id", pa.string()),
        ("question", pa.string()),
        ("golden_answers", STRINGS),
        ("data_source", pa.string()),
        ("prompt", pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("ground_truth", pa.struct([("target", STRINGS)])), ("style", pa.string())])),
        ("extra_info", pa.struct([("index", pa.int64()), ("split", pa.string())])),
    ]
)


def export_questions(questions: Iterable[Question], peer: Peer, output: Path, *, dataset: str, split: str) -> int:
    """Write questions as a peer reads them, whole, from a stream.

    Args:
        peer: whose format. FlashRAG's keeps candidates as HotpotQA's context, without their ids; Search-R1's has none;
            rank_llm's has no answers.
        output: the file, of an ending that the peer reads.
        dataset, split: what Search-R1's columns call them; a question's own dataset goes first.

    Returns:
        How many were written.

    Raises:
        InputError: the file's ending is another, or a question has nothing to rank.
    """
    if not output.name.endswith(ENDINGS[peer]):
        raise InputError("--output", str(output), f"{peer} reads {' or '.join(ENDINGS[peer])}", "Name it like that.")
    if peer == "search-r1":
        return _write_parquet(output, (_search_r1(*each, dataset, split) for each in enumerate(questions)))
    row: Callable[[Question], dict[str, Any]] = _flashrag if peer == "flashrag" else _rank_llm
    return write_json_lines(output, map(row, questions))


def selected_first(questions: Iterable[Question], rollouts: Iterable[pa.Table]) -> Iterator[Question]:
    """Questions of a rollout log in its order, once each: the candidates of the heaviest rollout, then the rest.

    Args:
        questions: of the run's training set.
        rollouts: rows of the log (`rollouts.log`); of a question that came more than once the last iteration counts.

    Raises:
        InputError: the training set has no such question any more.
    """
    best: dict[str, tuple[int, float, list[str]]] = {}
    for table in rollouts:
        for row in table.select(["question_id", "iteration", "weight", "document_ids"]).to_pylist():
            found = row["iteration"], row["weight"], row["document_ids"]
            if row["question_id"] not in best or found[:2] > best[row["question_id"]][:2]:
                best[row["question_id"]] = found
    known = {question.id: question for question in questions if question.id in best}
    for name, (_, _, ids) in best.items():
        if name not in known:
            raise InputError(
                "the run's data", name, "the questions of its rollouts are in it", "Use the data of the run."
            )
        place = {document: number for number, document in enumerate(ids)}
        documents = sorted(known[name].documents, key=lambda document: place.get(document.id, len(place)))
        yield replace(known[name], documents=tuple(documents))


def _flashrag(question: Question) -> dict[str, Any]:
    metadata: dict[str, Any] = {"type": question.type} if question.type else {}
    if question.documents:
        titles = [document.title for document in question.documents]
        gold = [question.documents[number - 1].title for number in question.supporting_numbers]
        metadata["context"] = {"title": titles, "sentences": [[document.text] for document in question.documents]}
        metadata["supporting_facts"] = {"title": gold, "sent_id": [0] * len(gold)}
    found = {"id": question.id, "question": question.question, "golden_answers": list(question.answers)}
    return {**found, "metadata": metadata}


def _search_r1(index: int, question: Question, dataset: str, split: str) -> dict[str, Any]:
    answers = list(question.answers)
    return {
        "id": question.id,
        "question": question.question,
        "golden_answers": answers,
        "data_source": question.dataset or dataset,
        "prompt": [{"role": "user", "content": PROMPT.format(question.question)}],
        "ability": "fact-reasoning",
        "reward_model": {"style": "rule", "ground_truth": {"target": answers}},
        "extra_info": {"split": split, "index": index},
    }


def _rank_llm(question: Question) -> dict[str, Any]:
    if not question.documents:
        raise InputError(
            f"question {question.id}", [], "a request has candidates to rank", "Retrieve some: dro-rl retrieve."
        )
    count = len(question.documents)
    return {
        "query": {"qid": question.id, "text": question.question},
        "candidates": [
            {
                "docid": document.id,
                "score": float(count - place),  # what stands first is ranked first
                "doc": {"title": document.title, "text": document.text},
            }
            for place, document in enumerate(question.documents)
        ],
    }


def _write_parquet(output: Path, rows: Iterator[dict[str, Any]]) -> int:
    count = 0
    with written_whole(output) as beside, pq.ParquetWriter(beside, SEARCH_R1, compression="zstd") as writer:
        while part := list(itertools.islice(rows, ROWS)):
            writer.write_table(pa.Table.from_pylist(part, schema=SEARCH_R1))
            count += len(part)
    return count
