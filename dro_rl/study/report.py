"""What a study has found: means over seeds, and of each claim whether it holds. As a record, as JSON, as Markdown."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dro_rl.errors import InputError, Phrase, some
from dro_rl.evaluation.stages import iteration_of
from dro_rl.evaluation.statistics import CONFIDENCE
from dro_rl.files import written_whole
from dro_rl.study.machines import read_machines
from dro_rl.study.plan import Claim, Study, at
from dro_rl.study.results import Results, Value, deepest_change
from dro_rl.study.verdicts import (
    MOST_SEEDS,
    Contrast,
    OverSeeds,
    Verdict,
    holm,
    over_seeds,
    paired,
    ratio_of_variances,
    seeds_needed,
    verdict,
)


@dataclass(frozen=True)
class Judged:
    """A claim and what became of it.

    Args:
        claim: the claim.
        verdict: whether it holds.
        words: the verdict with what would decide it, where it is undecided.
        a, b: means of what is compared, over the seeds that both have; for variances, their standard deviations.
        contrast: how far apart they are.
        adjusted: the p-value after Holm's correction over the study's claims.
        more_seeds: about how many would decide it; None where it is decided, or no number would.
    """

    claim: Claim
    verdict: Verdict
    words: str
    a: float | None
    b: float | None
    contrast: Contrast
    adjusted: float | None
    more_seeds: int | None


@dataclass(frozen=True)
class StudyReport:
    """A study's results.

    Args:
        study: its name.
        about: what its file says of itself.
        file, called: the file, and what a command names it by.
        base: the recipe that it changes.
        seeds: all that it asks for.
        machines: what ran it.
        means: by variant, by metric: percent, nats, shares, or a metric's own unit.
        claims: judged together.
        missing: arms that have not been run to their end.
        ended_before: by arm, stages asked for that its training ended before.
    """

    study: str
    about: str
    file: str
    called: str
    base: str
    seeds: Sequence[int]
    machines: Sequence[str]
    means: Mapping[str, Mapping[str, OverSeeds]]
    claims: Sequence[Judged]
    missing: Sequence[str]
    ended_before: Mapping[str, Sequence[str]]
    confidence: float = field(default=CONFIDENCE, init=False)


def make_report(study: Study, results: Results) -> StudyReport:
    """Means and verdicts of what has been run so far."""
    means: dict[str, dict[str, OverSeeds]] = {}
    for name, variant in study.variants.items():
        shown = [metric for metric in study.metrics if metric in variant.metrics]
        with at(f"{study.path}: variants.{name}"):
            means[name] = {metric: over_seeds(_numbers(results.values(name, metric))) for metric in shown}
    claims = judge(study, results)
    return StudyReport(
        study.name,
        study.about,
        str(study.path),
        study.called,
        study.base,
        study.seeds,
        read_machines(study.output_dir),
        means,
        claims,
        [arm.name for arm in results.missing],
        {arm: sorted(stages, key=iteration_of) for arm, stages in results.ended_before.items()},
    )


def judge(study: Study, results: Results) -> list[Judged]:
    """Every claim of a study, their p-values corrected together."""
    compared = [_compared(study, claim, results) for claim in study.claims.values()]
    adjusted = holm([contrast.p_value for _, _, contrast in compared])
    judged = []
    for claim, (a, b, contrast), p_value in zip(study.claims.values(), compared, adjusted, strict=True):
        found = verdict(contrast, p_value, claim.level)
        more, words = None, str(found)
        if found == "undecided":
            sides = [name for name in (claim.variant, claim.against) if isinstance(name, str)]
            more, words = _what_would_decide(claim, contrast, p_value, all(map(results.ran, sides)))
        judged.append(Judged(claim, found, words, a, b, contrast, p_value, more))
    return judged


def _compared(study: Study, claim: Claim, results: Results) -> tuple[float | None, float | None, Contrast]:
    """The two means and the contrast of a claim."""
    with at(f"{study.path}: claims.{claim.name}"):
        if claim.test == "never_falls":
            series = results.series(claim.variant, claim.metric)
            column = np.array([[deepest_change(values)] for values in series.values()]).reshape(-1, 1)
            return None, None, _of(column, margin=-claim.by)
        a = _values(study, claim, claim.variant, results)
        if not isinstance(claim.against, str):
            number = float(claim.against or 0.0)
            differences = _differences(a, {seed: _constant(value, number) for seed, value in a.items()})
            return over_seeds(_numbers(a)).mean, number, _of(differences, claim.by, -1 if claim.test == "below" else 1)
        b = _values(study, claim, claim.against, results)
        if claim.test == "steadier":
            ours, theirs = _numbers(a), _numbers(b)
            return _deviation(ours), _deviation(theirs), ratio_of_variances(ours, theirs)
        both = [seed for seed in a if seed in b]
        a, b = {seed: a[seed] for seed in both}, {seed: b[seed] for seed in both}
        contrast = _of(_differences(a, b), claim.by, -1 if claim.test == "below" else 1)
        return over_seeds(_numbers(a)).mean, over_seeds(_numbers(b)).mean, contrast


def _values(study: Study, claim: Claim, variant: str, results: Results) -> dict[int, Value]:
    stage = claim.stage if study.variants[variant].trains else None
    return results.values(variant, claim.metric, stage=stage, type=claim.type)


def _constant(value: Value, number: float) -> Value:
    return Value(number, dict.fromkeys(value.questions, number))


def _differences(a: Mapping[int, Value], b: Mapping[int, Value]) -> np.ndarray:
    """(seeds, questions) a − b, on the questions that all have; one column for values of no question."""
    sides = [(a[seed], b[seed]) for seed in a]
    if not sides:
        return np.empty((0, 1))
    if not all(first.questions and second.questions for first, second in sides):
        return np.array([[first.value - second.value] for first, second in sides])
    common = set.intersection(*(set(side.questions) for pair in sides for side in pair))
    if not common:
        raise InputError(
            "variant",
            Phrase("no question in common"),
            "what is compared has answered the same questions",
            "Correct it.",
        )
    ids = sorted(common)
    return np.array([[first.questions[i] - second.questions[i] for i in ids] for first, second in sides])


def _of(differences: np.ndarray, margin: float = 0.0, sign: int = 1) -> Contrast:
    if not len(differences):
        return Contrast(math.nan, math.nan, None, None, None, 0)
    return paired(differences, margin, sign)


def _numbers(values: Mapping[int, Value]) -> list[float]:
    return [value.value for value in values.values()]


def _deviation(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _what_would_decide(claim: Claim, contrast: Contrast, adjusted: float | None, ran: bool) -> tuple[int | None, str]:
    if contrast.seeds == 0:
        return None, "undecided: undefined in every seed" if ran else "undecided: not run"
    if contrast.seeds == 1:
        return None, "undecided: one run decides nothing"
    # Holm multiplies this p-value by as much as there are tests left when its turn comes.
    times = adjusted / contrast.p_value if adjusted and contrast.p_value else 1.0
    more = seeds_needed(contrast, claim.level / max(1.0, times))
    if more is None:
        shared = "more questions, too" if contrast.the_rest > 0 else f"more than {MOST_SEEDS:,} seeds"
        return None, f"undecided: {shared}, would be needed" if contrast.the_rest > 0 else f"undecided, {shared} needed"
    return more, f"undecided, about {more} more seed{'s' if more > 1 else ''} needed"


# Text -------------------------------------------------------------------------------------------------------


def number(value: float | None) -> str:
    """A value in a table: two digits after the point, more where it is small, `NONE` where there is none."""
    if value is None or math.isnan(value):
        return NONE
    return f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.2g}"


def interval(low: float | None, high: float | None) -> str:
    return NONE if low is None else f"{number(low)} … {number(high)}"


def claim_rows(report: StudyReport) -> list[tuple[str, ...]]:
    """A row a claim: words, metric, both sides, how far apart, interval, p, seeds, verdict."""
    rows: list[tuple[str, ...]] = []
    for judged in report.claims:
        claim, contrast = judged.claim, judged.contrast
        metric = claim.metric + (f", {claim.type}" if claim.type else "") + (f", {claim.stage}" if claim.stage else "")
        rows.append(
            (
                claim.says,
                metric,
                number(judged.a),
                number(judged.b),
                number(contrast.difference),
                interval(contrast.low, contrast.high),
                NONE if judged.adjusted is None else "<0.001" if judged.adjusted < 0.001 else f"{judged.adjusted:.3f}",
                str(contrast.seeds),
                judged.words,
            )
        )
    return rows


CLAIM_HEAD = ("claim", "metric", "A", "B", "A − B", f"{CONFIDENCE:.0%} interval", "p", "seeds", "verdict")
NONE = "–"
"""In a table, where there is nothing to say."""

NOTE = (
    "A − B is the mean difference over seeds, paired question by question where a metric has questions; for "
    "never_falls the deepest change from one iteration to the next; for steadier the ratio of the variances, and A "
    "and B are standard deviations. Intervals and p: Student's t over seeds, with questions as a second cluster; the F "
    "test for variances. p is corrected by Holm's method over all claims of the study. Seeds needed: for a power of "
    "80 %, if all is as it looks."
)


def mean_rows(report: StudyReport) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The head, and a row a variant."""
    metrics = list(dict.fromkeys(metric for row in report.means.values() for metric in row))
    rows = []
    for variant, row in report.means.items():
        if not row:
            continue  # nothing of it is shown
        seeds = max(found.seeds for found in row.values())
        rows.append((variant, str(seeds), *(_cell(row.get(metric), seeds) for metric in metrics)))
    return ("variant", "seeds", *metrics), rows


def _cell(found: OverSeeds | None, seeds: int) -> str:
    """A mean with its interval, and over how many seeds, where it is defined in fewer than the row has."""
    if found is None or found.mean is None:
        return NONE
    fewer = f" ({found.seeds} seed{'s' if found.seeds > 1 else ''})" if found.seeds < seeds else ""
    return number(found.mean) + (f" [{interval(found.low, found.high)}]" if found.low is not None else "") + fewer


def to_markdown(report: StudyReport) -> str:
    """The report as a section of a page."""
    seeds = f"{len(report.seeds)} seed{'s' if len(report.seeds) > 1 else ''}"
    lines = [f"## {report.study}", "", f"{report.about}.", ""]
    lines += [f"- study: `{report.study}`, on the recipe `{report.base}`, {seeds}"]
    lines += [f"- run: `dro-rl study run {report.called}`, then `dro-rl study show {report.called}`"]
    lines += [f"- machine: {machine}" for machine in report.machines]
    if report.missing:
        lines += [f"- not run to the end: {some(report.missing)}"]
    lines += [f"- {arm} ended before {', '.join(stages)}" for arm, stages in report.ended_before.items()]
    if report.claims:
        lines += ["", *_table(CLAIM_HEAD, claim_rows(report))]
    head, rows = mean_rows(report)
    lines += ["", *_table(head, rows), "", NOTE, ""]
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[cell.replace("|", "&#124;") for cell in row] for row in (head, ["---"] * len(head), *rows)]
    return [f"| {' | '.join(row)} |" for row in cells]


def write_report(folder: Path, report: StudyReport) -> None:
    """Write `report.md` and `report.json`, each whole."""
    with written_whole(folder / "report.md") as beside:
        beside.write_text(to_markdown(report), encoding="utf-8")
    with written_whole(folder / "report.json") as beside:
        text = json.dumps(_plain(asdict(report)), indent=2, ensure_ascii=False, allow_nan=False)
        beside.write_text(text + "\n", encoding="utf-8")


def write_section(page: Path, report: StudyReport) -> None:
    """Put the report into a page of several studies, in place of what the page had of this one, or at its end."""
    begin, end = f"<!-- study {report.study} -->", f"<!-- end of {report.study} -->"
    section = f"{begin}\n{to_markdown(report)}{end}\n"
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    pattern = re.compile(re.escape(begin) + r".*?" + re.escape(end) + r"\n?", re.DOTALL)
    text = pattern.sub(lambda _: section, text) if pattern.search(text) else f"{text.rstrip()}\n\n{section}".lstrip()
    with written_whole(page) as beside:
        beside.write_text(text, encoding="utf-8")


def _plain(value: Any) -> Any:
    """As JSON has it: what is no number is null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
