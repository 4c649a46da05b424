"""The toy world is exact, its splits share no fact, and the shipped base reads but has not been taught the task."""

from __future__ import annotations

from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dro_rl.errors import InputError
from dro_rl.prompts import Prompter
from dro_rl.records import Question
from dro_rl.selection import format_selection
from dro_rl.toy.pretrain import build_tokenizer, lookup_batch, reading_loss
from dro_rl.toy.world import PEOPLE, RELATIONS, TOY_BASE, Fact, fact_split, make_world, objects_of

SPLITS = ("train", "dev", "test")


@pytest.fixture(scope="module")
def worlds() -> dict[str, list[Question]]:
    return {split: make_world(split, 300) for split in SPLITS}


@pytest.fixture(scope="module")
def questions(worlds) -> list[Question]:
    return [question for world in worlds.values() for question in world]


@pytest.fixture(scope="module")
def base():
    return AutoModelForCausalLM.from_pretrained(TOY_BASE), AutoTokenizer.from_pretrained(TOY_BASE)


def facts(question: Question) -> list[Fact]:
    return [Fact(*document.text.split()) for document in question.documents]


def test_the_same_arguments_give_the_same_questions():
    assert make_world("dev", 20, seed=3) == make_world("dev", 20, seed=3)
    assert make_world("dev", 20, seed=3) != make_world("dev", 20, seed=4)


def test_the_questions_are_those_of_any_machine():
    question = make_world("dev", 2)[1]
    assert question.question == "birthplace_of boss_of otto ?"
    assert question.answers == ("tunis",)
    assert question.supporting_numbers == (4, 7)


def test_a_larger_world_continues_a_smaller_one():
    assert make_world("train", 40)[:10] == make_world("train", 10)


@pytest.mark.parametrize(("size", "num_documents"), [(0, 10), (7, 4), (30, 20)])
def test_any_size_is_made(size, num_documents):
    world = make_world("test", size, num_documents=num_documents)
    assert len(world) == size
    assert all(len(question.documents) == num_documents for question in world)


def test_no_fact_stands_in_two_splits(worlds):
    for split, world in worlds.items():
        assert {fact_split(fact) for question in world for fact in facts(question)} == {split}


def test_every_subject_and_relation_have_facts_in_every_split():
    for relation in RELATIONS:
        for subject in PEOPLE:
            counts = dict.fromkeys(SPLITS, 0)
            for name in objects_of(relation):
                counts[fact_split(Fact(relation, subject, name))] += 1
            assert counts == {"train": 48, "dev": 6, "test": 6}


def test_following_the_supporting_documents_gives_the_answer(questions):
    for question in questions:
        *asked, name, mark = question.question.split()
        assert mark == "?"
        told = {(fact.relation, fact.subject): fact for fact in facts(question)}
        used = []
        for relation in reversed(asked):
            used.append(told[relation, name])
            name = used[-1].object
        assert question.answers == (name,)
        assert sorted(question.supporting) == sorted("-".join(fact) for fact in used)


def test_the_answer_stands_in_one_document_alone(questions):
    for question in questions:
        (answer,) = question.answers
        holders = [n for n, document in enumerate(question.documents, 1) if answer in document.text.split()]
        assert len(holders) == 1
        assert holders[0] in question.supporting_numbers


def test_distractors_share_the_subject_or_the_relation(questions):
    shared = []
    for question in questions:
        *asked, subject, _ = question.question.split()
        others = [fact for fact in facts(question) if "-".join(fact) not in question.supporting]
        assert sum(fact.subject == subject for fact in others) == 1
        assert len({(fact.relation, fact.subject) for fact in facts(question)}) == len(question.documents)
        shared.append(sum(fact.relation in asked for fact in others))
    assert 3 < sum(shared) / len(shared) < 7


def test_the_place_of_the_supporting_documents_says_nothing(questions):
    places = torch.tensor([n - 1 for question in questions for n in question.supporting_numbers])
    shares = torch.bincount(places, minlength=10) / len(places)
    assert shares.min() > 0.06
    assert shares.max() < 0.14


def test_types_follow_the_share_of_two_hop_questions(questions):
    assert {question.type for question in make_world("dev", 50, two_hop_share=0.0)} == {"1-hop"}
    assert {question.type for question in make_world("dev", 50, two_hop_share=1.0)} == {"2-hop"}
    assert {question.dataset for question in questions} == {"toy"}


@pytest.mark.parametrize("bad", [{"split": "valid"}, {"num_documents": 3}, {"num_documents": 21}, {"same_subject": 9}])
def test_an_argument_out_of_range_is_refused_by_name(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        make_world(**{"split": "dev", "size": 1, **bad})


def test_every_word_of_the_world_and_of_its_prompts_is_known(questions):
    tokenizer = build_tokenizer()
    selector, generator = Prompter(tokenizer, "toy_selector"), Prompter(tokenizer, "toy_generator")
    for question in questions[::10]:
        for prompt in (selector.selector_prompt(question, 3), generator.generator_prompt(question, (3, 1, 2))):
            assert tokenizer.unk_token_id not in prompt.ids


def test_a_selection_survives_the_tokenizer(base):
    _, tokenizer = base
    prompter = Prompter(tokenizer, "toy_selector")
    for numbers in ([3, 1, 2], [10, 20, 9], [7]):
        text = format_selection(numbers)
        ids = prompter.completion(text)
        assert len(ids) == 2 * len(numbers)
        assert prompter.decode(ids) == text


def test_the_shipped_tokenizer_is_the_one_built(base):
    assert base[1].get_vocab() == build_tokenizer().get_vocab()


def test_the_shipped_base_is_small_and_reads(base):
    model, tokenizer = base
    assert model.dtype == torch.float32
    assert sum(weight.numel() for weight in model.parameters()) < 1_000_000
    kinds = ["object", "number", "object later", "number later"]
    with torch.no_grad():
        batch = lookup_batch(Random(0), 64, 10, kinds, linked=True, fillers=True, lists=False)
        _, right = reading_loss(model, tokenizer, batch)
    accuracy = dict(zip(kinds, right, strict=True))
    assert min(accuracy.values()) > 0.8, accuracy  # chance is one in ten
