from dataclasses import replace

import pytest

from dro_rl.data.candidates import cut_candidates, insert_gold, shape_candidates, shuffle_candidates, with_candidates
from dro_rl.errors import InputError
from dro_rl.records import Document, Question, write_questions

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


# In the recipe ----------------------------------------------------------------------------------------------


def recipe(**keys):
    from dro_rl.recipe import load_recipe

    models = {"selector_model_name_or_path": "toy", "generator_model_name_or_path": "toy"}
    return load_recipe(None, {"dataset_name": "toy", "output_dir": "runs/x", **models, **keys})


@pytest.mark.parametrize(
    ("keys", "place"), [({"num_documents": 0}, "num_documents"), ({"keep_gold": True}, "keep_gold")]
)
def test_a_wrong_key_is_named(keys, place):
    with pytest.raises(InputError, match=place):
        recipe(**keys)


def test_the_resolved_recipe_records_what_is_done_to_candidates():
    values = recipe(num_documents=5, keep_gold=True, shuffle_documents=True).values
    assert (values["num_documents"], values["keep_gold"], values["shuffle_documents"]) == (5, True, True)
    assert (recipe().values["num_documents"], recipe().values["shuffle_documents"]) == (None, False)


def test_training_cuts_and_shuffles_both_splits_and_keeps_gold_in_one(tmp_path, monkeypatch):
    from dro_rl import train
    from dro_rl.job import preflight

    for split in ("train", "dev"):
        write_questions(tmp_path / f"{split}.jsonl", [replace(QUESTION, id=split)])
    seen = {}

    class Reached(Exception):
        pass

    def check(recipe, train, dev):
        seen.update(train=train[0], dev=dev[0])
        raise Reached

    monkeypatch.setattr(preflight, "check", check)
    keys = {"dataset_name": tmp_path, "output_dir": tmp_path / "run", "num_documents": 3, "num_selected": 2,
            "keep_gold": "true", "shuffle_documents": "true", "seed": 1, "bf16": "false"}  # fmt: skip
    keys |= {"selector_model_name_or_path": "toy", "generator_model_name_or_path": "toy"}
    with pytest.raises(Reached):
        train.main([part for key, value in keys.items() for part in (f"--{key}", str(value))])
    assert sorted(ids(seen["train"])) == ["d1", "d2", "d5"]
    assert sorted(ids(seen["dev"])) == ["d1", "d2", "d3"]
    assert ids(seen["dev"]) == ids(shuffle_candidates(cut_candidates(replace(QUESTION, id="dev"), 3), 1))
