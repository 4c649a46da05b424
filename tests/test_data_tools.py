"""`dro-rl data prepare`, `check` and `show`, by the functions behind them and by the command line."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
from released import HOTPOT, MUSIQUE, RANK_LLM, TWO_WIKI, WOW, write
from typer.testing import CliRunner

from dro_rl.cli import app
from dro_rl.data import load_questions
from dro_rl.data.check import check, draw
from dro_rl.data.corpus import read_corpus
from dro_rl.data.manifest import manifest_path, questions_hash, read_manifest
from dro_rl.data.prepare import LICENCES, Preparation, prepare
from dro_rl.errors import InputError
from dro_rl.records import iter_questions, read_questions

DATA = Path(os.environ.get("DRO_RL_DATA") or Path(__file__).parent.parent.parent / "shared" / "data")


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """Six questions as HotpotQA releases them."""
    return write(tmp_path / "hotpot_dev_distractor_v1.json", *(HOTPOT | {"_id": f"h{n}"} for n in range(6)))


def job(source: Path | str, **others: Any) -> Preparation:
    output = others.pop("output", None) or Path(source).parent / "made" / "dev.jsonl.gz"
    return Preparation(others.pop("dataset", "hotpotqa"), str(source), output, **others)


def refusal(wanted: Preparation) -> str:
    with pytest.raises(InputError) as caught:
        prepare(wanted)
    assert not wanted.output.exists() or wanted.output.is_dir() or str(wanted.output) == wanted.source
    return str(caught.value)


# prepare ----------------------------------------------------------------------------------------------------


def test_prepare_writes_a_question_file_with_its_manifest(release: Path) -> None:
    wanted = job(release)
    manifest, skips = prepare(wanted)
    questions = read_questions(wanted.output)
    assert [question.id for question in questions] == [f"h{n}" for n in range(6)]
    assert read_manifest(wanted.output) == manifest
    assert (manifest.dataset, manifest.split, manifest.num_questions) == ("hotpotqa", "dev", 6)
    assert (manifest.licence, manifest.skipped, skips.total) == ("CC BY-SA 4.0", {}, 0)
    assert manifest.questions_hash == questions_hash(questions)
    assert manifest.sources == [{"name": release.name, "sha256": hashlib.sha256(release.read_bytes()).hexdigest()}]


def test_the_same_release_gives_the_same_bytes(release: Path) -> None:
    wanted = job(release)
    first, _ = prepare(wanted)
    assert prepare(wanted)[0].sha256 == first.sha256


def test_options_are_followed_and_recorded(release: Path) -> None:
    wanted = job(release, dataset="mine", format="hotpotqa", split="held-out", limit=2, licence="CC0")
    manifest, _ = prepare(wanted)
    assert (manifest.dataset, manifest.split, manifest.num_questions) == ("mine", "held-out", 2)
    assert manifest.licence == "CC0"
    assert {question.dataset for question in read_questions(wanted.output)} == {"mine"}
    assert prepare(job(release, dataset="mine", format="hotpotqa"))[0].licence == ""


def test_without_documents_the_candidates_are_yet_to_be_retrieved(release: Path) -> None:
    wanted = job(release, with_documents=False)
    manifest, _ = prepare(wanted)
    found = list(iter_questions(wanted.output, candidates="optional"))
    assert {(question.documents, question.supporting) for question in found} == {((), ())}
    assert manifest.questions_hash == prepare(job(release))[0].questions_hash
    prepare(wanted)
    with pytest.raises(InputError, match="Retrieve some first"):
        read_questions(wanted.output)


def test_candidates_make_a_corpus_in_which_the_labels_hold(release: Path) -> None:
    wanted = job(release, corpus=release.parent / "corpus.jsonl.gz")
    prepare(wanted)
    passages = list(read_corpus(wanted.corpus or ""))
    assert [passage.title for passage in passages] == ["Carl", "Ann", "Bob"]
    assert set(read_questions(wanted.output)[0].supporting) == {passages[1].id, passages[2].id}


def test_bad_rows_are_counted_in_the_manifest_and_what_is_no_question_too(tmp_path: Path) -> None:
    rows = [MUSIQUE, MUSIQUE | {"answerable": False}, MUSIQUE | {"id": "2hop__1", "answer": ""}, MUSIQUE]
    path = write(tmp_path / "musique_full_v1.0_train.jsonl", *rows)
    wanted = job(path, dataset="musique", skip_bad=True)
    manifest, skips = prepare(wanted)
    assert manifest.num_questions == 1
    assert manifest.skipped == {"unanswerable": 1, "answer: this is not empty": 1, "id: ids are unique": 1}
    assert "line 3: answer" in str(skips.first["answer: this is not empty"])
    wanted.output.unlink()
    assert "line 3: answer" in refusal(dataclasses.replace(wanted, skip_bad=False))


def test_aliases_and_answers_come_from_files_beside(tmp_path: Path) -> None:
    aliases = tmp_path / "id_aliases.json"
    aliases.write_text('{"Q_id": "Q12", "aliases": ["Eva M."]}\n')
    wanted = job(write(tmp_path / "dev.json", TWO_WIKI), dataset="2wikimultihopqa", aliases=aliases)
    manifest, _ = prepare(wanted)
    assert read_questions(wanted.output)[0].answers == ("Eva", "Eva M.")
    assert [each["name"] for each in manifest.sources] == ["dev.json", "id_aliases.json"]
    answers = write(tmp_path / "answers.jsonl", {"id": "7", "answers": ["Ann"]})
    wanted = job(write(tmp_path / "requests_test.jsonl", RANK_LLM), dataset="mine", answers=answers)
    assert prepare(wanted)[0].split == "test"


def test_aliases_for_rows_without_answer_ids_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    """Defect: the first release has no ids, so every further answer was lost without a word."""
    aliases = tmp_path / "id_aliases.json"
    aliases.write_text('{"Q_id": "Q12", "aliases": ["Eva M."]}\n')
    plain = {name: value for name, value in TWO_WIKI.items() if name != "answer_id"}
    wanted = job(write(tmp_path / "dev.json", plain), dataset="2wikimultihopqa", aliases=aliases)
    assert "data_ids.zip" in refusal(wanted)
    assert not wanted.output.exists()
    write(tmp_path / "dev.json", plain, TWO_WIKI | {"_id": "other"})  # comparison questions need not have one
    assert prepare(wanted)[0].num_questions == 2


def test_a_hub_dataset_is_prepared_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def served(name: str, config: str | None, **others: Any) -> list[dict[str, Any]]:
        asked.update(name=name, config=config, **others)
        return [HOTPOT]

    monkeypatch.setattr("datasets.load_dataset", served)
    wanted = job("someone/hotpot", output=tmp_path / "q.jsonl", config="distractor", split="validation")
    manifest, _ = prepare(wanted)
    assert asked == {"name": "someone/hotpot", "config": "distractor", "split": "validation", "streaming": True}
    assert manifest.sources == [{"name": "someone/hotpot/distractor/validation", "sha256": ""}]


@pytest.mark.parametrize("name", ["data.json", "train_dev.json", "contest.json", "someone/hub"])
def test_a_name_that_tells_no_split_asks_for_one(release: Path, name: str) -> None:
    assert "tells one split. Name it: --split train" in refusal(job(name, output=release.parent / "q.jsonl"))


def test_wrong_options_are_refused_before_anything_is_read(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dro_rl.data.prepare.released_rows", lambda *_, **__: pytest.fail("read"))
    folder = release.parent
    assert "written as .jsonl or .jsonl.gz" in refusal(job(release, output=folder / "q.parquet"))
    own = write(folder / "q.jsonl", HOTPOT)
    assert "a file of its own" in refusal(job(own, output=own, split="dev"))
    assert "a file of its own" in refusal(job(release, corpus=job(release).output))
    assert "written as" in refusal(job(release, corpus=folder / "c.tsv"))
    assert "Drop --no-documents" in refusal(job(release, corpus=folder / "c.jsonl", with_documents=False))
    assert "formats are questions, dpr" in refusal(job(release, format="squad"))
    assert "--aliases" in refusal(job(release, aliases=folder / "none.json"))


def test_a_release_without_a_question_writes_nothing(tmp_path: Path) -> None:
    assert "no questions" in refusal(job(write(tmp_path / "dev.json")))
    path = write(tmp_path / "musique_dev.jsonl", MUSIQUE | {"answerable": False})
    assert "no questions" in refusal(job(path, dataset="musique"))


def test_a_row_that_breaks_the_work_off_leaves_the_file_before(release: Path) -> None:
    wanted = job(release)
    prepare(wanted)
    before = wanted.output.read_bytes()
    write(release, HOTPOT, HOTPOT | {"_id": "b", "answer": 3})
    with pytest.raises(InputError, match="item 2: answer"):
        prepare(wanted)
    assert wanted.output.read_bytes() == before
    assert read_manifest(wanted.output) is not None


# check ------------------------------------------------------------------------------------------------------


def good(n: int) -> dict[str, Any]:
    return {"id": f"q{n}", "question": "who?", "answers": ["a", "b"], "documents": [{"id": "d", "text": "t"}]}


def test_check_goes_on_after_an_error_and_counts_by_kind(tmp_path: Path) -> None:
    rows = [good(0), good(1) | {"answers": ["", "x"]}, good(2) | {"answers": ["x", " "]}, good(0), good(4)]
    path = tmp_path / "q.jsonl"
    path.write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode() + b'{"id": \n\xff\n' + b'"text"\n')
    seen: list[str] = []
    report = check(path, on_error=lambda error: seen.append(error.place))
    assert report.counts["questions"] == 2
    assert report.counts["answers"] == 4
    assert report.wrong == {
        "answers[]: this is not empty": 2,
        "id: ids are unique": 1,
        "each line is one JSON object": 1,
        "files are UTF-8": 1,
        "this is a JSON object": 1,
    }
    lines = ["2 (id q1): answers[1]", "3 (id q2): answers[2]", "4: id", "6", "7", "8"]
    assert seen == [f"{path}: line {line}" for line in lines]


def test_check_reports_where_a_file_breaks_off(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(good(n)) + "\n" for n in range(50)).encode())[:-20])
    report = check(path)
    assert report.wrong == {"the gzip file is whole": 1}


def test_check_reads_released_files_and_corpora_too(release: Path) -> None:
    report = check(release)
    assert (report.format, report.counts["questions"], report.counts["candidates"]) == ("hotpotqa", 6, 18)
    passages = [{"id": "1", "text": "a"}, {"id": "1", "text": "b"}, {"id": "2", "text": ""}, {"id": "3", "text": "c"}]
    report = check(write(release.parent / "c.jsonl", *passages))
    assert (report.format, report.counts["passages"]) == ("corpus", 2)
    assert report.wrong == {"id: ids of a corpus are unique": 1, "text: this is not empty": 1}
    (release.parent / "c.tsv").write_text("id\ttext\ttitle\n1\ta\tA\n")
    assert check(release.parent / "c.tsv").counts["passages"] == 1


def test_check_compares_with_the_manifest(release: Path) -> None:
    wanted = job(release)
    prepare(wanted)
    assert check(wanted.output).manifest == read_manifest(wanted.output)
    lines = gzip.decompress(wanted.output.read_bytes()).splitlines(keepends=True)
    wanted.output.write_bytes(gzip.compress(b"".join(lines[:-1])))
    assert any("sha256" in what for what in check(wanted.output).wrong)


def test_check_says_when_there_is_nothing(tmp_path: Path) -> None:
    assert check(write(tmp_path / "q.json"), "hotpotqa").wrong == {"a file has at least one question": 1}
    report = check(write(tmp_path / "unknown.jsonl", {"q": 1}))
    assert (report.format, report.wrong.total()) == ("", 1)
    assert check(tmp_path / "none.jsonl").wrong == {"a file to read exists": 1}
    with pytest.raises(InputError, match="formats are"):
        check(tmp_path / "q.json", "squad")


def test_check_names_the_field_that_questions_lack(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", {"id": "1", "question": "who?", "gold": "Ann"})
    assert "line 1: answers: missing" in run("check", path, code=2)
    assert "1 answers" in run("check", path, "--column", "answers=gold")


UNREADABLE = {
    "pretty-printed": (json.dumps(good(0), indent=2), "line 1", "whole on one line"),
    "single-quoted": (str(good(0)) + "\n" + str(good(1)), "line 1", "double quotes"),
    "text": ("Who?\nAnn\n", "line 1", "one object a line"),
    "an array": (json.dumps([good(0)], indent=1), "line 1", "not an array over many lines"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_check_names_the_line_of_a_file_that_has_no_row_to_read(tmp_path: Path, name: str) -> None:
    """Defect: "no fields… name one with --format", where the lines are no JSON."""
    text, place, fix = UNREADABLE[name]
    path = tmp_path / "q.jsonl"
    path.write_text(text)
    said: list[str] = []
    report = check(path, on_error=lambda error: said.append(str(error)))
    assert report.format == ""
    assert f"{path}: {place}" in said[0]
    assert fix in said[0]
    assert "--format" not in "".join(said)


@pytest.mark.parametrize("name", ["q.jsonl", "q.json", "q.csv", "q.jsonl.gz"])
def test_check_says_that_an_empty_file_has_no_rows(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(b"") if name.endswith(".gz") else b"")
    (error,) = check(tmp_path / name).wrong
    assert "--format" not in error


@pytest.mark.parametrize("name", ["train.jsonl", "train.json", "train.csv"])
def test_check_and_training_read_the_same(tmp_path: Path, name: str) -> None:
    made = [good(n) | {"documents": [{"id": "d", "text": "t", "title": ""}], "supporting": ["d"]} for n in range(3)]
    if name.endswith(".csv"):
        cells = [[json.dumps(v).replace('"', '""') if isinstance(v, list) else v for v in row.values()] for row in made]
        lines = [",".join(made[0]), *(",".join(f'"{cell}"' for cell in row) for row in cells)]
        (tmp_path / name).write_text("\n".join(lines))
    else:
        write(tmp_path / name, *made)
    found = load_questions(str(tmp_path / name), "train")
    report = check(tmp_path / name)
    assert (report.hash, report.wrong.total()) == (questions_hash(found), 0)
    by_split = check(tmp_path, split="train")
    assert (by_split.hash, by_split.counts["questions with labels"]) == (report.hash, 3)


def test_check_of_a_folder_is_of_a_corpus_or_asks_for_a_split(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    write(tmp_path / "c" / "1.jsonl", {"id": "1", "text": "a"})
    assert check(tmp_path / "c").format == "corpus"
    write(tmp_path / "train.jsonl", good(0))
    assert "Add --split train" in run("check", tmp_path, code=2)
    assert "1 questions" in run("check", tmp_path, "--split", "train")
    assert "0 files for split dev" in run("check", tmp_path, "--split", "dev", code=2)


def test_check_reads_the_columns_that_a_recipe_names(tmp_path: Path) -> None:
    row = {"qid": 1, "query": "who?", "answers": ["a"], "documents": [{"id": "d", "text": "t"}]}
    path = write(tmp_path / "q.jsonl", row)
    assert check(path).wrong
    report = check(path, columns={"id": "qid", "question": "query"})
    assert (report.format, report.counts["questions"], report.wrong.total()) == ("questions", 1, 0)
    assert "1 questions" in run("check", path, "--column", "id=qid", "--column", "question=query")
    assert "NAME=COLUMN" in run("check", path, "--column", "qid", code=2)


def test_check_says_that_candidates_are_missing(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", {key: value for key, value in good(0).items() if key != "documents"})
    assert "1 without candidates: dro-rl retrieve finds some" in run("check", path)


# show -------------------------------------------------------------------------------------------------------


def test_drawn_questions_are_distinct_in_file_order_and_depend_on_the_seed(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", *map(good, range(30)))
    drawn = [question.id for question in draw(path, 5, seed=1)]
    assert drawn == [question.id for question in draw(path, 5, seed=1)]
    assert drawn == sorted(set(drawn), key=lambda each: int(each[1:]))
    assert len(drawn) == 5
    assert len({tuple(question.id for question in draw(path, 5, seed=seed)) for seed in range(6)}) > 1
    assert len(draw(path, 50, seed=0)) == 30


def test_every_question_is_drawn_equally_often(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", *map(good, range(6)))
    counts = dict.fromkeys((f"q{n}" for n in range(6)), 0)
    for seed in range(600):
        counts[draw(path, 1, seed)[0].id] += 1
    assert all(70 < count < 130 for count in counts.values())


# The command line -------------------------------------------------------------------------------------------


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["data", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def test_prepare_says_what_it_wrote_and_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "train.json", WOW, WOW | {"chosen_topic": ""})
    output = tmp_path / "wow.jsonl"
    said = run("prepare", "wow", "--input", path, "--output", output, "--skip-bad")
    assert "3 questions of wow, train" in said
    assert "left out: 1 by the rule 'chosen_topic: this is not empty'" in said
    assert manifest_path(output).is_file()
    error = run("prepare", "wow", "--input", path, "--output", output, code=2)
    assert "item 2: chosen_topic" in error.replace("\n", "")
    document = json.loads(run("prepare", "wow", "--input", path, "--output", output, "--limit", 1, "--json"))
    assert document["manifest"]["num_questions"] == 1


def test_check_prints_each_wrong_line_up_to_the_limit_and_ends_in_2(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", good(0), *(good(n) | {"answers": []} for n in range(1, 6)))
    said = run("check", path, "--limit", 2, code=2)
    assert said.count("at least one answer") == 3
    assert "line 2 (id q1)" in said
    assert "wrong: 5 by the rule 'answers: a question has at least one answer' (3 not shown)" in said
    assert run("check", path, "--limit", 0, code=2).count("at least one answer") == 6
    document = json.loads(run("check", path, "--json", code=2))
    assert document["files"][0]["wrong"] == {"answers: a question has at least one answer": 5}
    assert len(document["errors"]) == 5
    clean = write(tmp_path / "clean.jsonl", good(0))
    assert "nothing wrong" in run("check", clean)


def test_show_prints_questions_with_their_supporting_candidates_marked(release: Path) -> None:
    said = run("show", release, "--id", "h3")
    assert "[2]* Ann" in said
    assert "[1]  Carl" in said
    assert "answers: yes" in said
    assert len(json.loads(run("show", release, "-n", 2, "--json"))["questions"]) == 2
    assert "'h9'" in run("show", release, "--id", "h9", code=2)


def test_show_keeps_markup_and_control_characters_out_of_the_terminal(tmp_path: Path) -> None:
    row = good(0) | {"question": "[bold]who[/x]\x1b[2J?", "answers": ["[/]"], "documents": []}
    said = run("show", write(tmp_path / "q.jsonl", row))
    assert "[bold]who[/x]" in said
    assert "\x1b[2J" not in said
    assert "no candidates yet" in said


def test_help_names_every_format() -> None:
    from dro_rl.cli.data import FORMAT
    from dro_rl.data.readers import FORMATS

    assert FORMAT.split(", ") == list(FORMATS)


def test_the_five_datasets_have_a_licence_and_stand_in_the_documentation() -> None:
    text = (Path(__file__).parent.parent / "docs" / "data.md").read_text()
    from dro_rl.data.readers import FORMATS

    for name, licence in LICENCES.items():
        assert name in text
        assert licence in text
    for name in FORMATS:
        assert f"`{name}`" in text


@pytest.mark.real_data
@pytest.mark.skipif(not DATA.is_dir(), reason="no question files at DRO_RL_DATA or ../shared/data")
@pytest.mark.parametrize("name", LICENCES)
def test_real_questions_go_through_prepare_unchanged(tmp_path: Path, name: str) -> None:
    source = DATA / "dev" / f"{name}.jsonl.gz"
    wanted = Preparation(name, str(source), tmp_path / "q.jsonl.gz", split="dev", limit=40)
    prepare(wanted)
    assert read_questions(wanted.output) == list(itertools.islice(iter_questions(source), 40))
    assert not check(wanted.output).wrong
