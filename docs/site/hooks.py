"""What the site adds to mkdocs: files of the repository that pages link to become pages, and formulas become MathML.

A page links to `../recipes/quickstart.yaml`, as it must where the repository is read. On the site that file is a page
of its own, under `repository/`, and the link leads there.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
UNDER = "repository/"
INLINE = re.compile(r"\$`([^`]+)`\$")
"""A formula within a sentence, as hosts of repositories write it."""
LINK = re.compile(r"(?<=\]\()(?![a-z]+:)([^)\s#]+)(#[^)\s]*)?(?=\))")
"""A target that is a file; with its anchor."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Have fenced blocks named `math` shown as formulas."""
    fence = {"name": "math", "class": "formula", "format": formula}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    return config


def formula(source: str, *_: Any, **__: Any) -> str:
    """A fenced formula."""
    return f'<div class="formula">{mathml(source, "block")}</div>'


def mathml(source: str, display: str) -> str:
    """What browsers show without a script. The converter leaves no space after the name of a function."""
    return convert(source.strip().replace("\\log ", "\\log\\, "), display=display)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what the navigation, or a page, names of the repository outside of docs/, and what that links to."""
    waiting = re.findall(rf"{UNDER}\S+\.md", str(config.nav))
    for page in files.documentation_pages():
        waiting += [site for _, site in targets(page.src_uri, page.content_string) if site.startswith(UNDER)]
    while waiting:
        site = waiting.pop()
        if files.get_file_from_path(site) is None:
            text = text_of(site)
            files.append(File.generated(config, site, content=text))
            waiting += [other for _, other in targets(site, text) if other.startswith(UNDER)]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to where those files are on the site, and make formulas of what is TeX within sentences."""
    lead = dict(targets(page.file.src_uri, markdown))
    here = posixpath.dirname(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        if match[1] not in lead:
            return match[0]
        return posixpath.relpath(lead[match[1]], here or ".") + (match[2] or "")

    moved_all = LINK.sub(moved, markdown)
    return INLINE.sub(lambda match: f"<span>{mathml(match[1], 'inline')}</span>", moved_all)


def targets(site: str, markdown: str) -> list[tuple[str, str]]:
    """The links of a page to files that there are: as they are written, and where the files are on the site."""
    home = posixpath.dirname(site.removeprefix(UNDER) if site.startswith(UNDER) else f"docs/{site}")
    found = []
    for target, _ in LINK.findall(markdown):
        path = posixpath.normpath(posixpath.join(home, target))
        if (ROOT / path).is_file():
            found.append((target, place_of(path)))
    return found


def place_of(path: str) -> str:
    """Where a file of the repository is on the site."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return UNDER + path + ("" if path.endswith(".md") else ".md")


def text_of(site: str) -> str:
    """The page of a file of the repository: a Markdown file is one; another is shown as it is."""
    path = ROOT / site.removeprefix(UNDER)
    if path.is_file():
        return path.read_text(encoding="utf-8")
    path = path.with_suffix("")
    return f"# {path.relative_to(ROOT)}\n\n````{path.suffix[1:]}\n{path.read_text(encoding='utf-8')}````\n"
