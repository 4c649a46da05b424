import json
from dataclasses import replace

import pytest

from dro_rl.data.manifest import (
    Manifest,
    file_sha256,
    manifest_path,
    questions_hash,
    read_manifest,
    split_of_path,
    write_manifest,
)
from dro_rl.errors import InputError
from dro_rl.records import Document, Question, write_questions

QUESTIONS = [Question(f"q{n}", f"who {n}?", ("x", "y"), (Document("d", "", "t"),)) for n in range(3)]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "dev.jsonl"
    count = write_questions(path, QUESTIONS)
    write_manifest(path, Manifest("toy", "dev", count, questions_hash(QUESTIONS), file_sha256(path), "CC0"))
    return path


def test_a_manifest_reads_back(file):
    manifest = read_manifest(file)
    assert (manifest.dataset, manifest.split, manifest.num_questions, manifest.licence) == ("toy", "dev", 3, "CC0")


def test_a_file_without_manifest_has_none(tmp_path):
    path = tmp_path / "mine.jsonl"
    write_questions(path, QUESTIONS)
    assert read_manifest(path) is None


def test_a_changed_file_is_refused(file):
    write_questions(file, QUESTIONS[:2])
    with pytest.raises(InputError, match="not those that its manifest describes"):
        read_manifest(file)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": 2}, "reads format 1"),
        ({"speed": 3}, "a manifest has the fields"),
        ({"sha256": None}, "a manifest has the fields"),
    ],
)
def test_an_odd_manifest_is_refused(file, change, match):
    path = manifest_path(file)
    values = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    with pytest.raises(InputError, match=match):
        read_manifest(file)


def test_a_torn_manifest_is_refused(file):
    manifest_path(file).write_text('{"format": 1, ')
    with pytest.raises(InputError, match="one JSON object"):
        read_manifest(file)


def test_the_hash_is_of_questions_and_answers_not_of_candidates():
    other_documents = [replace(q, documents=(Document("e", "", "u"),)) for q in QUESTIONS]
    assert questions_hash(QUESTIONS) == questions_hash(other_documents)
    assert questions_hash(QUESTIONS) != questions_hash(QUESTIONS[::-1])
    for change in ({"id": "z"}, {"question": "z"}, {"answers": ("x",)}, {"answers": ("y", "x")}):
        assert questions_hash([replace(QUESTIONS[0], **change)]) != questions_hash(QUESTIONS[:1])


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("hotpot_train_v1.1.json", "train"),
        ("valid_random_split.json", "dev"),
        ("nq-dev-kilt.jsonl", "dev"),
        ("NQ-open.dev.jsonl", "dev"),
        ("nq-test.csv", "test"),
        ("some/train/test.jsonl", "test"),
        ("data/validation/nq.jsonl", "dev"),
        ("data.json", None),
        ("train_dev.json", None),
        ("train/dev_test.json", None),
        ("contest.json", None),
        ("some/test_0/data.json", None),
    ],
)
def test_the_split_is_told_by_the_name_of_the_file_else_of_its_folder(name, split):
    assert split_of_path(name) == split
