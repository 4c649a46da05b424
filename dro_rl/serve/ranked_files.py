"""Files of rankings, in and out: TREC runs, and rank_llm's JSON lines. The selector alone re-ranks them.

A TREC run has six columns, `qid Q0 docid rank score tag`, and neither questions nor texts: these come from a file of
queries and from a corpus. rank_llm's lines have all. Who evaluates a run sorts it by score, so the score written is one
over the place, for every document: those that the selector named, in its order, and then the others in theirs.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dro_rl.data.corpus import read_corpus
from dro_rl.data.readers.fields import Fields
from dro_rl.data.readers.peers import candidate
from dro_rl.errors import InputError, Phrase
from dro_rl.files import write_lines
from dro_rl.records import Document, Question, Selection, check_id, check_text
from dro_rl.retrieval.index import check_parts, read_index_manifest
from dro_rl.retrieval.passages import PassageStore
from dro_rl.rows import TABLES, rows, suffix
from dro_rl.rows.strict_json import json_lines
from dro_rl.rows.text import text_lines
from dro_rl.serve.ranking import ranked

Format = Literal["trec", "rank_llm"]
COLUMNS = "qid Q0 docid rank score tag"
Find = Callable[[str, str], Document]
"""From a document's id, and the place that names it, to the document."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """A question with its candidates in the order of the file.

    Args:
        question: with all candidates; its id is the query's.
        row: rank_llm's line, whose other fields are kept.
    """

    question: Question
    row: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Reranked:
    """What became of a file.

    Args:
        output: the file that was written.
        queries: how many there are.
        candidates: of all of them.
        unnamed: queries for which the selector named no document: their order is as it was.
    """

    output: Path
    queries: int
    candidates: int
    unnamed: int


class RankedFile:
    """A file of rankings that has been read once: every line is right, every query and document is known.

    Args:
        path: the file.
        format: what it is; by its name, unless told.
        queries: a file of queries, `qid<TAB>text` or JSON lines; for a TREC run.
        corpus: an index, or a corpus file or folder; for a TREC run.

    Raises:
        InputError: naming the file and the line of what is wrong.

    Attributes:
        queries, candidates: how many there are.
    """

    def __init__(self, path: Path, format: Format | None, queries: Path | None, corpus: Path | None) -> None:
        if not path.is_file():
            raise InputError(str(path), Phrase("no such file"), "a file of rankings exists", "Check the path.")
        self.path, self.format = path, format or format_of(path)
        self._find: Find = _nothing
        if self.format == "trec":
            self._texts = read_queries(_needed("--queries", queries, "the questions of a TREC run"))
            self._find = _finder(_needed("--corpus", corpus, "the texts of a TREC run"), path)
        self.queries = self.candidates = 0
        for ranking in self:
            self.queries += 1
            self.candidates += len(ranking.question.documents)
        if not self.queries:
            raise InputError(str(path), Phrase("no rankings"), "a file of rankings has at least one", "Check the file.")

    def __iter__(self) -> Iterator[Ranking]:
        return self._of_trec() if self.format == "trec" else rank_llm_rankings(self.path)

    def _of_trec(self) -> Iterator[Ranking]:
        for query in trec_queries(self.path):
            if query.id not in self._texts:
                raise InputError(
                    query.place, query.id, "each query of the run is in --queries", "Give the queries of this run."
                )
            documents = tuple(self._find(identifier, place) for identifier, place in query.documents.items())
            yield Ranking(Question(query.id, self._texts[query.id], (), documents))


def rerank_file(
    source: RankedFile,
    select: Callable[[Sequence[Question]], Sequence[Selection]],
    output: Path,
    *,
    depth: int | None = None,
    tag: str = "dro_rl",
    batch_size: int = 8,
    watch: Callable[[int], None] = lambda count: None,
) -> Reranked:
    """Re-rank a file into another, written whole.

    Args:
        source: the file.
        select: the selector.
        output: JSON lines of rank_llm where its name says `.jsonl`, else a TREC run; packed where it ends in `.gz`.
        depth: candidates that are ranked, from the first; the others follow as they were. None for all.
        tag: the run's name, in the last column.
        batch_size: queries that are ranked together.
        watch: told how many are done.
    """
    form = format_of(output)
    unnamed = 0

    def lines() -> Iterator[str]:
        nonlocal unnamed
        stream = iter(source)
        while batch := list(itertools.islice(stream, batch_size)):
            shown = [replace(each.question, documents=each.question.documents[:depth]) for each in batch]
            for ranking, selection in zip(batch, select(shown), strict=True):
                unnamed += not selection.valid
                yield from written(ranking, ranked(selection, len(ranking.question.documents)), form, tag)
            watch(len(batch))

    write_lines(output, lines())
    return Reranked(output, source.queries, source.candidates, unnamed)


def format_of(path: Path) -> Format:
    """What a file's name says that it is."""
    return "rank_llm" if suffix(path) == "jsonl" else "trec"


def written(ranking: Ranking, order: Sequence[int], form: Format, tag: str) -> Iterator[str]:
    """The lines of one query, its candidates in an order of their numbers."""
    question = ranking.question
    if form == "trec":
        for rank, number in enumerate(order, start=1):
            words = question.id, "Q0", question.documents[number - 1].id, str(rank), repr(1 / rank), tag
            for word in words:
                if not word or re.search(r"\s", word):
                    raise InputError(
                        f"query {question.id}",
                        word,
                        "a TREC run separates its columns by spaces",
                        "Write a .jsonl file.",
                    )
            yield " ".join(words)
        return
    if ranking.row is None:
        row: dict[str, Any] = {"query": {"qid": question.id, "text": question.question}}
        before: list[dict[str, Any]] = [
            {"docid": each.id, "score": 0.0, "doc": {"title": each.title, "text": each.text}}
            for each in question.documents
        ]
    else:
        row, before = dict(ranking.row), list(ranking.row["candidates"])
    after = [{**before[number - 1], "score": 1 / rank} for rank, number in enumerate(order, start=1)]
    yield json.dumps({**row, "candidates": after}, ensure_ascii=False)


# Reading ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class TrecQuery:
    """A query of a TREC run: its first line, and its documents, best first, each with the line that names it."""

    id: str
    place: str
    documents: dict[str, str]


def trec_queries(path: Path) -> Iterator[TrecQuery]:
    """The queries of a TREC run, one after the other. By score, as trec_eval sorts; those of equal score by rank."""
    seen: set[str] = set()
    for identifier, group in itertools.groupby(_trec_lines(path), lambda line: line.query):
        lines = list(group)
        if identifier in seen:
            raise InputError(
                lines[0].place, identifier, "the lines of a query stand together", "Sort the run: sort -s -k1,1."
            )
        seen.add(identifier)
        documents: dict[str, str] = {}
        for line in sorted(lines, key=lambda line: (-line.score, line.rank)):
            if line.document in documents:
                raise InputError(
                    line.place, line.document, "a document stands once in a query's ranking", "Drop the second line."
                )
            documents[line.document] = line.place
        yield TrecQuery(identifier, lines[0].place, documents)


@dataclass(frozen=True, slots=True)
class _TrecLine:
    place: str
    query: str
    document: str
    rank: int
    score: float


def _trec_lines(path: Path) -> Iterator[_TrecLine]:
    for number, text in text_lines(path):
        words = re.split(r"[ \t]+", text.strip(" \t\r\n"))
        if words == [""]:
            continue
        place = f"{path}: line {number}"
        if len(words) != 6:
            raise InputError(
                place, text.strip()[:80], f"a line of a TREC run has six columns: {COLUMNS}", "Correct the line."
            )
        query, _, document, rank, score, _ = words
        if not re.fullmatch(r"[0-9]{1,9}", rank):
            raise InputError(f"{place}: rank", rank, "a rank is a whole number", "Correct the line.")
        try:
            value = float(score)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise InputError(f"{place}: score", score, "a score is a number", "Correct the line.")
        yield _TrecLine(place, query, document, int(rank), value)


def rank_llm_rankings(path: Path) -> Iterator[Ranking]:
    """rank_llm's lines: `query` of `qid, text`, `candidates` of `docid, score, doc`, in the order of the file."""
    seen: set[str] = set()
    for place, row in json_lines(path):
        fields = Fields(row, place)
        query = fields.within("query")
        identifier = query.identifier("qid")
        if identifier in seen:
            raise InputError(f"{place}: query: qid", identifier, "a query stands once", "Drop the second line.")
        seen.add(identifier)
        documents: dict[str, Document] = {}
        for each in map(Fields, fields.items("candidates"), itertools.repeat(f"{place}: candidates")):
            passage = candidate(each)
            if passage.id in documents:
                raise InputError(
                    f"{each.place}: docid", passage.id, "a document stands once in a ranking", "Drop the second one."
                )
            documents[passage.id] = Document(passage.id, passage.title, passage.text)
        if not documents:
            raise InputError(
                f"{place}: candidates", Phrase("empty list"), "there is something to rank", "Drop the line."
            )
        yield Ranking(Question(identifier, query.text("text"), (), tuple(documents.values())), row)


def read_queries(path: Path) -> dict[str, str]:
    """Questions by id: of a table `qid<TAB>text`, or of JSON lines with an id and a text under one of their names."""
    texts: dict[str, str] = {}
    for place, row in rows(path):
        if suffix(path) in TABLES:
            if len(row) != 2:
                raise InputError(
                    place, Phrase(f"{len(row)} columns"), "a line of queries is an id and a text", "Correct the line."
                )
            identifier, text = check_id(row[0], f"{place}: qid"), check_text(row[1], f"{place}: text")
        else:
            fields = Fields(row, place)
            identifier = fields.identifier("qid", "id", "_id", "query_id")
            text = fields.text("text", "question", "query", "title")
        if identifier in texts:
            raise InputError(place, identifier, "a query stands once", "Drop the second line.")
        texts[identifier] = text
    return texts


def _finder(corpus: Path, run: Path) -> Find:
    """Where the documents of a run are: an index, which is looked into, or a corpus, of which those named are kept."""
    if (corpus / "passages").is_dir() or (corpus / "index.json").is_file():
        check_parts(read_index_manifest(corpus), corpus)
        store = PassageStore(corpus / "passages")

        def stored(identifier: str, place: str) -> Document:
            row = store.row_of(identifier)
            if row is None:
                raise _unknown(identifier, place, corpus)
            return store[row]

        return stored
    named = {identifier for query in trec_queries(run) for identifier in query.documents}
    kept = {document.id: document for document in read_corpus(corpus) if document.id in named}

    def found(identifier: str, place: str) -> Document:
        if identifier not in kept:
            raise _unknown(identifier, place, corpus)
        return kept[identifier]

    return found


def _unknown(identifier: str, place: str, corpus: Path) -> InputError:
    return InputError(
        f"{place}: docid", identifier, f"each document of the run is in {corpus}", "Give the corpus of this run."
    )


def _needed(option: str, path: Path | None, what: str) -> Path:
    if path is None:
        raise InputError(option, Phrase("missing"), f"{what} come from there", f"Give {option}.")
    return path


def _nothing(identifier: str, place: str) -> Document:
    raise AssertionError("rank_llm's lines have their texts")
