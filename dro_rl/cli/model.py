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
    typer.echo(f"{output}: {sum(path.stat().st_size for path in output.iterdir()) / 2**20:.0f} MiB")
