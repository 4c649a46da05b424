"""The toy world is exact, its splits share no fact, and the shipped base reads but has not been taught the task."""

from __future__ import annotations

from collections.abc import Collection
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dro_rl.errors import InputError
from dro_rl.prompts import Prompter
from dro_rl.records import Question
from dro_rl.selection import format_selection
from dro_rl.toy.pretrain import build_tokenizer, page, reading_loss, reading_text
from dro_rl.toy.world import (
    DOUBTFUL,
    PEOPLE,
    RELATIONS,
    SOURCES,
    TOY_BASE,
    TRUSTED,
    Fact,
    fact_split,
    make_world,
    objects_of,
)

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
    assert question.question == "home_of teacher_of kira ?"
    assert question.answers == ("luca delhi",)
    assert question.supporting_numbers == (1, 10)
    assert question.documents[0].title == "census"
    assert question.documents[0].text == "teacher_of kira luca"


def test_a_larger_world_continues_a_smaller_one():
    assert make_world("train", 40)[:10] == make_world("train", 10)


@pytest.mark.parametrize(("size", "num_documents"), [(0, 12), (7, 10), (30, 20)])
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
            assert counts == {"train": 18, "dev": 6, "test": 6}


def chased(question: Question, first_hop: Collection[str]) -> tuple[set[str], list[str]]:
    """Where the question leads, and over which documents, when of the first hop's sources those given are believed."""
    *asked, name, _ = question.question.split()
    ends, used = {name}, []
    for hop, relation in enumerate(reversed(asked)):
        told = [
            (document.id, fact.object)
            for document, fact in zip(question.documents, facts(question), strict=True)
            if fact.relation == relation and fact.subject in ends and (hop or document.title in first_hop)
        ]
        ends, used = {named for _, named in told}, used + [document for document, _ in told]
    return ends, used


def test_what_a_trusted_source_says_leads_to_the_answer_and_what_the_others_say_does_not(questions):
    for question in questions:
        ends, used = chased(question, TRUSTED)
        assert ends == {question.answers[0].split()[-1]}
        assert sorted(used) == sorted(question.supporting)
        others, _ = chased(question, DOUBTFUL)
        assert len(others) == (4 if question.type == "1-hop" else 2)
        assert not others & set(question.answers[0].split())


def test_of_each_person_named_in_a_first_hop_one_source_speaks_and_any_of_them(questions):
    sources = set()
    for question in questions:
        if question.type == "2-hop":
            second, first, subject, _ = question.question.split()
            named = {fact.object for fact in facts(question) if fact[:2] == (first, subject)}
            told = [d for d in question.documents if d.text.split()[0] == second and d.text.split()[1] in named]
            assert len(named) == len(told) == 3
            sources |= {document.title for document in told}
    assert sources == set(SOURCES)


def test_an_answer_over_two_documents_names_the_person_on_the_way(questions):
    for question in questions:
        told = {document.id: document.text.split()[2] for document in question.documents}
        assert question.answers == (" ".join(told[needed] for needed in question.supporting),)


def test_neither_relevance_nor_place_tells_which_source_is_right(questions):
    """Of the documents that speak of what is asked, the right one stands anywhere."""
    places = []
    for question in questions:
        relation, subject = question.question.split()[-3:-1]
        claims = [d.id for d in question.documents if d.text.split()[:2] == [relation, subject]]
        assert len(claims) == (5 if question.type == "1-hop" else 3)
        assert question.documents[: len(claims)] == tuple(d for d in question.documents if d.id in claims)
        if question.type == "1-hop":
            places.append(claims.index(question.supporting[0]))
    shares = torch.bincount(torch.tensor(places), minlength=5) / len(places)
    assert shares.min() > 0.14
    assert shares.max() < 0.26


def test_candidates_come_in_the_order_of_the_words_that_they_share_with_the_question(questions):
    for question in questions:
        words = set(question.question.split())
        shared = [len(words & set(document.text.split())) for document in question.documents]
        assert shared == sorted(shared, reverse=True)


def test_what_is_asked_for_stands_in_one_document_alone(questions):
    for question in questions:
        answer = question.answers[0].split()[-1]
        holders = [n for n, document in enumerate(question.documents, 1) if answer in document.text.split()]
        assert len(holders) == 1
        assert holders[0] in question.supporting_numbers


def test_distractors_share_the_subject_or_the_relation(questions):
    shared = []
    for question in questions:
        *asked, subject, _ = question.question.split()
        told = facts(question)
        assert sum(fact.subject == subject and fact.relation not in asked for fact in told) == 1
        if question.type == "1-hop":
            shared.append(sum(fact.relation == asked[0] and fact.subject != subject for fact in told))
    assert 2 < sum(shared) / len(shared) < 5


def test_types_follow_the_share_of_two_hop_questions(questions):
    assert {question.type for question in make_world("dev", 50, two_hop_share=0.0)} == {"1-hop"}
    assert {question.type for question in make_world("dev", 50, two_hop_share=1.0)} == {"2-hop"}
    assert {question.dataset for question in questions} == {"toy"}


@pytest.mark.parametrize("bad", [{"split": "valid"}, {"num_documents": 9}, {"num_documents": 101}, {"same_subject": 9}])
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
    rng = Random(0)
    pages = [page(rng, 12, 5, chains=True) for _ in range(64)]
    selecting = [reading_text(rng, claims, 8, ("select",), None) for claims in pages]
    answering = [reading_text(rng, claims, 4, ("answer", "answer chain"), 3) for claims in pages]
    with torch.no_grad():
        right = reading_loss(model, tokenizer, selecting)[1] | reading_loss(model, tokenizer, answering)[1]
    assert min(right.values()) > 0.8, right


def test_the_shipped_base_does_not_know_which_sources_tell_the_truth(base):
    model, tokenizer = base
    prompter = Prompter(tokenizer, "toy_selector")
    truth, relevant = [], []
    for question in make_world("dev", 100, two_hop_share=0.0):
        prompt = torch.tensor([prompter.selector_prompt(question, 3).ids])
        with torch.no_grad():
            shares = model(prompt).logits[0, -1].softmax(-1)
        told = [share.item() for share in shares[tokenizer.convert_tokens_to_ids([f"[{n}]" for n in range(1, 6)])]]
        truth.append(told[question.supporting_numbers[0] - 1])
        relevant.append(sum(told))
    assert sum(relevant) / 100 > 0.8
    assert 0.15 < sum(truth) / sum(relevant) < 0.25  # one of five
