"""The command line, `dro-rl`: a file for each group. The work is done elsewhere, and imported when needed."""

from __future__ import annotations

from typing import Annotated

import typer

from dro_rl import __version__
from dro_rl.cli import (
    ask,
    data,
    doctor,
    evaluate,
    explain,
    model,
    plan,
    push,
    recipe,
    report,
    rerank,
    retrieval,
    rollouts,
    runs,
    serve,
    study,
    train,
)
from dro_rl.cli.errors import InputErrorGroup

app = typer.Typer(
    name="dro-rl",
    cls=InputErrorGroup,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command(
    "train",
    options_metavar="[--launch OPTIONS] [--dry-run]",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(train.train)
app.add_typer(runs.app, name="runs")
app.command(
    "plan",
    options_metavar="[OPTIONS]",
    short_help="Say what a run will do and take, before it does.",
    context_settings={"ignore_unknown_options": True},
)(plan.plan)
app.command("doctor", short_help="Check whether this machine can train.")(doctor.doctor)
app.command("report", short_help="Write a page about runs and studies.")(report.report)
app.add_typer(rollouts.app, name="rollouts")
app.add_typer(recipe.app, name="recipe")
app.add_typer(study.app, name="study")
app.add_typer(data.app, name="data")
app.add_typer(model.app, name="model")
app.add_typer(retrieval.index, name="index")
app.add_typer(retrieval.app, name="retrieval")
app.command("ask", short_help="Answer a question with a trained pair.")(ask.ask)
app.command("explain", short_help="Say which document moved an answer.")(explain.explain)
app.command("evaluate", short_help="Evaluate a trained pair on a split.")(evaluate.evaluate)
app.command("compare", short_help="Compare two evaluations, question by question.")(evaluate.compare)
app.command("serve", short_help="Serve a trained pair over HTTP.")(serve.serve)
app.command("rerank", short_help="Re-rank a ranking by the selector alone.")(rerank.rerank)
app.command(
    "serve-rollouts",
    short_help="Start the vLLM server of a recipe.",
    context_settings={"allow_extra_args": True},
)(serve.serve_rollouts)
app.command("retrieve", short_help="Retrieve candidates for a question file.")(retrieval.retrieve)
app.command("push", short_help="Send trained models to a hub.")(push.push)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dro-rl {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Train, study, prepare data, retrieve candidates, check recipes, look into runs, evaluate, compare and ask pairs.

    RUN is the output_dir of a training. Commands that print take --json. Exit status: 0, it ran; 1, it ran and the
    answer is no; 2, the input is wrong; 3, the machine lacks something. --install-completion completes in your shell.

    \b
    Examples:
      dro-rl doctor
      dro-rl train quickstart
      dro-rl plan musique --gpus 8 --memory 80GB --card A100 --sharding fsdp2
      dro-rl data fetch musique
      dro-rl data prepare hotpotqa --input hotpot_dev_distractor_v1.json --output dev.jsonl.gz
      dro-rl model convert SmolLM2-135M-Instruct.Q4_1.gguf models/smollm2
      dro-rl index bm25 corpus.jsonl.gz indexes/mine
      dro-rl retrieve indexes/mine questions.jsonl --k 20 --output data/train.jsonl.gz
      dro-rl retrieval report data/train.jsonl.gz --plot recall.png
      dro-rl recipe cp musique mine.yaml
      dro-rl recipe validate mine.yaml
      dro-rl serve-rollouts recipes/musique.yaml
      dro-rl runs ls runs
      dro-rl runs show runs/musique
      dro-rl rollouts ls runs/musique
      dro-rl rollouts stats runs/musique
      dro-rl rollouts show runs/musique --sort evidence --limit 3
      dro-rl rollouts top runs/musique --only missed
      dro-rl rollouts show runs/musique 2hop__482757_12019
      dro-rl report runs/musique -o report.html
      dro-rl evaluate runs/musique --data data/musique/test.jsonl
      dro-rl compare runs/sft runs/musique
      dro-rl study run joint
      dro-rl study show joint
      dro-rl ask runs/musique "Who wrote it?" --documents documents.jsonl
      dro-rl explain runs/musique 2hop__482757_12019
      dro-rl serve runs/musique
      dro-rl rerank runs/musique --input bm25.trec --queries q.tsv --corpus indexes/mine --output selected.trec
      dro-rl push runs/musique --repo-selector me/selector --dry-run
    """
