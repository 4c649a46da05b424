"""How the figures of rollouts are printed: tables, or lists on a narrow terminal, and their JSON documents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from dro_rl.cli.output import TABLE_WIDTH, bar, number, percent, plain, print_rows
from dro_rl.rollouts.changes import Change
from dro_rl.rollouts.diagnostics import Summary
from dro_rl.rollouts.explain import Group
from dro_rl.rollouts.places import Brief
from dro_rl.rollouts.signals import Iteration, Signal, reading
from dro_rl.selection import format_selection

FIXED = ("weight", "", "ℓ", "mean", "sum", "log p", "log q")
LONGEST = 400
"""Characters of a text that are printed; JSON has it whole."""

PLACES = 20
"""Document numbers whose share is printed: all of them, or the most frequent."""


def iteration_document(iteration: Iteration) -> dict[str, Any]:
    """An iteration as the JSON documents have it."""
    steps = {"iteration": iteration.number, "first_step": iteration.first_step, "last_step": iteration.last_step}
    return {**steps, **asdict(iteration.rollouts)}


def signal_document(signal: Signal) -> dict[str, Any]:
    """A signal as the JSON documents have it."""
    rule, measured = signal.rule, signal.measured
    return {
        "name": rule.name,
        "fired": signal.fired,
        "value": measured.value,
        "limit": measured.limit,
        "above": measured.above,
        "unit": rule.unit,
        "meaning": rule.meaning,
        "keys": rule.keys,
        "advice": rule.advice,
        "first_iteration": signal.first_iteration,
        "last_iteration": signal.last_iteration,
        "questions": signal.questions,
    }


def print_iterations(out: Console, found: Sequence[Iteration], *, headings: bool = True) -> None:
    """A line an iteration."""

    names = ("iter", "step", "q", "valid", "clean", "dup", "tie", "ESS/m", "bound", "R 1/3/5", "by weight", "first")
    widths = (4, 4, 4, 5, 5, 3, 3, 5, 5, 7, 9, 6)
    rows = [_cells(iteration) for iteration in found]
    if out.width < TABLE_WIDTH:
        for row in rows:
            out.print(f"iteration {row[0]}", style="bold")
            for name, cell in zip(names[1:], row[1:], strict=True):
                out.print(f"  {name:<10}{cell}")
        return
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold", show_header=headings)
    for name, width in zip(names, widths, strict=True):
        table.add_column(name, justify="right", no_wrap=True, min_width=width)
    for row in rows:
        table.add_row(*row)
    out.print(table)


def _cells(iteration: Iteration) -> tuple[str, ...]:

    figures = iteration.rollouts
    often = max(range(len(figures.first)), key=figures.first.__getitem__, default=None)
    return (
        str(iteration.number),
        str(iteration.first_step),
        str(figures.questions),
        percent(figures.valid),
        percent(figures.clean),
        percent(figures.duplicate),
        percent(figures.all_tie),
        percent(figures.ess_share),
        number(figures.evidence_bound),
        "/".join(map(percent, figures.recall.values())),
        "/".join(map(percent, figures.weighted_recall.values())),
        "-" if often is None else f"[{often + 1}]{percent(figures.first[often])}",
    )


def print_places(out: Console, figures: Summary, over: str) -> None:
    """The histogram of the numbers that are selected: a policy that always names [10] leaps to the eye."""

    if not figures.first:
        return
    out.print(f"Places, over {over}: first, and at all, in percent", style="bold")
    often = sorted(range(len(figures.first)), key=lambda place: -max(figures.first[place], figures.selected[place]))
    for place in sorted(often[:PLACES]):
        first, selected = figures.first[place], figures.selected[place]
        out.print(
            f"{f'[{place + 1}]':>6} {percent(first):>3} {bar(first, 16):<16} {percent(selected):>3} {bar(selected, 16)}"
        )
    if len(often) > PLACES:
        out.print(f"  and {len(often) - PLACES} more")
    out.print(f"  a number drawn at random would be first in {percent(figures.first_chance)}")
    out.print()


def print_signals(out: Console, signals: Sequence[Signal], over: str) -> None:

    out.print(f"Signals, over {over}", style="bold")
    for signal in signals:
        if math.isnan(signal.measured.value):
            continue
        mark, style = ("!", "yellow") if signal.fired else (" ", "")
        out.print(f"{mark} {reading(signal)}", style=style)
        if signal.fired:
            out.print(Padding(f"{signal.rule.meaning} {signal.rule.advice}", (0, 0, 0, 2)))


def print_group(out: Console, group: Group) -> None:

    m = len(group.rollouts)
    out.print(f"{plain(group.question_id)}: {_cut(group.question)}", style="bold")
    out.print(f"answers: {' | '.join(map(_cut, group.answers))}")
    out.print(
        f"iteration {group.iteration}, step {group.step}: ESS {number(group.ess)} of {m}, "
        f"evidence bound {number(group.evidence_bound)} nats, "
        f"weight temperature {group.weight_temperature:.3g}"
    )
    averaged = all(rollout.answer_logp == rollout.answer_logp_mean for rollout in group.rollouts if rollout.valid)
    headings = ("weight", "", "selection", "ℓ", "sum" if averaged else "mean", "log p", "log q", "problems")
    rows = []
    for rollout in group.rollouts:
        marks = {d.number: "*" if d.supporting else "" for d in rollout.documents}
        named = format_selection(rollout.numbers)
        for n, mark in marks.items():
            named = named.replace(f"[{n}]", f"[{n}]{mark}")
        rows.append(
            (
                number(rollout.weight),
                bar(rollout.weight),
                named or f"wrote: {plain(rollout.text)[:40]}",
                number(rollout.answer_logp),
                number(rollout.answer_logp_sum if averaged else rollout.answer_logp_mean),
                number(rollout.selection_logp),
                number(rollout.proposal_logp),
                ", ".join(rollout.problems),
            )
        )
    if out.width < TABLE_WIDTH:
        for row in rows:
            out.print(" ".join(filter(None, row[:3])))
            details = (f"{heading} {cell}" for heading, cell in zip(headings[3:], row[3:], strict=True) if cell)
            out.print(Padding(", ".join(details), (0, 0, 0, 2)))
    else:
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
        for heading in headings:
            left = heading in ("", "selection", "problems")
            table.add_column(heading, justify="left" if left else "right", no_wrap=heading in FIXED)
        for row in rows:
            table.add_row(*row)
        out.print(table)
    _print_windows(out, group)
    _print_answers(out, group)
    documents = {d.number: d for rollout in group.rollouts for d in rollout.documents}
    for n, document in sorted(documents.items()):
        out.print(f"{f'[{n}]':>5}{'*' if document.supporting else ' '} {_cut(document.title)}", no_wrap=True)
    missing = group.num_supporting - sum(d.supporting for d in documents.values())
    if group.num_supporting:
        out.print(f"* supports the answer; {missing} of {group.num_supporting} supporting were not selected")
    out.print(plain(group.why), style="bold")


def _cut(text: str) -> str:
    """A text of any length in at most `LONGEST` characters."""
    shown = plain(text[: 2 * LONGEST])
    return shown if len(shown) <= LONGEST else f"{shown[:LONGEST]}…"


def _print_windows(out: Console, group: Group) -> None:
    """What each rollout was shown, window by window, and what it picked; rollouts that went the same way once."""
    ways = {rollout.windows: rollout for rollout in reversed(group.rollouts) if rollout.windows}
    for way, rollout in reversed(ways.items()):
        out.print(f"windows of {format_selection(rollout.numbers) or 'the invalid one'}, from the end of the list on:")
        for window in way:
            picked = format_selection(window.picked) or f"wrote: {plain(window.text)[:40]}"
            out.print(Padding(f"{in_runs(window.shown)} → {picked}", (0, 0, 0, 2)))


def in_runs(numbers: Sequence[int]) -> str:
    """Numbers in their order, those that follow each other as one: `81-100, 7, 3-4`."""
    runs: list[list[int]] = []
    for each in numbers:
        if runs and each == runs[-1][-1] + 1:
            runs[-1][1:] = [each]
        else:
            runs.append([each])
    return ", ".join("-".join(map(str, run)) for run in runs)


def _print_answers(out: Console, group: Group) -> None:
    """What was answered from each selection, where rewards look at answers, and what each reward made of it."""
    answered = {rollout.numbers: rollout for rollout in group.rollouts if rollout.answer is not None}
    for numbers, rollout in answered.items():
        rewards = ", ".join(f"{plain(name)} {number(value)}" for name, value in rollout.rewards.items())
        answer = plain(rollout.answer or "nothing")
        out.print(f"{format_selection(numbers)} answers {answer}: {rewards}; reward {number(rollout.reward)}")


def print_briefs(out: Console, briefs: Sequence[Brief]) -> None:
    """A line a question."""
    rows = [
        (
            plain(brief.question_id),
            number(brief.evidence_bound),
            number(brief.selector_entropy),
            number(brief.ess),
            f"{brief.distinct}/{brief.rollouts}",
            percent(brief.recall),
            f"{number(brief.weight)} {brief.selection or 'none'}",
            _cut(brief.question),
        )
        for brief in briefs
    ]
    print_rows(out, ("question", "bound", "entropy", "ESS", "sel", "R@5", "heaviest", ""), rows)


def print_changes(out: Console, changes: Sequence[Change]) -> None:
    """A line a question: what it was, and what it became."""
    rows = [
        (
            plain(change.after.question_id),
            f"{change.before.iteration} → {change.after.iteration}",
            f"{number(change.before.evidence_bound)} → {number(change.after.evidence_bound)}",
            f"{change.before.selection or 'none'} → {change.after.selection or 'none'}",
            _cut(change.after.question),
        )
        for change in changes
    ]
    print_rows(out, ("question", "iteration", "bound", "heaviest", ""), rows)
