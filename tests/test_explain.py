"""Claims about `dro-rl explain`: what is tried, that it is scored as rollouts are, and that ties are called ties."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training_world import questions, save_model, world, write_questions
from typer.testing import CliRunner

from dro_rl.cli import app
from dro_rl.evaluation.explain import Explanation, explain
from dro_rl.likelihood import completion_logps
from dro_rl.pipeline import PipelineSettings, RAGPipeline, save_settings
from dro_rl.prompts import Prompt
from dro_rl.records import Document, Question, Selection

DOCUMENTS = tuple(Document(f"d{n}", f"T{n}", "x") for n in range(1, 7))
QUESTION = Question("q", "Who?", ("he", "him"), DOCUMENTS, ("d2", "d6"))


class Pair:
    """Answers with a likelihood that a function of the documents read says, over two tokens."""

    def __init__(self, logp: Callable[[tuple[int, ...]], float]) -> None:
        self.calls: list[list[tuple[int, ...]]] = []
        self.logp = logp
        self.settings = SimpleNamespace(spec=SimpleNamespace(most=3))
        written = SimpleNamespace(
            completion=lambda answer: (7, 8), generator_prompt=lambda question, numbers: Prompt(tuple(numbers), False)
        )
        self.prompters, self.answerer = {"generator": written}, self

    def score(self, rows: Sequence[Any]) -> list[list[torch.Tensor]]:
        self.calls.append([tuple(row.prompt) for row in rows])
        return [[torch.full((2,), self.logp(tuple(row.prompt)) / 2)] for row in rows]


def tried(logp: Callable[[tuple[int, ...]], float], *numbers: int, **options: Any) -> tuple[Explanation, Pair]:
    pair = Pair(logp)
    return explain(pair, QUESTION, Selection(numbers, True), **options), pair  # type: ignore[arg-type]


def test_each_document_is_left_out_moved_alone_and_exchanged_for_gold() -> None:
    found, pair = tried(lambda read: -1.0, 2, 3, 4)
    assert [(trial.kind, trial.number, trial.numbers) for trial in found.trials] == [
        ("as selected", None, (2, 3, 4)),
        ("without", 2, (3, 4)),
        ("moved", 2, (3, 4, 2)),
        ("alone", 2, (2,)),
        ("without", 3, (2, 4)),
        ("moved", 3, (3, 2, 4)),
        ("alone", 3, (3,)),
        ("exchanged", 3, (2, 6, 4)),
        ("without", 4, (2, 3)),
        ("moved", 4, (4, 2, 3)),
        ("alone", 4, (4,)),
        ("exchanged", 4, (2, 3, 6)),
        ("no document", None, ()),
    ]
    assert found.titles[6] == ("T6", True)
    assert len(pair.calls) == 1, "scored together"


def test_equal_lists_are_scored_once() -> None:
    """Of two documents one alone is what is left without the other, and one moved is the other moved."""
    found, pair = tried(lambda read: -float(len(read)), 3, 2)
    (rows,) = pair.calls
    assert len(rows) == len(set(rows)) < len(found.trials)


def test_sum_and_mean_stand_side_by_side_and_the_weighed_one_changes() -> None:
    def logp(read: tuple[int, ...]) -> float:
        return -1.0 if 2 in read else -4.0

    whole, without = tried(logp, 2, 3)[0].trials[:2]
    assert (whole.sum, whole.mean, without.sum, without.mean) == (-1.0, -0.5, -4.0, -2.0)
    assert (without.change, without.tie) == (-3.0, False)
    assert tried(logp, 2, 3, likelihood="mean")[0].trials[1].change == -1.5


@pytest.mark.parametrize(
    ("numbers", "logp", "said"),
    [
        ((3, 2), lambda read: 0.0 if 2 in read else -2.0, "[2] T2 makes the answer more likely by 2.00 nats as the"),
        ((3, 4), lambda read: -2.0 if 3 in read else 0.0, "[3] T3 makes the answer less likely by 2.00 nats as the"),
        ((3, 4), lambda read: 0.04 * (3 in read), "A tie: no document, left out, moves the answer."),
        ((3, 4, 5), lambda read: float({3, 4} <= set(read)), "A tie of [3], [4]: each makes the answer more likely"),
        ((3,), lambda read: float(len(read)), "[3] makes the answer more likely by 1.00 nats against no document."),
        ((3,), lambda read: 0.0, "[3] moves the answer by no more than a tie against no document."),
        ((3, 4), lambda read: float(6 in read), "supporting document, [6] > [4], makes the answer more likely by 1.00"),
        ((3, 4), lambda read: -1.0 * (6 in read or 2 in read), "makes the answer less likely by 1.00 nats."),
        ((3, 4), lambda read: 0.0, "The best exchange for a supporting document, [2] > [4], is a tie."),
    ],
)
def test_which_document_moved_the_answer_in_words(
    numbers: tuple[int, ...], logp: Callable[[tuple[int, ...]], float], said: str
) -> None:
    assert said in tried(logp, *numbers)[0].why


def test_where_all_gold_is_selected_nothing_is_exchanged() -> None:
    found, _ = tried(lambda read: 0.0, 2, 6, 3)
    assert not [trial for trial in found.trials if trial.kind == "exchanged"]
    assert "exchange" not in found.why


# A tiny pair ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    world(folder)
    for role, seed in (("selector", 1), ("generator", 2)):
        save_model(folder / role, seed)
        (folder / role / "prompt.jinja").write_text((folder / f"{role[0]}.jinja").read_text())
    save_settings(folder, PipelineSettings(2, 128, 6, 4, {}))
    write_questions(folder / "mine.jsonl", [replace(q, id=f"東{i}") for i, q in enumerate(questions(3, seed=5))])
    return folder


def invoke(*arguments: object, columns: int = 80) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": str(columns)})


def test_the_command_scores_as_the_plain_path_does(pair: Path) -> None:
    arguments = ("explain", pair, "東1", "--question-file", pair / "mine.jsonl", "--selection", "[2] > [1]")
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    pipeline = RAGPipeline.from_pretrained(pair, roles=["generator"])
    prompter = pipeline.prompters["generator"]
    question = replace(questions(3, seed=5)[1], id="東1")
    for trial in found["trials"]:
        prompt = prompter.generator_prompt(question, trial["numbers"]).ids
        with pipeline.open_role("generator") as model, torch.no_grad():
            (logps,) = completion_logps(model, prompt, [prompter.completion(question.answers[0])], shared_prefix=False)
        assert trial["sum"] == pytest.approx(logps.sum().item(), abs=1e-4)
        assert trial["mean"] == pytest.approx(logps.mean().item(), abs=1e-4)


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_the_table_is_readable_at_any_width(pair: Path, columns: int) -> None:
    result = invoke("explain", pair, "東1", "--question-file", pair / "mine.jsonl", columns=columns)
    assert result.exit_code == 0, result.output
    assert "as selected" in result.stdout
    assert "without" in result.stdout
    assert "\x1b" not in result.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("東9",), "there is no question of this id. There are '東"),
        (("東1", "--selection", "[99]"), "these are distinct numbers from 1 to"),
        (("東1", "--selection", "2, 1"), "these are distinct numbers from 1 to"),
        (("東1", "--selection", "[1] > [1]"), "these are distinct numbers from 1 to"),
    ],
)
def test_what_cannot_be_explained_is_one_line(pair: Path, options: tuple[str, ...], said: str) -> None:
    result = invoke("explain", pair, *options, "--question-file", pair / "mine.jsonl")
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
