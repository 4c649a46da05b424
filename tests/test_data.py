"""Where questions come from: a file, a folder with a file for each split, the toy world, a hub."""

from __future__ import annotations

import csv
import gzip
import json
import sys
import types
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import released
from datasets import Dataset, DatasetDict
from training_world import questions, write_questions

from dro_rl.data import TOY_SIZES, dev_beside, load_questions
from dro_rl.data.check import check
from dro_rl.data.hub import is_local
from dro_rl.data.prepare import Preparation, prepare
from dro_rl.errors import InputError
from dro_rl.records import Question, read_questions


def rows(made: list[Question]) -> list[dict[str, Any]]:
    return json.loads(json.dumps([asdict(question) for question in made]))


def write(path: Path, made: list[Question]) -> Path:
    text = "\n".join(json.dumps(row) for row in rows(made))
    if path.name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows(made)), path)
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_a_file_is_all_its_questions_whatever_the_split(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"mine{suffix}", questions(5))
    assert load_questions(str(path), "train") == questions(5)
    assert load_questions(str(path), "anything") == questions(5)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_a_folder_has_a_file_for_each_split(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / f"train{suffix}", questions(5))
    write(tmp_path / f"dev{suffix}", questions(3, seed=1))
    assert load_questions(str(tmp_path), "train") == questions(5)
    assert load_questions(str(tmp_path), "dev") == questions(3, seed=1)


def test_a_home_folder_may_be_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "train.jsonl", questions(2))
    assert load_questions("~", "train") == load_questions("~/train.jsonl", "train") == questions(2)


def test_two_files_for_a_split_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", questions(5))
    write(tmp_path / "train.parquet", questions(5))
    with pytest.raises(InputError, match=r"2 files for split train: .*train\.jsonl\.gz.*Name the file itself"):
        load_questions(str(tmp_path), "train")


def test_no_file_for_a_split_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", questions(5))
    with pytest.raises(InputError, match="0 files for split dev"):
        load_questions(str(tmp_path), "dev")


@pytest.mark.parametrize("name", ["/nowhere/questions", "nowhere/questions.jsonl", "./nowhere"])
def test_a_path_that_leads_nowhere_is_not_looked_up_on_a_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dro_rl.data._from_hub", lambda *args: pytest.fail("looked up"))
    with pytest.raises(InputError, match=r"^dataset_name: .*a question file or folder exists"):
        load_questions(name, "train")


def test_the_limit_takes_the_first(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", questions(5))
    assert load_questions(str(path), "train", limit=3) == questions(5)[:3]
    assert load_questions(str(path), "train", limit=99) == questions(5)
    assert load_questions("toy", "dev", limit=3) == load_questions("toy", "dev")[:3]


def test_a_broken_line_beyond_the_limit_is_still_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", questions(5))
    path.write_text(path.read_text() + "\nnot json\n")
    with pytest.raises(InputError, match="line 6"):
        load_questions(str(path), "train", limit=2)


@pytest.mark.parametrize("split", TOY_SIZES)
def test_the_toy_world_is_the_same_each_time(split: str) -> None:
    made = load_questions("toy", split)
    assert len(made) == TOY_SIZES[split]
    assert made == load_questions("toy", split)
    assert len({question.id for question in made}) == len(made)


def test_the_toy_world_asks_other_questions_in_each_split() -> None:
    train, dev, test = ({(q.question, q.documents) for q in load_questions("toy", split)} for split in TOY_SIZES)
    assert not train & dev
    assert not train & test
    assert not dev & test


def test_the_toy_world_has_no_other_split() -> None:
    with pytest.raises(InputError, match=r"'validation': its splits are train, dev, test"):
        load_questions("toy", "validation")


def test_a_hub_that_cannot_be_reached_is_an_input_error() -> None:
    with pytest.raises(InputError, match=r"^dataset_name: 'nobody/nothing': .*hub dataset with split train.*network"):
        load_questions("nobody/nothing", "train")


def test_the_error_names_the_key_that_was_wrong() -> None:
    with pytest.raises(InputError, match=r"^eval_dataset_name: 'nobody/nothing'"):
        load_questions("nobody/nothing", "dev", key="eval_dataset_name")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Rows that a hub dataset has."""
    served: list[dict[str, Any]] = rows(questions(4))
    fake = types.ModuleType("datasets")
    fake.load_dataset = lambda name, config, split: served  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return served


def test_hub_rows_are_the_same_questions(hub: list[dict[str, Any]]) -> None:
    assert load_questions("someone/questions", "train") == questions(4)
    assert load_questions("someone/questions", "train", limit=2) == questions(2)


def test_hub_rows_are_checked_like_lines(hub: list[dict[str, Any]]) -> None:
    hub[2]["answers"] = []
    with pytest.raises(InputError, match=r"someone/questions \(train\): row 3.*answers: empty list"):
        load_questions("someone/questions", "train")
    hub[2] = hub[0]
    with pytest.raises(
        InputError, match=r"someone/questions \(train\): row 3: id: 'q0': ids are unique\. .* or that of row 1\."
    ):
        load_questions("someone/questions", "train")


@pytest.mark.parametrize(
    ("train", "dev"),
    [("train.jsonl", "dev.jsonl"), ("train/nq.jsonl", "dev/nq.jsonl"), ("nq-train.jsonl", "nq-dev.jsonl")],
)
def test_the_dev_file_beside_a_training_file_is_found(tmp_path: Path, train: str, dev: str) -> None:
    for name in (train, dev):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert dev_beside(str(tmp_path / train), "train", "dev") == str(tmp_path / dev)
    (tmp_path / dev).unlink()
    assert dev_beside(str(tmp_path / train), "train", "dev") is None


@pytest.mark.parametrize("layout", ["train/nq.jsonl", "nq/train.jsonl"])
def test_a_folder_of_several_datasets_is_read_by_config(tmp_path: Path, layout: str) -> None:
    (tmp_path / layout).parent.mkdir()
    write_questions(tmp_path / layout, questions(3))
    assert load_questions(str(tmp_path), "train", config="nq") == questions(3)


@pytest.mark.parametrize(
    ("name", "local"),
    [
        ("someone/questions", True),
        ("someone/other", False),
        ("someone/questions-v1.1", False),
        ("hotpot_qa", False),
        ("train.jsonl", True),
        ("dev.json.gz", True),
        ("psgs_w100.tsv.gz", True),
        ("json", False),
        ("data/nq/train", True),
        ("./data", True),
        ("~/data", True),
        ("/data", True),
    ],
)
def test_a_name_means_a_file_or_a_hub_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, local: bool
) -> None:
    """One rule for questions, corpora and released files. A folder of the name that is there comes before the hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone" / "questions").mkdir(parents=True)
    assert is_local(name) == local


def test_a_list_that_is_spelled_in_a_column_of_another_name_is_that_list(tmp_path: Path) -> None:
    """Its text was the only answer, brackets and all."""
    path = tmp_path / "mine.csv"
    path.write_text('id,question,gold\n1,How long?,"[""two years"", ""24 months""]"\n2,Which oil?,ISO 46\n')
    found = read_questions(path, candidates="optional", columns={"answers": "gold"})
    assert [question.answers for question in found] == [("two years", "24 months"), ("ISO 46",)]


def test_columns_of_other_names_are_the_fields_that_the_recipe_says(tmp_path: Path) -> None:
    """The column keeps its place in errors of the file; one that stands nowhere is named."""
    others = [{"qid": row["id"], "query": row["question"], **row} for row in rows(questions(3))]
    for row in others:
        del row["id"], row["question"]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in others))
    columns = {"id": "qid", "question": "query"}
    assert load_questions(str(path), "train", columns=columns) == questions(3)
    with pytest.raises(InputError, match=r"^dataset_columns: type: 'hops': .*no row does"):
        load_questions(str(path), "train", columns={**columns, "type": "hops"})
    with pytest.raises(InputError, match=r"^dataset_columns: query: .*one of id, question"):
        load_questions(str(path), "train", columns={"query": "question"})


# Layouts ------------------------------------------------------------------------------------------------------


def shards(folder: Path, split: str, made: list[Question], count: int = 2) -> None:
    """A split as a hub lays it out."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        write(folder / f"{split}-{number:05d}-of-{count:05d}.parquet", made[number::count])


@pytest.mark.parametrize("inner", ["", "data"])
def test_the_shards_of_a_hub_layout_are_one_split(tmp_path: Path, inner: str) -> None:
    shards(tmp_path / inner, "train", questions(5))
    shards(tmp_path / inner, "validation", questions(3, seed=1), count=1)
    (tmp_path / "README.md").write_text("---\nconfigs: []\n---\n")
    made = questions(5)
    assert load_questions(str(tmp_path), "train") == made[0::2] + made[1::2]
    assert load_questions(str(tmp_path), "dev") == questions(3, seed=1)


@pytest.mark.parametrize(("folder", "config"), [("train", None), ("nq/train", "nq"), ("data/train", None)])
def test_files_that_are_numbered_in_the_folder_of_a_split_are_one(
    tmp_path: Path, folder: str, config: str | None
) -> None:
    (tmp_path / folder).mkdir(parents=True)
    write(tmp_path / folder / "0000.parquet", questions(5)[:3])
    write(tmp_path / folder / "0001.parquet", questions(5)[3:])
    assert load_questions(str(tmp_path), "train", config=config) == questions(5)


def test_shards_of_a_configuration(tmp_path: Path) -> None:
    shards(tmp_path / "nq", "train", questions(4))
    assert len(load_questions(str(tmp_path), "train", config="nq")) == 4


def test_a_shard_that_is_missing_is_said(tmp_path: Path) -> None:
    shards(tmp_path / "data", "train", questions(5), count=3)
    (tmp_path / "data" / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(InputError, match=r"data: 2 of 3 shards of train: a split is whole"):
        load_questions(str(tmp_path), "train")


@pytest.mark.parametrize("name", ["validation.jsonl", "valid.parquet", "validation.json", "valid.csv"])
def test_validation_is_another_word_for_dev(tmp_path: Path, name: str) -> None:
    made = questions(3)
    if name.endswith(("json", "csv")):
        table(tmp_path / name, made)
    else:
        write(tmp_path / name, made)
    assert load_questions(str(tmp_path), "dev") == load_questions(str(tmp_path), "validation") == made
    write(tmp_path / "dev.jsonl", questions(2))
    assert len(load_questions(str(tmp_path), "dev")) == 2, "the word itself comes first"


def test_a_folder_without_the_split_says_what_it_has(tmp_path: Path) -> None:
    write(tmp_path / "training.jsonl", questions(2))
    with pytest.raises(InputError, match=r"0 files for split train: .*There are training\.jsonl\."):
        load_questions(str(tmp_path), "train")


def test_a_dataset_that_was_saved_to_disk_is_read(tmp_path: Path) -> None:
    splits = {
        "train": Dataset.from_list(rows(questions(5))),
        "validation": Dataset.from_list(rows(questions(3, seed=1))),
    }
    DatasetDict(splits).save_to_disk(str(tmp_path / "both"))
    splits["train"].save_to_disk(str(tmp_path / "alone"))
    assert load_questions(str(tmp_path / "both"), "train") == questions(5)
    assert load_questions(str(tmp_path / "both"), "dev") == questions(3, seed=1)
    assert load_questions(str(tmp_path / "alone"), "train") == questions(5)
    with pytest.raises(InputError, match="no split test: the saved splits are train, validation"):
        load_questions(str(tmp_path / "both"), "test")
    for file in (tmp_path / "alone").glob("*.arrow"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match=r"alone.*Save it again"):
        load_questions(str(tmp_path / "alone"), "train")


def table(path: Path, made: list[Question]) -> None:
    """Questions as an array, or as CSV whose lists are JSON in a field."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows(made), indent=1))
        return
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(rows(made)[0])
        for row in rows(made):
            writer.writerow([json.dumps(value) if isinstance(value, list) else value for value in row.values()])


def test_a_csv_of_ones_own_has_its_names_above_and_one_answer_or_a_list(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    passages = """[{""id"": ""a"", ""text"": ""x""}, {'id': 'b', 'text': ""it's""}]"""
    path.write_text(f'qid,question,gold,documents,supporting\n1,"Who, then?",Ann,"{passages}",b\n', encoding="utf-8")
    (found,) = load_questions(str(path), "train", columns={"id": "qid", "answers": "gold"})
    assert (found.id, found.question, found.answers, found.supporting) == ("1", "Who, then?", ("Ann",), ("b",))
    path.write_text("1;Who?;Ann\n")
    with pytest.raises(InputError, match="the first line names the columns, one of which is question"):
        load_questions(str(path), "train")


@pytest.mark.parametrize("answers", ["['a' 'b']", "[citation needed]"])
def test_a_list_that_cannot_be_read_is_no_answer(tmp_path: Path, answers: str) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(f'id,question,answers,documents\n1,who,"{answers}","[{{""id"": ""a"", ""text"": ""x""}}]"\n')
    with pytest.raises(InputError, match=r"answers: .*Write a JSON list"):
        load_questions(str(path), "train")


def test_a_single_text_in_a_column_of_answers_is_the_only_one(tmp_path: Path) -> None:
    made = [{**row, "answer": "Ann"} for row in rows(questions(2))]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps({k: v for k, v in row.items() if k != "answers"}) for row in made))
    assert [found.answers for found in load_questions(str(path), "train", columns={"answers": "answer"})] == [
        ("Ann",)
    ] * 2


def test_a_missing_id_says_what_to_do_and_prepare_does_it(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(json.dumps({k: v for k, v in row.items() if k != "id"}) for row in rows(questions(3))))
    with pytest.raises(InputError, match=r"line 1: id: missing.*dataset_columns: \{id: …\}.*dro-rl data prepare"):
        load_questions(str(path), "train")
    prepare(Preparation("mine", str(path), tmp_path / "made.jsonl"))
    assert [question.id for question in load_questions(str(tmp_path / "made.jsonl"), "train")] == [
        f"mine-train-{n}" for n in (1, 2, 3)
    ]


@pytest.mark.parametrize("layout", ["shards", "saved"])
def test_prepare_numbers_the_rows_of_a_folder(tmp_path: Path, layout: str) -> None:
    made = [{k: v for k, v in row.items() if k != "id"} for row in rows(questions(4))]
    if layout == "saved":
        Dataset.from_list(made).save_to_disk(str(tmp_path / "from"))
    else:
        (tmp_path / "from").mkdir()
        for number in range(2):
            part = pa.Table.from_pylist(made[2 * number : 2 * number + 2])
            pq.write_table(part, tmp_path / "from" / f"train-0000{number}-of-00002.parquet")
    with pytest.raises(InputError, match=r"row 1.*id: missing"):
        load_questions(str(tmp_path / "from"), "train")
    prepare(Preparation("mine", str(tmp_path / "from"), tmp_path / "made.jsonl", split="train"))
    found = load_questions(str(tmp_path / "made.jsonl"), "train")
    assert [question.id for question in found] == [f"mine-train-{n}" for n in (1, 2, 3, 4)]
    assert [question.question for question in found] == [row["question"] for row in made]


def test_the_dev_split_of_a_hub_may_be_called_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def served(name: str, config: str | None, split: str) -> list[dict[str, Any]]:
        asked.append(split)
        if split != "validation":
            raise ValueError(f'Unknown split "{split}". Should be one of ["train", "validation"].')
        return rows(questions(2))

    monkeypatch.setattr("datasets.load_dataset", served)
    assert load_questions("someone/questions", "dev") == questions(2)
    assert asked == ["dev", "valid", "validation"]
    with pytest.raises(InputError, match=r'hub dataset with split test \(Unknown split "test"'):
        load_questions("someone/questions", "test")


def test_a_question_file_may_have_fields_of_released_formats_beside_its_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    made = [
        {**row, "answer": "x", "context": [], "supporting_facts": [], "paragraphs": []} for row in rows(questions(2))
    ]
    path.write_text("\n".join(map(json.dumps, made)))
    assert load_questions(str(path), "train") == questions(2)
    assert check(path).format == "questions"


def test_a_released_file_says_how_a_question_file_is_made_of_it(tmp_path: Path) -> None:
    path = released.write(tmp_path / "train.json", released.HOTPOT)
    with pytest.raises(
        InputError, match=r"a row of the format hotpotqa.*dro-rl data prepare hotpotqa --input .*train\.json"
    ):
        load_questions(str(path), "train")
