"""The tables that the job prints at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from dro_rl.em.timing import Phase, rates
from dro_rl.rollouts.signals import Signal, reading
from dro_rl.terminal import console


def kept(stages: Sequence[Mapping[str, Any]], stage: str, metric: str, greater_is_better: bool) -> str:
    """Which stage's weights a run exports, and where they stand against the start, in a line."""
    values = {each["stage"]: each[metric] for each in stages}
    start = [name for name in values if name in ("base", "warmup")][-1]
    iterations = [name for name in values if name.startswith("iteration-")]
    place = "" if stage == start else f", of {len(iterations)} evaluated"
    line = f"{stage}{place}, with {metric} {values[stage]:.2f}"
    if stage == start:
        return f"{line}: no iteration was as good"
    sign = 1 if greater_is_better else -1
    line += f"; {start} had {values[start]:.2f}"
    if sign * values[stage] < sign * values[start]:
        line += ", which is better"
    equal = [name for name in (start, *iterations) if values[name] == values[stage] and name != stage]
    return f"{line}; as good: {', '.join(equal)}" if equal else line


def print_stages(stages: Sequence[Mapping[str, Any]], run_dir: Path, curves: Path, kept: str, k: int) -> None:
    """The dev split before, on the way and after, as a table, which stage was kept, and where the rest is.

    Recall is shown at as many documents as the selector names, K, and at fewer.
    """
    table = Table(title=f"{run_dir}: {stages[0]['split']}, {stages[0]['n']} questions")
    recalls = [f"recall@{n}" for n in (1, 3, 5) if n <= k]
    names = ("em", "f1", *recalls, "answer_logp", "valid")
    table.add_column("stage", no_wrap=True)
    for name in names:
        table.add_column(name.replace("recall@", "R@").replace("answer_logp", "log p"), justify="right", no_wrap=True)

    def row(label: str, summary: Mapping[str, Any], style: str | None = None) -> None:
        table.add_row(label, *("–" if summary[name] is None else f"{summary[name]:.2f}" for name in names), style=style)

    shown = stages if len(stages) <= 9 else [*stages[:2], *stages[-1:]]
    for stage in shown:
        row(stage["stage"], stage)
    # What joint training began from: the warm-up where there was one, else the base.
    first, last = [stage for stage in stages if stage["stage"] in ("base", "warmup")][-1], stages[-1]
    table.add_section()
    for kind in last.get("by_type", {}):
        row(f"{first['stage']}, {kind}", first["by_type"][kind], "dim")
        row(f"{last['stage']}, {kind}", last["by_type"][kind], "dim")
    out = console()
    out.print(table)
    out.print(f"kept        {kept}", soft_wrap=True)
    out.print(f"curves      {curves}", soft_wrap=True)
    out.print(f"rollouts    dro-rl rollouts show {run_dir}", soft_wrap=True)
    out.print(f"evaluate    dro-rl evaluate {run_dir} --data FILE", soft_wrap=True)
    out.print(f"ask         dro-rl ask {run_dir} QUESTION --documents FILE", soft_wrap=True)


def print_signals(found: Sequence[Signal], spans: Mapping[str, Sequence[tuple[int, int | None]]]) -> None:
    """What said that the run needs a hand: when, what it came to, and which keys to turn.

    Args:
        found: every signal after the last iteration.
        spans: by name, the iterations in which one appeared and was over; None for one that stands at the end.
    """
    if not spans:
        return
    table = Table(title="signals")
    for name in ("iterations", "signal at the end", "keys to turn"):
        table.add_column(name)
    for signal in found:
        if times := spans.get(signal.rule.name):
            stands = times[-1][1] is None
            when = ", ".join(f"{first}-{'' if end is None else end}" for first, end in times[-3:])
            table.add_row(
                when if len(times) <= 3 else f"…, {when}",
                reading(signal) if stands else f"{signal.rule.name}: over",
                ", ".join(signal.rule.keys),
                style="yellow" if stands else "dim",
            )
    console().print(table)


def print_phases(phases: Mapping[str, Phase], peak: float | None) -> None:
    """Where this process spent its time, the longest phase first."""
    table = Table(title="where the time went")
    table.add_column("phase", no_wrap=True)
    for name in ("seconds", "share", "tokens/s", *(["MFU"] if peak else [])):
        table.add_column(name, justify="right")
    whole = sum(phase.seconds for phase in phases.values())
    for name, phase in sorted(phases.items(), key=lambda item: -item[1].seconds):
        found = rates({name: phase}, peak)
        tokens, utilisation = found.get(f"tokens_per_second/{name}"), found.get(f"mfu/{name}")
        cells = [f"{phase.seconds:.1f}", f"{phase.seconds / whole:.1%}", "" if tokens is None else f"{tokens:,.0f}"]
        if peak:
            cells.append("" if utilisation is None else f"{utilisation:.1%}")
        table.add_row(name, *cells)
    console().print(table)
