"""The shapes that travel between rooms, and the one way to read and write a question file.

Nothing here knows of models, trainers, engines or the command line.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from dro_rl.errors import InputError, Phrase
from dro_rl.files import write_json_lines
from dro_rl.rows import TABLES, Bad, Rows, Watch, refuse, rows, suffix, with_names
from dro_rl.rows.spelled import spelled


@dataclass(frozen=True, slots=True)
class Document:
    """A retrieved passage. `title` may be empty, `text` may not."""

    id: str
    title: str
    text: str


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its accepted answers and its N candidates, in the retriever's order.

    Args:
        id: unique within a file.
        question: the text; for dialogue, the history, one utterance a line.
        answers: every accepted answer; the first is the one that `answer_aliases: first` trains on.
        documents: the candidates; document number n (1-based) is `documents[n - 1]`.
        supporting: ids of the documents known to hold the evidence, where labels exist.
        missed: ids of such documents that are not among the candidates: the retriever did not find them.
        dataset: the name of the dataset, free text.
        type: hops or question type, where known; evaluation reports by it.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    documents: tuple[Document, ...]
    supporting: tuple[str, ...] = ()
    dataset: str = ""
    type: str = ""
    missed: tuple[str, ...] = ()

    @property
    def supporting_numbers(self) -> tuple[int, ...]:
        """1-based numbers of the supporting documents among the candidates."""
        wanted = set(self.supporting)
        return tuple(n for n, document in enumerate(self.documents, start=1) if document.id in wanted)

    def shown(self, order: Sequence[int]) -> Question:
        """The question with its candidates in another order, or some of them, given by their numbers; an empty one
        changes nothing."""
        return replace(self, documents=tuple(self.documents[number - 1] for number in order)) if order else self


@dataclass(frozen=True, slots=True)
class Selection:
    """What a selector's text says.

    Args:
        numbers: distinct 1-based document numbers in the order given, at most K.
        valid: whether at least one valid document is named. Without one the generator has nothing to read.
        problems: codes of what is not as asked, empty for a perfect list: `format`, `out_of_range`, `repeated`,
            `too_few`, `too_many`.
    """

    numbers: tuple[int, ...]
    valid: bool
    problems: tuple[str, ...] = ()


Written = tuple[tuple[int, ...], tuple[int, ...]]
"""The order that a selector was shown, and the tokens that it wrote."""


@dataclass(frozen=True, slots=True)
class Window:
    """What a selector was shown at a time, and what it wrote.

    Args:
        order: numbers of the candidates as it was shown them; empty for all of the question's, in their own order.
        token_ids, proposal_logps, text: as in `Sample`.
        numbers: the documents that it named, in the question's own numbers, best first.
    """

    order: tuple[int, ...]
    token_ids: tuple[int, ...]
    proposal_logps: tuple[float, ...]
    text: str
    numbers: tuple[int, ...]

    @property
    def written(self) -> Written:
        """The completion that it is: those of a question with the same have the same log p."""
        return self.order, self.token_ids

    @property
    def proposal_logp(self) -> float:
        """log q of what was written, nats."""
        return float(sum(self.proposal_logps))


@dataclass(frozen=True, slots=True)
class Sample:
    """One selection drawn for one question, not scored or weighed yet.

    Where it was drawn window by window (`selection.windows`), tokens, text and order are those of the last one drawn.

    Args:
        question: index of the question in the training set.
        sample: 0..m-1 within the question's group.
        token_ids: the sampled tokens, end-of-sequence included when it was reached.
        proposal_logps: log q of each token under the distribution it was drawn from, nats.
        text: the decoded tokens.
        selection: what the text says, in the question's own numbers. Its problems are those of all windows.
        order: numbers of the candidates as the selector was shown them; empty for the question's own order.
        windows: those before the last one, as they slid; empty where the list was shown whole.
        reference_logp: log p(z|x) under the initial selector, nats; NaN without `beta`.
        prompt_cut: whether the selector read documents cut to fit `max_prompt_length`.
        temperature: what it was sampled at.
        draw: which draw for its place in the iteration it is: 1, or more after draws that tied (`resample_ties`).
        answer_logp_sum, answer_logp_mean: log p(y|x, d_z) over the answer's tokens, nats; NaN until it is scored, and
            for an invalid selection, which never is.
        answer: what the generator wrote after reading the selection; None where no reward looks at answers.
        rewards: the value of each reward that has been computed, by name.
    """

    question: int
    sample: int
    token_ids: tuple[int, ...]
    proposal_logps: tuple[float, ...]
    text: str
    selection: Selection
    order: tuple[int, ...] = ()
    windows: tuple[Window, ...] = ()
    reference_logp: float = math.nan
    prompt_cut: bool = False
    temperature: float = 1.0
    draw: int = 1
    answer_logp_sum: float = math.nan
    answer_logp_mean: float = math.nan
    answer: str | None = None
    rewards: tuple[tuple[str, float], ...] = ()

    @property
    def all_windows(self) -> tuple[Window, ...]:
        """Each window with what was written in it, the last one last; one where the list was shown whole."""
        last = Window(self.order, self.token_ids, self.proposal_logps, self.text, self.selection.numbers)
        return (*self.windows, last)

    @property
    def proposal_logp(self) -> float:
        """log q(z|x), nats: the sum over its windows."""
        return float(sum(window.proposal_logp for window in self.all_windows))

    @property
    def tokens_written(self) -> int:
        """Sampled tokens of all its windows."""
        return sum(len(window.token_ids) for window in self.all_windows)

    def answer_logp_as(self, likelihood: str) -> float:
        """log p(y|x, d_z) as `sum` or as `mean` over the answer's tokens, nats."""
        return self.answer_logp_sum if likelihood == "sum" else self.answer_logp_mean


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout(Sample):
    """A sample that the E-step has scored and weighed: a row of the rollout log.

    Args:
        selection_logp: log p(z|x), of all its windows, at temperature 1 under the selector that the E-step weighed
            with, nats.
        answer_logp: log p(y|x, d_z), nats: of the sum and the mean the one that is the likelihood.
        reward: what the objective weighs: under `reward: likelihood` the answer's log-likelihood, nats.
        weight: importance weight; sums to 1 over the group unless every rollout is invalid.
        advantage: what moves the selector under an objective of advantages; NaN under the others.
        proposal_weight: its weight were all answers alike: p/q normalised over the group, 1/m where q is p.
        ess: effective sample size of the group's weights, 0..m.
        weight_temperature: the temperature its weights were computed at.
    """

    selection_logp: float
    answer_logp: float
    reward: float
    weight: float
    advantage: float = math.nan
    proposal_weight: float
    ess: float
    weight_temperature: float


REQUIRED_FIELDS = ("id", "question", "answers", "documents")
OPTIONAL_FIELDS = ("supporting", "missed", "dataset", "type")
FIELDS = (*REQUIRED_FIELDS, *OPTIONAL_FIELDS)
AS_NAMED: Mapping[str, str] = MappingProxyType({})
"""Columns that have the names of their fields."""
LISTS = ("answers", "documents", "supporting", "missed")


Candidates = Literal["required", "optional"]
"""Whether each question has documents, as training needs, or may have none, as retrieval and the tools take it."""


def read_questions(
    path: str | Path, *, candidates: Candidates = "required", columns: Mapping[str, str] = AS_NAMED
) -> list[Question]:
    """Read a question file: JSON lines (`.jsonl`), a JSON array (`.json`), or a table (`.parquet`, `.csv`, `.tsv`) with
    the same columns; each but Parquet also as `.gz`.

    Args:
        path: the file.
        candidates: `optional` also takes questions whose `documents` is empty or missing; the `supporting` ids of such
            a question name documents of the corpus that its candidates will come from.
        columns: names of columns by the fields that they are, where they have other names.

    Returns:
        The questions in file order. A document that is a candidate of many questions stands in memory once.

    Raises:
        InputError: naming the file, the line (the row, in Parquet), the field, what is wrong and what to do. A file
            with one bad line is refused whole: a training set that silently shrank is worse than none.
    """
    return shared_documents(iter_questions(path, candidates=candidates, columns=columns))


def shared_documents(questions: Iterable[Question]) -> list[Question]:
    """The questions, of which a document that is a candidate of many stands in memory once."""
    shared: dict[Document, Document] = {}
    return [
        replace(question, documents=tuple(shared.setdefault(document, document) for document in question.documents))
        for question in questions
    ]


def iter_questions(
    path: str | Path,
    *,
    candidates: Candidates = "required",
    columns: Mapping[str, str] = AS_NAMED,
    bad: Bad = refuse,
    watch: Watch | None = None,
) -> Iterator[Question]:
    """`read_questions` as a stream: one question in memory at a time. `bad` and `watch` are those of `dro_rl.rows`."""
    path = Path(path)
    found = question_rows(path, columns, bad=bad, watch=watch)
    yield from some_questions(parse_questions(found, candidates=candidates, bad=bad), path)


def some_questions(questions: Iterator[Question], source: str | Path) -> Iterator[Question]:
    """The questions; an `InputError` where there are none."""
    empty = True
    for question in questions:
        empty = False
        yield question
    if empty:
        raise InputError(
            str(source), Phrase("no questions"), "a question file has at least one line", "Check the file."
        )


def question_rows(
    path: Path, columns: Mapping[str, str] = AS_NAMED, *, bad: Bad = refuse, watch: Watch | None = None
) -> Rows:
    """The rows of a question file under the names of fields, whatever file it is."""
    found = rows(path, bad=bad, watch=watch, wanted=lambda name: is_field(name, columns))
    if suffix(path) in TABLES:
        named = with_names(found, (columns.get("question", "question"),), bad=bad)
        return ((place, _with_lists(row)) for place, row in renamed(named, columns))
    return renamed(found, columns)


def is_field(column: str, columns: Mapping[str, str] = AS_NAMED) -> bool:
    """Whether a column is a field of questions, or is meant to be one."""
    return column in FIELDS or column in columns.values() or _meant(column, OPTIONAL_FIELDS) is not None


def _with_lists(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a table: what is no list, among the fields that are, is the only item of one."""
    for field in LISTS:
        value = row.get(field)
        if isinstance(value, str):
            found = spelled(value)
            alone = found is None and field != "documents" and not value.lstrip().startswith("[")
            row[field] = [value] if alone else value if found is None else found
    return row


def renamed(rows: Rows, columns: Mapping[str, str]) -> Rows:
    """Rows with their columns under the names of fields: `{"question": "query"}` makes a question of a query.

    Raises:
        InputError: a name is of no field, or no row has the column.
    """
    for field, column in columns.items():
        if field not in FIELDS or not isinstance(column, str) or not column:
            raise InputError(
                f"dataset_columns: {field}",
                column,
                f"this is the name of a column, for one of {', '.join(FIELDS)}",
                "Write {question: query}, for a column query that holds the questions.",
            )
    missing = dict(columns)
    for place, row in rows:
        if isinstance(row, Mapping):
            for field in [field for field, column in missing.items() if column in row]:
                del missing[field]
            kept = {name: value for name, value in row.items() if name not in columns}
            row = kept | {field: _alone(field, row.get(column)) for field, column in columns.items()}
        yield place, row
    for field, column in missing.items():
        raise InputError(
            f"dataset_columns: {field}", column, "the data has such a column, and no row does", "Correct the name."
        )


def _alone(field: str, value: Any) -> Any:
    """A text in a column that somebody names for a list spells that list, or is the only item of one."""
    if not isinstance(value, str) or field not in ("answers", "supporting", "missed"):
        return value
    found = spelled(value)
    return found if isinstance(found, list) else [value]


def parse_questions(rows: Rows, *, candidates: Candidates = "required", bad: Bad = refuse) -> Iterator[Question]:
    """Turn decoded rows into questions, checking every field, and that no id stands twice."""
    ids = UniqueIds()
    for place, row in rows:
        try:
            question = parse_question(row, place, candidates)
            ids.add(question.id, place)
        except InputError as error:
            bad(error)
        else:
            yield question


class UniqueIds:
    """The question ids met so far, each with its place."""

    def __init__(self) -> None:
        self._first: dict[str, str] = {}

    def add(self, identifier: str, place: str) -> None:
        """Take note of an id; an id that stands twice is an `InputError`."""
        first = self._first.setdefault(identifier, place)
        if first is not place:
            raise InputError(
                f"{place}: id",
                identifier,
                "ids are unique",
                f"Remove or rename it, or that of {first.rpartition(': ')[2]}.",
            )


def write_questions(path: str | Path, questions: Iterable[Question]) -> int:
    """Write a question file (`.jsonl` or `.jsonl.gz`), whole, from a stream. Equal questions give equal bytes.

    Returns:
        How many were written.
    """
    rows = (
        {name: value for name, value in asdict(question).items() if value or name in REQUIRED_FIELDS}
        for question in questions
    )
    return write_json_lines(Path(path), rows)


def parse_question(row: Any, place: str, candidates: Candidates = "required") -> Question:
    """Turn one decoded row into a `Question`, checking every field. `place` names the row in errors."""
    if not isinstance(row, dict):
        raise InputError(place, row, "each line is a JSON object", "Write one object a line.")
    optional = candidates == "optional"
    for field in REQUIRED_FIELDS:
        if row.get(field) is None and not (optional and field == "documents"):
            raise InputError(
                f"{place}: {field}", Phrase("missing"), f"a question has {', '.join(REQUIRED_FIELDS)}", _add(field)
            )
    _check_names(row, OPTIONAL_FIELDS, place)
    identifier = check_id(row["id"], f"{place}: id")
    place = f"{place} (id {identifier})"
    documents = () if optional and not row.get("documents") else _documents(row["documents"], place)
    answers = _texts(row["answers"], f"{place}: answers")
    if not answers:
        raise InputError(
            f"{place}: answers",
            Phrase("empty list"),
            "a question has at least one answer",
            "Add one, or drop the line.",
        )
    supporting = row.get("supporting")
    supporting = () if supporting is None else _ids(supporting, f"{place}: supporting")
    known = {document.id for document in documents}
    for support in supporting:
        if documents and support not in known:
            raise InputError(
                f"{place}: supporting",
                support,
                "supporting ids are ids of this question's documents",
                "Add the document to the candidates, or drop the id.",
            )
    missed = () if row.get("missed") is None else _ids(row["missed"], f"{place}: missed")
    for gold in missed:
        if gold in known:
            raise InputError(
                f"{place}: missed",
                gold,
                "what was missed is not among the documents",
                "Name it in supporting instead.",
            )
    return Question(
        id=identifier,
        question=check_text(row["question"], f"{place}: question"),
        answers=answers,
        documents=documents,
        supporting=supporting,
        dataset=_label(row.get("dataset"), f"{place}: dataset"),
        type=_label(row.get("type"), f"{place}: type"),
        missed=missed,
    )


def _documents(value: Any, place: str) -> tuple[Document, ...]:
    if not isinstance(value, list | tuple):
        raise InputError(f"{place}: documents", value, "documents is a list of {id, title, text}", "Write a list.")
    if not value:
        raise InputError(
            f"{place}: documents",
            Phrase("empty list"),
            "a question has candidates to select from",
            "Retrieve some first.",
        )
    documents: list[Document] = []
    seen: set[str] = set()
    for number, item in enumerate(value, start=1):
        where = f"{place}: documents[{number}]"
        if not isinstance(item, dict):
            raise InputError(where, item, "a document is an object with id, title and text", "Write an object.")
        for field in ("id", "text"):
            if item.get(field) is None:
                raise InputError(f"{where}.{field}", Phrase("missing"), "a document has id and text", "Add the field.")
        _check_names(item, ("title",), where)
        title = item.get("title")
        if title is not None and not isinstance(title, str):
            raise InputError(f"{where}.title", title, "a title is text, empty when there is none", "Write a string.")
        check_unicode(title or "", f"{where}.title")
        document = Document(check_id(item["id"], f"{where}.id"), title or "", check_text(item["text"], f"{where}.text"))
        if document.id in seen:
            raise InputError(
                f"{where}.id", document.id, "a document stands once among the candidates", "Drop the second one."
            )
        seen.add(document.id)
        documents.append(document)
    return tuple(documents)


def check_id(value: Any, place: str) -> str:
    """The value, if it is an id: text, or a whole number, which is read as text; else an `InputError` at `place`."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return check_text(value, place)


def check_text(value: Any, place: str) -> str:
    """The value, if it is text, Unicode, and not blank; else an `InputError` at `place`."""
    if not isinstance(value, str):
        raise InputError(place, value, "this is text", "Write a JSON string.")
    if not value.strip():
        raise InputError(place, value, "this is not empty", "Fill it in, or drop the line.")
    check_unicode(value, place)
    return value


def check_unicode(value: str, place: str) -> None:
    """Half of a surrogate pair, which JSON can spell, can be neither tokenized nor logged."""
    if value.isascii():
        return
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            place, value, f"this is Unicode text, and character {error.start + 1} is not", "Remove the character."
        ) from None


def _texts(value: Any, place: str, check: Callable[[Any, str], str] = check_text) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise InputError(place, value, "this is a list of strings", "Write a JSON list, also for a single one.")
    return tuple(check(item, f"{place}[{n}]") for n, item in enumerate(value, start=1))


def _ids(value: Any, place: str) -> tuple[str, ...]:
    return _texts(value, place, check_id)


def _label(value: Any, place: str) -> str:
    """The name of a dataset or of a type, which may be missing or blank, or a number (of hops)."""
    return "" if value is None or value == "" else check_id(value, place)


def _add(field: str) -> str:
    other = f"name its column, dataset_columns: {{{field}: …}}"
    if field == "id":
        return f"Add the field, {other}, or let dro-rl data prepare number the rows."
    return f"Add the field, or {other}."


def _check_names(row: Mapping[Any, Any], fields: tuple[str, ...], place: str) -> None:
    """Refuse the misspelt name of a field that need not be there: what it says would be lost without a word."""
    for name in row:
        field = None if name in FIELDS or name == "title" else _meant(name, fields)
        if field is not None and (row.get(field) is None or str(name).casefold() == field):
            raise InputError(
                f"{place}: {name}",
                row[name],
                f"there is no such field, and {field} is much like it",
                f"Name it {field}, or something else.",
            )


@lru_cache(maxsize=1024)
def _meant(name: str, fields: tuple[str, ...]) -> str | None:
    """The field whose name an unknown one is a misspelling of."""
    plain = re.sub(r"[\W_]", "", str(name).casefold())
    close = difflib.get_close_matches(plain, fields, n=1, cutoff=0.8)
    return close[0] if close else None
