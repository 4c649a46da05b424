"""What is checked of prompts and answers once the tokenizers are there, and before any weights are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from transformers import AutoConfig

from dro_rl.errors import InputError
from dro_rl.models.positions import positions_of
from dro_rl.prompts import Prompter, asks_for
from dro_rl.prompts.lengths import check_answers
from dro_rl.prompts.templates import PLACE as TEMPLATE
from dro_rl.recipe import Recipe
from dro_rl.records import Document, Question
from dro_rl.roles import Role
from dro_rl.selection import SelectionSpec, format_selection, parse_selection
from dro_rl.selection.windows import Windows


def check_prompts(recipe: Recipe, questions: Sequence[Question], prompters: Mapping[Role, Prompter]) -> None:
    """Refuse a template that does not render, and what would not fit: a question that is longer than
    `max_prompt_length` with every document cut away, a prompt or an answer longer than the model has positions for, a
    constraint that the selector's tokenizer cannot follow."""
    run, spec, windows = recipe.run, recipe.training.spec, recipe.training.windows
    for role, prompter in prompters.items():
        try:
            _check_role_prompts(questions, role, prompter, spec, windows)
        except InputError as error:
            if error.place != TEMPLATE:
                raise
            raise InputError(f"{role}_prompt_template", error.value, error.rule, error.fix) from None
        if role not in recipe.training.roles:
            continue  # where it is elsewhere, its endpoint says what it holds
        asked = run.of(role)
        config = AutoConfig.from_pretrained(
            asked.model, revision=asked.revision, trust_remote_code=run.trust_remote_code
        )
        positions, what = positions_of(config)
        if positions is not None:
            check_lengths(recipe, questions, role, prompter, positions, what)
    check_completions(recipe, questions, prompters["selector"])


def check_lengths(
    recipe: Recipe, questions: Sequence[Question], role: Role, prompter: Prompter, positions: int, what: str
) -> None:
    """Refuse gold answers, and prompts that nothing cuts, that are longer than the model has positions for.

    A token is at least one byte, so only what has more bytes than there is room for is tokenized.
    """
    training = recipe.training
    longest, selects = training.max_prompt_length, role == "selector"
    written = training.max_completion_length if selects else training.max_answer_length
    if not selects:
        written = max(written, check_answers(questions, prompter, training.answer_aliases, positions, what))
    if longest is not None:
        return
    room, spec, windows = positions - written, training.spec, training.windows
    overhead = _overhead(questions, role, prompter, spec, windows)
    for question in questions:
        numbers = _largest(question, _bytes, _shown_at_once(question, windows) if selects else spec.most)
        size = sum(_bytes(question.documents[number - 1]) for number in numbers)
        if size + 2 * len(question.question.encode()) + overhead <= room:
            continue
        if selects:
            prompt = prompter.selector_prompt(question.shown(numbers), spec.most, spec.least)
        else:
            prompt = prompter.generator_prompt(question, numbers)
        if len(prompt.ids) > room:
            raise InputError(
                "max_prompt_length",
                None,
                f"the prompt of question {question.id} has {len(prompt.ids)} tokens, and with {written} to write the "
                f"{role} has {positions} {what}",
                f"Use {room}: documents are cut evenly to fit." if room > 0 else "Use another model.",
            )


def _bytes(document: Document) -> int:
    """More than the tokens of a document with its number."""
    return len(document.title.encode()) + len(document.text.encode()) + 16


def _title(document: Document) -> int:
    """More than the tokens of a document that is cut to its title, without its number."""
    return len(document.title.encode()) + 8


def _shown_at_once(question: Question, windows: Windows | None) -> int:
    """Candidates that the selector is shown at a time."""
    return len(question.documents) if windows is None else min(windows.size, len(question.documents))


def _largest(question: Question, size: Callable[[Document], int], count: int) -> list[int]:
    """Numbers of so many of the question's documents, the largest first; of all of them in their order."""
    numbers = list(range(1, len(question.documents) + 1))
    if count >= len(numbers):
        return numbers
    return sorted(numbers, key=lambda number: -size(question.documents[number - 1]))[:count]


def _check_role_prompts(
    questions: Sequence[Question], role: Role, prompter: Prompter, spec: SelectionSpec, windows: Windows | None
) -> None:
    """A token is at least one byte, so only the first question and those with more bytes than tokens are rendered."""
    overhead = _overhead(questions, role, prompter, spec, windows)
    limit = prompter.max_prompt_length
    for place, question in enumerate(questions):
        numbers = _largest(question, _title, _shown_at_once(question, windows) if role == "selector" else spec.most)
        titles = sum(_title(question.documents[number - 1]) for number in numbers)
        if place == 0 or (limit is not None and 2 * len(question.question.encode()) + titles + overhead > limit):
            if role == "selector":
                prompter.selector_prompt(question.shown(numbers), spec.most, spec.least)
            else:
                prompter.generator_prompt(question, numbers)


def _overhead(
    questions: Sequence[Question], role: Role, prompter: Prompter, spec: SelectionSpec, windows: Windows | None
) -> int:
    """Bytes of a prompt without its question and documents: no fewer than its tokens."""
    example = format_selection(range(spec.most, 0, -1))
    variables = {**asks_for(spec.most, spec.least), "example": example} if role == "selector" else {}
    count = spec.most
    if role == "selector":
        count = max((_shown_at_once(question, windows) for question in questions), default=0)
    return len(prompter.render("", [Document("x", "x", "x")] * count, **variables).encode())


def check_completions(recipe: Recipe, questions: Sequence[Question], prompter: Prompter) -> None:
    """Refuse more candidates at a time than the selector's tokenizer has numbers for, a `max_completion_length` that no
    selection fits, or not the longest that a constraint may write, and a constraint that the tokenizer cannot
    follow."""
    training, spec, k = recipe.training, recipe.training.spec, recipe.training.spec.most
    counts = sorted({_shown_at_once(question, training.windows) for question in questions})
    for number in range(1, counts[-1] + 1):
        if parse_selection(prompter.decode(prompter.completion(format_selection([number]))), number, 1).problems:
            raise InputError(
                "window_size",
                training.window_size,
                f"the selector is shown up to {counts[-1]} candidates at a time, and its tokenizer cannot write "
                f"{format_selection([number])}",
                f"Use {number - 1} or less." if number > 2 else "Use another tokenizer.",
            )
    shortest = min(len(prompter.completion(format_selection(order))) for order in (range(1, k + 1), range(k, 0, -1)))
    if shortest > training.max_completion_length:
        raise InputError(
            "max_completion_length",
            training.max_completion_length,
            f"a selection of {k} documents fits, which takes {shortest} tokens or more",
            f"Use {2 * shortest}: numbers of two digits take more.",
        )
    if not training.constrain_selection:
        return
    for count in counts:
        longest = prompter.constraint(count, k, spec.least).verify()
        if longest > training.max_completion_length:
            raise InputError(
                "max_completion_length",
                training.max_completion_length,
                f"constrain_selection writes all {k} of {count} numbers, in up to {longest} tokens",
                f"Use {longest} or more.",
            )
