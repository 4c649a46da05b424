"""Documents say what the code does."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
from dataclasses import fields
from pathlib import Path

import typer
import yaml
from test_layout import LAYERS

import dro_rl
from dro_rl.cli import app
from dro_rl.keys.reference import KEYS
from dro_rl.rollouts.diagnostics import Summary
from dro_rl.rollouts.log import SCHEMA, VERSION
from dro_rl.rollouts.signals import RULES
from dro_rl.trainer import DROTrainer

ROOT = Path(__file__).parent.parent


def test_every_column_of_the_rollout_log_is_documented() -> None:
    text = (ROOT / "docs" / "rollout-log.md").read_text()
    assert f"Version {VERSION}:" in text
    rows = re.findall(r"^\| `(\w+)` \| `?(.+?)`? \| (.+) \|$", text.replace("\\|", "|"), flags=re.MULTILINE)
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
    for recipe in (ROOT / "recipes").rglob("*.yaml"):
        assert recipe.name in table, recipe.name


def test_trees_agree_on_make_targets() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    mentioned = set(re.findall(r"`make ([a-z]+)`", (ROOT / "README.md").read_text()))
    assert mentioned <= targets
    assert {"setup", "quickstart", "test", "lint", "bench"} <= targets


def test_make_passes_on_what_it_is_given(tmp_path: Path) -> None:
    """DATASET from the environment or the command line, paths with spaces, a single file, and further keys."""
    (folder := tmp_path / "my data" / "train").mkdir(parents=True)
    (folder / "musique.jsonl.gz").write_bytes(b"")

    def printed(*arguments: str, **environment: str) -> str:
        kept = {name: value for name, value in os.environ.items() if name not in ("DATASET", "DATA", "MAKEFLAGS")}
        make = ["make", "-n", "-C", str(ROOT), *arguments]
        return subprocess.run(make, env=kept | environment, capture_output=True, text=True, check=True).stdout

    assert 'dro-rl train nq_smollm2 --dataset_name "/a b" ' in printed("real", "DATA=/a b")
    assert "dro-rl train hotpotqa_smollm2 " in printed("real", DATASET="hotpotqa")
    assert "auto --output_dir runs/mine" in printed("real", "DATASET=musique", "ARGS=--output_dir runs/mine")
    assert 'test -e "/a b"' in printed("real", "DATA=/a b")
    data = f"DATA={tmp_path / 'my data'}"
    (line,) = [line for line in printed("smoke", data).splitlines() if line.strip().startswith('"$(ls')]
    found = subprocess.run(["sh", "-c", f"echo {line.strip()}"], capture_output=True, text=True, check=True).stdout
    assert found.strip() == str(folder / "musique.jsonl.gz")
    assert "dro-rl train nq_smoke " in printed("smoke", data, DATASET="nq")


def test_commands_that_documents_give_exist_with_their_options() -> None:
    """A command that is renamed, or loses an option, would leave its reader alone."""
    found, root = 0, typer.main.get_command(app)
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").glob("*.md")]:
        for block in re.findall(r"^```bash\n(.*?)^```", document.read_text(), flags=re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if "dro-rl" not in words:
                    continue
                found += 1
                command, rest = root, words[words.index("dro-rl") + 1 :]
                while hasattr(command, "commands"):
                    assert rest, f"{document.name}: {line}"
                    assert rest[0] in command.commands, f"{document.name}: {line}"
                    command, rest = command.commands[rest[0]], rest[1:]
                known = {option for parameter in command.params for option in parameter.opts + parameter.secondary_opts}
                given = {word.partition("=")[0] for word in rest if word.startswith("--")}
                passes_on = {"allow_extra_args", "ignore_unknown_options"} & set(command.context_settings)
                assert given <= known or passes_on, f"{document.name}: {line}: {given - known}"
    assert found > 20


def test_the_map_draws_every_room_and_every_layer() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    tree, layers = re.findall(r"^```text\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    drawn = [set(line.split(" · ")) for line in layers.splitlines()]
    assert drawn == [set(rooms) for rooms in reversed(LAYERS)]
    named = set(re.findall(r"\b(\w+)(?:\.py|/)", tree))
    assert {room for rooms in LAYERS for room in rooms} <= named


def test_the_map_leads_to_files_that_there_are() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text().partition("## The way of a question")[2]
    for name in re.findall(r"`((?:\w+/)+\w*\.?\w*)`", text):
        if name != "output_dir/rollouts/":
            assert (ROOT / name).exists() or (ROOT / "dro_rl" / name).exists(), name


def test_the_citation_has_the_version_and_the_paper() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == dro_rl.__version__
    assert DROTrainer._paper["id"] in cited["preferred-citation"]["url"]


def test_troubleshooting_quotes_what_the_code_says() -> None:
    """A message that changes its words would no longer be found on the page, nor a key that has another name."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    said = "\n".join(
        node.value
        for path in (ROOT / "dro_rl").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    signals, quoted, keys = {rule.name for rule in RULES}, 0, 0
    for row in re.findall(r"^\| (.*?) \| .*? \| (.*) \|$", page, flags=re.MULTILINE):
        for words in re.findall(r"`([a-z][^`]* [^`]*)`", row[0]):
            quoted += 1
            for part in words.split("…"):
                assert part.strip() in said, words
        for word in re.findall(r"`([a-z]+_[a-z_]+)(?:: [^`]+)?`", " ".join(row)):
            keys += 1
            assert word in KEYS or word in signals, word
    assert quoted > 20
    assert keys > 40
