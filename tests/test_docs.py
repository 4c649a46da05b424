"""Documents say what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from dro_rl.rollouts.log import SCHEMA, VERSION

ROOT = Path(__file__).parent.parent


def test_every_column_of_the_rollout_log_is_documented() -> None:
    text = (ROOT / "docs" / "rollout-log.md").read_text()
    assert f"Version {VERSION}:" in text
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+) \|$", text, flags=re.MULTILINE)
    assert rows == [(f.name, str(f.type), f.metadata[b"description"].decode()) for f in SCHEMA]


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
