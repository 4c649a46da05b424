"""The frozen candidate cache: questions with what a retriever found for them, and a manifest that says how.

Training reads the file and needs no index. The work is done in parts beside the output, so that a killed job goes on;
the output is written whole, from whole parts, and its manifest after it.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from dro_rl.data.candidates import insert_gold, with_candidates
from dro_rl.data.manifest import (
    Manifest,
    manifest_path,
    questions_hash,
    read_manifest,
    split_of_path,
    write_manifest,
)
from dro_rl.errors import InputError, Phrase
from dro_rl.files import file_sha256, written_whole
from dro_rl.locks import owned
from dro_rl.records import Question, iter_questions, write_questions
from dro_rl.retrieval.index import Index, IndexManifest, check_k
from dro_rl.rows import Bad, Skips, refuse

PART = 1024
"""Questions of a part: what a kill can cost."""

SUFFIXES = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class Search:
    """What is done for each question.

    Args:
        k: candidates to find.
        gold: put supporting documents that were not found among the candidates.
        seed: of the places that they take.
        labels: keep the questions' labels; else drop them, for a corpus whose ids are other ones.
    """

    k: int = 20
    gold: bool = False
    seed: int = 0
    labels: bool = True


def retrieve(
    index: Index,
    questions: Path,
    output: Path,
    search: Search,
    *,
    processes: int = 1,
    skip_bad: bool = False,
    overwrite: bool = False,
) -> Manifest:
    """Write a candidate cache: the questions of a file with the passages of an index. Called again, it goes on.

    Args:
        index: where to look.
        questions: a question file, with candidates (which are replaced) or without.
        output: the question file to write.
        search: what is done for each question.
        processes: how many search side by side.
        skip_bad: leave bad questions, and those whose gold is not in the corpus, out and count them.
        overwrite: replace an output of other questions, another index or other settings.

    Returns:
        The manifest, which stands beside the output.

    Raises:
        InputError: a bad question, gold that is not in the corpus, a k that is larger than it, a place that is taken.
    """
    _check_paths(questions, output)
    check_k(search.k, index.manifest, index.folder)
    source = read_manifest(questions)
    asked = {
        "retrieval": {**retrieval_facts(index.manifest), **asdict(search)},
        "source": {"name": questions.name, "sha256": file_sha256(questions)},
    }
    with owned(output.with_name(f".{output.name}.lock"), str(output)):
        there = _finished(output, asked, overwrite)
        return there or _retrieve(index, questions, output, search, source, asked, processes, skip_bad)


def _retrieve(
    index: Index,
    questions: Path,
    output: Path,
    search: Search,
    source: Manifest | None,
    asked: Mapping[str, Any],
    processes: int,
    skip_bad: bool,
) -> Manifest:
    """Search for what is not found yet, and gather it."""
    skips = Skips()
    bad = skips if skip_bad else refuse
    read = list(_questions(index, questions, search, bad))
    parts = output.with_name(f".{output.name}.parts")
    # With the bytes of `source`, which questions were left out says everything: --skip-bad by itself changes no part.
    _claim(parts, {**asked, "read": questions_hash(read), "search_versions": index.versions})
    _fill(index, read, parts, search, processes)
    tally = Tally()
    write_questions(output, tally.watch(_gathered(parts, questions, bad)))
    manifest = Manifest(
        dataset=source.dataset if source else read[0].dataset,
        split=source.split if source else _split_of(questions),
        num_questions=tally.questions,
        questions_hash=questions_hash(iter_questions(output)),
        sha256=file_sha256(output),
        licence=source.licence if source else "",
        sources=[asked["source"]],
        skipped={**(source.skipped if source else {}), **skips.counts},
        retrieval={**asked["retrieval"], "search_versions": index.versions, "fewer_than_k": tally.fewer_than(search.k)},
        changes=_changes(search),
    )
    write_manifest(output, manifest)
    shutil.rmtree(parts)
    return manifest


def retrieval_facts(manifest: IndexManifest) -> dict[str, Any]:
    """What of an index a question file's manifest says: what the candidates depend on, and no place of this machine."""
    names = ("retriever", "settings", "versions", "corpus_hash", "passages")
    corpus = Path(manifest.corpus).name if manifest.files else manifest.corpus
    return {"corpus": corpus, **{name: getattr(manifest, name) for name in names}}


class Tally:
    """Counts questions as they pass by, and their candidates."""

    def __init__(self) -> None:
        self.questions = 0
        self._sizes: Counter[int] = Counter()

    def watch(self, questions: Iterable[Question]) -> Iterator[Question]:
        """The questions, counted."""
        for question in questions:
            self.questions += 1
            self._sizes[len(question.documents)] += 1
            yield question

    def fewer_than(self, k: int) -> int:
        """How many have fewer than k candidates."""
        return sum(count for size, count in self._sizes.items() if size < k)


def _questions(index: Index, path: Path, search: Search, bad: Bad) -> Iterator[Question]:
    """The questions to retrieve for: without candidates, their gold `missed` as yet, and known to be in the corpus."""
    for question in iter_questions(path, candidates="optional", bad=bad):
        if not search.labels:
            question = replace(question, supporting=(), missed=())
        question = with_candidates(question, ())
        lost = next((gold for gold in question.missed if index.passages.row_of(gold) is None), None)
        if lost is None:
            yield question
        else:
            bad(
                InputError(
                    f"{path}: question {question.id}: supporting",
                    Phrase(f"{lost!r}, which is not in the corpus of {index.folder}"),
                    "gold documents are passages of the corpus",
                    "Index the corpus that the labels are of, leave such questions out with --skip-bad, or the labels "
                    "with --drop-labels.",
                )
            )


def _fill(index: Index, questions: list[Question], parts: Path, search: Search, processes: int) -> None:
    """Write the parts that are not there yet."""
    batches = [questions[start : start + PART] for start in range(0, len(questions), PART)]
    missing = [number for number in range(len(batches)) if not _part(parts, number).is_file()]
    done = len(questions) - sum(len(batches[number]) for number in missing)
    with tqdm(total=len(questions), initial=done, desc="questions", unit="q", disable=None) as progress:
        if processes == 1 or len(missing) < 2:
            for number in missing:
                _write_part(index, batches[number], _part(parts, number), search)
                progress.update(len(batches[number]))
            return
        work = [(batches[number], _part(parts, number), search) for number in missing]
        count = min(processes, len(work))
        context = get_context("spawn")
        with ProcessPoolExecutor(count, context, _open_index, (index.folder, context.Value("i", 0))) as pool:
            try:
                for size in pool.map(_write_part_there, work):
                    progress.update(size)
            except BrokenProcessPool:
                raise InputError(
                    "retrieve",
                    Phrase("a process that searches died, of too little memory as a rule"),
                    "what is done is kept",
                    "Give the same command with fewer --processes: it goes on where it stopped.",
                ) from None


_index_there: Index
"""The index of a process that searches beside the main one."""


def _open_index(folder: Path, opened: Any) -> None:
    global _index_there
    with opened.get_lock():
        rank = opened.value
        opened.value += 1
    _index_there = Index(folder, rank)


def _write_part_there(work: tuple[list[Question], Path, Search]) -> int:
    _write_part(_index_there, *work)
    return len(work[0])


def _write_part(index: Index, questions: Sequence[Question], path: Path, search: Search) -> None:
    found = index.search([question.question for question in questions], search.k)
    answered = []
    for question, candidates in zip(questions, found, strict=True):
        question = with_candidates(question, [candidate.document for candidate in candidates])
        if search.gold:
            rows = [index.passages.row_of(identifier) for identifier in question.missed]
            question = insert_gold(question, [index.passages[row] for row in rows if row is not None], search.seed)
        answered.append(question)
    write_questions(path, answered)


def _gathered(parts: Path, source: Path, bad: Bad) -> Iterator[Question]:
    """The questions of all parts; an `InputError`, so that no file is written, where none is left."""
    empty = True
    for path in sorted(parts.glob("[0-9]*.jsonl")):
        for question in iter_questions(path, candidates="optional"):
            if question.documents:
                empty = False
                yield question
            else:
                bad(
                    InputError(
                        f"question {question.id}: question",
                        Phrase(f"{question.question[:60]!r}, for which nothing was found"),
                        "a question has at least one candidate",
                        "Correct the question, or leave such ones out with --skip-bad: what is done is kept.",
                    )
                )
    if empty:
        raise InputError(
            str(source), Phrase("no question is left"), "a cache has at least one", "Check its gold ids and questions."
        )


def _split_of(path: Path) -> str:
    """The split that the name of a file or of its folder tells; else the file's name."""
    return split_of_path(path) or path.name.partition(".")[0]


def _check_paths(questions: Path, output: Path) -> None:
    if not questions.is_file():
        what = "a folder" if questions.is_dir() else "no such file"
        raise InputError(str(questions), Phrase(what), "QUESTIONS is a question file", "Check the path.")
    if not output.name.lower().endswith(SUFFIXES):
        raise InputError("output", str(output), f"a cache ends in {' or '.join(SUFFIXES)}", "Name it so.")


def _finished(output: Path, asked: Mapping[str, Any], overwrite: bool) -> Manifest | None:
    """The manifest of the output, if it is there and is what was asked for."""
    if overwrite or not (output.exists() or manifest_path(output).exists()):
        return None
    manifest = read_manifest(output) if output.is_file() else None
    if manifest is not None and manifest.sources == [asked["source"]]:
        there = {key: (manifest.retrieval or {}).get(key) for key in asked["retrieval"]}
        if there == asked["retrieval"]:
            return manifest
    if output.with_name(f".{output.name}.parts").is_dir() and manifest is None:
        return None  # killed between the output and its manifest
    raise InputError(
        str(output),
        Phrase("there is such a file, of other questions, another index or other settings"),
        "a cache is not written over by chance",
        "Name another, or add --overwrite.",
    )


def _claim(parts: Path, asked: Mapping[str, Any]) -> None:
    """Take the folder of parts for this job, or go on with the same one; parts of another job are of no use."""
    begun = parts / "asked.json"
    wanted = json.dumps(asked, indent=2)
    if parts.exists() and not (begun.is_file() and begun.read_text(encoding="utf-8") == wanted):
        shutil.rmtree(parts)
    with written_whole(begun) as beside:
        beside.write_text(wanted, encoding="utf-8")


def _changes(search: Search) -> list[dict[str, Any]]:
    changes: list[dict[str, Any]] = []
    if not search.labels:
        changes.append({"change": "drop_labels"})
    if search.gold:
        changes.append({"change": "insert_gold", "seed": search.seed})
    return changes


def _part(parts: Path, number: int) -> Path:
    return parts / f"{number:06}.jsonl"
