"""The released formats: made-up rows of each, and the questions that come of them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from released import (
    DPR,
    FIRST,
    FLASHRAG,
    FLASHRAG_CONTEXT,
    HOTPOT,
    HOTPOT_COLUMNS,
    HOTPOT_OBJECTS,
    KILT,
    MUSIQUE,
    RANK_LLM,
    RETRIEVED,
    SEARCH_R1,
    TWO_WIKI,
    TWO_WIKI_MIRRORS,
    WOW,
    write,
)

from dro_rl.data.readers import COLUMNS, FORMATS, read_aliases, read_answers, read_released, released_rows, sniff
from dro_rl.data.readers.fields import Source, document_id
from dro_rl.errors import InputError
from dro_rl.records import Document, Question, is_field, read_questions, write_questions
from dro_rl.rows import Skips


def document(title: str, text: str, identifier: str = "") -> Document:
    return Document(identifier or document_id(title, text), title, text)


TEA = document("Tea", "Tea is a drink. It is hot.")
GREEN = document("Green tea", "Green tea is green. It is old.")
SHORT_TEA = document("Tea", "Tea is a drink.")
CUP = document("Cup", "A cup holds tea.")
CARL, ANN, BOB = (
    document("Carl", "Carl is a baker."),
    document("Ann", "Ann sings. Ann was born in Łódź."),
    document("Bob", "Bob."),
)
HOTPOT_QUESTION = Question(
    HOTPOT["_id"], HOTPOT["question"], ("yes",), (CARL, ANN, BOB), (ANN.id, BOB.id), "x", "comparison"
)
MIA = (
    document("Film", "It was made by Mia."),
    document("Mia", "Mia's mother is Eva."),
    document("Mia", "Another Mia."),
)
RIVER = (document("Ort", "Ein Ort."), document("Fluss", "Ein Fluss."), document("Fluss", "Noch ein Fluss."))
FLASH = (document("Bob", "Bob is."), document("Ann", "Ann is. She sings."))
GOLDEN: dict[str, tuple[str, Any, list[Question]]] = {
    "NQ-open": (
        "nq-open",
        {"question": "wo", "answer": ["Łódź", "Lodz"]},
        [Question("x-dev-1", "wo", ("Łódź", "Lodz"), (), dataset="x")],
    ),
    "retrieved passages": (
        "retrieved",
        RETRIEVED,
        [
            Question(
                "x-dev-1",
                "who painted it",
                ("Zoë",),
                (Document("8", "A", "Nobody."), Document("9", "B", "Zoë did.")),
                ("9",),
                "x",
            )
        ],
    ),
    "HotpotQA": ("hotpotqa", HOTPOT, [HOTPOT_QUESTION]),
    "HotpotQA of a hub": ("hotpotqa", HOTPOT_COLUMNS, [HOTPOT_QUESTION]),
    "HotpotQA of objects": ("hotpotqa", HOTPOT_OBJECTS, [HOTPOT_QUESTION]),
    "HotpotQA fullwiki, gold not retrieved": (
        "hotpotqa",
        HOTPOT | {"context": HOTPOT["context"][:2]},
        [Question(HOTPOT["_id"], HOTPOT["question"], ("yes",), (CARL, ANN), (ANN.id,), "x", "comparison")],
    ),
    "2WikiMultihopQA": (
        "2wikimultihopqa",
        TWO_WIKI,
        [
            Question(
                TWO_WIKI["_id"],
                TWO_WIKI["question"],
                ("Eva", "Eva M.", "Evan"),
                MIA,
                tuple(each.id for each in MIA),
                "x",
                "compositional",
            )
        ],
    ),
    "MuSiQue": (
        "musique",
        MUSIQUE,
        [
            Question(
                MUSIQUE["id"],
                "Wo mündet er?",
                ("Ulm", "Ulm an der Donau"),
                RIVER,
                (RIVER[1].id, RIVER[2].id),
                "x",
                "3-hop",
            )
        ],
    ),
    "Wizard of Wikipedia": (
        "wow",
        WOW,
        [
            Question("x-dev-1-1", "Tea", ("Do you like tea?",), (TEA,), (TEA.id,), "x"),
            Question(
                "x-dev-1-3",
                "Do you like tea?\nI do! Green tea.",
                ("It is very old.",),
                (TEA, GREEN, SHORT_TEA, CUP),
                (GREEN.id,),
                "x",
            ),
            Question(
                "x-dev-1-5",
                "Do you like tea?\nI do! Green tea.\nIt is very old.\nBye.",
                ("Bye!",),
                (TEA,),
                (),
                "x",
            ),
        ],
    ),
    "KILT": ("kilt", KILT, [Question("-1000", "first\nsecond", ("Ulm", "Ulm, Germany"), (), dataset="x")]),
    "FlashRAG": ("flashrag", FLASHRAG, [Question("dev_3", "who?", ("Ann", "Anna"), (), dataset="x")]),
    "FlashRAG with a context": (
        "flashrag",
        FLASHRAG_CONTEXT,
        [Question("dev_4", "who?", ("Ann",), FLASH, (FLASH[1].id,), "x", "bridge")],
    ),
    "Search-R1": ("search-r1", SEARCH_R1, [Question("nq-train_0", "who sings?", ("Ann",), (), dataset="nq")]),
    "Search-R1, verl's columns alone": (
        "search-r1",
        {key: SEARCH_R1[key] for key in ("data_source", "prompt", "ability", "reward_model", "extra_info")},
        [Question("nq-train_0", "who sings?", ("Ann",), (), dataset="nq")],
    ),
    "rank_llm": (
        "rank-llm",
        RANK_LLM,
        [
            Question(
                "7",
                "who sings?",
                ("Ann",),
                (Document("a", "Ann", "Ann sings."), Document("12", "Bob", "Bob does not.")),
                dataset="x",
            )
        ],
    ),
}


def source() -> Source:
    return Source("x", "dev", aliases={"Q12": ("Eva M.", "Eva", "Evan")}, answers={"7": ("Ann",)})


def read(path: Path, format: str | None = None, **options: Any) -> list[Question]:
    return list(read_released(released_rows(path), format or explicit(path), source(), **options))


def explicit(path: Path) -> str:
    """The format, sniffed, so that a row of any dataset is read under the made-up name."""
    place, row = next(released_rows(path))
    return sniff(row, place)


def refusal(path: Path, format: str | None = None) -> str:
    with pytest.raises(InputError) as caught:
        read(path, format)
    return str(caught.value)


# What is read -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("container", ["r.json", "r.jsonl", "r.jsonl.gz"])
def test_a_released_row_gives_these_questions(tmp_path: Path, name: str, container: str) -> None:
    """Fields, order, aliases, labels, types; the format told by the fields alone; Windows line ends."""
    format, row, expected = GOLDEN[name]
    path = write(tmp_path / container, row)
    assert explicit(path) == format
    assert read(path) == expected


@pytest.mark.parametrize("name", ["HotpotQA of a hub", "FlashRAG with a context", "Search-R1", "MuSiQue", "rank_llm"])
def test_parquet_gives_the_same(tmp_path: Path, name: str) -> None:
    """Search-R1's container, and that of datasets from a hub."""
    format, row, expected = GOLDEN[name]
    if format == "rank-llm":
        row = {**row, "candidates": [{**each, "docid": str(each["docid"])} for each in row["candidates"]]}
    path = write(tmp_path / "r.parquet", row)
    assert explicit(path) == format
    assert read(path) == expected


@pytest.mark.parametrize("name", GOLDEN)
def test_what_is_read_goes_through_a_question_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / "q.jsonl.gz"
    write_questions(path, GOLDEN[name][2])
    assert read_questions(path, candidates="optional") == GOLDEN[name][2]
    assert read(path, "questions") == GOLDEN[name][2]


@pytest.mark.parametrize("name", TWO_WIKI_MIRRORS)
@pytest.mark.parametrize("container", ["r.jsonl", "r.parquet"])
def test_mirrors_that_keep_json_as_text_give_the_same(tmp_path: Path, name: str, container: str) -> None:
    """Defect: brackets and quotes of JSON became passages, and no title met its label."""
    row = TWO_WIKI_MIRRORS[name]
    if container.endswith(".parquet"):  # whose columns have one type
        row = {key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()}  # fmt: skip
    path = write(tmp_path / container, row)
    assert explicit(path) == "2wikimultihopqa"
    assert read(path) == GOLDEN["2WikiMultihopQA"][2]


def musique_columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {key: [row[key] for row in rows] for key in rows[0]}


@pytest.mark.parametrize(
    "paragraphs",
    [
        musique_columns,
        json.dumps,
        lambda rows: json.dumps(musique_columns(rows)),
        lambda rows: list(map(json.dumps, rows)),
    ],
    ids=["columns", "text", "columns as text", "texts"],
)
def test_musique_of_columns_or_text_gives_the_same(tmp_path: Path, paragraphs: Callable[[Any], Any]) -> None:
    row = MUSIQUE | {"paragraphs": paragraphs(MUSIQUE["paragraphs"]), "answer_aliases": str(MUSIQUE["answer_aliases"])}
    assert read(write(tmp_path / "r.jsonl", row)) == GOLDEN["MuSiQue"][2]


def test_a_title_may_stand_in_quotes_of_its_own(tmp_path: Path) -> None:
    context = [['"Heroes"', ["An album."]], ["Low", ["Another album."]]]
    row = HOTPOT | {"context": context, "supporting_facts": [['"Heroes"', 0]]}
    question = read(write(tmp_path / "r.json", row))[0]
    assert [each.title for each in question.documents] == ['"Heroes"', "Low"]
    assert question.supporting_numbers == (1,)


@pytest.mark.parametrize("name", GOLDEN)
def test_of_columns_no_others_are_read_than_the_readers_know(tmp_path: Path, name: str) -> None:
    """Defect: a column that a reader reads is not on the list of those that are read."""
    format, row, expected = GOLDEN[name]
    known = {key: value for key, value in row.items() if key in COLUMNS or is_field(key)}
    assert read(write(tmp_path / "r.jsonl", known), format) == expected


def test_dpr_json_keeps_the_corpus_ids_and_hides_which_come_first(tmp_path: Path) -> None:
    """Defect: positives first, so that the place tells the label."""
    rows = [DPR | {"question": f"wer malte es {n}"} for n in range(40)]
    questions = read(write(tmp_path / "nq-dev.json", *rows))
    assert questions[0].answers == ("Zoë", "Zoe")
    for question in questions:
        assert {document.id for document in question.documents} == {"17", "4", *map(str, range(30, 36))}
        assert set(question.supporting) == {"17", "4"}
    first = [question.supporting_numbers[0] for question in questions]
    assert len(set(first)) > 3
    assert questions == read(tmp_path / "nq-dev.json")
    assert [question.id for question in questions[:2]] == ["x-dev-1", "x-dev-2"]


def test_dpr_csv_has_its_answers_as_a_python_list(tmp_path: Path) -> None:
    path = tmp_path / "nq-test.csv"
    path.write_bytes('wo\t"[""Ann\'s"", \'Łódź\']"\r\nwer\t[\'Ann\']\n'.encode())
    assert read(path) == [
        Question("x-dev-1", "wo", ("Ann's", "Łódź"), (), dataset="x"),
        Question("x-dev-2", "wer", ("Ann",), (), dataset="x"),
    ]


def test_the_unanswerable_half_of_musique_full_is_left_out_and_counted(tmp_path: Path) -> None:
    """Both twins have the same id."""
    path, about = write(tmp_path / "r.jsonl", MUSIQUE, MUSIQUE | {"answerable": False}), source()
    assert len(list(read_released(released_rows(path), "musique", about))) == 1
    assert about.left_out == {"unanswerable": 1}


def test_the_first_implementations_labels_show_neither_by_place_nor_by_spelling(tmp_path: Path) -> None:
    """Gold and retrieved passages are spelled in two ways there; a passage that is both is one candidate."""
    question = read(write(tmp_path / "r.json", FIRST))[0]
    texts = {document.text: document.title for document in question.documents}
    assert texts == {"Ann sings.": "Ann", "Bob hums.": "Dr. Bob", "Carl is deaf.": "Carl", "Nobody knows.": ""}
    assert {question.documents[n - 1].title for n in question.supporting_numbers} == {"Ann", "Dr. Bob"}
    retrieved = FIRST | {"positive": FIRST["positive"][:1]}
    question = read(write(tmp_path / "r.json", retrieved))[0]
    assert [document.title for document in question.documents] == ["Carl", "Ann", ""]
    assert question.supporting_numbers == (2,)


def test_a_wizards_sentence_under_another_title_is_found_in_its_passage(tmp_path: Path) -> None:
    dialog = [dict(turn) for turn in WOW["dialog"]]  # type: ignore[attr-defined]
    dialog[2]["checked_passage"] = {"partner_x_1": "Some other title"}
    assert read(write(tmp_path / "r.json", WOW | {"dialog": dialog}))[1].supporting == (GREEN.id,)


def test_alias_and_answer_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "id_aliases.json"
    path.write_text('{"Q_id": "Q12", "aliases": ["Eva M."], "demonyms": ["Evan"]}\n{"Q_id": "Q1", "aliases": []}\n')
    assert read_aliases(path) == {"Q12": ("Eva M.", "Evan"), "Q1": ()}
    path = write(tmp_path / "answers.jsonl", {"id": 7, "answers": ["Ann", "Ann", "Anna"]})
    assert read_answers(path) == {"7": ("Ann", "Anna")}


def test_a_release_is_a_stream(tmp_path: Path) -> None:
    """Defect: an array of gigabytes held in memory, or read whole before its first question."""
    path = tmp_path / "r.json"
    path.write_text("[" + json.dumps(HOTPOT) + "," + json.dumps(HOTPOT | {"_id": "b"}) + ", broken")
    stream = read_released(released_rows(path), "hotpotqa", source())
    assert next(stream).id == HOTPOT["_id"]


def test_every_format_is_told_from_every_other() -> None:
    told = {sniff(row, "here") for _, row, _ in GOLDEN.values()} | {sniff(DPR, "here"), sniff(FIRST, "here")}
    told |= {sniff(["q", "['a']"], "here"), sniff({"id": "1", "question": "q", "answers": ["a"]}, "here")}
    assert told == set(FORMATS)


# What is wrong ----------------------------------------------------------------------------------------------


def without(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in names}


def turn(**fields: Any) -> dict[str, Any]:
    return WOW | {"dialog": [{"speaker": "0_Wizard", "text": "Hi.", "retrieved_passages": []} | fields]}


BAD: dict[str, tuple[str, Any, tuple[str, ...]]] = {
    "no question": ("hotpotqa", without(HOTPOT, "question"), ("question: missing", "file's format")),
    "no answer": ("hotpotqa", without(HOTPOT, "answer"), ("answer: missing",)),
    "blank answer": ("hotpotqa", HOTPOT | {"answer": " "}, ("answer", "not empty")),
    "a context that is text": ("hotpotqa", HOTPOT | {"context": "Ann"}, ("context: 'Ann'", "a list")),
    "a paragraph without sentences": (
        "hotpotqa",
        HOTPOT | {"context": [["Ann"]]},
        ("context[1]", "pair of title and sentences"),
    ),
    "columns of labels and passages of two lengths": (
        "musique",
        MUSIQUE | {"paragraphs": {"title": ["A", "B"], "paragraph_text": ["x"]}},
        ("paragraphs: title 2, paragraph_text 1", "one length"),
    ),
    "text that is no JSON": ("hotpotqa", HOTPOT | {"context": "[['Ann' 'x']]"}, ("context: \"[['Ann'", "a list")),
    "an empty paragraph": ("hotpotqa", HOTPOT | {"context": [["Ann", [""]]]}, ("context[1]", "not empty")),
    "sentences that are numbers": ("hotpotqa", HOTPOT | {"context": [["Ann", [1]]]}, ("context[1]", "sentences")),
    "columns of two lengths": (
        "hotpotqa",
        HOTPOT_COLUMNS | {"context": {"title": ["A", "B"], "sentences": [["x"]]}},
        ("context[1]",),
    ),
    "a fact that is text": ("hotpotqa", HOTPOT | {"supporting_facts": ["Ann"]}, ("supporting_facts[1]", "a pair")),
    "no paragraph text": (
        "musique",
        MUSIQUE | {"paragraphs": [{"title": "Ort", "is_supporting": False}]},
        ("paragraphs[1]: paragraph_text: missing",),
    ),
    "a label that is text": (
        "musique",
        MUSIQUE | {"paragraphs": [{"title": "Ort", "paragraph_text": "x", "is_supporting": "no"}]},
        ("paragraphs[1]: is_supporting: 'no'", "true or false"),
    ),
    "aliases that are text": ("musique", MUSIQUE | {"answer_aliases": "Ulm"}, ("answer_aliases: 'Ulm'", "a list")),
    "an empty list of answers": ("dpr", DPR | {"answers": []}, ("answers: empty list", "at least one answer")),
    "a context without text": ("dpr", DPR | {"hard_negative_ctxs": [{"title": "A"}]}, ("ctxs[1]: text: missing",)),
    "answers that are text": ("nq-open", {"question": "q", "answer": "a"}, ("answer: 'a'", "a list")),
    "a test file of KILT": ("kilt", {"id": "1", "input": "q", "output": []}, ("output: no answer", "without answers")),
    "a KILT file without output": ("kilt", {"id": "1", "input": "q"}, ("output: missing",)),
    "a numeric golden answer": ("flashrag", FLASHRAG | {"golden_answers": [3]}, ("golden_answers[1]: 3", "text")),
    "a prompt without its question": (
        "search-r1",
        without(SEARCH_R1, "question") | {"prompt": [{"role": "user", "content": "who?"}]},
        ("prompt: 'who?'", "Question:"),
    ),
    "no target": ("search-r1", without(SEARCH_R1, "golden_answers") | {"reward_model": {}}, ("ground_truth: missing",)),
    "a request without answers": (
        "rank-llm",
        RANK_LLM | {"query": {"qid": "8", "text": "q"}},
        ("qid: '8'", "--answers FILE"),
    ),
    "a candidate without text": (
        "rank-llm",
        RANK_LLM | {"candidates": [{"docid": "a", "score": 1, "doc": {}}]},
        ("candidates[1]: doc: text: missing",),
    ),
    "passages that are objects": ("dro", FIRST | {"positive": [{"text": "x"}]}, ("positive[1]", "text")),
    "a turn without speaker": ("wow", turn(speaker=None), ("dialog[1]: speaker: missing",)),
    "a passage without sentences": ("wow", turn(retrieved_passages=[{"Cup": []}]), ("Cup", "not empty")),
    "a checked sentence that is text": ("wow", turn(checked_sentence="Tea is"), ("checked_sentence", "an object")),
    "a row that is text": ("hotpotqa", "Ann", ("'Ann'", "JSON object")),
    "a row that is null": ("wow", None, ("None", "JSON object")),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_row_is_named_by_its_own_field(tmp_path: Path, name: str) -> None:
    """Defect: a KeyError; or a message about fields of ours that the released file does not have."""
    format, row, said = BAD[name]
    message = refusal(write(tmp_path / "r.json", row), format)
    for part in (str(tmp_path / "r.json"), "item 1", *said):
        assert part in message


def test_an_id_that_stands_twice_is_refused(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "r.jsonl", HOTPOT, HOTPOT))
    assert "line 2: id" in message
    assert "or that of line 1." in message


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("only a question", "a question, a tab and a list"),
        ("q\tAnn", "['…', '…']"),
        ("q\t[]", "['…', '…']"),
        ("q\t__import__('os').getcwd()", "['…', '…']"),
        ("q\t[1]", "text"),
        (" \t['Ann']", "not empty"),
    ],
)
def test_a_wrong_line_of_a_csv_is_named_and_nothing_in_it_is_run(tmp_path: Path, line: str, said: str) -> None:
    """Defect: eval of the second column, which runs what the file says."""
    path = tmp_path / "nq-test.csv"
    path.write_text(f"q\t['a']\n{line}\n")
    message = refusal(path, "dpr-csv")
    assert "line 2" in message
    assert said in message


@pytest.mark.parametrize(
    "row", [{"a": 1}, [1, 2], "text", None, {"id": "1", "input": "q", "question": "q", "ctxs": []}]
)
def test_fields_of_no_format_or_of_several_ask_for_one(row: Any) -> None:
    with pytest.raises(InputError, match=r"Name one with --format: questions, dpr, "):
        sniff(row, "r.json: item 1")


def test_bad_rows_are_left_out_and_counted_when_asked(tmp_path: Path) -> None:
    """A dialogue with one wrong turn is left out whole: half of it would be another dialogue."""
    half = WOW | {"dialog": [*WOW["dialog"], {"speaker": "0_Wizard"}]}  # type: ignore[misc]
    path, skips = write(tmp_path / "r.jsonl", WOW, half, turn(text=""), WOW), Skips()
    assert len(read(path, "wow", bad=skips)) == 6
    assert skips.counts == {"text: every row has this field": 1, "text: this is not empty": 1}


CONTAINERS: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "lines where an array is released": ("r.json", lambda raw: b'{"_id": "1"}\n', "one JSON array"),
    "an array that breaks off": ("r.json", lambda raw: raw[:-5], "whole JSON array"),
    "a truncated gzip": ("r.json.gz", lambda raw: gzip.compress(raw)[:-9], "gzip file is whole"),
    "Latin-1": ("r.json", lambda raw: raw.replace(b"Carl is", b"C\xe4rl is"), "UTF-8"),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_broken_container_is_refused_even_when_bad_rows_are_left_out(tmp_path: Path, name: str) -> None:
    file, damage, said = CONTAINERS[name]
    path = tmp_path / file
    path.write_bytes(damage(json.dumps([HOTPOT]).encode()))
    with pytest.raises(InputError, match=said):
        list(read_released(released_rows(path, bad=Skips()), "hotpotqa", source(), bad=Skips()))


def test_a_file_of_another_dataset_is_refused_unless_its_format_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "r.json", HOTPOT)
    with pytest.raises(InputError, match="Name it hotpotqa"):
        list(read_released(released_rows(path), None, Source("musique", "dev")))
    assert [each.dataset for each in read_released(released_rows(path), "hotpotqa", Source("mine", "dev"))] == ["mine"]
