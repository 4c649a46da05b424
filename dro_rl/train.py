"""The job: a recipe in, a trained selector and generator out.

dro-rl train quickstart --seed 1 --output_dir runs/seed-1
dro-rl train recipes/musique.yaml [--key value …] --launch "--config_file ddp --num_processes 8"
accelerate launch --config_file recipes/accelerate/ddp.yaml dro_rl/train.py recipes/musique.yaml [--key value …]
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from functools import partial

import torch
import transformers
from transformers import set_seed

from dro_rl.errors import InputError, Phrase, first_line, is_full_disk
from dro_rl.evaluation.plots import plot_curves
from dro_rl.job import preflight
from dro_rl.job.assembly import evaluate_base, load_models, load_reference, warm_up_models
from dro_rl.job.console import kept, print_phases, print_signals, print_stages
from dro_rl.job.identity import inputs_of
from dro_rl.job.output import claimed_output_dir
from dro_rl.job.stopping import LAUNCHED, Stopped, say_stopped, stop_on_signals, stop_with_launcher
from dro_rl.keys.reference import keys_text
from dro_rl.recipe import Recipe, load_recipe, parse_command_line
from dro_rl.terminal import PlainFormatter, console
from dro_rl.trainer import DROTrainer

SECONDS_TO_BE_ENDED = 10


def main(arguments: Sequence[str]) -> None:
    """Recipe, data, checks, and the run: from top to bottom."""
    transformers.utils.logging.disable_progress_bar()  # ours show the work; loading and writing files is brief
    recipe = load_recipe(*parse_command_line(arguments))
    job = preflight.prepare(recipe, recipe.training.world_size)
    inputs = partial(inputs_of, recipe, job.train, job.dev, job.prompters)
    with claimed_output_dir(recipe, inputs) as checkpoint:
        run_training(recipe, job, checkpoint)


def run_training(recipe: Recipe, job: preflight.Prepared, checkpoint: str | None) -> None:
    """What happens in the output folder: warm-up, models, training, evaluation, export."""
    run, training = recipe.run, recipe.training
    set_seed(training.seed)
    evaluate_base(recipe, job.dev, job.prompters)
    sources = warm_up_models(recipe, job.train, job.prompters)
    set_seed(training.seed)
    trainer = DROTrainer(
        load_models(recipe, sources),
        training,
        job.train,
        job.dev,
        job.prompters,
        eval_split=run.dataset_eval_split,
        initial_stage="base" if run.warmup == "none" else "warmup",
        reference=load_reference(recipe, sources),
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.evaluate(stage="final")
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        print_phases(trainer.phases(), trainer.peak_flops)
        curves = plot_curves(trainer.run_dir)
        print_signals(trainer.signals.found, trainer.signals.spans)
        metric, more = str(training.metric_for_best_model), bool(training.greater_is_better)
        print_stages(trainer.stages, trainer.run_dir, curves, kept(trainer.stages, trainer.kept_stage, metric, more))


def run_job(arguments: Sequence[str]) -> int:
    """`main` with errors in a user's input, and a signal's end, as one line on standard error and the exit status."""
    if "--help" in arguments or "-h" in arguments or not arguments:
        print((__doc__ or "").strip(), keys_text(), sep="\n")
        return 0
    handler = logging.StreamHandler()
    handler.setFormatter(PlainFormatter("%(message)s"))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("dro_rl").setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    try:
        return _refusing(arguments)
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0" and LAUNCHED not in os.environ:
            say_stopped(stopped.number)
        return stopped.status


def _refusing(arguments: Sequence[str]) -> int:
    try:
        main(arguments)
    except InputError as error:
        return _refuse(error)
    except Exception as error:
        if not is_full_disk(error):
            raise
        return _refuse(
            InputError(
                str(getattr(error, "filename", None) or "disk"),
                Phrase(f"full ({first_line(error)})"),
                "a run has room for its files; checkpoints that are in place are whole",
                "Free some, and give the same command with --resume_from_checkpoint auto.",
            )
        )
    return 0


def _refuse(error: InputError) -> int:
    rank = os.environ.get("RANK", "0")
    beside = os.environ.get("LOCAL_RANK", "0") != "0"
    if beside:
        # Most errors befall all processes, and the launcher ends this one when the main one has said it. What befell
        # this one alone must be said here.
        time.sleep(SECONDS_TO_BE_ENDED)
    where = f"[process {rank}] " if beside else ""
    console(stderr=True).print(f"{where}error: {error}", soft_wrap=True)
    return 2


if __name__ == "__main__":
    stop_on_signals()
    stop_with_launcher()
    status = run_job(sys.argv[1:])
    if torch.distributed.is_initialized() and status < 128:  # whoever was stopped does not wait for the others
        torch.distributed.destroy_process_group()
    if os.environ.get("RANK", "0") != "0":
        # Seen rarely: threads that libraries leave running abort a process that exits after all is done. Only the main
        # process has anything to finish on exit.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
