"""What a warm-up shows a model: prompts, and the completions to imitate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random

from dro_rl.config import DROConfig
from dro_rl.errors import InputError
from dro_rl.keys.run import RunConfig
from dro_rl.prompts import Prompter
from dro_rl.records import Question, check_id
from dro_rl.rows.strict_json import json_lines
from dro_rl.selection import SelectionSpec, format_selection
from dro_rl.selection.windows import Slide

Pair = tuple[tuple[int, ...], tuple[int, ...]]
"""Prompt ids and completion ids."""


def selector_examples(
    questions: Sequence[Question], prompter: Prompter, run: RunConfig, training: DROConfig
) -> Iterator[Pair]:
    """Selections to imitate: K numbers in the order that `warmup_selector_order` says.

    Where the selector is to decide how many, it imitates as many as are labelled, a number by chance in an order by
    chance, and all K of any other order, which says nothing of how many suffice. A list that is shown window by window
    is an example for each, as who selects in that order goes through them.
    """
    order, spec = selection_order(run, training.seed), training.spec
    for question in questions:
        ranks = {number: rank for rank, number in enumerate(order(question))}
        slide = Slide.begin(training.windows, len(question.documents))
        while True:
            shown = question.shown(slide.shown)
            numbers = slide.shown or range(1, len(question.documents) + 1)
            count = spec.most
            if run.warmup_selector_order == "random":
                count = count_by_chance(spec, training.seed, question)
            elif run.warmup_selector_order == "labels" and shown.supporting_numbers:
                count = min(max(len(shown.supporting_numbers), spec.least), spec.most)
            picked = sorted(numbers, key=ranks.__getitem__)[:count]
            selection = format_selection([numbers.index(number) + 1 for number in picked])
            yield prompter.selector_prompt(shown, spec.most, spec.least).ids, prompter.completion(selection)
            if slide.last:
                break
            slide = slide.after(picked)


def count_by_chance(spec: SelectionSpec, seed: int, question: Question) -> int:
    """How many documents, where it is left to chance."""
    return Random(f"{seed}/count/{question.id}").randint(spec.least, spec.most)


def selection_order(run: RunConfig, seed: int) -> Callable[[Question], list[int]]:
    """How a question's candidates are ordered for imitation, best first, as document numbers."""

    def retriever(question: Question) -> list[int]:
        return list(range(1, len(question.documents) + 1))

    def labels(question: Question) -> list[int]:
        supporting = question.supporting_numbers
        return [*supporting, *(n for n in retriever(question) if n not in supporting)]

    def chance(question: Question) -> list[int]:
        numbers = retriever(question)
        Random(f"{seed}/order/{question.id}").shuffle(numbers)
        return numbers

    if run.warmup_selector_order == "ranking":
        return read_ranking(Path(str(run.warmup_selector_ranking)))
    return {"labels": labels, "retriever": retriever, "random": chance}[run.warmup_selector_order]


def read_ranking(path: Path) -> Callable[[Question], list[int]]:
    """A ranking file: JSONL with {id, ranking: [document ids, best first]}. Candidates it leaves out come last."""
    if not path.is_file():
        raise InputError("warmup_selector_ranking", str(path), "the file exists", "Check the path.")
    ranking: dict[str, list[str]] = {}
    for place, row in json_lines(path):
        if not isinstance(row, dict) or not isinstance(row.get("ranking"), list):
            raise InputError(place, row, "each line is {id, ranking: [document ids]}", "Correct it.")
        ranking[check_id(row.get("id"), f"{place}: id")] = [
            check_id(identifier, f"{place}: ranking[{n}]") for n, identifier in enumerate(row["ranking"], start=1)
        ]

    def order(question: Question) -> list[int]:
        if question.id not in ranking:
            raise InputError(str(path), question.id, "every training question has a ranking", "Add its line.")
        places = {identifier: place for place, identifier in enumerate(ranking[question.id])}
        if not any(document.id in places for document in question.documents):
            raise InputError(
                f"{path}: id {question.id}",
                ranking[question.id],
                "a ranking names candidates of its question, by document id",
                "Rank the documents of the question file.",
            )
        numbers = range(1, len(question.documents) + 1)
        return sorted(numbers, key=lambda n: places.get(question.documents[n - 1].id, len(places)))

    return order


def generator_examples(
    questions: Sequence[Question], prompter: Prompter, run: RunConfig, training: DROConfig
) -> Iterator[Pair]:
    """Answers from K documents, chosen as `warmup_generator_documents` says; chosen documents stand in random order.

    Where the selector is to decide how many, their number is left to chance, but for labelled ones, which all stay.
    """
    spec = training.spec
    for question in questions:
        k = count_by_chance(spec, training.seed, question)
        everything = range(1, len(question.documents) + 1)
        random = Random(f"{training.seed}/documents/{question.id}")
        supporting = list(question.supporting_numbers)[: spec.most]
        others = [number for number in everything if number not in supporting]
        random.shuffle(others)
        numbers = {
            "gold": supporting or list(everything)[:k],
            "retrieved": list(everything)[:k],
            "mixed": [*supporting, *others][: max(k, len(supporting))],
            "random": random.sample(everything, min(k, len(everything))),
        }[run.warmup_generator_documents]
        # Gold always first is a label leak: the generator would learn to read the first document only.
        if run.warmup_generator_documents != "retrieved":
            random.shuffle(numbers)
        yield prompter.generator_prompt(question, numbers).ids, prompter.completion(question.answers[0])
