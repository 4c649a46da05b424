"""The site: built strictly, whole, and of nothing that is fetched."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="the docs extra is not installed: pip install 'dro_rl[docs]'")

ROOT = Path(__file__).parent.parent
SITE = ROOT / "docs" / "site"
FETCHED = re.compile(r"""<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)""")


def build(root: Path, output: Path) -> subprocess.CompletedProcess[str]:
    """`make docs` of a checkout."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(root / "docs/site/mkdocs.yml")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(
        [*command, "-d", str(output)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("site") / "html"
    done = build(ROOT, output)
    assert done.returncode == 0, done.stderr
    return output


def test_every_page_is_built(built: Path) -> None:
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert pages <= {path.stem for path in built.glob("*.html")}


def test_nothing_is_fetched(built: Path) -> None:
    """The site can be read without network, and tells nobody who reads it."""
    for page in built.rglob("*.html"):
        assert not FETCHED.findall(page.read_text(encoding="utf-8")), page
    for sheet in built.rglob("*.css"):
        assert not re.findall(r"url\([\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_what_pages_link_to_outside_of_the_docs_is_a_page(built: Path) -> None:
    """As the repository has it, text and all, and linked from where it stands."""
    recipe = (built / "repository/recipes/quickstart.yaml.html").read_text(encoding="utf-8")
    assert "num_generations" in recipe
    table = (built / "repository/recipes/index.html").read_text(encoding="utf-8")
    assert 'href="quickstart.yaml.html"' in table
    assert 'href="../../evidence.html"' in table
    assert 'href="repository/recipes/index.html"' in (built / "reproduce.html").read_text(encoding="utf-8")


def test_formulas_need_no_script(built: Path) -> None:
    page = (built / "how-it-learns.html").read_text(encoding="utf-8")
    source = (ROOT / "docs/how-it-learns.md").read_text(encoding="utf-8")
    assert page.count('display="block"') == source.count("```math") > 5
    assert page.count('display="inline"') == source.count("$`") > 5


def test_a_link_an_anchor_or_a_page_that_leads_nowhere_fails_the_build(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    for name in ("recipes", "CHANGELOG.md", "CONTRIBUTING.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "docs/lost.md").write_text("# Lost\n\n[a](gone.md) [b](keys.md#gone) [c](../recipes/gone.yaml)\n")
    done = build(tmp_path, tmp_path / "html")
    assert done.returncode != 0
    for said in ("lost.md", "'gone.md'", "'keys.md#gone'", "'../recipes/gone.yaml'"):
        assert said in done.stderr


def test_the_reference_of_commands_is_made_of_them() -> None:
    page = runpy.run_path(str(SITE / "commands.py"))["page"]()
    assert (ROOT / "docs/commands.md").read_text(encoding="utf-8") == page, (
        "python docs/site/commands.py > docs/commands.md"
    )


def test_pictures_are_those_that_the_script_draws(tmp_path: Path) -> None:
    """The same files with the same words; the curves are of the package's functions."""
    runpy.run_path(str(SITE / "pictures.py"))["draw"](tmp_path)

    def words(folder: Path) -> dict[str, list[str]]:
        files = sorted(folder.glob("*.svg"))
        return {file.name: re.findall(r"<text[^>]*>([^<]*)</text>", file.read_text("utf-8")) for file in files}

    assert words(tmp_path) == words(ROOT / "docs/pictures")
    assert all(words(tmp_path).values())
    shown = set(re.findall(r"\(pictures/(\S+)\)", (ROOT / "docs/how-it-learns.md").read_text(encoding="utf-8")))
    assert shown == words(tmp_path).keys()
