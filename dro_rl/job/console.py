"""The tables at the end of a job, which `dro-rl runs show` prints again: both print what a run's folder says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from dro_rl.evaluation.stages import FINAL, STARTS, recalls, start_of
from dro_rl.rollouts.signals import Signal, reading
from dro_rl.runs import Run, SignalSpan
from dro_rl.selection import SelectionSpec
from dro_rl.terminal import console


def print_run(run: Run) -> None:
    """Where the time went, the signals, the stages with the kept one, and what to look at next."""
    if run.ending is not None:
        print_phases(run.ending.rates)
        print_signals(run.ending.signals)
    if run.stages:
        print_stages(run)
    out = console()
    if run.state != "finished":
        owner = f" by {run.owner}" if run.owner else ""
        out.print(f"state       {run.state}{owner}, iteration {run.iteration} of {run.iterations}", soft_wrap=True)
        if run.standing:
            out.print(f"signals     {', '.join(run.standing)}", soft_wrap=True)
    if run.stages and run.kept is not None:
        metric = str(run.recipe["metric_for_best_model"])
        word = "kept" if run.state == "finished" else "would keep"
        out.print(f"{word:<11} {kept(run.stages, run.kept, metric, run.more_is_better)}", soft_wrap=True)
    curves = run.path / "evaluation" / "curves.png"
    if curves.is_file():
        out.print(f"curves      {curves}", soft_wrap=True)
    if run.iteration:
        out.print(f"rollouts    dro-rl rollouts show {run.path}", soft_wrap=True)
    if run.state == "finished":
        out.print(f"evaluate    dro-rl evaluate {run.path} --data FILE", soft_wrap=True)
        out.print(f"ask         dro-rl ask {run.path} QUESTION --documents FILE", soft_wrap=True)


def kept(stages: Sequence[Mapping[str, Any]], stage: str, metric: str, greater_is_better: bool) -> str:
    """Which stage's weights a run exports, and where they stand against the start, in a line."""
    values = {each["stage"]: math.nan if each.get(metric) is None else each[metric] for each in stages}
    start = str(start_of(stages)["stage"])
    iterations = [name for name in values if name not in (*STARTS, FINAL)]
    place = "" if stage == start else f", of {len(iterations)} evaluated"
    line = f"{stage}{place}, with {metric} {values[stage]:.2f}"
    if stage == start:
        return f"{line}: no iteration was as good" if iterations else line
    sign = 1 if greater_is_better else -1
    line += f"; {start} had {values[start]:.2f}"
    if sign * values[stage] < sign * values[start]:
        line += ", which is better"
    equal = [name for name in (start, *iterations) if values[name] == values[stage] and name != stage]
    return f"{line}; as good: {', '.join(equal)}" if equal else line


def print_stages(run: Run) -> None:
    """The dev split before, on the way and after, as a table.

    Recall is shown at as many documents as the selector names at most, and at fewer; how many it names, where it
    decides.
    """
    stages = run.stages
    table = Table(title=f"{run.path}: {stages[0]['split']}, {stages[0]['n']} questions")
    spec = SelectionSpec.of(run.recipe["num_selected"])
    names = ("em", "f1", *recalls(spec.most), "answer_logp", "valid", *(["num_selected"] if spec.chooses else []))
    table.add_column("stage", no_wrap=True)
    for name in names:
        shown = name.replace("recall@", "R@").replace("answer_logp", "log p").replace("num_selected", "K")
        table.add_column(shown, justify="right", no_wrap=True)

    def row(label: str, summary: Mapping[str, Any], style: str | None = None) -> None:
        table.add_row(
            label, *("–" if (value := summary.get(name)) is None else f"{value:.2f}" for name in names), style=style
        )

    for stage in stages if len(stages) <= 9 else [*stages[:2], *stages[-1:]]:
        row(stage["stage"], stage)
    first, last = start_of(stages), stages[-1]
    table.add_section()
    for kind in last.get("by_type", {}):
        row(f"{first['stage']}, {kind}", first.get("by_type", {}).get(kind, {}), "dim")
        if last is not first:
            row(f"{last['stage']}, {kind}", last["by_type"][kind], "dim")
    console().print(table)


def signal_spans(found: Sequence[Signal], spans: Mapping[str, Sequence[tuple[int, int | None]]]) -> list[SignalSpan]:
    """What said that the run needs a hand: when, what it came to, and which keys to turn.

    Args:
        found: every signal after the last iteration.
        spans: by name, the iterations in which one appeared and was over; None for one that stands at the end.
    """
    rows: list[SignalSpan] = []
    for signal in found:
        if times := spans.get(signal.rule.name):
            when = ", ".join(f"{first}-{'' if end is None else end}" for first, end in times[-3:])
            rows.append(
                {
                    "name": signal.rule.name,
                    "iterations": when if len(times) <= 3 else f"…, {when}",
                    "reading": reading(signal),
                    "keys": list(signal.rule.keys),
                    "stands": times[-1][1] is None,
                }
            )
    return rows


def print_signals(spans: Sequence[SignalSpan]) -> None:
    """The signals of a run, those that stand at its end with what they came to."""
    if not spans:
        return
    table = Table(title="signals")
    for name in ("iterations", "signal at the end", "keys to turn"):
        table.add_column(name)
    for span in spans:
        table.add_row(
            span["iterations"],
            span["reading"] if span["stands"] else f"{span['name']}: over",
            ", ".join(span["keys"]),
            style="yellow" if span["stands"] else "dim",
        )
    console().print(table)


def print_phases(rates: Mapping[str, float]) -> None:
    """Where a process spent its time, the longest phase first.

    Args:
        rates: `time/<phase>` in seconds, and where known `tokens_per_second/<phase>` and `mfu/<phase>`.
    """
    table = Table(title="where the time went")
    table.add_column("phase", no_wrap=True)
    peak = any(name.startswith("mfu/") for name in rates)
    for name in ("seconds", "share", "tokens/s", *(["MFU"] if peak else [])):
        table.add_column(name, justify="right")
    seconds = {name.removeprefix("time/"): value for name, value in rates.items() if name.startswith("time/")}
    whole = sum(seconds.values()) or math.nan
    for name, value in sorted(seconds.items(), key=lambda item: -item[1]):
        tokens, utilisation = rates.get(f"tokens_per_second/{name}"), rates.get(f"mfu/{name}")
        cells = [f"{value:.1f}", f"{value / whole:.1%}", "" if tokens is None else f"{tokens:,.0f}"]
        if peak:
            cells.append("" if utilisation is None else f"{utilisation:.1%}")
        table.add_row(name, *cells)
    console().print(table)
