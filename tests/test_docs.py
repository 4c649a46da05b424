"""Documents say what the code does."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path

import typer

from dro_rl.cli import app
from dro_rl.rollouts.diagnostics import Summary
from dro_rl.rollouts.log import SCHEMA, VERSION
from dro_rl.rollouts.signals import RULES

ROOT = Path(__file__).parent.parent


def test_every_column_of_the_rollout_log_is_documented() -> None:
    text = (ROOT / "docs" / "rollout-log.md").read_text()
    assert f"Version {VERSION}:" in text
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+) \|$", text, flags=re.MULTILINE)
    assert rows == [(f.name, str(f.type), f.metadata[b"description"].decode()) for f in SCHEMA]


def test_every_figure_and_signal_is_documented() -> None:
    text = (ROOT / "docs" / "signals.md").read_text()
    figures, signals = (
        re.findall(r"^\| `([\w/]+)`.*\|$", part, flags=re.MULTILINE) for part in text.split("## Signals")
    )
    assert figures == [field.metadata["log"] for field in fields(Summary) if field.metadata.get("log")]
    assert signals == [rule.name for rule in RULES]
    for rule in RULES:
        assert f"| {', '.join(f'`{key}`' for key in rule.keys)} |" in text


def test_files_that_documents_point_to_exist() -> None:
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} points to {target}"


def test_every_recipe_is_in_the_table() -> None:
    table = (ROOT / "recipes" / "README.md").read_text()
    for recipe in [*(ROOT / "recipes").glob("*.yaml"), *(ROOT / "recipes" / "accelerate").glob("*.yaml")]:
        assert recipe.name in table, recipe.name


def test_trees_agree_on_make_targets() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    mentioned = set(re.findall(r"`make ([a-z]+)`", (ROOT / "README.md").read_text()))
    assert mentioned <= targets
    assert {"setup", "quickstart", "test", "lint", "bench"} <= targets


def test_commands_that_documents_give_exist_with_their_options() -> None:
    """A command that is renamed, or loses an option, would leave its reader alone."""
    found = 0
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").glob("*.md")]:
        for block in re.findall(r"^```bash\n(.*?)^```", document.read_text(), flags=re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if "dro-rl" not in words:
                    continue
                found += 1
                command, rest = typer.main.get_command(app), words[words.index("dro-rl") + 1 :]
                while hasattr(command, "commands"):
                    assert rest, f"{document.name}: {line}"
                    assert rest[0] in command.commands, f"{document.name}: {line}"
                    command, rest = command.commands[rest[0]], rest[1:]
                known = {option for parameter in command.params for option in parameter.opts + parameter.secondary_opts}
                given = {word.partition("=")[0] for word in rest if word.startswith("--")}
                assert given <= known or command.allow_extra_args, f"{document.name}: {line}: {given - known}"
    assert found > 20
