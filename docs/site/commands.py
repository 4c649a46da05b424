"""Print docs/commands.md, the reference of `dro-rl`, from the commands themselves.

python docs/site/commands.py > docs/commands.md
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import Any

import typer

from dro_rl.cli import app

HEAD = """# Commands

Made by `python docs/site/commands.py`; `dro-rl COMMAND --help` prints the same of one command.
"""


def page() -> str:
    """The whole page."""
    root = typer.main.get_command(app)
    return "\n".join([HEAD, *about(root, "dro-rl"), *sections(root, "dro-rl", "##")]).rstrip() + "\n"


def sections(group: Any, path: str, level: str) -> Iterator[str]:
    """A section for each command of a group, and for each group within it."""
    for name, command in group.commands.items():
        yield f"{level} {path} {name}\n"
        yield from about(command, f"{path} {name}")
        if hasattr(command, "commands"):
            yield from sections(command, f"{path} {name}", level + "#")


def about(command: Any, path: str) -> Iterator[str]:
    """What it does, its examples, how it is called, and a row for each argument and option."""
    does, _, examples = command.help.partition("\b\nExamples:\n")
    yield does.strip() + "\n"
    if hasattr(command, "commands"):
        yield "Commands: " + ", ".join(f"`{path} {name}`" for name in command.commands) + ".\n"
        return
    context = typer.Context(command, info_name=path)
    rest = ""
    if examples:
        examples, _, rest = examples.partition("\n\n")
        lines = "\n".join(line.removeprefix("  ") for line in examples.splitlines())
        yield f"```bash\n{lines}\n```\n"
    if rest:
        yield rest.strip() + "\n"
    yield f"```text\n{path} {' '.join(command.collect_usage_pieces(context))}\n```\n"
    records = [parameter.get_help_record(context) for parameter in command.get_params(context)]
    told = [record for record in records if record is not None and record[0] != "--help"]
    rows = [f"| <code>{cell(spelled)}</code> | {cell(meaning)} |" for spelled, meaning in told]
    yield "\n".join(["| given | what it is |", "|---|---|", *rows]) + "\n"


def cell(text: str) -> str:
    """Text as it stands in a table; what would end a cell, or begin a tag, as a character by its number."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "&#124;")


if __name__ == "__main__":
    print(page(), end="")
