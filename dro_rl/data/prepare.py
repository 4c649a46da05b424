"""From a released file to a question file with its manifest."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dro_rl.data.corpus import write_corpus
from dro_rl.data.manifest import Manifest, questions_hash, split_of_path, write_manifest
from dro_rl.data.readers import FORMATS, read_aliases, read_answers, read_released, released_rows
from dro_rl.data.readers.fields import Source
from dro_rl.errors import InputError, Phrase
from dro_rl.files import file_sha256
from dro_rl.records import Question, iter_questions, write_questions
from dro_rl.rows import Bad, Skips, Watch, refuse

LICENCES = {
    "nq": "CC BY-SA 3.0",
    "hotpotqa": "CC BY-SA 4.0",
    "musique": "CC BY 4.0",
    "2wikimultihopqa": "Apache-2.0",
    "wow": "CC BY 4.0",
}
"""Licences of the five datasets, as their publishers state them."""

WRITTEN = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class Preparation:
    """What `prepare` is asked for.

    Args:
        dataset: name of the dataset; for the five of `LICENCES` the file has to be theirs, and the licence is known.
        source: a file or a hub dataset.
        output: the question file to write, `.jsonl` or `.jsonl.gz`.
        format: a name in `FORMATS`; None tells it by the first row.
        split: name of the split; None takes it from the name of the file, or of its folder.
        config: configuration of a hub dataset.
        limit: the first so many questions.
        skip_bad: leave bad rows out and count them, in place of refusing the file.
        licence: licence of the data; None takes the known one.
        aliases: `id_aliases.json` of 2WikiMultihopQA.
        answers: JSON lines of `{id, answers}`, for requests of rank_llm.
        corpus: where to write all candidates, each once, as a corpus to retrieve from.
        with_documents: keep the candidates that the release has; without them they are to be retrieved.
        columns: names of columns by the fields of question files that they are, for a file of one's own.
    """

    dataset: str
    source: str
    output: Path
    format: str | None = None
    split: str | None = None
    config: str | None = None
    limit: int | None = None
    skip_bad: bool = False
    licence: str | None = None
    aliases: Path | None = None
    answers: Path | None = None
    corpus: Path | None = None
    with_documents: bool = True
    columns: Mapping[str, str] = field(default_factory=dict)


def prepare(job: Preparation, *, watch: Watch | None = None) -> tuple[Manifest, Skips]:
    """Write the question file, its manifest and the corpus, where one is asked for; each whole or not at all.

    Returns:
        The manifest, and what was left out as bad, with the first error of each kind.

    Raises:
        InputError: an option is wrong, found before anything is read; or a row is, without `skip_bad`.
    """
    _check_options(job)
    split = _split(job)
    skips = Skips()
    bad: Bad = skips if job.skip_bad else refuse
    source = Source(
        dataset=job.dataset,
        split=split,
        aliases=read_aliases(job.aliases) if job.aliases else {},
        answers=read_answers(job.answers) if job.answers else {},
    )
    rows = released_rows(job.source, config=job.config, split=split, columns=job.columns, bad=bad, watch=watch)
    questions: Iterator[Question] = itertools.islice(read_released(rows, job.format, source, bad=bad), job.limit)
    if not job.with_documents:
        questions = (dataclasses.replace(each, documents=(), supporting=()) for each in questions)
    if job.aliases:
        questions = _with_answer_ids(questions, source, job.aliases)
    count = write_questions(job.output, _some(questions, job.source))
    manifest = Manifest(
        dataset=job.dataset,
        split=split,
        num_questions=count,
        questions_hash=questions_hash(iter_questions(job.output, candidates="optional", watch=watch)),
        sha256=file_sha256(job.output),
        licence=LICENCES.get(job.dataset, "") if job.licence is None else job.licence,
        sources=_sources(job, split),
        skipped=dict(source.left_out + skips.counts),
    )
    write_manifest(job.output, manifest)
    if job.corpus is not None:
        found = iter_questions(job.output, candidates="optional", watch=watch)
        write_corpus(job.corpus, (document for question in found for document in question.documents))
    return manifest, skips


def _check_options(job: Preparation) -> None:
    written = {"--output": job.output} | ({"--corpus": job.corpus} if job.corpus else {})
    for option, path in written.items():
        if not path.name.lower().endswith(WRITTEN):
            raise InputError(option, str(path), f"it is written as {' or '.join(WRITTEN)}", "Rename it.")
        others = {Path(job.source).resolve(), *(each.resolve() for each in written.values() if each is not path)}
        if path.is_dir() or path.resolve() in others:
            raise InputError(option, str(path), "it is a file of its own", "Name another.")
    if job.corpus is not None and not job.with_documents:
        raise InputError("--corpus", Phrase("without documents"), "a corpus is made of them", "Drop --no-documents.")
    if job.format is not None and job.format not in FORMATS:
        raise InputError("--format", job.format, f"formats are {', '.join(FORMATS)}", "Use one of them.")
    for option, file in (("--aliases", job.aliases), ("--answers", job.answers)):
        if file is not None and not file.is_file():
            raise InputError(option, str(file), "the file exists", "Check the path.")


def _split(job: Preparation) -> str:
    split = job.split or split_of_path(job.source)
    if split is None:
        name = Path(job.source).name
        raise InputError(
            "--split",
            Phrase("not given"),
            f"neither {name!r} nor the name of its folder tells one split",
            "Name it: --split train.",
        )
    return split


def _some(questions: Iterator[Question], name: str) -> Iterator[Question]:
    """The questions; an `InputError`, so that no file is written, where there are none."""
    first = next(questions, None)
    if first is None:
        raise InputError(name, Phrase("no questions"), "a file has at least one usable question", "Check the file.")
    yield first
    yield from questions


def _with_answer_ids(questions: Iterator[Question], source: Source, aliases: Path) -> Iterator[Question]:
    """The questions; an `InputError`, so that no file is written, where no row says whose aliases are its answer's."""
    yield from questions
    if not source.answer_ids:
        raise InputError(
            "--aliases",
            str(aliases),
            "rows have an answer_id, by which aliases are found, and none has",
            "Use the release of 2WikiMultihopQA with ids (data_ids.zip), or leave --aliases out.",
        )


def _sources(job: Preparation, split: str) -> list[dict[str, str]]:
    """The files that were read, each with its hash; a hub dataset has a name only."""
    path = Path(job.source).expanduser()
    if not path.is_file():
        name = "/".join(part for part in (job.source, job.config, split) if part)
        return [{"name": name, "sha256": ""}]
    files = [path, *(each for each in (job.aliases, job.answers) if each)]
    return [{"name": each.name, "sha256": file_sha256(each)} for each in files]
