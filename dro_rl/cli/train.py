"""`dro-rl train`: start the job as `accelerate launch` would, in as few processes as it takes."""

from __future__ import annotations

from typing import Annotated

import typer


def train(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE", help="A recipe's name or file; --key value after it goes over it.", show_default=False
        ),
    ],
    launch: Annotated[
        str, typer.Option("--launch", metavar="OPTIONS", help="Options of `accelerate launch`, in quotes.")
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan, as `dro-rl plan` does, and train nothing.")
    ] = False,
) -> None:
    """Train a selector and a generator together, as a recipe says.

    One process where there is one device, or none. Several where there are several, or where accelerate's own
    configuration or --launch says so; its --config_file may be the name of a shipped one: cpu, ddp, fsdp2, single_gpu,
    zero2, zero3. A run that was stopped goes on with --resume_from_checkpoint auto.

    \b
    Examples:
      dro-rl train quickstart
      dro-rl train musique --dry-run
      dro-rl train musique --dataset_name data/musique --output_dir runs/musique
      dro-rl train mine.yaml --seed 1 --launch "--config_file fsdp2 --num_processes 8"

    `dro-rl recipe ls` lists the recipes that are shipped, `dro-rl recipe keys` every key.
    """
    from dro_rl.recipe import load_recipe, parse_command_line, read_keys

    path, overrides = parse_command_line(arguments)
    if dry_run:
        recipe = load_recipe(path, overrides)  # a wrong key waits for nothing
        from dro_rl.cli.plan import planned, show
        from dro_rl.job.launch import launched

        processes, layout = launched(launch)
        found = planned(recipe, sharding=layout, processes=processes)
        show(found, json=False)
        raise typer.Exit(0 if found.fits else 1)

    _, keys = read_keys(path, overrides)  # nor does it here
    from dro_rl.job.launch import launch_job

    raise typer.Exit(launch_job(launch, arguments, on_cpu=keys.use_cpu))
