"""`dro-rl serve-rollouts`: start a vLLM server that a training samples from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def serve_rollouts(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The training's recipe.", show_default=False)],
    replica: Annotated[
        int, typer.Option("--replica", min=1, help="Which of the recipe's vllm_server_base_url to be.")
    ] = 1,
    role: Annotated[
        Literal["selector", "generator"],
        typer.Option("--role", help="Whose model: the generator's writes answers, under answer_engine: vllm."),
    ] = "selector",
    host: Annotated[
        str,
        typer.Option("--host", help="Interface to listen on. Whoever has the key steers the server."),
    ] = "127.0.0.1",
    gpu_memory_utilization: Annotated[
        float, typer.Option("--gpu-memory-utilization", min=0.01, max=1.0, help="Share of a GPU's memory to take.")
    ] = 0.9,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command, and leave.")] = False,
) -> None:
    """Start the vLLM server of a recipe with `vllm_mode: server`, and become it.

    What stands after -- goes to vLLM as it is. The server takes the model's weights from the training as it goes;
    stop it with Ctrl-C when the training is done.

    \b
    Examples:
      dro-rl serve-rollouts recipes/musique.yaml
      dro-rl serve-rollouts recipes/musique.yaml --replica 2 -- --max-num-seqs 512
      CUDA_VISIBLE_DEVICES=6,7 dro-rl serve-rollouts recipes/musique.yaml -- --tensor-parallel-size 2
    """
    import os
    import shlex

    from dro_rl.cli.output import console
    from dro_rl.engines.serve import server_command
    from dro_rl.recipe import load_recipe

    command = server_command(
        load_recipe(recipe),
        role=role,
        replica=replica,
        host=host,
        gpu_memory_utilization=gpu_memory_utilization,
        extra=context.args,
    )
    set_here = " ".join(f"{name}={shlex.quote(value)}" for name, value in command.environment.items())
    console().print(f"{set_here} {shlex.join(command.arguments)}", soft_wrap=True)
    if not dry_run:
        os.execve(command.arguments[0], list(command.arguments), {**os.environ, **command.environment})
