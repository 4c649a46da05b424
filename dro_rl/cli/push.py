"""`dro-rl push`: a run's trained models to a hub, and never unasked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The output_dir of a training.", show_default=False)],
    repo_selector: Annotated[
        str | None, typer.Option("--repo-selector", help="owner/name for the selector.", show_default=False)
    ] = None,
    repo_generator: Annotated[
        str | None, typer.Option("--repo-generator", help="owner/name for the generator.", show_default=False)
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public; else it is private.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask first.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would go, and send nothing.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document; needs --yes or --dry-run.")] = False,
) -> None:
    """Upload a run's trained models, with their cards, to a hub: files and sizes first, then a question.

    A repository that is new is private. Needs a token: hf auth login, or HF_TOKEN.

    \b
    Examples:
      dro-rl push runs/musique --repo-selector me/musique-selector --dry-run
      dro-rl push runs/musique --repo-selector me/musique-selector --repo-generator me/musique-generator
    """
    from dro_rl.cli.output import console, print_json
    from dro_rl.errors import InputError, Phrase
    from dro_rl.job.push import check_token, plan_push
    from dro_rl.job.push import push as upload

    if json and not (yes or dry_run):
        raise InputError(
            "--json", Phrase("without --yes"), "a question has no place in JSON", "Add --yes or --dry-run."
        )
    named = {"selector": repo_selector, "generator": repo_generator}
    plans = plan_push(run, {role: name for role, name in named.items() if name})  # type: ignore[misc]
    out = console()
    if not json:
        for plan in plans:
            out.print(f"{plan.folder} to {plan.repository} ({'public' if public else 'private'}):", soft_wrap=True)
            for name, size in plan.files.items():
                out.print(f"  {size / 2**20:10,.2f} MiB  {name}", soft_wrap=True)
    sent: dict[str, str] = {}
    if not dry_run:
        check_token()
        if not yes:
            typer.confirm("Send them?", abort=True)
        for plan in plans:
            sent[plan.role] = upload(plan, public=public)
            if not json:
                out.print(f"sent: {sent[plan.role]}", soft_wrap=True)
    if json:
        print_json({"dry_run": dry_run, "public": public, "plans": plans, "sent": sent})
