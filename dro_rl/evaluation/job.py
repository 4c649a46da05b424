"""`dro-rl evaluate`: a trained pair on a question file, in parts, so that a killed evaluation goes on where it was.

<output>/settings.json       what the rows depend on: another setting is refused, not mixed in
<output>/parts/part-N.parquet   rows of finished parts, until all are there
<output>/questions.parquet   a row a question (`results.SCHEMA`)
<output>/report.json, report.md
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from dro_rl.data import load_questions
from dro_rl.data.manifest import SPLITS, Manifest, questions_hash, read_manifest, split_of_path
from dro_rl.data.sources import files_of_split, saved_folder
from dro_rl.errors import InputError, Phrase, first_line
from dro_rl.evaluation.controls import applies, control_selection
from dro_rl.evaluation.evaluator import evaluate
from dro_rl.evaluation.report import Report, make_report, write_report
from dro_rl.evaluation.results import Conditions, QuestionResult, candidates_hash, read_results, write_results
from dro_rl.evaluation.shape import shape_of
from dro_rl.files import file_sha256
from dro_rl.locks import LOCK, claim, owned
from dro_rl.pipeline import PROMPT, SETTINGS, PipelineSettings, RAGPipeline, read_settings
from dro_rl.progress import Progress
from dro_rl.records import Question
from dro_rl.roles import ROLES
from dro_rl.rows import stem
from dro_rl.rows.small import read_object
from dro_rl.selection import SelectionSpec

QUESTIONS_PER_PART = 64
"""Questions whose rows are computed and written together: what a kill can cost."""


@dataclass(frozen=True)
class EvaluationJob:
    """What to evaluate.

    Args:
        run: a run's folder, or one with `selector/` and `generator/`.
        data: a question file, a folder with a file for each split, `toy`, or a hub name.
        config: a dataset of a folder that holds several, configuration of a hub dataset, or the depth of `toy`.
        split: which split of a folder, of `toy` or of a hub dataset; for a single file, what the report calls it.
        control: what stands in for the selector.
        seed: of `control: random`.
        output: where the results go; `RUN/evaluation/<split>`, unless told.
        recipe: where K, lengths, templates and the shape of candidates come from, for a folder without
            `pipeline.json`.
        limit: the first so many questions.
        num_documents: the first so many candidates of each; None leaves it to the run's recipe.
        shuffle_documents: whether candidates are shuffled by the recipe's seed; None leaves it to the run's recipe, but
            for `control: retriever-order`, which takes them as they stand.
        window_size, window_stride: how candidates are shown, as in a recipe; None leaves it to the run.
        columns: names of columns by the fields of question files that they are.
        batch_size: questions answered at once.
        device, dtype: as in `RAGPipeline.from_pretrained`.
        overwrite: begin anew where other results stand.
    """

    run: Path
    data: str
    config: str | None = None
    split: str | None = None
    control: str = "none"
    seed: int = 0
    output: Path | None = None
    recipe: Path | None = None
    limit: int | None = None
    num_documents: int | None = None
    shuffle_documents: bool | None = None
    window_size: int | None = None
    window_stride: int | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    batch_size: int = 8
    device: str | None = None
    dtype: str | None = None
    overwrite: bool = False


def run_evaluation(job: EvaluationJob) -> tuple[Report, Path]:
    """Evaluate, or go on with an evaluation that was killed, or report one that is done.

    Returns:
        The report and the folder it stands in.

    Raises:
        InputError: for data, a run or an output folder that do not fit.
    """
    _check_device(job.device)
    settings, templates = _settings(job)
    settings = settings.slid(job.window_size, job.window_stride)
    as_they_stand = job.shuffle_documents is None and job.control == "retriever-order"
    shape = shape_of(job.run, job.recipe, job.num_documents, False if as_they_stand else job.shuffle_documents)
    questions, split, manifest = _questions(job)
    questions = shape.apply(questions)
    longest = max(len(question.documents) for question in questions)
    if job.window_size is not None and job.window_size > longest:
        rule = f"no question has more than {longest} documents to slide over"
        raise InputError("--window-size", job.window_size, rule, "Lower it, or leave it out.")
    conditions = Conditions(
        stage=split if job.control == "none" else f"{split}, {job.control}",
        split=split,
        num_questions=len(questions),
        questions_hash=questions_hash(questions),
        candidates_hash=candidates_hash(questions),
        num_documents=longest,
        num_selected=settings.num_selected,
        control=job.control,
        seed=job.seed,
        window_size=settings.window_size,
        window_stride=settings.window_stride,
    )
    asked = [question for question in questions if applies(job.control, question)]
    if not asked:
        raise InputError(
            f"--control {job.control}",
            Phrase("no question has labels"),
            "gold documents are those that `supporting` names",
            "Use a file with labels, or another control.",
        )
    folder = job.output or job.run / "evaluation" / _folder_name(split, job)

    def load() -> RAGPipeline:
        pipeline = RAGPipeline.from_pretrained(
            job.run,
            device=job.device,
            dtype=getattr(torch, job.dtype) if job.dtype else None,
            settings=settings,
            templates=templates,
            roles=ROLES if job.control == "none" else ("generator",),
            batch_size=job.batch_size,
        )
        pipeline.leave_room(asked, conditions.answer_aliases)
        return pipeline

    with owned(folder / LOCK, str(folder)):
        _claim(folder, job, {**asdict(conditions), "settings": asdict(settings), **_pair(job, templates)})
        results = _results(folder, asked, conditions, load)
        left_out = len(questions) - len(asked)
        skipped = {"no labelled document among the candidates": left_out} if left_out else {}
        report = make_report(str(job.run), job.data, conditions, str(shape), results, skipped, manifest)
        write_report(folder, report)
        return report, folder


def _check_device(device: str | None) -> None:
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA raises the second
        raise InputError(
            "--device", device, f"this machine has it ({first_line(error)})", "Use cpu, or leave it unset."
        ) from None


def _results(
    folder: Path, questions: Sequence[Question], conditions: Conditions, load: Callable[[], RAGPipeline]
) -> list[QuestionResult]:
    """Rows of all questions: from the finished file, else part by part, of which the missing are computed."""
    whole, parts = folder / "questions.parquet", folder / "parts"
    if whole.is_file():
        shutil.rmtree(parts, ignore_errors=True)  # a kill may have come between the two
        return read_results(whole)[0]
    pipeline: RAGPipeline | None = None
    results: list[QuestionResult] = []
    with Progress(len(questions), f"evaluation, {conditions.stage}") as progress:
        for number, first in enumerate(range(0, len(questions), QUESTIONS_PER_PART)):
            path = parts / f"part-{number:05d}.parquet"
            if path.is_file():
                rows = read_results(path)[0]
                progress.skip(len(rows))
            else:
                pipeline = pipeline or load()
                rows = _part(pipeline, questions[first : first + QUESTIONS_PER_PART], conditions)
                write_results(path, rows, conditions)
                means = " ".join(f"{name} {_running([*results, *rows], name):.1f}" for name in ("em", "f1"))
                progress.update(len(rows), means)
            results += rows
    write_results(whole, results, conditions)
    shutil.rmtree(parts)
    return results


def _part(pipeline: RAGPipeline, questions: Sequence[Question], conditions: Conditions) -> list[QuestionResult]:
    selections = None
    if conditions.control != "none":
        k, seed = SelectionSpec.of(conditions.num_selected).most, conditions.seed
        selections = [control_selection(conditions.control, question, k, seed) for question in questions]
    return evaluate(pipeline, questions, conditions.answer_likelihood, conditions.answer_aliases, selections)


def _running(results: Sequence[QuestionResult], metric: str) -> float:
    return 100 * sum(result.scores[metric] for result in results) / len(results)


def _settings(job: EvaluationJob) -> tuple[PipelineSettings, dict[Any, str] | None]:
    """K, lengths and templates: those saved with the run, or a recipe's."""
    if job.recipe is None:
        if not (job.run / SETTINGS).is_file() and (job.run / "generator").is_dir():
            raise InputError(
                str(job.run),
                Phrase(f"no {SETTINGS}"),
                "K, lengths and prompts are saved with a finished run",
                "For a checkpoint or a pair of your own, name a recipe that says them: --recipe FILE.",
            )
        return read_settings(job.run), None
    from dro_rl.recipe import load_recipe

    recipe = load_recipe(job.recipe)
    templates = {role: recipe.run.of(role).prompt_template for role in ROLES}
    return PipelineSettings.of(recipe.training, recipe.run.chat_template_kwargs), templates


def _questions(job: EvaluationJob) -> tuple[list[Question], str, Manifest | None]:
    """The questions, the split's name, and the manifest beside the file, where there is one."""
    part = job.split or "test"
    questions = load_questions(job.data, part, config=job.config, limit=job.limit, columns=job.columns, key="--data")
    path = Path(job.data).expanduser()
    whole = path.is_dir() and saved_folder(path, part) is None
    file = files_of_split(path, part, job.config)[0] if whole else path
    manifest = read_manifest(file) if file.is_file() else None
    if manifest is not None:
        dataset, split = manifest.dataset, manifest.split
    elif path.is_file():
        dataset, split = _told_by_name(path)
    elif path.is_dir():
        dataset, split = job.config or path.absolute().name, part
    else:
        dataset, split = "/".join(word for word in (job.data, job.config) if word), part
    name = "/".join(word for word in (dataset, job.split or split) if word)
    return questions, f"{name}, first {job.limit}" if job.limit else name, manifest


def _told_by_name(path: Path) -> tuple[str, str]:
    """Dataset and split of a file without a manifest: `nq/dev.jsonl` and `dev/nq.jsonl` are nq's dev split."""
    name, split = stem(path), split_of_path(path)
    if split is None or name.lower() in SPLITS:
        return path.absolute().parent.name, split or name
    return name, split


def _folder_name(split: str, job: EvaluationJob) -> str:
    parts = [split.replace("/", "-").replace(", first ", "-first-")]
    if job.num_documents is not None:
        parts.append(f"n{job.num_documents}")
    if job.shuffle_documents is not None:
        parts.append("shuffled" if job.shuffle_documents else "in-order")
    if job.control != "none":
        parts.append(job.control)
    if job.control == "random":
        parts.append(str(job.seed))
    return "-".join(parts)


def _pair(job: EvaluationJob, templates: dict[Any, str] | None) -> dict[str, Any]:
    """The models by what their files hold, wherever they stand: every byte is read, as when they are loaded."""
    digest = hashlib.sha256()
    for role in ROLES:
        for path in sorted((job.run / role).glob("*")):
            if path.is_file() and path.suffix in (".safetensors", ".bin", ".json", ".jinja"):
                digest.update(f"{role}/{path.name} {file_sha256(path)}\n".encode())
    return {"models": digest.hexdigest(), "templates": templates or PROMPT, "dtype": job.dtype}


def _claim(folder: Path, job: EvaluationJob, settings: dict[str, Any]) -> None:
    """Take an output folder: a fresh one, or one whose rows were computed under the same settings."""
    record = folder / "settings.json"
    if job.overwrite and record.is_file():
        for name in ("questions.parquet", "report.json", "report.md", "settings.json"):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / "parts", ignore_errors=True)

    facts = {key: value for key, value in settings.items() if key != "dro_rl"}

    def differs(key: str, was: Any, wanted: Any) -> InputError:
        known = read_object(record, "what rows were computed under", "Add --overwrite to begin anew.")
        return InputError(
            str(folder),
            Phrase(f"results under another {', '.join(key for key in facts if known.get(key) != facts[key])}"),
            "rows of one evaluation come from one pair, the same questions and the same settings",
            "Give another --output, or --overwrite to begin anew.",
        )

    claim(record, facts, differs)
