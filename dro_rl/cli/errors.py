"""What a wrong input looks like on the command line: one line on stderr and exit code 2, no traceback; 3 for a lack."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from dro_rl.errors import InputError, from_system


class InputErrorGroup(TyperGroup):
    """A group of commands: an `InputError` of any of them becomes `error: …` and its exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except InputError as error:
            found = error
        except OSError as error:
            said = from_system(error)
            if said is None:
                raise
            found = said
        typer.echo(f"error: {found}", err=True)
        raise typer.Exit(found.status)
