"""Prompt templates: where they are, how they are read, and what is wrong with one, in one line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from dro_rl.errors import InputError, Phrase, first_line
from dro_rl.prompts.sandbox import BoundedEnvironment
from dro_rl.records import Document

TEMPLATES = Path(__file__).parent
PLACE = "prompt template"


def load_template(name: str) -> PromptTemplate:
    """Load one by name or path. Raises `InputError` for one that is missing, or is not Jinja as prompts need it."""
    source = read_template(name)
    environment = BoundedEnvironment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    try:
        return PromptTemplate(name, source, environment, environment.template(source))
    except jinja2.TemplateSyntaxError as error:
        raise InputError(
            f"{template_path(name)}: line {error.lineno}",
            Phrase(str(error)),
            "a template is valid Jinja",
            "Correct it.",
        ) from None
    except ERRORS as error:
        raise _refusal(name, error) from None


@dataclass(frozen=True)
class PromptTemplate:
    """A template, compiled.

    Args:
        name: of one shipped in this folder, or its path.
        source: its text.
    """

    name: str
    source: str
    _environment: BoundedEnvironment
    _template: jinja2.Template

    def render(self, question: str, documents: Sequence[Document], **variables: Any) -> str:
        """The text. Raises `InputError` where the template does not render, or costs more than prompts do."""
        given = len(question) + sum(len(document.title) + len(document.text) for document in documents)
        given += len(documents) * len(self.source)
        variables = {**variables, "question": question, "documents": list(documents)}
        try:
            return self._environment.render(self._template, given, variables)
        except ERRORS as error:
            raise _refusal(self.name, error) from None


ERRORS = (
    jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, SyntaxError,
    TypeError, ValueError,
)  # fmt: skip
"""What a template's expressions raise, as Python's do, and what Python's compiler says of one nested too deep."""


def _refusal(name: str, error: BaseException) -> InputError:
    return InputError(
        PLACE,
        name,
        "a template renders from question and documents (id, title, text), the selector's from k, least, most and "
        f"example too ({first_line(error)})",
        "Correct the template.",
    )


def template_path(name: str) -> Path:
    """Where a template is: one shipped in this folder, by name, or any `.jinja` file."""
    return Path(name) if name.endswith(".jinja") else TEMPLATES / f"{name}.jinja"


def read_template(name: str) -> str:
    """A template's text. Raises `InputError` for one that is missing or is not text."""
    path = template_path(name)
    if not path.is_file():
        shipped = ", ".join(sorted(p.stem for p in TEMPLATES.glob("*.jinja")))
        raise InputError(PLACE, name, f"a template is one of {shipped}, or a path to a .jinja file", "Check the name.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            str(path), Phrase(f"byte {error.start} is not UTF-8"), "a template is UTF-8 text", "Convert the file."
        ) from None
