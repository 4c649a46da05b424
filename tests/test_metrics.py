"""Claims about the metrics: the official SQuAD v1.1/KILT behaviour, and the defects they must not have."""

from __future__ import annotations

import math
import sys

import pytest

from dro_rl.evaluation import (
    answer_recall_at_k,
    exact_match,
    f1,
    normalize_answer,
    precision_at_k,
    recall_at_k,
    rouge_l,
)
from dro_rl.records import Document


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The Eiffel Tower", "eiffel tower"),
        ("  a\tnew \n hope ", "new hope"),
        ("an apple a day", "apple day"),
        ("theatre", "theatre"),  # an article is a whole word
        ("panathenaic", "panathenaic"),
        ("A.", ""),  # punctuation goes first, then what is left is an article
        ("the-end", "theend"),
        ("O'Neil", "oneil"),
        ("1,000", "1000"),
        ("$3.50 (net)", "350 net"),
        ("under_score", "underscore"),  # the underscore is punctuation too
        ("", ""),
    ],
)
def test_normalisation_follows_the_official_script(text: str, normalized: str) -> None:
    """Guards the order lower-case, punctuation, articles, white space: another order gives other texts."""
    assert normalize_answer(text) == normalized


def test_punctuation_is_deleted_not_replaced_by_a_space() -> None:
    """Defect: a metric that puts spaces for punctuation reads "U.S." as "u s", so that "US" is wrong."""
    assert normalize_answer("U.S.") == "us"
    assert exact_match("US", ["U.S."]) == 1.0
    assert f1("US", ["U.S."]) == 1.0
    assert exact_match("twenty-one", ["twenty one"]) == 0.0


def test_every_accepted_answer_counts() -> None:
    """Defect: a metric that looks at `answers[0]` alone marks a correct alias wrong."""
    aliases = ["United States of America", "U.S.", "the States"]
    assert exact_match("states", aliases) == 1.0
    assert f1("The US", aliases) == 1.0
    assert exact_match("states", aliases[:1]) == 0.0


def test_f1_takes_the_best_alias_not_the_mean() -> None:
    """Defect: averaging over aliases punishes questions with many."""
    assert f1("New York", ["New York City", "Gotham"]) == pytest.approx(0.8)  # precision 1, recall 2/3
    assert f1("New York", ["Gotham", "New York"]) == 1.0


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("red green", "green blue", 0.5),
        ("green", "the green door", 2 / 3),
        ("no no no", "no", 0.5),  # precision 1/3, recall 1
        ("no no", "no no never", 0.8),
        ("yes", "no", 0.0),
        ("", "no", 0.0),
        ("Door green", "green door", 1.0),  # a multiset: order does not count
    ],
)
def test_f1_is_of_token_multisets(prediction: str, answer: str, expected: float) -> None:
    """Guards multiplicity: with sets, "no no no" would be a perfect "no"."""
    assert f1(prediction, [answer]) == pytest.approx(expected)


def test_nothing_left_on_both_sides_is_exact_and_has_no_f1() -> None:
    """The official quirk, kept: equal strings match, and `num_same == 0` gives F1 0."""
    assert exact_match("The", ["a"]) == 1.0
    assert f1("The", ["a"]) == 0.0


def test_case_and_letters_outside_ascii() -> None:
    """Guards that accents are neither stripped nor punctuation, and that only ASCII punctuation goes."""
    assert exact_match("BARTÓK BÉLA", ["Bartók, Béla"]) == 1.0
    assert exact_match("Bartok", ["Bartók"]) == 0.0
    assert f1("東京 タワー", ["東京"]) == pytest.approx(2 / 3)
    assert normalize_answer("«Ça»") == "«ça»"
    assert exact_match("x\u00a0y\u2003z", ["x y z"]) == 1.0


def test_answers_are_a_list() -> None:
    """Defect: a text taken for a list is compared letter by letter, and a one-letter prediction is right."""
    with pytest.raises(TypeError, match="write \\['no'\\]"):
        exact_match("n", "no")
    with pytest.raises(ValueError, match="at least one accepted answer"):
        f1("no", [])


def test_recall_is_the_share_of_supporting_documents_among_the_first_k() -> None:
    """Defect: 1 for any one of several supporting documents hides that multi-hop evidence is incomplete."""
    assert recall_at_k([3, 1, 2], [1, 2], 1) == 0.0
    assert recall_at_k([3, 1, 2], [1, 2], 2) == 0.5
    assert recall_at_k([3, 1, 2], [2, 1], 3) == 1.0
    assert recall_at_k([3, 1], [1, 2], 5) == 0.5
    assert [recall_at_k([4, 7], [7], k) for k in (1, 2)] == [0.0, 1.0]


def test_recall_never_exceeds_one() -> None:
    """Defect: counting a repeated number or a repeated label twice."""
    assert recall_at_k([1, 1], [1], 2) == 1.0
    assert recall_at_k([1], [1, 1], 1) == 1.0


def test_recall_at_its_edges() -> None:
    """An empty selection finds nothing; without labels there is nothing to find; k counts from 1."""
    assert recall_at_k([], [1], 5) == 0.0
    assert math.isnan(recall_at_k([1], [], 5))
    with pytest.raises(ValueError, match="k is 0"):
        recall_at_k([1], [1], 0)


DOCUMENTS = [
    Document("a", "Béla Bartók", "A composer from Nagyszentmiklós."),
    Document("b", "U.S.", "The Art of War was not written there."),
]


def test_answer_recall_looks_for_whole_tokens_in_title_and_text() -> None:
    """Defect: a substring search finds "art" in "Bartók"; one that skips titles misses answers there."""
    assert answer_recall_at_k(DOCUMENTS, ["art"], 1) == 0.0
    assert answer_recall_at_k(DOCUMENTS, ["art"], 2) == 1.0
    assert answer_recall_at_k(DOCUMENTS, ["Bartók"], 1) == 1.0
    assert answer_recall_at_k(DOCUMENTS, ["composer, from (the) Nagyszentmiklós"], 1) == 1.0
    assert answer_recall_at_k(DOCUMENTS, ["composer Nagyszentmiklós"], 1) == 0.0
    assert answer_recall_at_k(DOCUMENTS, ["US"], 2) == 1.0


def test_answer_recall_takes_any_alias_within_k() -> None:
    """Defect: the first alias alone, or documents behind the k-th."""
    assert answer_recall_at_k(DOCUMENTS, ["nobody", "war"], 2) == 1.0
    assert answer_recall_at_k(DOCUMENTS, ["nobody", "war"], 1) == 0.0


def test_answer_recall_at_its_edges() -> None:
    """An answer of articles alone would stand in every document; nothing selected holds nothing."""
    assert answer_recall_at_k(DOCUMENTS, ["The"], 2) == 0.0
    assert answer_recall_at_k([], ["art"], 5) == 0.0
    with pytest.raises(ValueError, match="k is 0"):
        answer_recall_at_k(DOCUMENTS, ["art"], 0)
    with pytest.raises(ValueError, match="at least one accepted answer"):
        answer_recall_at_k(DOCUMENTS, [], 1)


# What SQuAD and KILT themselves expect ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "answers", "em", "best_f1"),
    [
        ("Denver Broncos", ["Denver Broncos", "The Denver Broncos!"], 1.0, 1.0),
        ("the Broncos", ["Denver Broncos", "Carolina Panthers"], 0.0, 2 / 3),
        ("February 7, 2016", ["February 7", "the 7th of February, 2016"], 0.0, 0.8),
        ("in 1990 and 1991", ["1990"], 0.0, 0.4),  # precision 1/4, recall 1
        ("14th century", ["the 14th century", "fourteenth"], 1.0, 1.0),
    ],
)
def test_em_and_f1_of_worked_cases(prediction: str, answers: list[str], em: float, best_f1: float) -> None:
    """By hand from the official definition: normalise, count common tokens, take the best accepted answer."""
    assert exact_match(prediction, answers) == em
    assert f1(prediction, answers) == pytest.approx(best_f1)


def test_f1_of_a_reply_in_dialogue_is_kilts() -> None:
    """KILT scores Wizard of Wikipedia with the same F1: here 5 common tokens of 7 predicted and 8 accepted."""
    reply = "I love jazz! It began in New Orleans."
    accepted = "Yes, jazz began in New Orleans, a port city."
    assert f1(reply, [accepted]) == pytest.approx(2 * (5 / 8) * (5 / 8) / (5 / 8 + 5 / 8))


def test_rouge_l_is_kilts() -> None:
    """KILT's own test expects 0.999999995 of a perfect answer: its package adds 1e-8 to a denominator."""
    assert rouge_l("the cat sat", ["the cat sat"]) == 0.999999995
    assert rouge_l("a b c d", ["a x c"]) == pytest.approx(4 / 7, abs=1e-6)  # common subsequence a c: 2/4 and 2/3
    assert rouge_l("c a", ["a c"]) == pytest.approx(0.5, abs=1e-6)  # order counts
    assert rouge_l("Cat", ["cat"]) == 0.0  # no normalisation
    assert rouge_l("x y", ["q", "x y z"]) == pytest.approx(0.8, abs=1e-6)


def test_rouge_l_takes_long_answers_without_a_full_stop() -> None:
    """Defect: the package calls itself once a word, and Python's limit ended an evaluation at 1,000 of them."""
    words = [f"w{i}" for i in range(1200)]
    limit = sys.getrecursionlimit()
    assert rouge_l(" ".join(words), [" ".join(words)]) == pytest.approx(1, abs=1e-6)
    half = " ".join(words[::2])
    assert rouge_l(half, [" ".join(words)]) == pytest.approx(2 / 3, abs=1e-6)
    assert rouge_l(" ".join(f"v{i}" for i in range(1200)), [" ".join(words)]) == 0.0  # n + m calls deep
    assert sys.getrecursionlimit() == limit


@pytest.mark.parametrize("nothing", ["", ".", "  ", "...", " . "])
def test_rouge_l_of_nothing_is_zero(nothing: str) -> None:
    """Defect: the package raises for a text without a sentence, which ends an evaluation at its last question."""
    assert rouge_l(nothing, ["x"]) == 0.0
    assert rouge_l("x", [nothing, "x"]) == 0.999999995


def test_precision_is_over_k_places() -> None:
    assert precision_at_k([3, 1, 2], [1, 2], 1) == 0.0
    assert precision_at_k([3, 1, 2], [1, 2], 3) == pytest.approx(2 / 3)
    assert precision_at_k([1], [1, 2], 5) == 0.2  # four empty places
    assert precision_at_k([], [1], 3) == 0.0
    assert math.isnan(precision_at_k([1], [], 3))
    with pytest.raises(ValueError, match="k is 0"):
        precision_at_k([1], [1], 0)
