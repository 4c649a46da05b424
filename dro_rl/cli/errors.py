"""What a wrong input looks like on the command line: one line on stderr, exit code 2, no traceback."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from dro_rl.errors import InputError, from_system


class InputErrorGroup(TyperGroup):
    """A group of commands: an `InputError` of any of them becomes `error: …` and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except InputError as error:
            found: InputError | None = error
        except OSError as error:
            found = from_system(error)
            if found is None:
                raise
        typer.echo(f"error: {found}", err=True)
        raise typer.Exit(2)
