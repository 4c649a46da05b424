"""Claims about the door for text from data: nothing in it steers a terminal, a table, Markdown or a chart."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from rich.table import Table
from training_world import world

from dro_rl import train
from dro_rl.errors import InputError, Phrase
from dro_rl.evaluation.report import _table
from dro_rl.shown import chart, markdown, plain, visible
from dro_rl.terminal import PlainFormatter, console

STEERS = {
    "a colour": ("a\x1b[31mb", r"a\x1b[31mb"),
    "a title, by OSC": ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
    "a C1 sequence": ("a\x9b31mb", r"a\x9b31mb"),
    "a second line": ("a\nerror: fake", r"a\nerror: fake"),
    "a return to the first column": ("good\rbad", r"good\rbad"),
    "a step back": ("a\x08b", r"a\x08b"),
    "a line separator": ("a\u2028b", r"a\u2028b"),
    "another order": ("user\u202etxt.exe", r"user\u202etxt.exe"),
    "an isolated order": ("\u2066a\u2069", r"\u2066a\u2069"),
    "a tag that nobody sees": ("a\U000e0041b", r"a\U000e0041b"),
    "a byte that was no text": ("a\udc80b", r"a\udc80b"),
    "an end": ("a\x00b", r"a\x00b"),
}
FINE = ["[/foo]", "[red]tower[/red]", "東京は？", "Béla Bartók", "می‌خواهم", "👩‍🔬", ":smile:", "a  b", "no\u00a0break"]


@pytest.mark.parametrize("case", STEERS)
def test_what_steers_a_terminal_is_written_out(case: str) -> None:
    text, shown = STEERS[case]
    assert visible(text) == shown


@pytest.mark.parametrize("text", FINE)
def test_what_only_looks_like_it_stays(text: str) -> None:
    assert visible(text) == text


def test_a_longer_text_has_one_space_for_any_white_space() -> None:
    assert plain("Who was\n\n\the?\x1b") == r"Who was he?\x1b"


@pytest.mark.parametrize("text", [*FINE, *(text for text, _ in STEERS.values())])
def test_whatever_the_console_prints_is_one_line_as_it_is(capsys: pytest.CaptureFixture[str], text: str) -> None:
    console().print(text, soft_wrap=True)
    assert capsys.readouterr().out == f"{visible(text)}\n"


@pytest.mark.parametrize("text", ["[/foo]", "a\x1b[31m\nerror: fake", "a\u202eb"])
def test_a_table_keeps_its_shape(capsys: pytest.CaptureFixture[str], text: str) -> None:
    """In a cell, a heading and a title."""
    table = Table(title=text)
    table.add_column(text)
    table.add_row(text)
    console().print(table)
    printed = capsys.readouterr().out
    assert printed.count(visible(text)) == 3
    assert printed.count("\n") == 6


@pytest.mark.parametrize("text", ["a\x1b[31m\nerror: fake", "a\u202eb", "\x9b2J"])
@pytest.mark.parametrize("part", ["place", "value", "rule", "fix"])
def test_an_error_is_one_line_whichever_part_quotes_it(part: str, text: str) -> None:
    parts: dict[str, Any] = {"place": "key", "value": Phrase("it"), "rule": "a rule", "fix": "Do.", part: Phrase(text)}
    assert visible(text) in str(InputError(**parts))
    assert str(InputError(**parts)).isprintable()


def test_a_log_line_is_one_line() -> None:
    record = logging.LogRecord("dro_rl", logging.INFO, "", 0, "waiting for %s", ("a\nerror: fake",), None)
    assert PlainFormatter("%(message)s").format(record) == r"waiting for a\nerror: fake"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a|b", r"a\|b"),
        ("<script>", "&lt;script>"),
        ("[x](javascript:y)", r"[x\](javascript:y)"),
        ("*a* _b_ `c` ~~d~~", r"\*a\* \_b\_ \`c\` \~\~d\~\~"),
        ("answer_logp [1 … 2]", "answer_logp [1 … 2]"),
        ("a&lt;b", "a&amp;lt;b"),
        (r"a\<b", r"a\\&lt;b"),
        ("a\n# b", r"a\\n# b"),
    ],
)
def test_markdown_shows_the_text(text: str, shown: str) -> None:
    assert markdown(text) == shown


def test_a_type_with_a_bar_is_one_cell_of_a_report() -> None:
    assert _table(["type"], [["2|hop\n| x"]])[-1] == r"| 2\|hop\\n\| x |"


@pytest.mark.parametrize("text", ["runs/$a$", r"runs/$\frac$", "a$b", "_first"])
def test_a_chart_shows_the_text(text: str) -> None:
    """Defect: half a formula in a folder's name ended a run after its training."""
    figure = Figure()
    axes = figure.subplots()
    figure.suptitle(chart(text))
    axes.plot([1, 2], label=chart(text))
    assert len(axes.legend().texts) == 1
    figure.savefig(io.BytesIO(), format="png")


def test_a_run_in_a_folder_with_markup_in_its_name_ends_with_its_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Defect: MarkupError, after the export."""
    output = tmp_path / "[" / "foo] $x"
    train.main([str(world(tmp_path / "world")), "--output_dir", f"'{output}'", "--num_iterations", "1"])
    assert f"rollouts    dro-rl rollouts show {output}" in capsys.readouterr().out
