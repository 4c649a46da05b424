"""What readers share: taking fields out of a row with a check each, and making documents of passages."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dro_rl.errors import InputError, Phrase
from dro_rl.records import Document, check_text, check_unicode


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
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        return check_text(value, f"{self.place}: {name}")

    def title(self, name: str = "title") -> str:
        """A title: text that may be missing or blank."""
        value = self.value.get(name)
        return _title("" if value is None else value, f"{self.place}: {name}")

    def items(self, *names: str) -> list[Any]:
        """A list."""
        name, value = self.get(*names)
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
        """A list of objects."""
        name = self.get(*names)[0]
        return (Fields(item, f"{self.place}: {name}[{n}]") for n, item in enumerate(self.items(name), 1))

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


def paragraph(value: Any, place: str) -> str:
    """Sentences as one text."""
    if isinstance(value, str):
        return check_text(value, place)
    if not isinstance(value, list | tuple) or not all(isinstance(sentence, str) for sentence in value):
        raise InputError(place, value, "this is a list of sentences", "Check the file's format.")
    return check_text(" ".join(sentence.strip() for sentence in value if sentence.strip()), place)


def titled_paragraphs(row: Fields, name: str = "context") -> Iterator[tuple[str, str]]:
    """Titles and texts of a context, as released (`[[title, [sentence, …]], …]`) or as hubs keep it (columns)."""
    context = row.get(name)[1]
    if isinstance(context, Mapping):
        columns = row.within(name)
        titles, bodies = columns.items("title"), columns.items("sentences", "content")
        pairs: list[Any] = list(zip(titles, bodies, strict=False)) if len(titles) == len(bodies) else [None]
    else:
        pairs = row.items(name)
    for number, pair in enumerate(pairs, start=1):
        place = f"{row.place}: {name}[{number}]"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise InputError(place, pair, "this is a pair of title and sentences", "Check the file's format.")
        yield _title(pair[0], place), paragraph(pair[1], place)


def supporting_titles(row: Fields, name: str = "supporting_facts") -> set[str]:
    """Titles of supporting facts, as released (`[[title, sentence number], …]`) or as hubs keep them (columns)."""
    facts = row.get(name)[1]
    if isinstance(facts, Mapping):
        return set(row.within(name).texts("title"))
    titles = set()
    for number, fact in enumerate(row.items(name), start=1):
        place = f"{row.place}: {name}[{number}]"
        if not isinstance(fact, list | tuple) or not fact:
            raise InputError(place, fact, "this is a pair of title and sentence number", "Check the file's format.")
        titles.add(check_text(fact[0], place))
    return titles


def _title(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise InputError(place, value, "a title is text", "Check the file's format.")
    check_unicode(value, place)
    return value
