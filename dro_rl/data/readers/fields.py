"""What readers share: taking fields out of a row with a check each, and making documents of passages."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dro_rl.errors import InputError, Phrase
from dro_rl.records import Document, check_id, check_text, check_unicode
from dro_rl.rows.spelled import spelled


@dataclass
class Source:
    """What a reader knows beside the rows.

    Args:
        dataset: name of the dataset, for questions that do not say theirs.
        split: name of the split; part of the ids that a reader has to make up.
        aliases: further accepted answers by the id of the answer (2WikiMultihopQA).
        answers: accepted answers by the id of the question, for formats without any (rank_llm).
        left_out: rows that are no questions for this purpose, counted by reason.
        answer_ids: rows that name an id of their answer, by which its aliases are known.
    """

    dataset: str
    split: str
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    answers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    answer_ids: int = 0


class Fields:
    """One JSON object of a released file. Its fields are taken by name; an `InputError` names one that is not as
    it should be.
    """

    def __init__(self, value: Any, place: str) -> None:
        value = unpacked(value)
        if not isinstance(value, Mapping):
            raise InputError(place, value, "this is a JSON object", "Check the file's format.")
        self.value, self.place = value, place

    @property
    def number(self) -> int:
        """The row's number in its file."""
        return int(self.place.rpartition(" ")[2])

    def __contains__(self, name: str) -> bool:
        return self.value.get(name) is not None

    def get(self, *names: str) -> tuple[str, Any]:
        """The first of the names that is there, and its value."""
        for name in names:
            if name in self:
                return name, self.value[name]
        raise InputError(
            f"{self.place}: {names[0]}", Phrase("missing"), "every row has this field", "Check the file's format."
        )

    def text(self, *names: str) -> str:
        """A text that is not blank."""
        name, value = self.get(*names)
        return check_text(value, f"{self.place}: {name}")

    def identifier(self, *names: str) -> str:
        """An id, written as text or as a number."""
        name, value = self.get(*names)
        return check_id(value, f"{self.place}: {name}")

    def title(self, name: str = "title") -> str:
        """A title: text that may be missing or blank."""
        value = self.value.get(name)
        return _title("" if value is None else value, f"{self.place}: {name}")

    def items(self, *names: str) -> list[Any]:
        """A list."""
        name, value = self.get(*names)
        value = unpacked(value)
        if not isinstance(value, list | tuple):
            raise InputError(f"{self.place}: {name}", value, "this is a list", "Check the file's format.")
        return list(value)

    def texts(self, *names: str) -> tuple[str, ...]:
        """A list of texts, none blank."""
        name = self.get(*names)[0]
        return tuple(check_text(item, f"{self.place}: {name}[{n}]") for n, item in enumerate(self.items(name), 1))

    def within(self, name: str) -> Fields:
        """An object within this one."""
        return Fields(self.get(name)[1], f"{self.place}: {name}")

    def objects(self, *names: str) -> Iterator[Fields]:
        """A list of objects, or the columns of one, as hubs keep it."""
        name, value = self.get(*names)
        if isinstance(columns := unpacked(value), Mapping):
            return iter(self._rows_of(columns, name))
        return (Fields(item, f"{self.place}: {name}[{n}]") for n, item in enumerate(self.items(name), 1))

    def _rows_of(self, columns: Mapping[str, Any], name: str) -> list[Fields]:
        lists = {key: Fields(columns, f"{self.place}: {name}").items(key) for key in columns}
        if len({len(values) for values in lists.values()}) > 1:
            sizes = ", ".join(f"{key} {len(values)}" for key, values in lists.items())
            raise InputError(
                f"{self.place}: {name}", Phrase(sizes), "columns are of one length", "Check the file's format."
            )
        rows = (dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True))
        return [Fields(row, f"{self.place}: {name}[{n}]") for n, row in enumerate(rows, 1)]

    def answers(self, *names: str) -> tuple[str, ...]:
        """Accepted answers: a list of texts with at least one, each kept once."""
        name = self.get(*names)[0]
        found = unique(self.texts(name))
        if not found:
            raise InputError(
                f"{self.place}: {name}",
                Phrase("empty list"),
                "a question has at least one answer",
                "A split without answers cannot be used.",
            )
        return found


class Passage(NamedTuple):
    """A passage on its way to a document: its id, where the format has one, and whether it holds the evidence."""

    title: str
    text: str
    supporting: bool = False
    id: str = ""


def documents(passages: Iterable[Passage]) -> tuple[tuple[Document, ...], tuple[str, ...]]:
    """Candidates and the ids of the supporting ones. A passage that stands twice is kept once."""
    found: dict[str, Document] = {}
    supporting: dict[str, None] = {}
    for passage in passages:
        identifier = passage.id or document_id(passage.title, passage.text)
        found.setdefault(identifier, Document(identifier, passage.title, passage.text))
        if passage.supporting:
            supporting[identifier] = None
    return tuple(found.values()), tuple(supporting)


def document_id(title: str, text: str) -> str:
    """An id for a passage that came without one, the same wherever the passage stands."""
    return hashlib.sha1(f"{title}\n{text}".encode()).hexdigest()[:16]


def hash_order(question_id: str, found: Iterable[Document]) -> tuple[Document, ...]:
    """Documents in an order that says nothing, for formats that put the supporting ones first."""
    return tuple(sorted(found, key=lambda each: hashlib.sha1(f"{question_id}/{each.id}".encode()).digest()))


def unique(texts: Iterable[str]) -> tuple[str, ...]:
    """The texts in order, each once."""
    return tuple(dict.fromkeys(texts))


def unpacked(value: Any) -> Any:
    """A value, or the list or object that it spells: some mirrors keep JSON as text, also within JSON."""
    found = spelled(value) if isinstance(value, str) else None
    return value if found is None else found


def paragraph(value: Any, place: str) -> str:
    """Sentences as one text."""
    value = unpacked(value)
    if isinstance(value, str):
        return check_text(value, place)
    if not isinstance(value, list | tuple) or not all(isinstance(sentence, str) for sentence in value):
        raise InputError(place, value, "this is a list of sentences", "Check the file's format.")
    return check_text(" ".join(sentence.strip() for sentence in value if sentence.strip()), place)


def labelled_paragraphs(row: Fields) -> list[Passage]:
    """The paragraphs of `context`, of which those with a title of `supporting_facts` are supporting."""
    paragraphs = titled_paragraphs(row) if "context" in row else []
    facts = supporting_titles(row) if "supporting_facts" in row else set()
    if facts.isdisjoint(title for title, _ in paragraphs):
        facts = {*_unquoted(sorted(facts))}
    return [Passage(title, text, title in facts) for title, text in paragraphs]


def titled_paragraphs(row: Fields, name: str = "context") -> list[tuple[str, str]]:
    """Titles and texts of a context: pairs as released (`[[title, [sentence, …]], …]`), or objects or columns of
    `title` and `sentences`, as hubs keep it; each also as the text of its JSON.
    """
    context = unpacked(row.get(name)[1])
    if isinstance(context, Mapping):
        columns = row.within(name)
        titles, bodies = columns.items("title"), columns.items("sentences", "content")
        pairs: list[Any] = list(zip(titles, bodies, strict=False)) if len(titles) == len(bodies) else [None]
    else:
        pairs = [_pair(unpacked(item), f"{row.place}: {name}[{n}]") for n, item in enumerate(row.items(name), 1)]
    found = []
    for number, pair in enumerate(pairs, start=1):
        place = f"{row.place}: {name}[{number}]"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise InputError(place, pair, "this is a pair of title and sentences", "Check the file's format.")
        found.append((_title(pair[0], place), paragraph(pair[1], place)))
    titles = _unquoted([title for title, _ in found])
    return [(title, text) for title, (_, text) in zip(titles, found, strict=True)]


def supporting_titles(row: Fields, name: str = "supporting_facts") -> set[str]:
    """Titles of supporting facts: pairs as released (`[[title, sentence number], …]`), or objects or columns of
    `title` and `sent_id`, as hubs keep them; each also as the text of its JSON.
    """
    facts = unpacked(row.get(name)[1])
    if isinstance(facts, Mapping):
        return set(row.within(name).texts("title"))
    titles = set()
    for number, fact in enumerate(row.items(name), start=1):
        place = f"{row.place}: {name}[{number}]"
        fact = unpacked(fact)
        if isinstance(fact, Mapping):
            fact = [Fields(fact, place).get("title")[1]]
        if not isinstance(fact, list | tuple) or not fact:
            raise InputError(place, fact, "this is a pair of title and sentence number", "Check the file's format.")
        titles.add(check_text(fact[0], place))
    return titles


def _pair(item: Any, place: str) -> Any:
    if isinstance(item, Mapping):
        fields = Fields(item, place)
        return fields.get("title")[1], fields.get("sentences", "content")[1]
    return item


def _unquoted(titles: Sequence[str]) -> list[str]:
    """Titles that are JSON of titles, all of them, without their quotes: a title may begin and end with its own."""
    try:
        read = [json.loads(title) for title in titles if title.startswith('"')]
    except ValueError:
        read = []
    return read if len(read) == len(titles) and all(isinstance(title, str) for title in read) else list(titles)


def _title(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise InputError(place, value, "a title is text", "Check the file's format.")
    check_unicode(value, place)
    return value
