"""Options that several commands have in common."""

from __future__ import annotations

from typing import Annotated

import typer

WindowSize = Annotated[
    int | None,
    typer.Option("--window-size", min=2, help="Candidates shown at a time, of a longer list. Without it, as trained."),
]
WindowStride = Annotated[
    int | None,
    typer.Option("--window-stride", min=1, help="New ones of each further window. Without it, all with room."),
]
