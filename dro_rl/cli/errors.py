"""What a wrong input looks like on the command line: one line on stderr, exit code 2, no traceback."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from dro_rl.errors import InputError


class InputErrorGroup(TyperGroup):
    """A group of commands: an `InputError` of any of them becomes `error: …` and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except InputError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
