import pytest

from dro_rl.data.candidates import cut_candidates, insert_gold, shape_candidates, shuffle_candidates, with_candidates
from dro_rl.records import Document, Question

DOCUMENTS = tuple(Document(f"d{n}", "", f"text {n}") for n in range(1, 7))
QUESTION = Question("q", "?", ("x",), DOCUMENTS, ("d2", "d5"))


def ids(question):
    return [document.id for document in question.documents]


def test_a_cut_keeps_the_first_and_says_what_gold_it_cost():
    cut = cut_candidates(QUESTION, 3)
    assert (ids(cut), cut.supporting, cut.missed) == (["d1", "d2", "d3"], ("d2",), ("d5",))
    assert cut_candidates(QUESTION, 9) == QUESTION


def test_a_cut_that_keeps_gold_drops_the_last_others():
    assert ids(cut_candidates(QUESTION, 3, keep_gold=True)) == ["d1", "d2", "d5"]
    assert ids(cut_candidates(QUESTION, 2, keep_gold=True)) == ["d2", "d5"]
    assert ids(cut_candidates(QUESTION, 1, keep_gold=True)) == ["d2"]


def test_a_shuffle_is_a_function_of_seed_and_question():
    orders = {tuple(ids(shuffle_candidates(QUESTION, seed))) for seed in range(20)}
    assert len(orders) > 10
    assert shuffle_candidates(QUESTION, 3) == shuffle_candidates(QUESTION, 3)
    assert sorted(ids(shuffle_candidates(QUESTION, 3))) == sorted(ids(QUESTION))
    assert shuffle_candidates(QUESTION, 3).supporting == QUESTION.supporting


def test_inserted_gold_takes_the_place_of_the_last_others_and_stands_anywhere():
    lacking = with_candidates(QUESTION, [d for d in DOCUMENTS if d.id != "d5"])
    assert (lacking.supporting, lacking.missed) == (("d2",), ("d5",))
    places = set()
    for seed in range(40):
        full = insert_gold(lacking, [DOCUMENTS[4]], seed)
        assert sorted(ids(full)) == ["d1", "d2", "d3", "d4", "d5"]
        assert (full.supporting, full.missed) == (("d2", "d5"), ())
        places.add(ids(full).index("d5"))
    assert places == {0, 1, 2, 3, 4}


def test_gold_is_never_put_in_the_place_of_gold():
    only = Question("q", "?", ("x",), DOCUMENTS[1:2], ("d2",), missed=("d5",))
    assert sorted(ids(insert_gold(only, [DOCUMENTS[4]], 0))) == ["d2", "d5"]


@pytest.mark.parametrize("keys", [{}, {"keep_gold": True}])
def test_nothing_happens_unasked(keys):
    assert shape_candidates([QUESTION], **keys) == [QUESTION]


def test_a_cut_comes_before_a_shuffle():
    (shaped,) = shape_candidates([QUESTION], 3, shuffle_seed=1)
    assert sorted(ids(shaped)) == ["d1", "d2", "d3"]
