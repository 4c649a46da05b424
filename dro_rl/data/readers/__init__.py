"""Readers of the released formats of the five datasets and of peers' files: rows in, questions out, as a stream.

A format is known by its fields, whatever container they came in: JSON lines, a JSON array, Parquet, a hub dataset.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dro_rl.data.hub import hub_rows, is_local
from dro_rl.data.readers import multihop, natural_questions, peers, wizard
from dro_rl.data.readers.fields import Fields, Source
from dro_rl.data.sources import folder_rows
from dro_rl.errors import InputError, Phrase
from dro_rl.records import AS_NAMED, Question, UniqueIds, is_field, parse_question, question_rows, renamed
from dro_rl.rows import TABLES, Bad, Rows, Watch, refuse, rows, suffix
from dro_rl.rows.strict_json import json_lines


@dataclass(frozen=True)
class Format:
    """A released format.

    Args:
        read: makes the questions of a row.
        about: what it is, in a line.
        fields: the fields that every row has.
        without: fields that tell another format from this one.
        dataset: the only dataset that comes in it; empty where any may.
    """

    read: Callable[[Any, Source], Iterator[Question]]
    about: str
    fields: frozenset[str]
    without: frozenset[str] = frozenset()
    dataset: str = ""


def _own(row: Fields, source: Source) -> Iterator[Question]:
    numbered = {} if "id" in row else {"id": f"{source.dataset}-{source.split}-{row.number}"}
    yield parse_question({**row.value, **numbered}, row.place, "optional")


def _fields(names: str) -> frozenset[str]:
    return frozenset(names.split())


FORMATS: Mapping[str, Format] = {
    "questions": Format(
        _own,
        "question files of dro_rl",
        _fields("question answers"),
        _fields("ctxs positive_ctxs positive paragraphs data_source"),
    ),
    "dpr": Format(
        natural_questions.dpr, "DPR's retriever JSON: nq-train.json, nq-dev.json", _fields("question positive_ctxs")
    ),
    "dpr-csv": Format(natural_questions.dpr_csv, "DPR's qa CSV: nq-test.csv", _fields("")),
    "nq-open": Format(
        natural_questions.nq_open,
        "NQ-open.train.jsonl, NQ-open.dev.jsonl",
        _fields("question answer"),
        _fields("context paragraphs positive golden_answers"),
    ),
    "retrieved": Format(
        natural_questions.retrieved, "passages as DPR's retriever writes and FiD reads them", _fields("question ctxs")
    ),
    "hotpotqa": Format(
        multihop.hotpotqa,
        "hotpot_train_v1.1.json, hotpot_dev_distractor_v1.json, hotpot_dev_fullwiki_v1.json",
        _fields("question context supporting_facts"),
        _fields("evidences"),
        "hotpotqa",
    ),
    "2wikimultihopqa": Format(
        multihop.two_wiki, "train.json, dev.json", _fields("question context evidences"), dataset="2wikimultihopqa"
    ),
    "musique": Format(
        multihop.musique,
        "musique_ans_v1.0_*.jsonl, musique_full_v1.0_*.jsonl",
        _fields("id question paragraphs"),
        dataset="musique",
    ),
    "wow": Format(wizard.wizard, "train.json, valid_random_split.json", _fields("dialog chosen_topic"), dataset="wow"),
    "kilt": Format(peers.kilt, "KILT's JSONL of any dataset", _fields("id input")),
    "flashrag": Format(
        peers.flashrag, "FlashRAG's JSONL", _fields("id question golden_answers"), _fields("data_source")
    ),
    "search-r1": Format(peers.search_r1, "Search-R1's Parquet", _fields("data_source reward_model")),
    "rank-llm": Format(peers.rank_llm, "rank_llm's requests", _fields("query candidates")),
    "dro": Format(
        peers.first_implementation, "the first implementation's JSON", _fields("question positive retrieval")
    ),
}
"""By the name that `--format` takes."""


COLUMNS = _fields(
    "_id answer answer_aliases answer_id answerable candidates chosen_topic chosen_topic_passage context ctxs dialog "
    "evidences extra_info golden_answers hard_negative_ctxs input metadata output paragraphs positive positive_ctxs "
    "prompt q_id query query_id reward_model supporting_facts data_source retrieval"
)
"""The fields that some reader reads, beside those of question files: of a file of columns, no others are read."""


def sniff(row: Any, place: str) -> str:
    """The format of a row, by its fields.

    Raises:
        InputError: the fields are those of no format, or of several.
    """
    if isinstance(row, list) and len(row) == 2 and all(isinstance(value, str) for value in row):
        return "dpr-csv"
    keys = set(row) if isinstance(row, Mapping) else set()
    if {"question", "answers", "documents"} <= keys:
        return "questions"  # with whatever other fields beside
    found = [
        name for name, known in FORMATS.items() if known.fields and known.fields <= keys and not known.without & keys
    ]
    if len(found) == 1:
        return found[0]
    raise InputError(
        place,
        Phrase(f"the fields {', '.join(sorted(map(str, keys)))}" if keys else "no fields"),
        f"a format is known by its fields, and these are of {' and '.join(found) or 'none'}",
        f"Name one with --format: {', '.join(FORMATS)}.",
    )


def released_format(row: Any, place: str) -> str | None:
    """The released format that a row is whole in; None for one of a question file, or of nothing that is known."""
    try:
        format = sniff(row, place)
        if format == "questions" or not list(FORMATS[format].read(Fields(row, place), Source("", ""))):
            return None
    except InputError:
        return None
    return format


def released_rows(
    name: str | Path,
    *,
    config: str | None = None,
    split: str = "train",
    columns: Mapping[str, str] = AS_NAMED,
    bad: Bad = refuse,
    watch: Watch | None = None,
) -> Rows:
    """Rows of a file, of a split in a folder, or of a hub dataset, which is streamed.

    Args:
        name: of the file, the folder or the dataset.
        config, split: of a folder or a hub dataset.
        columns: names of columns by the fields of question files that they are.
        bad, watch: those of `dro_rl.rows`.
    """

    def wanted(column: str) -> bool:
        return column in COLUMNS or is_field(column, columns)

    if not is_local(name):
        return renamed(hub_rows(str(name), config, [split], place="--input", wanted=wanted), columns)

    def read(path: Path) -> Rows:
        if suffix(path) in TABLES and path.is_file():
            _, first = next(rows(path, bad=lambda error: None), ("", []))
            if columns.get("question", "question") in [name.strip() for name in first]:
                return question_rows(path, columns, bad=bad, watch=watch)
        return renamed(rows(path, bad=bad, watch=watch, wanted=wanted), columns)

    path = Path(name).expanduser()
    return folder_rows(path, split, config, columns, read, wanted) if path.is_dir() else read(path)


def read_released(found: Rows, format: str | None, source: Source, *, bad: Bad = refuse) -> Iterator[Question]:
    """The questions of released rows.

    Args:
        found: the rows with their places.
        format: a name in `FORMATS`; None takes it from the first row's fields.
        source: what is known beside the rows.
        bad: what is done with a bad row, from which no question comes then.

    Raises:
        InputError: naming file, row and field, the rule and what to do.
    """
    first = next(found, None)
    if first is None:
        return
    name = format or sniff(first[1], first[0])
    if name not in FORMATS:
        raise InputError("--format", name, f"formats are {', '.join(FORMATS)}", "Use one of them.")
    own = FORMATS[name].dataset
    if own and not format and source.dataset not in ("", own):
        raise InputError(
            first[0],
            Phrase(f"a row of {own}"),
            f"the dataset is {source.dataset}",
            f"Name it {own}, or give --format {name} if another dataset has its format.",
        )
    read, ids = FORMATS[name].read, UniqueIds()
    for place, row in itertools.chain([first], found):
        try:
            questions = list(read((place, row) if name == "dpr-csv" else Fields(row, place), source))
            for question in questions:
                ids.add(question.id, place)
        except InputError as error:
            bad(error)
        else:
            yield from questions


def read_aliases(path: Path) -> dict[str, tuple[str, ...]]:
    """`id_aliases.json` of 2WikiMultihopQA, an object a line: accepted spellings by the id of an answer."""
    found = {}
    for place, value in json_lines(path):
        row = Fields(value, place)
        found[row.identifier("Q_id")] = tuple(
            text for name in ("aliases", "demonyms") if name in row for text in row.texts(name)
        )
    return found


def read_answers(path: Path) -> dict[str, tuple[str, ...]]:
    """Accepted answers by the id of the question: JSON lines of `{id, answers}`; a question file will do."""
    found = {}
    for place, value in rows(path):
        row = Fields(value, place)
        found[row.identifier("id")] = row.answers("answers")
    return found
