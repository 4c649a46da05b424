"""`dro-rl data fetch`: one of the five datasets from a hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def fetch(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help="nq, hotpotqa, musique, 2wikimultihopqa or wow.", show_default=False),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The folder to fill. Without it, data/NAME.", show_default=False),
    ] = None,
    split: Annotated[
        list[str] | None, typer.Option("--split", help="train or dev; both unless told.", show_default=False)
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="A commit, a branch or a tag; else the commit that is pinned.")
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave bad rows out and count them; else the first ends it.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Fetch a dataset from a hub, checked by commit and sha256, as question files with manifests.

    Its licence is printed before anything is fetched. fetched.json, beside the question files, keeps commit and hashes:
    later fetches have to agree with it. A command that was killed goes on when it is given again.

    \b
    Examples:
      dro-rl data fetch musique
      dro-rl data fetch hotpotqa --split dev --output data/hotpotqa
      dro-rl data fetch nq --revision main
    """
    import sys

    from huggingface_hub.utils.tqdm import disable_progress_bars

    from dro_rl.cli.output import console, print_json
    from dro_rl.data.fetch import commit_of, release_of
    from dro_rl.data.fetch import fetch as run
    from dro_rl.data.prepare import LICENCES

    if not sys.stderr.isatty():
        disable_progress_bars()
    release, out = release_of(name), console()
    commit = commit_of(release, revision)
    if not json:
        out.print(f"{name}: {LICENCES[name]}; {release.repository} at {commit}", soft_wrap=True)
    folder = output or Path("data") / name
    made = run(name, folder, commit, split or list(release.files), skip_bad=skip_bad)
    if json:
        splits = {each: {"output": path, "manifest": manifest} for each, (path, manifest) in made.items()}
        print_json({"licence": LICENCES[name], "repository": release.repository, "commit": commit, "splits": splits})
        return
    for path, manifest in made.values():
        out.print(f"{path}: {manifest.num_questions:,} questions", soft_wrap=True)
        for why, count in manifest.skipped.items():
            out.print(f"left out: {count:,} {why}", soft_wrap=True)
    if not release.candidates:
        out.print("without candidates: dro-rl index and dro-rl retrieve find some", soft_wrap=True)
