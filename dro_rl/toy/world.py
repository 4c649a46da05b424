"""The toy world: a closed world of people and places, made by code. The whole method runs on it in minutes.

A document is what one source says of one relation: `register home_of mira oslo`. A question asks for an object
(`home_of mira ?`), or goes over one person to the next (`home_of friend_of mira ?`), and then the answer names the
person on the way too (`goran oslo`). Of what is asked first, several sources speak and contradict each other; there two
of the six tell the truth. No retriever and no relevance tells which: answers alone do. Of each person whom they name,
one source speaks, and nobody contradicts it. Facts are drawn afresh for every question, so an answer can be had from
the documents alone. Knows of records; of no model.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Sequence
from pathlib import Path
from random import Random
from typing import Literal, NamedTuple

from dro_rl.errors import InputError
from dro_rl.records import Document, Question

Split = Literal["train", "dev", "test"]

TOY_BASE: Path = Path(__file__).parent / "base"
"""Folder of the shipped tiny model and its tokenizer; `dro_rl.toy.pretrain` makes it."""

PEOPLE: tuple[str, ...] = tuple(
    """
    ada amir boris carla dana dario emil fay goran hugo ines ivan jana kira lars lena luca mira nadia nils
    olga otto quinn rosa sven tara ugo vera yuri zeno
    """.split()  # noqa: SIM905
)
PLACES: tuple[str, ...] = tuple(
    """
    accra athens basel bonn cairo delhi dublin essen graz havana izmir kyoto lagos lima malmo minsk nice
    oslo paris porto quito riga seoul tartu tunis turin ulm vilna york zadar
    """.split()  # noqa: SIM905
)
TO_PERSON: tuple[str, ...] = ("friend_of", "teacher_of", "boss_of", "sister_of")
TO_PLACE: tuple[str, ...] = ("home_of", "birthplace_of", "office_of", "school_of")
RELATIONS: tuple[str, ...] = TO_PERSON + TO_PLACE
TRUSTED: tuple[str, ...] = ("census", "register")
DOUBTFUL: tuple[str, ...] = ("advert", "diary", "novel", "rumour")
SOURCES: tuple[str, ...] = TRUSTED + DOUBTFUL
CLAIMS: int = 5
"""Sources that speak of what a one-hop question asks; one of them is trusted."""
FIRST_CLAIMS: int = 3
"""Sources that speak of the first hop of a two-hop question; of each person whom they name one speaks, whichever."""
MIN_DOCUMENTS, MAX_DOCUMENTS = 10, 100
NUMBERED = 20
"""Documents that the shipped model has numbers for: a longer list is shown to it window by window."""


class Fact(NamedTuple):
    """A relation, whose, and to whom or what."""

    relation: str
    subject: str
    object: str

    @property
    def text(self) -> str:
        return " ".join(self)


def fact_split(fact: Fact) -> Split:
    """The one split in which a fact may stand: three facts in five are train's, one dev's, one test's.

    Any subject and relation have objects in every split, six people or places in dev and in test.
    """
    place = objects_of(fact.relation).index(fact.object)
    bucket = (zlib.crc32(f"{fact.relation} {fact.subject}".encode()) + place) % 5
    return "test" if bucket == 4 else "dev" if bucket == 3 else "train"


def objects_of(relation: str) -> tuple[str, ...]:
    """The names that can be the object of a relation."""
    return PEOPLE if relation in TO_PERSON else PLACES


def draw_fact(rng: Random, split: Split, subject: str, relation: str, taken: Collection[str]) -> Fact:
    """A fact of the split about `subject`, its object neither the subject nor among the names `taken`."""
    while True:
        fact = Fact(relation, subject, rng.choice(objects_of(relation)))
        if fact.object != subject and fact.object not in taken and fact_split(fact) == split:
            return fact


class Claim(NamedTuple):
    """What one source says, and as text one document."""

    source: str
    fact: Fact

    @property
    def document(self) -> Document:
        return Document(id="-".join((self.source, *self.fact)), title=self.source, text=self.fact.text)


def draw_claims(
    rng: Random, split: Split, subject: str, relation: str, sources: Sequence[str], taken: Collection[str]
) -> list[Claim]:
    """What each of the sources says of one relation of `subject`: no two the same, and none of the names `taken`."""
    claims: list[Claim] = []
    for source in sources:
        said = {claim.fact.object for claim in claims}
        claims.append(Claim(source, draw_fact(rng, split, subject, relation, {*taken, *said})))
    return claims


def make_world(
    split: Split,
    size: int,
    seed: int = 0,
    num_documents: int = 12,
    two_hop_share: float = 0.5,
    same_subject: int = 1,
    same_relation: float = 0.5,
) -> list[Question]:
    """Make questions with candidates, answers and exact labels.

    Question i depends on the other arguments and on i alone, on any machine: a larger `size` continues the
    list that a smaller one begins. No fact stands in two splits. Candidates stand in the order in which a retriever
    by words finds them: those that share most words with the question first, and nothing else is in it.

    Args:
        split: which facts to draw from.
        size: how many questions.
        seed: another seed, other questions.
        num_documents: N, from 10 to 100. In more than twenty the people of the distractors come again.
        two_hop_share: chance that a question needs two documents, 0..1.
        same_subject: distractors that tell another relation of the person in the question.
        same_relation: share of the other distractors that tell a relation asked for of somebody else, 0..1.

    Raises:
        InputError: an argument out of its range.
    """
    if split not in ("train", "dev", "test"):
        raise InputError("split", split, "a split is train, dev or test", "Choose one of them.")
    if not MIN_DOCUMENTS <= num_documents <= MAX_DOCUMENTS:
        rule = f"the toy world has {MIN_DOCUMENTS} to {MAX_DOCUMENTS} candidates"
        raise InputError("num_documents", num_documents, rule, "Choose a number within.")
    if not 0 <= same_subject <= min(num_documents - MIN_DOCUMENTS + 1, len(RELATIONS) - 2):
        rule = "there is room for the claims needed, and a relation for each"
        raise InputError("same_subject", same_subject, rule, "Ask for fewer.")
    return [
        _make_question(split, seed, index, num_documents, two_hop_share, same_subject, same_relation)
        for index in range(size)
    ]


def _make_question(
    split: Split,
    seed: int,
    index: int,
    num_documents: int,
    two_hop_share: float,
    same_subject: int,
    same_relation: float,
) -> Question:
    # A string seeds through SHA-512: the same on any machine and under any PYTHONHASHSEED.
    rng = Random(f"toy/{split}/{seed}/{index}")
    two_hop = rng.random() < two_hop_share
    people = rng.sample(PEOPLE, len(PEOPLE))
    subject = people.pop()
    if two_hop:
        asked = [rng.choice(TO_PERSON), rng.choice(TO_PLACE)]
        first = draw_claims(rng, split, subject, asked[0], _sources(rng, FIRST_CLAIMS), ())
        second: list[Claim] = []
        for claim in first:
            taken = [known.fact.object for known in second]
            second += draw_claims(rng, split, claim.fact.object, asked[1], [rng.choice(SOURCES)], taken)
        candidates, needed = [*first, *second], [first[0], second[0]]
    else:
        asked = [rng.choice(RELATIONS)]
        candidates = draw_claims(rng, split, subject, asked[0], _sources(rng, CLAIMS), ())
        needed = candidates[:1]
    answer = needed[-1].fact.object
    named = {subject, *(claim.fact.object for claim in candidates)}
    others = [name for name in people if name not in named]
    again = list(others)
    for relation in rng.sample([relation for relation in RELATIONS if relation not in asked], same_subject):
        candidates.append(Claim(rng.choice(SOURCES), draw_fact(rng, split, subject, relation, {subject, answer})))
    while len(candidates) < num_documents:
        relation = rng.choice(asked if rng.random() < same_relation else RELATIONS)
        others = others or list(again)
        fact = draw_fact(rng, split, others.pop(), relation, {subject, answer})
        claim = Claim(rng.choice(SOURCES), fact)
        if claim not in candidates:
            candidates.append(claim)
    words = {*asked, subject}
    rng.shuffle(candidates)
    candidates.sort(key=lambda claim: -len(words.intersection(claim.fact)))
    return Question(
        id=f"toy-{split}-{seed}-{index}",
        question=" ".join([*reversed(asked), subject, "?"]),
        answers=(" ".join(claim.fact.object for claim in needed),),
        documents=tuple(claim.document for claim in candidates),
        supporting=tuple(claim.document.id for claim in needed),
        dataset="toy",
        type="2-hop" if two_hop else "1-hop",
    )


def _sources(rng: Random, count: int) -> list[str]:
    """So many sources that contradict each other: the first is trusted, the others are not."""
    return [rng.choice(TRUSTED), *rng.sample(DOUBTFUL, count - 1)]
