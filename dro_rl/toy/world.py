"""The toy world: a closed world of people and places, made by code. The whole method runs on it in minutes.

A document is one fact (`home_of mira oslo`: the home of Mira is Oslo). A question names one fact without its
object (`home_of mira ?`), or goes from one person to the next (`home_of friend_of mira ?`). Facts are drawn afresh
for every question, so an answer can be had from the documents alone. Knows of records; of no model.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection
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
    ada amir anna arno bela bina boris carla cleo dana dario edda elio emil esra fay finn gita goran
    hana hugo ida ines ivan jana joel juno kai kira lars lena lior luca maja marc mira nadia nils noor
    olga omar otto pia quinn rania remo rosa sami sven tara theo timo ugo uma vera wanda xena yara yuri
    zeno
    """.split()  # noqa: SIM905
)
PLACES: tuple[str, ...] = tuple(
    """
    accra aden athens bari basel bern bonn brno cairo cork dakar delhi doha dublin essen fez ghent graz
    hanoi havana hull izmir jena kyoto lagos leeds lima linz lodz lyon malmo miami minsk nice oslo padua
    paris perth porto quito riga rome salem seoul siena sofia tartu tokyo trier tunis turin turku ulm
    utah vaduz vilna wuhan york zadar zagreb
    """.split()  # noqa: SIM905
)
TO_PERSON: tuple[str, ...] = ("friend_of", "teacher_of", "boss_of", "sister_of")
TO_PLACE: tuple[str, ...] = ("home_of", "birthplace_of", "office_of", "school_of")
RELATIONS: tuple[str, ...] = TO_PERSON + TO_PLACE
MIN_DOCUMENTS, MAX_DOCUMENTS = 4, 20


class Fact(NamedTuple):
    """One fact, and as text one document."""

    relation: str
    subject: str
    object: str

    @property
    def text(self) -> str:
        return " ".join(self)


def fact_split(fact: Fact) -> Split:
    """The one split in which a fact may stand: eight facts in ten are train's, one dev's, one test's.

    Any subject and relation have objects in every split, six people or places in dev and in test.
    """
    place = objects_of(fact.relation).index(fact.object)
    bucket = (zlib.crc32(f"{fact.relation} {fact.subject}".encode()) + place) % 10
    return "test" if bucket == 9 else "dev" if bucket == 8 else "train"


def objects_of(relation: str) -> tuple[str, ...]:
    """The names that can be the object of a relation."""
    return PEOPLE if relation in TO_PERSON else PLACES


def draw_fact(rng: Random, split: Split, subject: str, relation: str, taken: Collection[str]) -> Fact:
    """A fact of the split about `subject`, its object neither the subject nor among the names `taken`."""
    while True:
        fact = Fact(relation, subject, rng.choice(objects_of(relation)))
        if fact.object != subject and fact.object not in taken and fact_split(fact) == split:
            return fact


def make_world(
    split: Split,
    size: int,
    seed: int = 0,
    num_documents: int = 10,
    two_hop_share: float = 0.2,
    same_subject: int = 1,
    same_relation: float = 0.5,
) -> list[Question]:
    """Make questions with candidates, answers and exact labels.

    Question i depends on the other arguments and on i alone, on any machine: a larger `size` continues the
    list that a smaller one begins. No fact stands in two splits. The order of the candidates says nothing.

    Args:
        split: which facts to draw from.
        size: how many questions.
        seed: another seed, other questions.
        num_documents: N, from 4 to 20.
        two_hop_share: chance that a question needs two documents, 0..1.
        same_subject: distractors that tell another fact of the person in the question.
        same_relation: share of the other distractors that tell the relation asked for of somebody else, 0..1.

    Raises:
        InputError: an argument out of its range.
    """
    if split not in ("train", "dev", "test"):
        raise InputError("split", split, "a split is train, dev or test", "Choose one of them.")
    if not MIN_DOCUMENTS <= num_documents <= MAX_DOCUMENTS:
        rule = f"the toy world has {MIN_DOCUMENTS} to {MAX_DOCUMENTS} candidates"
        raise InputError("num_documents", num_documents, rule, "Choose a number within.")
    if not 0 <= same_subject <= min(num_documents, len(RELATIONS)) - 2:
        rule = "there is room for the facts needed, and a relation for each"
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
        first = draw_fact(rng, split, subject, rng.choice(TO_PERSON), ())
        second = draw_fact(rng, split, first.object, rng.choice(TO_PLACE), ())
        needed = [first, second]
    else:
        needed = [draw_fact(rng, split, subject, rng.choice(RELATIONS), ())]
    asked = [fact.relation for fact in needed]
    taken = {subject, *(fact.object for fact in needed)}  # the way to the answer is told once
    others = [name for name in people if name not in taken]
    candidates = list(needed)
    for relation in rng.sample([relation for relation in RELATIONS if relation not in asked], same_subject):
        candidates.append(draw_fact(rng, split, subject, relation, taken))
    while len(candidates) < num_documents:
        relation = rng.choice(asked if rng.random() < same_relation else RELATIONS)
        candidates.append(draw_fact(rng, split, others.pop(), relation, taken))
    rng.shuffle(candidates)
    documents = tuple(Document(id="-".join(fact), title="", text=fact.text) for fact in candidates)
    return Question(
        id=f"toy-{split}-{seed}-{index}",
        question=" ".join([*reversed(asked), subject, "?"]),
        answers=(needed[-1].object,),
        documents=documents,
        supporting=tuple("-".join(fact) for fact in needed),
        dataset="toy",
        type="2-hop" if two_hop else "1-hop",
    )
