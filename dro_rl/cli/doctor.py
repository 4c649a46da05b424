"""`dro-rl doctor`: whether this machine can do what the package does."""

from __future__ import annotations

from typing import Annotated

import typer

MARKS = {"ok": "ok", "note": "note", "broken": "BROKEN"}


def doctor(
    self_test: Annotated[
        bool, typer.Option("--self-test/--no-self-test", help="Train the toy world for a step: half a minute or two.")
    ] = True,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Look at versions, devices, extras and disk, and train one step of the toy world.

    The exit status is 3 where something is broken. A note is for whoever needs what it is about.

    \b
    Examples:
      dro-rl doctor
      dro-rl doctor --no-self-test --json
    """
    from dro_rl.cli.output import console, print_json
    from dro_rl.doctor import examine
    from dro_rl.errors import LackError

    found = []
    out = console()
    for finding in examine(self_test=self_test):
        found.append(finding)
        if not json:
            out.print(f"{MARKS[finding.state]:7} {finding.check:12} {finding.says}", soft_wrap=True)
            if finding.fix:
                out.print(f"{'':20} {finding.fix}", soft_wrap=True, style="dim")
    broken = any(finding.state == "broken" for finding in found)
    if json:
        print_json({"ok": not broken, "findings": found})
    if broken:
        raise typer.Exit(LackError.status)
