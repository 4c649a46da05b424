import math
from collections import Counter

import numpy as np
import pytest

from dro_rl.errors import InputError
from dro_rl.retrieval import bm25, passages
from dro_rl.retrieval.bm25 import BM25, Analyzer
from dro_rl.retrieval.passages import PassageStore, write_passages
from tests.retrieval_world import PASSAGES, QUESTIONS

QUERIES = [*(question.question for question in QUESTIONS), "lamp lamp tin", "grass", "zebra", ""]


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(passages, "PART", 3)
    write_passages(tmp_path / "passages", PASSAGES)
    return PassageStore(tmp_path / "passages")


def build(store, folder, processes=1, **settings):
    BM25(**settings).build(store, folder, processes)
    opened = BM25(**settings)
    opened.open(folder)
    return opened


def plain_scores(query, k1, b, language):
    """The formula, as the module's docstring gives it."""
    analyze = Analyzer(language)
    texts = [analyze(f"{document.title} {document.text}") for document in PASSAGES]
    mean = sum(map(len, texts)) / len(texts)
    scores = []
    for text in texts:
        score = 0.0
        for word in analyze(query):
            holding = sum(word in other for other in texts)
            count = Counter(text)[word]
            idf = math.log(1 + (len(texts) - holding + 0.5) / (holding + 0.5))
            if count:
                score += idf * count / (count + k1 * (1 - b + b * len(text) / mean))
        scores.append(score)
    return scores


@pytest.mark.parametrize("compiled", [False, True], ids=["numpy", "numba"])
@pytest.mark.parametrize(("k1", "b", "language"), [(0.9, 0.4, "english"), (1.2, 0.75, "none"), (0.0, 0.0, "english")])
def test_scores_are_those_of_the_formula(store, tmp_path, monkeypatch, compiled, k1, b, language):
    monkeypatch.setattr(bm25, "COMPILED", 1 if compiled else 100)
    index = build(store, tmp_path / "bm25", k1=k1, b=b, language=language)
    for query, found in zip(QUERIES, index.search(QUERIES, len(PASSAGES)), strict=True):
        plain = plain_scores(query, k1, b, language)
        best = sorted(
            (row for row in range(len(PASSAGES)) if plain[row] > 0), key=lambda row: (-round(plain[row], 5), row)
        )
        assert [hit.row for hit in found] == best
        assert [hit.score for hit in found] == pytest.approx([plain[row] for row in best], rel=1e-5)


def test_passages_that_share_no_word_are_left_out(store, tmp_path):
    index = build(store, tmp_path / "bm25")
    assert [len(found) for found in index.search(["zebra", "", "the of", "grass"], 8)] == [0, 0, 0, 2]


def test_the_best_k_are_the_first_k_of_a_full_sort():
    draw = np.random.default_rng(0)
    for size in (5, 300, 5000):
        for k in (1, 7, 20):
            scores = draw.integers(0, 6, size).astype(np.float32) * (draw.random(size) < 0.3)
            plain = sorted((row for row in range(size) if scores[row] > 0), key=lambda row: (-scores[row], row))[:k]
            assert [hit.row for hit in bm25._best(scores, k)] == plain


def test_a_word_is_lower_case_stemmed_and_no_stop_word():
    assert Analyzer("english")("The Herons' 3 lamps, IN Zürich") == ["heron", "3", "lamp", "zürich"]
    assert Analyzer("none")("The Herons") == ["the", "herons"]


def test_two_processes_make_the_index_that_one_makes(store, tmp_path):
    for processes in (1, 2):
        BM25().build(store, tmp_path / str(processes), processes)
    files = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert len(files) == 5
    for name in files:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name


def test_a_build_that_was_killed_goes_on_with_the_next_part(store, tmp_path, monkeypatch):
    written = []
    whole = bm25._write_words

    def die_at_the_last(folder, number, words, language):
        if number == 2 and written == [0, 1]:
            written.append("killed")
            raise KeyboardInterrupt
        written.append(number)
        whole(folder, number, words, language)

    monkeypatch.setattr(bm25, "_write_words", die_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        BM25().build(store, tmp_path / "bm25", 1)
    index = build(store, tmp_path / "bm25")
    assert written == [0, 1, "killed", 2]
    assert index.search(["grass"], 2)[0][0].row == 4


@pytest.mark.parametrize("settings", [{"k1": -1.0}, {"b": 1.5}, {"language": "klingon"}])
def test_a_wrong_setting_is_named(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        BM25(**settings).check()


def test_an_index_that_is_not_whole_is_refused(store, tmp_path):
    build(store, tmp_path / "bm25")
    (tmp_path / "bm25" / "data.csc.index.npy").write_bytes(b"torn")
    with pytest.raises(InputError, match="an index is whole"):
        BM25().open(tmp_path / "bm25")
