"""The warm-up that needs no labels: what is quoted, what is named for it, and how the turns stand together."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from training_world import questions as made
from training_world import save_model, world, write_questions

from dro_rl.errors import InputError
from dro_rl.job import preflight, quotes, warmup
from dro_rl.job.examples import Pair
from dro_rl.job.quotes import JOINED, TURNS, check_quotes, quoted_examples
from dro_rl.job.warmup import WarmUp, examples_of, warm_up
from dro_rl.models.loading import load_model
from dro_rl.prompts import Prompter
from dro_rl.recipe import Recipe, load_recipe
from dro_rl.records import Document, Question
from dro_rl.selection import parse_selection

WORDS = [
    "amber",
    "birch",
    "cedar",
    "delta",
    "ember",
    "fable",
    "grove",
    "haven",
    "inlet",
    "jewel",
    "knoll",
    "lemon",
    "maple",
]


def question(name: str = "q", documents: int = 4) -> Question:
    """Documents of forty words each, of which no two say the same."""
    texts = [" ".join(f"{word}{number}{place}" for place in range(3) for word in WORDS) for number in range(documents)]
    return Question(name, "which ?", ("x",), tuple(Document(f"d{n}", f"T{n}", text) for n, text in enumerate(texts)))


def recipe_with(folder: Path, **keys: Any) -> Recipe:
    world(folder)
    chosen = {"warmup": "selector", "warmup_selector_order": "quotes", "output_dir": str(folder / "run")}
    return load_recipe(folder / "recipe.yaml", chosen | keys)


def turns_of(prompter: Prompter, recipe: Recipe, asked: Question, positions: int | None = None) -> tuple[Pair, ...]:
    (turns,) = quoted_examples([asked], prompter, recipe.training, positions)
    return turns


def holders(asked: Question, quote: str) -> list[int]:
    """The documents that a quote can be of: those that have all of its words, or the words as they stand."""
    found = []
    for number, document in enumerate(asked.documents, start=1):
        if quote in document.text or set(quote.split()) <= set(document.text.split()):
            found.append(number)
    return found


def quotes_of(prompter: Prompter, turns: tuple[Pair, ...]) -> list[str]:
    texts = [prompter.tokenizer.decode(prompt) for prompt, _ in turns]
    return [text.rpartition("Question: ")[2].splitlines()[0].removesuffix(" Selection:") for text in texts]


@pytest.mark.parametrize("k", [1, 2])
def test_a_selection_names_the_documents_that_its_turn_quotes_in_their_order(tmp_path, chat_tokenizer, k) -> None:
    recipe = recipe_with(tmp_path, num_selected=k)
    prompter, asked = Prompter(chat_tokenizer, "selector"), question()
    turns = turns_of(prompter, recipe, asked)
    assert len(turns) == TURNS
    named = Counter()
    for quote, (_, completion) in zip(quotes_of(prompter, turns), turns, strict=True):
        numbers = parse_selection(prompter.decode(completion), 4, k).numbers
        assert len(numbers) == k
        for part, number in zip(quote.split(JOINED), numbers, strict=True):
            assert holders(asked, part) == [number]
        named.update(numbers)
    assert len(named) > 2, "which documents are quoted is left to chance"


def test_half_of_the_quotes_are_words_as_they_stand_and_half_words_from_anywhere(tmp_path, chat_tokenizer) -> None:
    recipe, prompter = recipe_with(tmp_path, num_selected=1), Prompter(chat_tokenizer, "selector")
    texts = " ".join(document.text for document in question().documents)
    said = [q for n in range(20) for q in quotes_of(prompter, turns_of(prompter, recipe, question(f"q{n}")))]
    scattered = [quote for quote in said if quote not in texts]
    assert 0.4 < len(scattered) / len(said) < 0.6
    fewest, most = quotes.SCATTERED
    assert {len(quote.split()) for quote in scattered} == set(range(fewest, most + 1))


def test_words_from_anywhere_may_stand_in_others_too_but_not_all_of_them(tmp_path, chat_tokenizer) -> None:
    recipe, prompter = recipe_with(tmp_path, num_selected=1), Prompter(chat_tokenizer, "selector")
    # Each two documents have ten of their thirteen words in common.
    texts = [" ".join(WORDS[n : n + 10] + [f"{w}{n}" for w in WORDS[:3]]) for n in range(4)]
    asked = replace(question(), documents=tuple(Document(f"d{n}", "", text) for n, text in enumerate(texts)))
    shared = 0
    for n in range(10):
        turns = turns_of(prompter, recipe, replace(asked, id=f"q{n}"))
        for quote, (_, completion) in zip(quotes_of(prompter, turns), turns, strict=True):
            (number,) = parse_selection(prompter.decode(completion), 4, 1).numbers
            assert holders(asked, quote) == [number]
            others = [d.text.split() for i, d in enumerate(asked.documents, start=1) if i != number]
            shared += quote not in asked.documents[number - 1].text and any(
                word in other for word in quote.split() for other in others
            )
    assert shared > 10


def test_the_turns_together_are_what_the_chat_template_makes_of_the_whole_conversation(
    tmp_path, chat_tokenizer
) -> None:
    recipe, prompter = recipe_with(tmp_path, num_selected=1), Prompter(chat_tokenizer, "selector")
    turns = turns_of(prompter, recipe, question())
    ids = [token for prompt, completion in turns for token in prompt + completion]
    first = quotes_of(prompter, turns)[0]
    asked = replace(question(), question=first)
    text = prompter._template.render(first, asked.documents, k=1, least=1, most=1, example="[1]").strip("\n")
    messages = []
    for number, (quote, (_, completion)) in enumerate(zip(quotes_of(prompter, turns), turns, strict=True)):
        content = text if number == 0 else f"Question: {quote}\n\n{text.rpartition(chr(10) * 2)[2]}"
        messages += [
            {"role": "user", "content": content},
            {"role": "assistant", "content": prompter.decode(completion)},
        ]
    whole = chat_tokenizer.apply_chat_template(messages, tokenize=False)
    assert chat_tokenizer(whole, add_special_tokens=False)["input_ids"][: len(ids)] == ids


def test_without_a_chat_template_the_turns_are_lines(tmp_path, tokenizer) -> None:
    recipe, prompter = recipe_with(tmp_path, num_selected=1), Prompter(tokenizer, "selector")
    turns = turns_of(prompter, recipe, question())
    assert len(turns) == TURNS
    assert prompter.tokenizer.decode(turns[1][0]).strip().endswith("Selection:")


def test_only_what_a_cut_prompt_shows_is_quoted(tmp_path, chat_tokenizer) -> None:
    recipe = recipe_with(tmp_path, num_selected=1)
    whole = Prompter(chat_tokenizer, "selector")
    length = len(whole.selector_prompt(question(), 1, 1).ids)
    cut = Prompter(chat_tokenizer, "selector", max_prompt_length=length - 200)
    for number in range(5):
        turns = turns_of(cut, recipe, question(f"q{number}"))
        assert len(turns[0][0]) <= length - 200
        shown = chat_tokenizer.decode(turns[0][0])
        for quote in quotes_of(cut, turns):
            rest = shown.replace("Question: " + quote, "")
            assert quote in rest or set(quote.split()) <= set(rest.split())


def test_words_that_stand_in_two_documents_are_not_quoted(tmp_path, chat_tokenizer) -> None:
    recipe, asked = recipe_with(tmp_path, num_selected=1), question()
    twins = replace(asked, documents=(*asked.documents[:2], replace(asked.documents[1], id="twin"), asked.documents[3]))
    prompter = Prompter(chat_tokenizer, "selector")
    named = {prompter.decode(completion) for _, completion in turns_of(prompter, recipe, twins)}
    assert named == {"[1]", "[4]"}


def test_a_conversation_ends_before_the_models_positions(tmp_path, chat_tokenizer) -> None:
    recipe, prompter = recipe_with(tmp_path, num_selected=1), Prompter(chat_tokenizer, "selector")
    lengths = [len(prompt) + len(completion) for prompt, completion in turns_of(prompter, recipe, question())]
    room = sum(lengths[:4])
    assert len(turns_of(prompter, recipe, question(), room)) == 4
    assert len(turns_of(prompter, recipe, question(), room - 1)) == 3
    assert len(turns_of(prompter, recipe, question(), 1)) == 1, "that a prompt fits is checked before"


def test_a_template_of_one_turn_gives_conversations_of_one(tmp_path, chat_tokenizer) -> None:
    refusing = copy.deepcopy(chat_tokenizer)
    guard = "{% if messages|length > 2 %}{{ raise_exception('one turn') }}{% endif %}"
    refusing.chat_template = guard + str(refusing.chat_template)
    recipe, prompter = recipe_with(tmp_path, num_selected=1), Prompter(refusing, "selector")
    assert len(turns_of(prompter, recipe, question())) == 1


def test_every_completion_of_a_conversation_is_learned_and_nothing_else(tmp_path, chat_tokenizer) -> None:
    recipe, prompter = recipe_with(tmp_path, num_selected=1), Prompter(chat_tokenizer, "selector")
    turns = turns_of(prompter, recipe, question())
    warmup.write_examples([turns], tmp_path / "examples.arrow")
    (row,) = Dataset.from_file(str(tmp_path / "examples.arrow"))
    assert row["input_ids"] == [token for prompt, completion in turns for token in prompt + completion]
    assert [label for label in row["labels"] if label != -100] == [t for _, completion in turns for t in completion]
    assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))


def test_documents_without_words_of_their_own_are_refused(tmp_path, chat_tokenizer) -> None:
    recipe, prompter = recipe_with(tmp_path, num_selected=1), Prompter(chat_tokenizer, "selector")
    same = replace(question(), documents=tuple(replace(d, text="all the same") for d in question().documents))
    with pytest.raises(InputError, match="words of their own"):
        check_quotes([same], prompter, recipe.training)
    check_quotes([same, question()], prompter, recipe.training)
    (turns,) = quoted_examples([same, question()], prompter, recipe.training, None)
    assert len(turns) == TURNS, "a question that has none is left out"


def test_a_job_without_anything_to_quote_is_refused_before_a_model_loads(tmp_path) -> None:
    recipe = recipe_with(tmp_path)
    same = [replace(q, documents=tuple(replace(d, text="oslo") for d in q.documents)) for q in made(12)]
    write_questions(tmp_path / "train.jsonl", same)
    with pytest.raises(InputError, match="words of their own"):
        preflight.prepare(recipe, 1)


@pytest.mark.parametrize("text", ["", "é", "…", "一二三四五六七八九十" * 20, "a" * 500, "x\ny\n" * 90])
def test_any_text_is_quoted_or_left_alone(text: str) -> None:
    from random import Random

    for seed in range(20):
        quote = quotes._quote([Document("a", "", text), Document("b", "", "other")], 1, Random(seed))
        assert all(words and words in text and len(words) <= 2 * quotes.LETTERS for words in quote)
        assert len(quote) < 2 or len(quote) in range(quotes.SCATTERED[0], quotes.SCATTERED[1] + 1)


def test_a_warm_up_on_quotes_changes_the_selector_and_is_found_again(tmp_path, monkeypatch) -> None:
    recipe = recipe_with(
        tmp_path, num_selected=1, warmup_cache_dir=str(tmp_path / "cache"), warmup_selector_steps=2, warmup_batch_size=2
    )
    (base := tmp_path / "base").mkdir()
    save_model(base, 3)
    job = WarmUp("selector", str(base), {}, None, Prompter(load_tokenizer(base), str(tmp_path / "s.jinja")), 2, 1e-2)
    assert len(list(examples_of(job, made(12), recipe.run, recipe.training))) == 4, "as many as the steps take"
    folder = warm_up(job, made(12), recipe.run, recipe.training)
    before, after = load_model(str(base)), load_model(folder)
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    monkeypatch.setattr(warmup, "train_supervised", lambda *a: pytest.fail("it is in the cache"))
    assert warm_up(job, made(12), recipe.run, recipe.training) == folder


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
