"""Wizard of Wikipedia, as ParlAI released it: dialogues whose wizard speaks with passages of Wikipedia in sight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from dro_rl.data.readers.fields import Fields, Passage, Source, documents, paragraph
from dro_rl.errors import InputError
from dro_rl.records import Question, check_text

NOTHING_USED = "no_passages_used"


def wizard(row: Fields, source: Source) -> Iterator[Question]:
    """A dialogue of `train.json`, `valid_random_split.json` and their like: one question for each turn of the wizard.

    The question is the dialogue so far, an utterance a line, the oldest first; where the wizard opens, the topic. The
    answer is what the wizard said. Candidates are what the wizard saw: the topic's passage, then the passages
    retrieved for the two utterances before, each under its title. Supporting is the passage of the checked sentence;
    turns that used none have no label.
    """
    topic = row.text("chosen_topic")
    topic_passage = paragraph(row.items("chosen_topic_passage"), f"{row.place}: chosen_topic_passage")
    history: list[str] = []
    seen: list[list[tuple[str, str]]] = []
    for number, turn in enumerate(row.objects("dialog"), start=1):
        utterance = " ".join(turn.text("text").split())
        if "Wizard" in turn.text("speaker"):
            shown = [(topic, topic_passage), *(pair for passages in seen[-1:-3:-1] for pair in passages)]
            checked, sentence = _checked(turn)
            # The title that goes with a checked sentence is now and then of another passage than holds it.
            holds = [bool(sentence) and sentence in text for _, text in shown]
            titled = [held and checked == name for held, (name, _) in zip(holds, shown, strict=True)]
            marks = titled if any(titled) else holds
            found, supporting = documents(
                Passage(*each, supporting=mark) for each, mark in zip(shown, marks, strict=True)
            )
            yield Question(
                id=f"{source.dataset}-{source.split}-{row.number}-{number}",
                question="\n".join(history) or topic,
                answers=(utterance,),
                documents=found,
                supporting=supporting,
                dataset=source.dataset,
            )
        history.append(utterance)
        seen.append(list(_retrieved(turn)))


def _retrieved(turn: Fields) -> Iterator[tuple[str, str]]:
    """Titles and texts of `retrieved_passages`: objects of one title and its sentences each."""
    for passage in turn.objects("retrieved_passages"):
        for title, sentences in passage.value.items():
            yield title, paragraph(sentences, f"{passage.place}: {title}")


def _checked(turn: Fields) -> tuple[str, str]:
    """The title and the sentence that the wizard chose; blanks where none was used."""
    values = []
    for name in ("checked_passage", "checked_sentence"):
        chosen = turn.value.get(name) or {}
        if not isinstance(chosen, Mapping):
            raise InputError(f"{turn.place}: {name}", chosen, "this is an object", "Check the file's format.")
        values.append(check_text(next(iter(chosen.values())), f"{turn.place}: {name}") if chosen else "")
    title, sentence = values
    return ("", "") if NOTHING_USED in values else (title, sentence.strip())
