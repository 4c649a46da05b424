"""What the job prints: help, one line a step, a table at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from dro_rl.em.timing import Phase, rates
from dro_rl.recipe import KEYS, described
from dro_rl.terminal import console

COLUMNS = (("evidence_bound", "bound", ".2f"), ("ess", "ess", ".1f"), ("answer_logp", "answer", ".2f"),
           ("recall@3", "recall@3", ".2f"), ("rollouts/valid", "valid", ".2f"))  # fmt: skip


class LineProgress(ProgressCallback):
    """The stock progress bar, with one readable line a log in place of a dictionary of every metric.

    Under `disable_tqdm` the lines come without the bar.
    """

    def on_train_begin(self, args: TrainingArguments, *rest: Any, **kwargs: Any) -> None:
        if not args.disable_tqdm:
            super().on_train_begin(args, *rest, **kwargs)

    def on_step_end(self, args: TrainingArguments, *rest: Any, **kwargs: Any) -> None:
        if not args.disable_tqdm:
            super().on_step_end(args, *rest, **kwargs)

    def on_train_end(self, args: TrainingArguments, *rest: Any, **kwargs: Any) -> None:
        if not args.disable_tqdm:
            super().on_train_end(args, *rest, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        write = print if args.disable_tqdm or self.training_bar is None else self.training_bar.write
        if "loss" in logs:
            parts = [f"{label} {logs[name]:{form}}" for name, label, form in COLUMNS if name in logs]
            seconds = sum(value for name, value in logs.items() if name.startswith("time/"))
            write(
                f"step {state.global_step}/{state.max_steps}  loss {logs['loss']:.3f}  "
                f"{'  '.join(parts)}  {seconds:.1f} s"
            )
        elif "eval_em" in logs:
            write(
                f"step {state.global_step}/{state.max_steps}  dev: em {logs['eval_em']:.1f}  f1 {logs['eval_f1']:.1f}"
                + "".join(f"  {name[5:]} {logs[name]:.1f}" for name in ("eval_recall@3", "eval_valid") if name in logs)
            )


def print_stages(stages: Sequence[Mapping[str, Any]], run_dir: Path, curves: Path) -> None:
    """The dev split before, on the way and after, as a table, and where the rest is."""
    table = Table(title=f"{run_dir}: {stages[0]['split']}, {stages[0]['n']} questions")
    names = ("em", "f1", "recall@1", "recall@3", "recall@5", "answer_logp", "valid")
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
    out.print(f"curves      {curves}", soft_wrap=True)
    out.print(f"rollouts    dro-rl rollouts show {run_dir}", soft_wrap=True)
    out.print(f"evaluate    dro-rl evaluate {run_dir} --data FILE", soft_wrap=True)
    out.print(f"ask         dro-rl ask {run_dir} QUESTION --documents FILE", soft_wrap=True)


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


def print_help(summary: str) -> None:
    """Usage with examples, and every key of ours."""
    print(summary.strip())
    for key in KEYS.values():
        print(f"\n{described(key)}")
