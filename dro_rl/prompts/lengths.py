"""Whether gold answers, which are scored whole, fit behind their prompts. Knows of tokens, not of models."""

from __future__ import annotations

from collections.abc import Sequence

from dro_rl.errors import InputError
from dro_rl.prompts import Prompter
from dro_rl.records import Question

MEASURED = 100
"""Answers that are tokenized whatever their size, the longest first."""


def check_answers(questions: Sequence[Question], prompter: Prompter, aliases: str, positions: int, what: str) -> int:
    """Refuse an answer that does not fit into the positions left by `max_prompt_length`.

    A token is at least one byte, so only what has more bytes than there is room for is tokenized.

    Args:
        questions: with their answers.
        prompter: the generator's.
        aliases: which of the answers are scored, as in `answer_aliases`.
        positions: of the model, for prompt and answer together.
        what: what these positions are, for the message.

    Returns:
        Tokens of the longest answer that was looked at, its end included.
    """
    longest = prompter.max_prompt_length or 0
    answers = [
        (len(answer.encode()), answer, question.id)
        for question in questions
        for answer in (question.answers[:1] if aliases == "first" else question.answers)
    ]
    answers.sort(key=lambda each: -each[0])
    tokens, answered = 0, ""
    for place, (size, answer, identifier) in enumerate(answers):
        if place < MEASURED or size + 2 > positions - longest:
            tokens, answered = max((tokens, answered), (len(prompter.completion(answer)), identifier))
    if tokens + longest > positions:
        raise InputError(
            "max_prompt_length",
            prompter.max_prompt_length,
            f"with the {tokens} tokens of the answer of question {answered} this is at most the generator's "
            f"{positions} {what}",
            f"{f'Use {positions - tokens}, or drop' if tokens < positions else 'Drop'} the question.",
        )
    return tokens
