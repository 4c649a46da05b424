"""What a data file holds and everything that is wrong with it: question files, released formats, corpora."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from dro_rl.data.corpus import ID_FIELDS, TEXT_FIELDS, CorpusHash, read_corpus, shards
from dro_rl.data.manifest import Manifest, questions_hash, read_manifest
from dro_rl.data.readers import FORMATS, read_answers, read_released, released_rows, sniff
from dro_rl.data.readers.fields import Source
from dro_rl.data.sources import split_rows
from dro_rl.errors import InputError, Phrase
from dro_rl.records import AS_NAMED, Question
from dro_rl.rows import Watch, kind

CORPUS = "corpus"
"""The format of `check` that is no format of questions."""


@dataclass
class Report:
    """What `check` found.

    Args:
        file: the file.
        format: a name in `FORMATS`, `corpus`, or nothing where it cannot be told.
        counts: what the file holds: questions, documents and so on.
        wrong: how many errors there are, by kind.
        manifest: the manifest beside the file, where there is one and it fits.
        hash: `questions_hash`, or `corpus_hash`, of what could be read.
    """

    file: Path
    format: str
    counts: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    manifest: Manifest | None = None
    hash: str = ""

    @property
    def without_candidates(self) -> int:
        """How many questions have none yet."""
        return self.counts["questions"] - self.counts["questions with candidates"]


def check(
    path: Path,
    format: str | None = None,
    *,
    answers: Path | None = None,
    split: str | None = None,
    columns: Mapping[str, str] = AS_NAMED,
    on_error: Callable[[InputError], None] = lambda error: None,
    watch: Watch | None = None,
) -> Report:
    """Read a whole file and count what it holds and what is wrong, going on after each error that allows it.

    Args:
        path: the file; given a split, also a folder in which training would find it.
        format: a name in `FORMATS`, `corpus`, or None to tell it by the first row.
        answers: accepted answers, for requests of rank_llm.
        split: read the split that training would.
        columns: names of columns by the fields of question files that they are, as `dataset_columns` of a recipe.
        on_error: is given each error as it is found.
        watch: wraps the raw file, to draw a progress bar.

    Raises:
        InputError: there is no such format.
    """
    if format not in (None, CORPUS, *FORMATS):
        raise InputError("--format", format, f"formats are {', '.join((*FORMATS, CORPUS))}", "Use one of them.")
    report = Report(path, format or "")

    def bad(error: InputError) -> None:
        report.wrong[kind(error)] += 1
        on_error(error)

    try:
        report.format = format or ("questions" if split else format_of(path, columns))
        if report.format == CORPUS:
            digest = CorpusHash()
            for document in read_corpus(path, bad=bad, watch=watch):
                digest.add(document)
            report.counts["passages"], report.hash = digest.count, digest.hexdigest()
        else:
            source = Source("", "", answers=read_answers(answers) if answers else {})
            if split:
                found_rows = split_rows(str(path), split, columns=columns, bad=bad, watch=watch)
            else:
                found_rows = released_rows(path, columns=columns, bad=bad, watch=watch)
            found = read_released(found_rows, report.format, source, bad=bad)
            report.hash = questions_hash(_counted(found, report.counts))
            report.counts.update({f"left out, {why}": count for why, count in source.left_out.items()})
            if not report.counts["questions"] and not report.wrong:
                bad(InputError(str(path), Phrase("no questions"), "a file has at least one question", "Check it."))
    except InputError as error:
        bad(error)
    if report.format == "questions" and path.is_file() and not report.wrong:
        try:
            report.manifest = read_manifest(path)
        except InputError as error:
            bad(error)
    return report


def format_of(path: Path, columns: Mapping[str, str] = AS_NAMED) -> str:
    """The format of a file by its first readable row: a name in `FORMATS`, or `corpus`."""
    if path.is_dir():
        files = shards(path)
        if files and format_of(files[0], columns) == CORPUS:
            return CORPUS
        raise InputError(
            str(path),
            Phrase("no folder of a corpus's shards"),
            "of a folder of questions a split is checked, as training finds it",
            "Add --split train, or --format corpus for a corpus.",
        )
    skipped: list[InputError] = []
    found = (
        (place, row)
        for place, row in released_rows(path, columns=columns, bad=skipped.append)
        if isinstance(row, list | dict)
    )
    place, row = next(found, (str(path), None))
    if row is None:
        raise (
            skipped[0]
            if skipped
            else InputError(str(path), Phrase("no rows"), "a file has at least one", "Check the file.")
        )
    if isinstance(row, list):
        return "dpr-csv" if len(row) == 2 and row[1].startswith("[") else CORPUS
    if "question" not in row and {*ID_FIELDS} & {*row} and {*TEXT_FIELDS} & {*row}:
        return CORPUS
    try:
        return sniff(row, place)
    except InputError:
        if "question" in row and "answers" not in row:
            return "questions"  # whose rows say what they lack
        raise


def _counted(questions: Iterator[Question], counts: Counter[str]) -> Iterator[Question]:
    for question in questions:
        counts["questions"] += 1
        counts["answers"] += len(question.answers)
        counts["candidates"] += len(question.documents)
        counts["questions with candidates"] += bool(question.documents)
        counts["questions with labels"] += bool(question.supporting)
        yield question


def draw(
    path: Path,
    number: int,
    seed: int,
    *,
    identifier: str | None = None,
    format: str | None = None,
    answers: Path | None = None,
    columns: Mapping[str, str] = AS_NAMED,
    watch: Watch | None = None,
) -> list[Question]:
    """Questions of a file, drawn at random in one pass and returned in file order, or the one with an id.

    Raises:
        InputError: the file cannot be read, or has no such question.
    """
    source = Source("", "", answers=read_answers(answers) if answers else {})
    found = read_released(released_rows(path, columns=columns, watch=watch), format, source)
    if identifier is not None:
        question = next((each for each in found if each.id == identifier), None)
        if question is None:
            raise InputError(f"{path}: id", identifier, "the file has such a question", "Check the id.")
        return [question]
    random, drawn = Random(seed), []
    for place, question in enumerate(found):
        if place < number:
            drawn.append((place, question))
        elif (instead := random.randrange(place + 1)) < number:
            drawn[instead] = (place, question)
    if not drawn:
        raise InputError(str(path), Phrase("no questions"), "a file has at least one question", "Check the file.")
    return [question for _, question in sorted(drawn, key=lambda each: each[0])]
