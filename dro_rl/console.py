"""What the job prints: help, one line a step, a table at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import PartialState
from rich.console import Console
from rich.table import Table
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from dro_rl.recipe import describe_keys

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


def print_stages(stages: Sequence[Mapping[str, Any]], output_dir: str | None) -> None:
    """The dev split at every stage, as a table."""
    if not PartialState().is_main_process:
        return
    table = Table(title=f"{output_dir}: {stages[0]['split']}, {stages[0]['n']} questions")
    names = ("em", "f1", "recall@1", "recall@3", "recall@5", "answer_logp", "valid")
    table.add_column("stage", no_wrap=True)
    for name in names:
        table.add_column(name.replace("recall@", "R@"), justify="right", no_wrap=True)
    for stage in stages:
        cells = ["–" if stage[name] is None else f"{stage[name]:.2f}" for name in names]
        table.add_row(stage["stage"], *cells)
    Console().print(table)


def print_help(summary: str) -> None:
    """Usage with examples, and every key of ours."""
    console = Console(soft_wrap=False)
    console.print(summary.strip(), markup=False, highlight=False)
    table = Table(box=None, pad_edge=False)
    for title in ("key", "default", "what it is"):
        table.add_column(title, overflow="fold")
    for row in describe_keys():
        table.add_row(*row)
    console.print(table, markup=False)
    console.print("Every key of transformers.TrainingArguments is one too, but for those that have no meaning here.")
