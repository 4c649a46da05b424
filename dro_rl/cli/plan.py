"""`dro-rl plan`, and `dro-rl train --dry-run`: what a run will do and take, before it does."""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from dro_rl.recipe import Recipe
    from dro_rl.resources.plan import Plan


def plan(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE", help="A recipe's name or file; --key value after it goes over it.", show_default=False
        ),
    ],
    gpus: Annotated[
        int | None, typer.Option("--gpus", min=1, help="Plan for so many GPUs, not for this machine.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="SIZE", help="Memory of a device, as 80GB.", show_default=False)
    ] = None,
    card: Annotated[
        str | None,
        typer.Option("--card", help="The GPU's name, as H100: what its makers say of its speed tells the time."),
    ] = None,
    sharding: Annotated[
        Literal["none", "ddp", "zero2", "zero3", "fsdp2"] | None,
        typer.Option("--sharding", help="How devices share the models. Unset: ddp where there are several."),
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Run a few iterations, here, to tell the time of them all.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Say what a run will do and take: steps, tokens, operations, memory by phase, disk, time.

    Nothing is trained, but for a few steps by --calibrate, in a folder that is deleted.

    The exit status is 1 where it does not fit: the last line says which keys to turn.

    \b
    Examples:
      dro-rl plan quickstart --calibrate
      dro-rl plan recipes/musique.yaml --gpus 8 --memory 80GB --card A100 --sharding fsdp2
      dro-rl plan mine.yaml --tokens_per_microbatch 8192 --json
    """
    from dro_rl.recipe import load_recipe, parse_command_line

    named = list(takewhile(lambda argument: not argument.startswith("-"), arguments))
    recipe = load_recipe(*parse_command_line([*named, *arguments[len(named) :]]))
    found = planned(recipe, gpus, memory, card, sharding, calibrate)
    show(found, json)
    raise typer.Exit(0 if found.fits else 1)


def planned(
    recipe: Recipe,
    gpus: int | None = None,
    memory: str | None = None,
    card: str | None = None,
    sharding: Any = None,
    calibrate: bool = False,
    processes: int | None = None,
) -> Plan:
    """The plan of a recipe on the devices that are named, else on this machine's."""
    from dro_rl.resources.machine import machine
    from dro_rl.resources.plan import make_plan

    devices = machine(gpus, memory, card, on_cpu=recipe.training.use_cpu, processes=processes)
    return make_plan(recipe, devices, sharding, calibrated=calibrate)


def show(found: Plan, json: bool) -> None:
    """Print a plan."""
    from dro_rl.cli.output import console, print_json
    from dro_rl.errors import as_size
    from dro_rl.progress import duration

    if json:
        print_json(_document(found))
        return
    from rich.table import Table

    out, counts = console(), found.counts
    schedule, work = counts.schedule, found.work
    device = found.machine.card or found.machine.kind
    where = f"{found.machine.devices} x {device}, {as_size(found.machine.memory)} each"
    out.print(f"devices     {where}, {found.sharding}, {found.precision}", soft_wrap=True)
    for role, size in found.sizes.items():
        trained = f"{_count(size.trained)} train" if size.trained else "frozen"
        out.print(f"{role:11} {_count(size.parameters)} weights, {trained}", soft_wrap=True)
    loop = (
        f"{counts.iterations} iterations of {schedule.questions_per_iteration} questions",
        f"{counts.steps} steps of {schedule.questions_per_step}",
        f"{_count(found.rollouts)} rollouts",
        f"{counts.evaluations} evaluations of {counts.dev} questions",
    )
    out.print(f"loop        {', '.join(loop)}", soft_wrap=True)
    asked = f"{work.prompt:.0f} tokens and {schedule.num_generations} x {work.selection:.0f}"
    if work.windows > 1:
        asked += f" in each of {work.windows:.3g} windows"
    read = f"{work.distinct:.1f} x ({work.reading:.0f} and {work.answer:.0f})"
    out.print(f"a question  selector {asked}, generator {read}", soft_wrap=True)
    out.print(f"disk        {as_size(found.disk)} of checkpoints and models", soft_wrap=True)
    table = Table(title="memory of one device, GiB")
    table.add_column("phase", no_wrap=True)
    columns = {
        "weights": "weights",
        "gradients": "grads",
        "optimizer": "optim",
        "activations": "activ",
        "cache": "cache",
        "other": "other",
        "total": "total",
    }
    for name in columns.values():
        table.add_column(name, justify="right", no_wrap=True)
    for phase in found.phases:
        style = "bold" if phase == found.peak else None
        table.add_row(phase.name, *(f"{getattr(phase, name) / 2**30:.2f}" for name in columns), style=style)
    out.print(table)
    times = Table(title="the whole run, at most")
    times.add_column("phase", no_wrap=True)
    for name in ("tokens", "operations", "time"):
        times.add_column(name, justify="right", no_wrap=True)
    for each in sorted(found.done, key=lambda done: -(done.seconds or done.operations)):
        counted = [_count(value) if value else "" for value in (each.tokens, each.operations)]
        times.add_row(each.phase, *counted, "?" if each.seconds is None else duration(each.seconds))
    out.print(times)
    if found.seconds is None:
        how = "--calibrate tells it" if found.machine.here else "--card NAME tells it"
        out.print(f"time        not known: {how}")
    else:
        source = (
            f"by {found.calibration.steps} steps that were run here"
            if found.calibration
            else f"by the {found.machine.card}'s peak, of which 40 % are assumed"
        )
        out.print(f"time        {duration(found.seconds)}, {source}", soft_wrap=True)
    peak, room = found.peak.total, found.machine.memory_of_a_process
    line = f"{as_size(peak)} of {as_size(room)} a process, in {found.peak.name}"
    if found.fits:
        out.print(f"fits        {line}", soft_wrap=True)
        return
    out.print(f"does not fit: {line}", soft_wrap=True)
    if found.advice is None or not found.advice.changes:
        out.print("advice      none: no key makes it smaller", soft_wrap=True)
        return
    turned = ", ".join(f"{key}: {value}" for key, value in found.advice.changes.items())
    then = "" if found.advice.fits else "; even that does not fit"
    out.print(f"advice      {turned} -> {as_size(found.advice.memory)}{then}", soft_wrap=True)


def _document(found: Plan) -> dict[str, Any]:
    from dataclasses import asdict

    phases = [asdict(phase) | {"total": phase.total} for phase in found.phases]
    sizes = {
        role: {
            name: getattr(size, name) for name in ("parameters", "trained", "layers", "width", "vocabulary", "packed")
        }
        for role, size in found.sizes.items()
    }
    counts = found.counts
    return {
        "machine": found.machine,
        "sharding": found.sharding,
        "precision": found.precision,
        "questions": counts.schedule.num_questions,
        "questions_per_step": counts.schedule.questions_per_step,
        "steps": counts.steps,
        "iterations": counts.iterations,
        "rollouts": found.rollouts,
        "evaluations": counts.evaluations,
        "checkpoints": counts.checkpoints,
        "models": sizes,
        "work": found.work,
        "phases": phases,
        "peak": {"phase": found.peak.name, "bytes": found.peak.total, "room": found.machine.memory_of_a_process},
        "fits": found.fits,
        "advice": found.advice,
        "disk": found.disk,
        "done": found.done,
        "seconds": found.seconds,
        "calibration": found.calibration,
    }


def _count(number: float) -> str:
    for size, name in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f} {name}"
    return f"{number:.0f}"
