"""How good candidates are before a selector reads them: recall, MRR and nDCG over k, by gold ids and by answer string.

The measures are those of ir-measures (trec_eval); only which candidate is relevant is decided here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dro_rl.data.manifest import read_manifest
from dro_rl.errors import InputError, Phrase
from dro_rl.files import written_whole
from dro_rl.metrics import answer_recall_at_k
from dro_rl.records import Question, read_questions
from dro_rl.shown import chart

DEEPEST = 100
SHOWN = (1, 3, 5, 10, 20, 50, 100)

MEANINGS = {
    "ids": "relevant are the supporting documents, those that the retriever missed included",
    "answer": "relevant are candidates that hold an accepted answer; recall is whether any of the first k does, and "
    "nDCG compares with the best order of these candidates",
}


@dataclass(frozen=True)
class Judged:
    """Measures by one notion of relevance.

    Args:
        questions: how many are judged; those without gold ids are not by ids.
        meaning: what is relevant.
        measures: `recall`, `MRR`, `nDCG`: means over the questions, 0..1, for each k of the report.
    """

    questions: int
    meaning: str
    measures: dict[str, list[float]]


@dataclass(frozen=True)
class Report:
    """A report on one file.

    Args:
        file: the question file.
        retriever: by its manifest; `unknown` without one.
        questions: how many the file has.
        questions_hash: `dro_rl.data.manifest.questions_hash`; empty without a manifest.
        depth: candidates of the question that has most.
        ks: 1 up to the depth, 100 at most.
        judged: by `ids`, where questions have gold ids, and by `answer`.
    """

    file: str
    retriever: str
    questions: int
    questions_hash: str
    depth: int
    ks: list[int]
    judged: dict[str, Judged]

    @property
    def shown(self) -> list[int]:
        """The k of a printed table."""
        return sorted({k for k in SHOWN if k <= self.ks[-1]} | {self.ks[-1]})


def report_file(path: Path) -> Report:
    """Judge the candidates of a question file.

    Raises:
        InputError: the file is not as a question file is, or its manifest says that it is another one.
    """
    questions = read_questions(path)
    manifest = read_manifest(path)
    depth = max(len(question.documents) for question in questions)
    ks = list(range(1, min(depth, DEEPEST) + 1))
    judged = {}
    labelled = [question for question in questions if question.supporting or question.missed]
    if labelled:
        judged["ids"] = _judge(labelled, ks, "ids", _by_ids, "R")
    judged["answer"] = _judge(questions, ks, "answer", _by_answer, "Success")
    retrieval = (manifest.retrieval if manifest else None) or {}
    return Report(
        file=str(path),
        retriever=str(retrieval.get("retriever", "unknown")),
        questions=len(questions),
        questions_hash=manifest.questions_hash if manifest else "",
        depth=depth,
        ks=ks,
        judged=judged,
    )


def _by_ids(question: Question) -> dict[str, int]:
    return dict.fromkeys((*question.supporting, *question.missed), 1)


def _by_answer(question: Question) -> dict[str, int]:
    return {document.id: int(answer_recall_at_k([document], question.answers, 1)) for document in question.documents}


def _judge(
    questions: Sequence[Question],
    ks: Sequence[int],
    by: str,
    relevance: Callable[[Question], dict[str, int]],
    recall: str,
) -> Judged:
    import ir_measures

    relevant = {question.id: relevance(question) for question in questions}
    ranked = {
        # trec_eval breaks ties by id, so the order itself is the score
        question.id: {document.id: -float(place) for place, document in enumerate(question.documents)}
        for question in questions
    }
    names = {"recall": recall, "MRR": "RR", "nDCG": "nDCG"}
    wanted = {(name, k): ir_measures.parse_measure(f"{base}@{k}") for name, base in names.items() for k in ks}
    sums = dict.fromkeys(wanted.values(), 0.0)
    for metric in ir_measures.iter_calc(list(sums), relevant, ranked):
        sums[metric.measure] += metric.value
    measures = {name: [sums[wanted[name, k]] / len(questions) for k in ks] for name in names}
    return Judged(len(questions), MEANINGS[by], measures)


def write_reports(reports: Sequence[Report], path: Path) -> None:
    """Write every figure as JSON, whole."""
    with written_whole(path) as beside:
        beside.write_text(
            json.dumps({"reports": [asdict(each) for each in reports]}, indent=2) + "\n", encoding="utf-8"
        )


def plot_reports(reports: Sequence[Report], path: Path) -> None:
    """Draw the curves over k: a panel a measure, a line a file, dashed by answer string."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if path.suffix.lower() != ".png":
        raise InputError("--plot", Phrase(str(path)), "a plot is a .png", "Name it so.")
    figure = Figure(figsize=(12, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 3, sharey=True), ("recall", "MRR", "nDCG"), strict=True):
        for number, report in enumerate(reports):
            for by, judged in report.judged.items():
                style = {"ids": "-", "answer": "--"}[by]
                label = chart(f"{Path(report.file).name} ({report.retriever}), by {by}")
                axes.plot(report.ks, [100 * v for v in judged.measures[name]], style, color=f"C{number}", label=label)
        axes.set_title(f"{name}@k")
        axes.set_xlabel("k")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.set_ylim(0, 101)
    figure.axes[0].set_ylabel("percent")
    figure.axes[0].legend(fontsize=7)
    with written_whole(path) as beside:
        figure.savefig(beside, format="png", dpi=120)
