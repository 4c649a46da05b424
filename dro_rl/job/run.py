"""The job from top to bottom: recipe, data, checks, warm-up, models, training, evaluation, export."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial

import transformers
from transformers import set_seed

from dro_rl.em.timing import rates
from dro_rl.evaluation.plots import plot_curves
from dro_rl.job import preflight
from dro_rl.job.assembly import evaluate_base, load_models, load_reference, warm_up_models
from dro_rl.job.cards import write_cards
from dro_rl.job.console import print_run, signal_spans
from dro_rl.job.identity import inputs_of
from dro_rl.job.output import claimed_output_dir, note_ending
from dro_rl.job.solvable import keep_solvable
from dro_rl.recipe import Recipe, load_recipe, parse_command_line
from dro_rl.runs import Ending, read_run
from dro_rl.trainer import DROTrainer


def run(arguments: Sequence[str]) -> None:
    """Do what a command line, `RECIPE [--key value …]`, says. Raises `InputError` for what a user can correct."""
    run_recipe(load_recipe(*parse_command_line(arguments)))


def run_recipe(recipe: Recipe) -> None:
    """The job of a recipe that is loaded."""
    transformers.utils.logging.disable_progress_bar()  # ours show the work; loading and writing files is brief
    job = preflight.prepare(recipe, recipe.training.world_size)
    inputs = partial(inputs_of, recipe, job.train, job.dev, job.prompters)
    with claimed_output_dir(recipe, inputs) as checkpoint:
        run_training(recipe, job, checkpoint)


def run_training(recipe: Recipe, job: preflight.Prepared, checkpoint: str | None) -> None:
    """What happens in the output folder: warm-up, the choice of questions, models, training, evaluation, export."""
    run, training = recipe.run, recipe.training
    set_seed(training.seed)
    evaluate_base(recipe, job.dev, job.prompters)
    sources = warm_up_models(recipe, job.train, job.prompters)
    train = keep_solvable(recipe, sources, job.train, job.prompters)
    set_seed(training.seed)
    models = load_models(recipe, sources)
    trainer = DROTrainer(
        models,
        training,
        train,
        job.dev,
        job.prompters,
        eval_split=run.dataset_eval_split,
        initial_stage="base" if run.warmup == "none" else "warmup",
        reference=load_reference(recipe, sources, models),
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.evaluate_kept()
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        plot_curves(trainer.run_dir, training.spec.most)
        note_ending(trainer.run_dir, ending_of(trainer))
        print_run(read_run(trainer.run_dir))
        write_cards(trainer.run_dir)


def ending_of(trainer: DROTrainer) -> Ending:
    """What is said at the end, beside what the run's files say: `dro-rl runs show` says it again."""
    trainer.clock.flush()
    return Ending(
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        kept=trainer.kept_stage,
        rates=rates(trainer.clock.total, trainer.peak_flops),
        signals=signal_spans(trainer.signals.found, trainer.signals.spans),
    )
