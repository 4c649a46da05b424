"""A corpus of a few passages, and what writes it."""

from __future__ import annotations

import json
from pathlib import Path

from dro_rl.records import Document, Question

PASSAGES = [
    Document("p1", "Herons", "The heron has a red lamp, and herons fish at night."),
    Document("p2", "Owls", "An owl has no lamp; owls hunt mice."),
    Document("p3", "Bridges", "The tin bridge is in Marl. Most bridges are of stone."),
    Document("p4", "", "Ines sold the boat to Omar, who bought a cart."),
    Document("p5", "Vey", "On Mount Vey grows blue grass, red grass and grass."),
    Document("p6", "Lamps", "Lamps are green or blue. A lamp of tin is a tin lamp."),
    Document("p7", "Boats", "Boats leak. A boat of tin sank at Marl."),
    Document("p8", "Grass", "Grass is green elsewhere."),
]

QUESTIONS = [
    Question("q1", "Which bird has a red lamp?", ("heron",), (), dataset="birds"),
    Question("q2", "Where is the tin bridge?", ("Marl",), (), dataset="birds"),
    Question("q3", "Who sold the boat?", ("Ines",), (), dataset="birds"),
]
GOLD = {"q1": ["p1"], "q2": ["p3"], "q3": ["p4", "p8"]}


def write_corpus(path: Path, passages: list[Document] = PASSAGES) -> Path:
    """Write passages as JSONL."""
    rows = [{"id": each.id, "title": each.title, "text": each.text} for each in passages]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_asked(path: Path, *, gold: bool = True, **changes: object) -> Path:
    """Write the questions without candidates, with their gold ids or without; `changes` go over the first row."""
    rows = []
    for question in QUESTIONS:
        row = {"id": question.id, "question": question.question, "answers": list(question.answers), "dataset": "birds"}
        rows.append(row | ({"supporting": GOLD[question.id]} if gold else {}))
    rows[0] |= changes
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
