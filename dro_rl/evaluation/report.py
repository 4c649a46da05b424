"""The report of an evaluation: means with intervals, as a record, as JSON and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dro_rl.data.manifest import Manifest
from dro_rl.evaluation.results import METRICS, UNITS, Conditions, QuestionResult, metric_values, results_by_type
from dro_rl.evaluation.statistics import CONFIDENCE, RESAMPLES, Estimate, estimate
from dro_rl.files import written_whole
from dro_rl.selection import SelectionSpec
from dro_rl.selection.windows import Windows
from dro_rl.shown import markdown

TYPE_METRICS = ("em", "f1", "recall@5", "answer_recall@5", "answer_logp")
"""What the tables by question type show; the JSON has every metric."""


@dataclass(frozen=True)
class Report:
    """What an evaluation found.

    Args:
        run: the folder of the pair.
        data: where the questions come from.
        conditions: what was asked, and how.
        candidates: what was done to them before the pair read them, and what said so.
        skipped: questions left out, by reason.
        metrics: every metric over all questions: percent, or in its unit.
        by_type: the same for each number of hops or question type.
        manifest: of the question file, where it has one: its licence, retrieval and changes.
    """

    run: str
    data: str
    conditions: Conditions
    candidates: str
    skipped: Mapping[str, int]
    metrics: Mapping[str, Estimate]
    by_type: Mapping[str, Mapping[str, Estimate]]
    manifest: Manifest | None = None
    confidence: float = field(default=CONFIDENCE, init=False)
    resamples: int = field(default=RESAMPLES, init=False)


def make_report(
    run: str,
    data: str,
    conditions: Conditions,
    candidates: str,
    results: Sequence[QuestionResult],
    skipped: Mapping[str, int],
    manifest: Manifest | None,
) -> Report:
    """Means and intervals of an evaluation's rows."""
    by_type = {kind: _estimates(of_type) for kind, of_type in results_by_type(results).items()}
    return Report(run, data, conditions, candidates, skipped, _estimates(results), by_type, manifest)


def _estimates(results: Sequence[QuestionResult]) -> dict[str, Estimate]:
    return {name: estimate(metric_values(results, name)) for name in METRICS}


def write_report(folder: Path, report: Report) -> None:
    """Write `report.md`, then `report.json`, each whole."""
    with written_whole(folder / "report.md") as beside:
        beside.write_text(to_markdown(report), encoding="utf-8")
    with written_whole(folder / "report.json") as beside:
        beside.write_text(json.dumps(asdict(report), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def number(value: float | None) -> str:
    """A mean in a table, `–` where there is none."""
    return "–" if value is None else f"{value:.2f}"


def interval(low: float | None, high: float | None) -> str:
    """An interval in a table."""
    return "–" if low is None else f"{number(low)} … {number(high)}"


def label(metric: str) -> str:
    """A metric's name with its unit."""
    return f"{metric} ({UNITS[metric]})" if metric in UNITS else metric


def headline(report: Report) -> list[tuple[str, str]]:
    """What stands above the table: what was evaluated, on what, and how."""
    conditions, manifest = report.conditions, report.manifest
    lines = [
        ("run", report.run),
        ("split", f"{conditions.split}: {conditions.num_questions} questions"),
        ("questions hash", conditions.questions_hash),
        ("selector", "the run's own" if conditions.control == "none" else f"control: {_control(conditions)}"),
        (
            "decoding",
            f"{conditions.decoding}, K={SelectionSpec.of(conditions.num_selected)} of N={conditions.num_documents}"
            f"{_windows(conditions)}",
        ),
    ]
    lines.append(("candidates", report.candidates))
    if manifest is not None and manifest.retrieval:
        known = [
            f"{key} {manifest.retrieval[key]}" for key in ("retriever", "corpus", "k") if key in manifest.retrieval
        ]
        lines.append(("retrieval", ", ".join(known)))
    if manifest is not None and manifest.changes:
        lines.append(("changes", "; ".join(_flat(change) for change in manifest.changes)))
    return lines + [("left out", f"{count} questions: {reason}") for reason, count in report.skipped.items()]


def _windows(conditions: Conditions) -> str:
    windows = Windows.of(
        conditions.window_size, conditions.window_stride, SelectionSpec.of(conditions.num_selected).most
    )
    if windows is None:
        return ""
    return f", in windows of {windows.size} that slide by {windows.stride}: {windows.count(conditions.num_documents)}"


def _control(conditions: Conditions) -> str:
    return f"random, seed {conditions.seed}" if conditions.control == "random" else conditions.control


def _flat(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def metric_rows(metrics: Mapping[str, Estimate]) -> list[tuple[str, str, str, str]]:
    """Name, mean, interval and count of every metric that some question defines."""
    return [
        (label(name), number(found.mean), interval(found.low, found.high), str(found.n))
        for name, found in metrics.items()
        if found.n
    ]


def type_rows(report: Report, intervals: bool = True) -> list[tuple[str, ...]]:
    """A row a type: its name, its questions, and its means, with their intervals or without."""

    def cell(found: Estimate) -> str:
        return f"{number(found.mean)} [{interval(found.low, found.high)}]" if intervals else number(found.mean)

    return [
        (kind, str(metrics["em"].n), *(cell(metrics[name]) for name in TYPE_METRICS))
        for kind, metrics in report.by_type.items()
    ]


def to_markdown(report: Report) -> str:
    """The report as one page."""
    lines = [f"# Evaluation: {markdown(report.conditions.stage)}", ""]
    lines += [f"- {name}: {markdown(value)}" for name, value in headline(report)]
    lines += ["", *_table(("metric", "mean", f"{CONFIDENCE:.0%} interval", "questions"), metric_rows(report.metrics))]
    if report.by_type:
        lines += ["", *_table(("type", "questions", *map(label, TYPE_METRICS)), type_rows(report))]
    lines += [
        "",
        f"Percent, but for what names its unit. Intervals: percentile bootstrap over questions, {RESAMPLES} resamples.",
        "",
    ]
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(map(markdown, row))} |" for row in (head, ["---"] * len(head), *rows)]
