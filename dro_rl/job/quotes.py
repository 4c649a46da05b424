"""A warm-up of the selector that needs no labels: to name the documents that words are quoted from.

A small language model has never bound a number to a text. It then selects at chance, and no weighing of rollouts gives
it what it lacks. Quotes teach it, from the documents alone: each conversation shows a question's candidates, and quotes
in place of the question, turn after turn. Half of them are runs of words, which can be found by copying; the others are
words from anywhere in a document, of which other documents have some too, as the words of a question are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import Random

from dro_rl.config import DROConfig
from dro_rl.errors import InputError
from dro_rl.job.examples import Pair, count_by_chance
from dro_rl.prompts import Prompter
from dro_rl.records import Document, Question
from dro_rl.selection import format_selection
from dro_rl.selection.windows import Slide

TURNS = 12
"""Quotes over one list of documents."""

LETTERS = 40
"""A run of words has as many, and the rest of its last word."""

SCATTERED = (4, 8)
"""The fewest and the most words from anywhere in a document."""

Quote = tuple[str, ...]
"""Words of a document: one run of them as it stands there, or some from anywhere in it, in any order."""

TRIES = 8
"""Draws of a quote, until one stands in one document alone."""

JOINED = " … "
"""Between quotes, where several documents are to be named."""


def quoted_examples(
    questions: Sequence[Question], prompter: Prompter, training: DROConfig, positions: int | None
) -> Iterator[tuple[Pair, ...]]:
    """One conversation a question, each of `TURNS` turns, or of fewer where the model has no more positions.

    A turn quotes as many documents as are to be selected, by chance, and the selection names them in that order. Only
    what a prompt shows of a document is quoted, and only words that no other one has all of. A question without enough
    of them is left out.

    Args:
        positions: tokens that the model has room for, `None` for any number.
    """
    for question in questions:
        if turns := tuple(_conversation(question, prompter, training, positions)):
            yield turns


def check_quotes(questions: Sequence[Question], prompter: Prompter, training: DROConfig) -> None:
    """Raise `InputError` where no question has enough documents to quote from."""
    if next(quoted_examples(questions, prompter, training, None), None) is None:
        raise InputError(
            "warmup_selector_order",
            "quotes",
            f"documents have words of their own, {training.spec.most} of a question's at least, and are not cut away",
            "Raise max_prompt_length, lower num_selected, or imitate another order.",
        )


def _conversation(question: Question, prompter: Prompter, training: DROConfig, positions: int | None) -> Iterator[Pair]:
    random = Random(f"{training.seed}/quotes/{question.id}")
    spec, window = training.spec, Slide.begin(training.windows, len(question.documents)).shown
    question = question.shown(window)
    shown, length = prompter.selector_prompt_and_shown(question, spec.most, spec.least)[1], 0
    first: tuple[int, ...] | None = None
    for turn in range(TURNS):
        count = count_by_chance(spec, training.seed, replace(question, id=f"{question.id}/{turn}"))
        for _ in range(TRIES):
            quotes = _quotes(shown, min(count, len(shown)), random)
            if not quotes:
                return
            asked = replace(question, question=JOINED.join(" ".join(quote) for _, quote in quotes))
            if turn:
                again = replace(asked, documents=tuple(shown))
                prompt = prompter.next_turn(prompter.selector_asks_again(again, spec.most, spec.least))
                break
            # Quotes in the question's place leave the documents more room, or less.
            made, shown = prompter.selector_prompt_and_shown(asked, spec.most, spec.least)
            prompt = made.ids
            if all(_holds(shown[number - 1], quote) for number, quote in quotes):
                first = prompt
                break
        if first is None or prompt is None:  # no quote is shown, or the chat template takes no second turn
            return
        completion = prompter.completion(format_selection([number for number, _ in quotes]))
        length += len(prompt) + len(completion)
        if turn and positions is not None and length > positions:
            return
        yield prompt, completion


def _quotes(documents: Sequence[Document], count: int, random: Random) -> list[tuple[int, Quote]]:
    """Numbers of so many documents, each with a quote; empty where too few have words of their own."""
    quotes: list[tuple[int, Quote]] = []
    for number in random.sample(range(1, len(documents) + 1), len(documents)):
        quote = _quote(documents, number, random)
        if quote:
            quotes.append((number, quote))
        if len(quotes) == count:
            return quotes
    return []


def _quote(documents: Sequence[Document], number: int, random: Random) -> Quote:
    """A quote of one document that no other has all of; empty where none was found."""
    for _ in range(TRIES):
        quote = random.choice((_run, _scattered))(documents[number - 1].text, random)
        if not quote or any(JOINED in words for words in quote):
            continue
        if [n for n, document in enumerate(documents, start=1) if _holds(document, quote)] == [number]:
            return quote
    return ()


def _holds(document: Document, quote: Quote) -> bool:
    """Whether a document has all words of a quote."""
    text = document.text.lower()
    return all(words.lower() in text for words in quote)


def _run(text: str, random: Random) -> Quote:
    """Words as they stand; none where a text has none."""
    starts = [match.start() for match in re.finditer(r"\w+", text)]
    starts = [start for start in starts if start + LETTERS <= len(text)] or starts[:1]
    if not starts:
        return ()
    start = random.choice(starts)
    end = start + LETTERS
    rest = re.match(r"\w*", text[end : end + LETTERS])
    return (text[start : end + (len(rest.group()) if rest else 0)].strip(),)


def _scattered(text: str, random: Random) -> Quote:
    """Some words in any order, in small letters; none where a text has too few."""
    words = sorted({word.lower()[:LETTERS] for word in re.findall(r"\w+", text)})
    fewest, most = SCATTERED
    if len(words) < fewest:
        return ()
    return tuple(random.sample(words, random.randint(fewest, min(most, len(words)))))
