"""`dro-rl serve`: a trained pair behind HTTP. `dro-rl serve-rollouts`: a vLLM server that a training samples from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from dro_rl.cli.options import WindowSize, WindowStride
from dro_rl.serve.settings import Limits

DEFAULT = Limits()


def serve(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's output_dir.", show_default=False)],
    host: Annotated[
        str, typer.Option("--host", help="Interface to listen on; 127.0.0.1 is this machine's own.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 for any that is free.")] = 8000,
    name: Annotated[
        str | None, typer.Option("--name", help="Of the model, as clients give it. Without it, the folder's.")
    ] = None,
    corpus: Annotated[
        Path | None,
        typer.Option("--corpus", metavar="INDEX", help="Where documents are found for a question without any."),
    ] = None,
    candidates: Annotated[int, typer.Option("--candidates", min=1, help="Documents to find in it.")] = 20,
    k: Annotated[int | None, typer.Option("--k", min=1, help="Documents to select. Without it, as trained.")] = None,
    window_size: WindowSize = None,
    window_stride: WindowStride = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Questions in work together, at most.")] = 8,
    queue: Annotated[
        int, typer.Option("--queue", min=1, help="Questions that wait; more are refused.")
    ] = DEFAULT.waiting,
    rate: Annotated[
        float, typer.Option("--rate", min=0, help="Questions a second of one address; 0 for any number.")
    ] = DEFAULT.rate,
    burst: Annotated[int, typer.Option("--burst", min=1, help="Questions of one address at once.")] = DEFAULT.burst,
    max_body: Annotated[int, typer.Option("--max-body", min=1024, help="Bytes of a request.")] = DEFAULT.body,
    max_documents: Annotated[
        int, typer.Option("--max-documents", min=1, help="Documents of a question.")
    ] = DEFAULT.documents,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0.1, help="Seconds to an answer, those in the queue among them.")
    ] = DEFAULT.answer_seconds,
    stop_timeout: Annotated[
        float, typer.Option("--stop-timeout", min=0.1, help="Seconds for what is asked already, once told to stop.")
    ] = DEFAULT.stop_seconds,
    json: Annotated[bool, typer.Option("--json", help="Say where it listens as one JSON document.")] = False,
) -> None:
    """Serve a trained pair: rankings, answers with the documents they are from, and a page to ask by hand.

    Clients of vLLM, Jina, Cohere and OpenAI work with /v1/rerank and /v1/chat/completions; /health, /metrics and
    /openapi.json are there too. There is no key: whoever reaches the interface can ask. SIGTERM or Ctrl-C: nothing
    new is taken, what is asked already is answered or refused. Needs pip install 'dro_rl[serve]'.

    \b
    Examples:
      dro-rl serve runs/quickstart
      dro-rl serve runs/nq --corpus indexes/wiki-bm25 --port 8080 --name nq
      dro-rl serve runs/musique --batch-size 32 --queue 256 --rate 0
    """
    import dataclasses
    import os

    from dro_rl.serve.connections import address_of, check_installed, listen

    check_installed()
    listening = listen(host, port)
    limits = dataclasses.replace(
        DEFAULT,
        body=max_body,
        documents=max_documents,
        waiting=queue,
        rate=rate,
        burst=burst,
        answer_seconds=timeout,
        stop_seconds=stop_timeout,
    )

    from transformers.utils.logging import disable_progress_bar

    from dro_rl.cli.output import console, print_json
    from dro_rl.pipeline import read_settings
    from dro_rl.serve.serving import Serving, is_loopback
    from dro_rl.serve.work import Pair

    disable_progress_bar()
    settings = read_settings(run)
    if k is not None:
        settings = dataclasses.replace(settings, num_selected=k)
    pair = Pair.open(run, settings.slid(window_size, window_stride), corpus, candidates, batch_size)
    model, url = name or run.resolve().name, address_of(listening)
    if not is_loopback(str(listening.getsockname()[0])):
        console(stderr=True).print("there is no key: whoever reaches this interface can ask", soft_wrap=True)

    def ready() -> None:
        if json:
            print_json({"url": url, "model": model}, line=True)
        else:
            console().print(f"{model} at {url}", soft_wrap=True)
            console().file.flush()

    if not Serving(pair, model, limits, batch_size).run(listening, ready):
        os._exit(0)  # the models' thread is in the middle of what nobody waits for, and cannot be interrupted


def serve_rollouts(
    context: typer.Context,
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="Name or file of the training's recipe.", show_default=False)
    ],
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
