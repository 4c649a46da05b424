"""Claims about `dro-rl`: its figures are those counted by hand, its errors are one line, its help is fast."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from scipy.stats import ttest_1samp
from typer.testing import CliRunner

from dro_rl import __version__
from dro_rl.cli import app
from dro_rl.records import Document, Question, Rollout, Selection
from dro_rl.rollouts import changes, log, read
from dro_rl.rollouts.explain import GroupRollout, SelectedDocument, explain
from dro_rl.selection import SelectionSpec

DOCUMENTS = (
    Document("d1", "Béla Bartók", "A composer."),
    Document("d2", "", "A passage without a title."),
    Document("d3", "東京 [red]tower[/red]", "A tower."),
    Document("d4", "Four\x1b[31m", "Hostile."),
)
QUESTIONS = (
    Question("a", "Who was\nhe?", ("Bartók", "Béla"), DOCUMENTS, ("d1", "d3")),
    Question("b", "Which one?", ("no",), DOCUMENTS),
    Question("c", "Which none?", ("nothing",), DOCUMENTS),
    Question("é東", "東京は？", ("はい",), DOCUMENTS, ("d4",)),
)


def rollouts(
    question: int,
    selections: Sequence[Sequence[int]],
    answer_logps: Sequence[float],
    weights: Sequence[float],
    log_ratios: Sequence[float] | None = None,
) -> list[Rollout]:
    """A group of hand-made rollouts. An empty selection is an invalid one."""
    squares = sum(weight**2 for weight in weights)
    return [
        Rollout(
            question=question,
            sample=sample,
            token_ids=(1, 2),
            proposal_logps=(-1.0, -0.5),
            text="x" if selection else "I cannot [b]tell",
            selection=Selection(tuple(selection), bool(selection), () if selection else ("format", "too_few")),
            selection_logp=-1.5 + (log_ratios[sample] if log_ratios else 0.0),
            reference_logp=math.nan,
            answer_logp=answer_logps[sample],
            answer_logp_sum=answer_logps[sample],
            answer_logp_mean=answer_logps[sample] / 4,
            reward=answer_logps[sample],
            weight=weights[sample],
            proposal_weight=1 / len(selections),
            ess=1 / squares if squares else 0.0,
            weight_temperature=1.0,
        )
        for sample, selection in enumerate(selections)
    ]


def write(run: Path, iteration: int, part: int, step: int, first: int, groups: list[list[Rollout]]) -> None:
    """Log groups as one part of an iteration."""
    flat = [rollout for group in groups for rollout in group]
    table = log.to_table(flat, QUESTIONS, iteration, step, first, len(groups[0]))
    log.write(table, log.part_path(run, iteration, part))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two iterations. The first, in two parts: one decided question, one tie, one without a valid rollout."""
    run = tmp_path / "run"
    nan = math.nan
    decided = rollouts(
        0,
        [[1, 3], [1, 2], [1, 2], []],
        [math.log(0.4), math.log(0.2), math.log(0.2), nan],
        [0.5, 0.25, 0.25, 0],
    )
    tie = rollouts(1, [[2, 1]] * 4, [math.log(0.5)] * 4, [0.25] * 4)
    none = rollouts(2, [[]] * 4, [nan] * 4, [0.0] * 4)
    write(run, 1, 0, 0, 0, [decided])
    write(run, 1, 1, 2, 1, [tie, none])
    first = 1 / (1 + math.exp(-0.5))
    write(run, 2, 0, 4, 0, [rollouts(3, [[4, 1], [3, 2]], [-3.0, -2.5], [first, 1 - first], [1.0, 0.0])])
    return run


def invoke(*arguments: object, columns: int = 80) -> Any:
    """Run the command line in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": str(columns)})


def document(*arguments: object) -> Any:
    """The JSON document that a command prints, which is all that it prints."""
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def refusal(*arguments: object) -> str:
    """The one line of stderr that a command ends in."""
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


# ls -------------------------------------------------------------------------------------------------------


def test_ls_counts_what_is_there(run: Path) -> None:
    """Every share by hand. Defect: shares of the wrong whole (rollouts for questions, valid for all)."""
    iterations = document("rollouts", "ls", run)["iterations"]
    first = iterations[0]
    assert [item["iteration"] for item in iterations] == [1, 2]
    assert (first["first_step"], first["last_step"]) == (0, 2)
    assert (first["questions"], first["rollouts"], first["valid_rollouts"]) == (3, 12, 7)
    assert first["valid"] == pytest.approx(7 / 12)
    assert first["all_tie"] == pytest.approx(1 / 3)
    assert first["all_invalid"] == pytest.approx(1 / 3)
    # After the first of each question there are 2 + 3 valid rollouts, of which 1 + 3 repeat.
    assert first["duplicate"] == pytest.approx(4 / 5)
    assert first["problems"] == {"format": 5, "too_few": 5}


def test_ls_averages_likelihoods_and_bounds(run: Path) -> None:
    """An invalid rollout adds nothing to the sum and counts in m; a question of them alone has no bound."""
    first = document("rollouts", "ls", run)["iterations"][0]
    assert first["evidence_bound"] == pytest.approx((math.log(0.8 / 4) + math.log(0.5)) / 2)
    assert first["answer_logp"] == pytest.approx((math.log(0.4) + 2 * math.log(0.2) + 4 * math.log(0.5)) / 7)
    assert first["ess"] == pytest.approx((1 / 0.375 + 4 + 0) / 3)
    assert first["ess_share"] == pytest.approx((1 / 0.375 / 4 + 1 + 0) / 3)


def test_ls_recall_is_over_labelled_questions_plain_and_by_weight(run: Path) -> None:
    """Question a alone has labels. Its invalid rollout finds nothing, and has no weight."""
    first, second = document("rollouts", "ls", run)["iterations"]
    assert first["labelled"] == 1
    assert first["recall"] == pytest.approx({"1": 1.5 / 4, "3": 2 / 4, "5": 2 / 4})
    assert first["weighted_recall"] == pytest.approx({"1": 0.5, "3": 0.75, "5": 0.75})
    # p/q is e and 1: what the selector itself would find, of rollouts that another proposal drew.
    assert second["recall"]["1"] == pytest.approx(math.e / (math.e + 1))
    assert second["weighted_recall"]["1"] == pytest.approx(0.6225, abs=1e-4)


def test_ls_says_null_where_there_is_nothing_to_average(tmp_path: Path) -> None:
    """Defect: NaN in the output, which is not JSON; or a 0 that reads like a measurement."""
    write(tmp_path, 1, 0, 0, 0, [rollouts(2, [[], []], [math.nan] * 2, [0.0, 0.0])])
    (only,) = document("rollouts", "ls", tmp_path)["iterations"]
    for name in ("evidence_bound", "answer_logp", "duplicate"):
        assert only[name] is None
    assert only["recall"] == {"1": None, "3": None, "5": None}
    assert (only["valid"], only["all_invalid"], only["all_tie"]) == (0, 1, 0)
    assert invoke("rollouts", "ls", tmp_path).exit_code == 0


def test_the_order_of_rows_and_parts_does_not_matter(run: Path) -> None:
    """Guards that groups are found by their position, not by adjacency."""
    table = read.read_iteration(run, 1)
    backwards = table.take(list(range(table.num_rows))[::-1])
    assert repr(read.summarize_iteration(backwards)) == repr(read.summarize_iteration(table))


def test_answers_that_are_impossible_are_a_tie() -> None:
    """Defect: −inf less −inf is NaN, and NaN is neither a tie nor none."""
    group = rollouts(0, [[1], [2]], [-math.inf, -math.inf], [0.5, 0.5])
    summary = read.summarize_iteration(log.to_table(group, QUESTIONS, 1, 0, 0, 2)).rollouts
    assert summary.all_tie == 1
    assert summary.evidence_bound == -math.inf


def test_ls_prints_a_table_in_the_order_of_time(run: Path) -> None:
    """The table has the figures, a line an iteration, and a legend of its headings."""
    result = invoke("rollouts", "ls", run)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split()[:8] == ["iter", "step", "q", "valid", "clean", "dup", "tie", "ESS/m"]
    assert lines[1].split()[:8] == ["1", "0", "3", "58", "58", "80", "33", "56"]
    assert lines[2].split()[:4] == ["2", "4", "1", "100"]
    assert "38/50/50" in lines[1]
    assert lines[1].split()[-1] == "[2]57"
    assert "ESS/m: effective share" in " ".join(lines)


def test_last_shows_the_end_of_a_long_run(run: Path) -> None:
    """Online runs have thousands of iterations."""
    assert [item["iteration"] for item in document("rollouts", "ls", run, "--last", 1)["iterations"]] == [2]


@pytest.mark.parametrize("columns", [20, 40, 75, 80, 200])
@pytest.mark.parametrize("command", ["ls", "stats", "show"])
def test_nothing_is_wider_than_the_terminal_or_cut(run: Path, command: str, columns: int) -> None:
    """Defect: tables that a narrow terminal folds into each other, or whose figures end in an ellipsis."""
    result = invoke("rollouts", command, run, columns=columns)
    assert result.exit_code == 0
    assert "…" not in result.stdout
    if columns >= 40:
        assert max(map(cell_len, result.stdout.splitlines())) <= columns
    for figure in {"ls": ["38/50/50"], "stats": ["38/50/50"], "show": ["0.62", "-3.00"]}[command]:
        assert figure in result.stdout


# show -----------------------------------------------------------------------------------------------------


def test_show_orders_the_rollouts_of_a_question_by_weight(run: Path) -> None:
    """One question, all its columns."""
    (group,) = document("rollouts", "show", run, "a")["questions"]
    assert (group["iteration"], group["step"], group["position"]) == (1, 0, 0)
    assert group["question"] == "Who was\nhe?"
    assert group["answers"] == ["Bartók", "Béla"]
    assert group["evidence_bound"] == pytest.approx(math.log(0.2))
    assert [rollout["sample"] for rollout in group["rollouts"]] == [0, 1, 2, 3]
    best, last = group["rollouts"][0], group["rollouts"][-1]
    assert best["documents"] == [
        {"number": 1, "id": "d1", "title": "Béla Bartók", "supporting": True},
        {"number": 3, "id": "d3", "title": "東京 [red]tower[/red]", "supporting": True},
    ]
    assert best["weight"] == 0.5
    assert (best["selection_logp"], best["proposal_logp"]) == (-1.5, -1.5)
    assert (best["answer_logp_sum"], best["answer_logp_mean"]) == (math.log(0.4), math.log(0.4) / 4)
    assert (last["answer_logp"], last["valid"], last["problems"]) == (None, False, ["format", "too_few"])
    assert last["text"] == "I cannot [b]tell"


def test_show_has_what_was_answered_and_each_reward(tmp_path: Path) -> None:
    """Beside the reward that was weighed; an answer may be empty, or hostile, and is printed as text."""
    made = rollouts(1, [[2, 1], [3], [1]], [-1.0, -2.0, -3.0], [0.5, 0.5, 0.0])
    said = [("no\x1b[31m [b]way[/b]", 1.0), ("", 0.0), ("never", 0.25)]
    made = [
        replace(each, answer=answer, rewards=(("f1", value), ("judge:short", 2 * value)), reward=3 * value)
        for each, (answer, value) in zip(made, said, strict=True)
    ]
    write(tmp_path, 1, 0, 0, 0, [made])
    (group,) = document("rollouts", "show", tmp_path, "b")["questions"]
    assert [each["answer"] for each in group["rollouts"]] == [answer for answer, _ in said]
    assert group["rollouts"][2]["rewards"] == {"f1": 0.25, "judge:short": 0.5}
    text = invoke("rollouts", "show", tmp_path, "b", columns=120).stdout
    assert "[1] answers never: f1 0.25, judge:short 0.50; reward 0.75" in text
    assert "[3] answers nothing: f1 0.00" in text
    assert "[b]way[/b]" in text
    assert "\x1b" not in text


@pytest.mark.parametrize("likelihood", ["sum", "mean"])
def test_show_has_the_likelihood_both_ways(tmp_path: Path, likelihood: str) -> None:
    """ℓ is what the weights come from; the other of sum and mean stands beside it."""
    (made,) = rollouts(1, [[2]], [-6.0], [1.0])
    write(tmp_path, 1, 0, 0, 0, [[replace(made, answer_logp=made.answer_logp_as(likelihood))]])
    lines = invoke("rollouts", "show", tmp_path, "b", columns=120).stdout.splitlines()
    (heads,) = (line.split() for line in lines if "log q" in line and "weight" in line and "ℓ" in line)
    (row,) = (line.split() for line in lines if "[2]" in line and "1.00" in line)
    assert heads[heads.index("ℓ") + 1] == {"sum": "mean", "mean": "sum"}[likelihood]
    assert row[3:5] == {"sum": ["-6.00", "-1.50"], "mean": ["-1.50", "-6.00"]}[likelihood]


def test_show_says_in_words_why_the_first_one_won(run: Path) -> None:
    """The margin is in nats against the next distinct selection, not against a duplicate of the winner."""
    result = invoke("rollouts", "show", run, "a", columns=300)
    assert (
        "[1] > [3] has weight 0.50: its answer log-likelihood exceeds that of the next distinct selection, "
        "[1] > [2], by 0.69 nats. Only it reads [3] 東京 [red]tower[/red] (supporting)." in result.stdout
    )


def test_show_marks_supporting_documents_and_prints_titles_as_they_are(run: Path) -> None:
    """Defects: markup in a title that vanishes or colours; control characters that steer the terminal."""
    text = invoke("rollouts", "show", run, "a").stdout
    assert "[1]* > [3]*" in text
    assert "[3]* 東京 [red]tower[/red]" in text
    assert "[2]  A passage without a title." in text
    assert "wrote: I cannot [b]tell" in text
    assert "\x1b" not in invoke("rollouts", "show", run, "é東").stdout


def test_show_finds_a_question_by_an_id_in_any_script(run: Path) -> None:
    """The correction by the proposal decides here, and is said."""
    (group,) = document("rollouts", "show", run, "é東")["questions"]
    assert group["question"] == "東京は？"
    assert "0.50 nats below that of [3] > [2], but its log p − log q is 1.00 nats above" in group["why"]


@pytest.mark.parametrize(("sort", "order"), [("weight", "abc"), ("evidence", "cab"), ("ess", "cab")])
def test_show_without_an_id_picks_questions_of_an_iteration(run: Path, sort: str, order: str) -> None:
    """The most decided, the hardest, or the least spread first; the hardest is the one nothing explains."""
    groups = document("rollouts", "show", run, "--iteration", 1, "--sort", sort)["questions"]
    assert [group["question_id"] for group in groups] == list(order)
    limited = document("rollouts", "show", run, "--iteration", 1, "--sort", sort, "--limit", 1)["questions"]
    assert [group["question_id"] for group in limited] == [order[0]]


def test_show_takes_the_last_iteration_unless_told(run: Path) -> None:
    """What a user wants to see is the model as it is now."""
    assert [group["question_id"] for group in document("rollouts", "show", run)["questions"]] == ["é東"]


def grouped(*items: tuple[Sequence[int], float, float]) -> list[GroupRollout]:
    """Rollouts of (selection, answer log-likelihood, weight), in the order of weight."""
    return [
        GroupRollout(
            sample=sample,
            weight=weight,
            documents=tuple(SelectedDocument(n, f"d{n}", f"T{n}", False) for n in numbers),
            valid=bool(numbers),
            problems=(),
            text="",
            answer_logp=logp,
            selection_logp=-1.0,
            proposal_logp=-1.0,
        )
        for sample, (numbers, logp, weight) in enumerate(items)
    ]


@pytest.mark.parametrize(
    ("items", "said"),
    [
        ([((), math.nan, 0.0), ((), math.nan, 0.0)], "No rollout names a valid document"),
        ([((1, 2), -1.0, 0.5), ((1, 2), -1.0, 0.5)], "Every valid rollout selects [1] > [2]"),
        (
            [((1, 2), -1.0, 0.5), ((2, 1), -1.0, 0.5)],
            "same answer log-likelihood, -1.00 nats: the weights prefer none",
        ),
        ([((1, 2), -1.0, 0.4), ((1, 2), -1.0, 0.4), ((3, 2), -2.0, 0.2)], "0.80 over 2 rollouts"),
        ([((1, 2), -1.0, 0.7), ((2, 1), -2.0, 0.3)], "the documents of [2] > [1] in another order"),
        ([((1,), -1.0, 0.7), ((1, 2), -2.0, 0.3)], "leaves out [2] T2, which [1] > [2] reads"),
        (
            [((1, 2), -1.0, 0.6), ((3, 2), -2.0, 0.3), ((1, 3), -3.0, 0.1)],
            "reads [1] T1, which [3] > [2] does not",
        ),
        ([((1,), -1.0, 1.0), ((2,), -math.inf, 0.0)], "by inf nats"),
    ],
)
def test_why_has_words_for_every_case(items: list[tuple[Sequence[int], float, float]], said: str) -> None:
    """Defect: a sentence about a winner where there is none, or a difference that is not there."""
    assert said in explain(grouped(*items))


GOLD = 4
"""The document of `TIES` that explains the answer."""
TIES = [
    # Four selections that all hold the gold document.
    ([((4, 1), -1.0, 0.25), ((4, 2), -1.0, 0.25), ((3, 4), -1.0, 0.25), ((4, 5), -1.0, 0.25)], 4),
    # The same, but for rounding and a little more.
    ([((4, 1), -1.0, 0.252), ((4, 2), -1.01, 0.25), ((3, 4), -1.015, 0.249), ((4, 5), -1.02, 0.248)], 4),
    # The first two of four, of which the first only just leads.
    ([((4, 1), -1.0, 0.42), ((2, 4), -1.03, 0.41), ((1, 2), -2.0, 0.10), ((3, 5), -2.5, 0.07)], 2),
    # One of those that tie was drawn twice, and stands behind the other twice.
    ([((4, 1), -1.0, 0.3), ((4, 2), -1.0, 0.3), ((4, 1), -1.0, 0.3), ((1, 2), -2.1, 0.1)], 2),
    # Equal weights of unequal likelihoods, as uniform weighting gives.
    ([((4, 1), -1.0, 0.5), ((4, 2), -3.0, 0.5)], 2),
    # Answers that none can give.
    ([((4, 1), -math.inf, 0.5), ((4, 2), -math.inf, 0.5)], 2),
]


@pytest.mark.parametrize(("items", "tied"), TIES)
def test_a_tie_is_called_one_and_credits_what_all_that_tie_share(
    items: list[tuple[Sequence[int], float, float]], tied: int
) -> None:
    """Defect: "only it reads [1]", of the first of several that explain the answer alike."""
    why = explain(grouped(*items))
    assert why.startswith("A tie")
    assert f" {tied} " in why
    assert f"read [{GOLD}] T{GOLD}." in why
    assert "nan" not in why
    for number in (1, 2, 3, 5):
        assert f"[{number}] T{number}" not in why, "a distractor"


def test_a_tie_of_selections_without_a_common_document_credits_none() -> None:
    why = explain(grouped(((1, 2), -1.0, 0.5), ((3, 4), -1.0, 0.5)))
    assert "They have no document in common." in why


def test_another_reward_is_what_is_compared() -> None:
    """Defect: a selection that wins by its exact match, credited with a likelihood that is no higher."""
    wrong, right = (
        replace(rollout, reward=reward)
        for rollout, reward in zip(grouped(((1, 2), -1.0, 0.7), ((1, 3), -0.9, 0.3)), (1.0, 0.0), strict=True)
    )
    assert "its reward exceeds that of the next distinct selection, [1] > [3], by 1.00." in explain([wrong, right])
    tied = [replace(rollout, reward=1.0, weight=0.5) for rollout in (wrong, right)]
    assert "A tie: all 2 distinct selections have the same reward, 1.00" in explain(tied)


def test_a_clear_winner_is_none() -> None:
    """0.06 nats ahead is a win, and said to be a small one."""
    why = explain(grouped(((1, 2), -1.0, 0.515), ((1, 3), -1.06, 0.485)))
    assert "exceeds that of the next distinct selection, [1] > [3], by 0.06 nats" in why
    assert "Only it reads [2] T2." in why


# top, diff, export, sql, watch ----------------------------------------------------------------------------


def found(*arguments: object) -> list[str]:
    return [item["question_id"] for item in document("rollouts", "top", *arguments)["questions"]]


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        ((), "cab"),
        (("--sort", "weight"), "abc"),
        (("--sort", "ess"), "cab"),
        (("--only", "missed"), ""),
        (("--only", "tie"), "b"),
        (("--only", "collapsed"), "b"),
        (("--only", "invalid"), "ca"),
        (("--problem", "format"), "ca"),
        (("--problem", "repeated"), ""),
        (("--text", "WHICH"), "cb"),
        (("--text", "cannot [b]"), "ca"),
        (("--text", "which", "--only", "tie"), "b"),
        (("--limit", 1), "c"),
    ],
)
def test_top_lists_the_questions_that_are_asked_for(run: Path, options: tuple[object, ...], ids: str) -> None:
    assert found(run, "--iteration", 1, *options) == list(ids)


def test_missed_are_labelled_questions_whose_gold_nobody_selects(tmp_path: Path) -> None:
    """Not those without labels."""
    write(
        tmp_path, 1, 0, 0, 0,
        [rollouts(0, [[2], [4]], [-1.0, -2.0], [0.7, 0.3]), rollouts(1, [[2], [4]], [-1.0, -2.0], [0.7, 0.3]),
         rollouts(3, [[2], [4]], [-1.0, -2.0], [0.7, 0.3])],
    )  # fmt: skip
    assert found(tmp_path, "--only", "missed") == ["a"]


def test_unselected_are_questions_whose_heaviest_rollout_leaves_gold_out(tmp_path: Path) -> None:
    """Gold is among the candidates; another rollout may have found it."""
    write(
        tmp_path, 1, 0, 0, 0,
        [rollouts(0, [[2], [1]], [-1.0, -2.0], [0.7, 0.3]), rollouts(3, [[4], [1]], [-1.0, -2.0], [0.7, 0.3]),
         rollouts(1, [[2], [4]], [-1.0, -2.0], [0.7, 0.3])],
    )  # fmt: skip
    assert found(tmp_path, "--only", "unselected") == ["a"]
    assert found(tmp_path, "--only", "missed") == []


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        (("--min-weight", 0.5), "a"),
        (("--max-weight", 0.3), "cb"),
        (("--min-weight", 0.2, "--max-weight", 0.3), "b"),
        (("--question", "b"), "b"),
        (("--question", "b", "--only", "invalid"), ""),
        (("--split", "train"), "cab"),
    ],
)
def test_top_filters_by_weight_question_and_split(run: Path, options: tuple[object, ...], ids: str) -> None:
    assert found(run, "--iteration", 1, *options) == list(ids)


@pytest.mark.parametrize(
    ("iteration", "ids"), [("all", "cab é東"), ("1-2", "cab é東"), ("2", " é東"), ("2-2", " é東"), ("1", "cab")]
)
def test_top_looks_into_one_iteration_several_or_all(run: Path, iteration: str, ids: str) -> None:
    """A question that is sampled in several has a line for each."""
    first, _, second = ids.partition(" ")
    assert sorted(found(run, "--iteration", iteration)) == sorted([*first, *([second] if second else [])])


@pytest.mark.parametrize("iteration", ["0", "7", "1-7", "2-1", "one", "-1", "1-", "١"])
def test_an_iteration_that_is_none_is_refused(run: Path, iteration: str) -> None:
    if iteration in ("1-", "١"):  # to whom digits are digits
        assert found(run, f"--iteration={iteration}") == found(run, "--iteration", 1)
    else:
        assert "iteration" in refusal("rollouts", "top", run, f"--iteration={iteration}")


def test_another_split_was_not_sampled(run: Path) -> None:
    assert "rollouts are of the split that is trained on, train" in refusal("rollouts", "top", run, "--split", "dev")


def test_top_says_what_a_question_is_in_a_line(run: Path) -> None:
    (first,) = document("rollouts", "top", run, "--iteration", 1, "--sort", "weight", "--limit", 1)["questions"]
    assert (first["selection"], first["weight"]) == ("[1] > [3]", 0.5)
    assert (first["distinct"], first["rollouts"]) == (2, 4)
    assert first["recall"] == pytest.approx(0.5)
    text = invoke("rollouts", "top", run, "--iteration", 1, columns=120).stdout
    assert "[1] > [3]" in text
    assert "3 of 3 questions, iteration 1" in text


def test_show_takes_the_same_filters(run: Path) -> None:
    groups = document("rollouts", "show", run, "--iteration", 1, "--only", "tie")["questions"]
    assert [group["question_id"] for group in groups] == ["b"]
    assert "no such question in iteration 1" in invoke("rollouts", "show", run, "--iteration", 1, "--text", "zz").stdout


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    """Question a is explained better the second time, b worse, c once only."""
    run = tmp_path / "changed"
    half = [0.5, 0.5]
    write(run, 1, 0, 0, 0, [rollouts(n, [[1], [2]], [-2.0, -2.0], half) for n in (0, 1, 2)])
    write(run, 2, 0, 1, 0, [rollouts(0, [[3], [3]], [-1.0, -1.0], half), rollouts(1, [[1], [1]], [-4.0, -4.0], half)])
    return run


def test_diff_compares_questions_that_were_sampled_twice(changed: Path) -> None:
    said = document("rollouts", "diff", changed)
    assert (said["compared"], said["improved"], said["worse"]) == (2, 1, 1)
    assert [item["after"]["question_id"] for item in said["questions"]] == ["b", "a"]
    assert [item["evidence_change"] for item in said["questions"]] == pytest.approx([-2.0, 1.0])
    assert said["questions"][1]["before"]["selection"] == "[1]"
    assert said["questions"][1]["after"]["selection"] == "[3]"
    best = document("rollouts", "diff", changed, "--sort", "improved", "--limit", 1)["questions"]
    assert [item["after"]["question_id"] for item in best] == ["a"]
    assert "-2.00 → -4.00" in invoke("rollouts", "diff", changed, columns=120).stdout


@pytest.fixture
def thrice(changed: Path) -> Path:
    """A third time: a becomes worse than ever, b recovers in part; within a tie is no change."""
    half = [0.5, 0.5]
    groups = [rollouts(0, [[1], [2]], [-3.0, -3.0], half), rollouts(1, [[1], [2]], [-2.97, -2.97], half)]
    write(changed, 3, 0, 2, 0, groups)
    return changed


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        (("--only", "worse"), "ab"),  # the last time against the first
        (("--only", "worse", "--since", 2), "a"),
        (("--only", "improved", "--since", 2), "b"),
        (("--sort", "improved", "--since", 2), "ba"),
        (("--sort", "worse", "--since", 2), "ab"),
        (("--sort", "worse", "--since", 1, "--limit", 1), "a"),
        (("--only", "improved"), ""),
        (("--since", 2, "--sort", "worse", "--text", "which"), "b"),
        (("--since", 2, "--sort", "worse", "--only", "collapsed"), ""),
    ],
)
def test_answers_got_worse_or_better_since_an_iteration(thrice: Path, options: tuple[object, ...], ids: str) -> None:
    assert found(thrice, *options) == list(ids)


@pytest.mark.parametrize("compared", [{}, {"first": 1}, {"first": 1, "last": 3}, {"first": 2, "last": 2}])
def test_two_times_are_found_in_one_reading(
    thrice: Path, compared: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []

    def read_once(paths: Sequence[Path], columns: Any = None) -> Any:
        opened.extend(paths)
        return log.read(paths, columns)

    monkeypatch.setattr(changes, "log", types.SimpleNamespace(read=read_once))
    found = changes.compare(thrice, **{name: [number] for name, number in compared.items()})
    assert len(opened) == len(set(opened)) == {0: 3, 1: 3, 2: len({*compared.values()})}[len(compared)]
    first, last = compared.get("first", 1), compared.get("last", 3)
    assert found.compared == (0 if first == last else 2)
    assert {(each.before.iteration, each.after.iteration) for each in found.shown} <= {(first, last)}


def test_within_a_tie_is_neither_worse_nor_better(changed: Path) -> None:
    group = rollouts(1, [[1], [2]], [-4.04, -4.04], [0.5, 0.5])
    write(changed, 3, 0, 2, 0, [group])
    assert found(changed, "--only", "worse", "--since", 2) == []


@pytest.mark.parametrize("iteration", [9, 3])
def test_nothing_comes_after_the_last_iteration(thrice: Path, iteration: int) -> None:
    assert "was sampled after it" in refusal("rollouts", "top", thrice, "--only", "worse", "--since", iteration)


def test_diff_compares_two_runs(changed: Path, run: Path) -> None:
    """By the last time of each question."""
    said = document("rollouts", "diff", changed, run, "--to", 1)
    assert {item["after"]["question_id"] for item in said["questions"]} == {"a", "b", "c"}
    assert said["questions"][-1]["evidence_change"] == pytest.approx(4 + math.log(0.5))


def test_diff_says_how_far_the_bound_moves_over_questions(changed: Path, run: Path) -> None:
    """By scipy's test of pairs; of several iterations, the last time of each question."""
    said = document("rollouts", "diff", changed, run, "--to", "1-1", "--limit", 100)
    known = [change["evidence_change"] for change in said["questions"]]
    pairs, mean = [change for change in known if change is not None], said["mean"]  # nothing of one was valid at first
    assert mean["questions"] == len(pairs) == said["compared"] - 1
    assert mean["change"] == pytest.approx(sum(pairs) / len(pairs)) == pytest.approx(mean["after"] - mean["before"])
    assert mean["p_value"] == pytest.approx(ttest_1samp(pairs, 0).pvalue)
    assert mean["low"] < mean["change"] < mean["high"]
    shown = invoke("rollouts", "diff", changed, run, "--from", "1-2", "--to", 1).stdout
    assert "nats a question (" in shown
    assert "--from: '2-1'" in refusal("rollouts", "diff", changed, run, "--from", "2-1")
    assert "--to: 'x'" in refusal("rollouts", "diff", changed, run, "--to", "x")


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz", "out.parquet"])
def test_export_writes_whole_rows(run: Path, tmp_path: Path, name: str) -> None:
    output = tmp_path / name
    assert document("rollouts", "export", run, "--output", output)["rollouts"] == 14
    assert document("rollouts", "export", run, "--output", output, "--only", "tie")["rollouts"] == 4
    if name == "out.parquet":
        table = log.read([output])
        assert table.num_rows == 4
        assert set(table["question_id"].to_pylist()) == {"b"}
    if name == "out.jsonl":
        invoke("rollouts", "export", run, "--output", output, "--only", "invalid", "--iteration", 1)
        rows = [json.loads(line, parse_constant=pytest.fail) for line in output.read_text().splitlines()]
        assert [row["answer_logp"] for row in rows].count(None) == 5
        assert set(rows[0]) == set(log.SCHEMA.names)


def test_export_says_which_files_it_writes(run: Path, tmp_path: Path) -> None:
    assert "a .jsonl, .jsonl.gz or .parquet file" in refusal("rollouts", "export", run, "--output", tmp_path / "o.csv")


def test_sql_asks_the_log(run: Path) -> None:
    pytest.importorskip("duckdb")
    statement = "select iteration, count(*) as n, sum(weight) as w from rollouts group by 1 order by 1"
    said = document("rollouts", "sql", run, statement)
    assert said["columns"] == ["iteration", "n", "w"]
    assert [(row["iteration"], row["n"]) for row in said["rows"]] == [(1, 12), (2, 2)]
    assert "iteration" in invoke("rollouts", "sql", run, statement).stdout
    assert len(document("rollouts", "sql", run, "select * from rollouts", "--limit", 3)["rows"]) == 3


@pytest.mark.parametrize(
    "statement",
    [
        "select nonsense from rollouts",
        "not sql",
        "select * from read_csv('/etc/passwd')",
        "copy rollouts to '{folder}/out.csv'",
        "attach '{folder}/db.duckdb'",
        "set enable_external_access = true",
        "install httpfs",
    ],
)
def test_sql_reaches_the_log_and_nothing_else(run: Path, tmp_path: Path, statement: str) -> None:
    pytest.importorskip("duckdb")
    assert "SQL over rollouts" in refusal("rollouts", "sql", run, statement.format(folder=tmp_path))
    assert not (tmp_path / "out.csv").exists()


def test_watch_prints_iterations_as_they_are_sampled(run: Path) -> None:
    """The last one when it has not grown for a while."""
    lines = invoke("rollouts", "watch", run, "--every", 0.1, "--until", 2, columns=100).stdout.splitlines()
    assert [line.split()[0] for line in lines if line.split()[0] in "12"] == ["1", "2"]
    assert sum("clean" in line and "iter" in line for line in lines) == 1
    assert sum(line.startswith("! clean") for line in lines) == 1


# stats ----------------------------------------------------------------------------------------------------


def test_stats_counts_problems_over_the_run(run: Path) -> None:
    """How often, the most frequent first."""
    found = document("rollouts", "stats", run)
    assert found["problems"] == {"format": 5, "too_few": 5}
    assert found["iterations"] == document("rollouts", "ls", run)["iterations"]
    assert "format               5  35.7 %" in invoke("rollouts", "stats", run).stdout


def test_stats_signals_pool_the_latest_iterations(run: Path) -> None:
    """Few questions are pooled over iterations, each diagnostic by what it is a share of."""
    found = {signal["name"]: signal for signal in document("rollouts", "stats", run)["signals"]}
    assert found["valid"]["value"] == pytest.approx(9 / 14)
    assert found["all_tie"]["value"] == pytest.approx(1 / 4)
    assert found["duplicate"]["value"] == pytest.approx(4 / 6)
    assert [name for name, signal in found.items() if signal["fired"]] == ["clean", "valid", "all_invalid"]
    assert (found["ess_share"]["first_iteration"], found["ess_share"]["last_iteration"]) == (1, 2)
    assert found["ess_share"]["questions"] == 4


def test_stats_judges_the_present_not_the_past(tmp_path: Path) -> None:
    """Defect: an average over the run that a good beginning hides a collapse in."""
    spread = [rollouts(0, [[1], [2]], [-1.0, -2.0], [0.6, 0.4]) for _ in range(120)]
    collapsed = [rollouts(0, [[1]] * 2, [-1.0] * 2, [0.5] * 2) for _ in range(120)]
    write(tmp_path, 1, 0, 0, 0, spread)
    write(tmp_path, 2, 0, 9, 0, collapsed)
    signals = document("rollouts", "stats", tmp_path)["signals"]
    assert [signal["name"] for signal in signals if signal["fired"]] == ["all_tie", "duplicate", "position"]
    assert {signal["first_iteration"] for signal in signals} == {2}
    text = invoke("rollouts", "stats", tmp_path).stdout
    assert "! all_tie" in text
    assert "Raise num_generations" in text
    assert "target_ess" not in text


# errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["ls", "show", "stats", "top", "diff", "watch"])
def test_a_run_that_is_not_there(tmp_path: Path, command: str) -> None:
    """Exit code 2 and one line, no traceback."""
    message = refusal("rollouts", command, tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in message
    assert "no such folder" in message


@pytest.mark.parametrize("command", ["ls", "show", "stats"])
def test_a_folder_without_rollouts(tmp_path: Path, command: str) -> None:
    """Says what a run holds."""
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / ".iteration-00001-part-00000.parquet.tmp").write_bytes(b"half")
    assert "no rollouts: a run holds rollouts/iteration-*.parquet" in refusal("rollouts", command, tmp_path)


def test_the_rollouts_folder_itself(run: Path) -> None:
    """The commonest slip gets its own answer."""
    assert f"Pass the folder above it: {run}" in refusal("rollouts", "ls", run / "rollouts")


def test_an_unknown_question(run: Path) -> None:
    """Says where it looked and gives an id that is there."""
    message = refusal("rollouts", "show", run, "zzz")
    assert "'zzz': this id was sampled in none of iterations 1-2" in message
    assert "'a'" in message
    assert "none of iteration 2" in refusal("rollouts", "show", run, "a", "--iteration", 2)


def test_an_unknown_iteration(run: Path) -> None:
    """Says which there are."""
    message = refusal("rollouts", "show", run, "--iteration", 7)
    assert "iteration: 7: this run has logged iterations 1-2" in message


@pytest.mark.parametrize("command", ["ls", "show", "stats", "top", "diff"])
@pytest.mark.parametrize("damage", ["half", "empty", "text"])
def test_a_broken_part(run: Path, command: str, damage: str) -> None:
    """Names the file, so that it can be deleted."""
    path = log.part_path(run, 2, 0)
    raw = path.read_bytes()
    path.write_bytes({"half": raw[: len(raw) // 2], "empty": b"", "text": b"not Parquet"}[damage])
    message = refusal("rollouts", command, run)
    assert path.name in message
    assert "whole Parquet" in message


def test_control_characters_in_an_error_do_not_reach_the_terminal(tmp_path: Path) -> None:
    """A path is input too."""
    assert "\x1b" not in refusal("rollouts", "ls", tmp_path / "a\x1b[31m\nb")


# The other commands ---------------------------------------------------------------------------------------


def test_version_and_help() -> None:
    """The help has examples that can be typed."""
    assert invoke("--version").stdout == f"dro-rl {__version__}\n"
    text = invoke("--help").stdout
    for example in ("dro-rl rollouts ls runs/musique", "dro-rl recipe validate", "dro-rl ask runs/musique"):
        assert f"\n    {example}" in text


def test_help_imports_nothing_heavy() -> None:
    """Defect: seconds of imports before a word of help."""
    code = (
        "import sys, dro_rl.cli\n"
        "heavy = ('torch', 'transformers', 'trl', 'pyarrow', 'numpy', 'datasets')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"


@dataclass(frozen=True)
class Answer:
    """What the stand-in pipeline answers."""

    text: str
    selection: Selection
    logp: float


@dataclass(frozen=True)
class Settings:
    """What the stand-in pipeline is set to."""

    num_selected: int = 2

    @property
    def spec(self) -> SelectionSpec:
        """How many documents."""
        return SelectionSpec.of(self.num_selected)

    def slid(self, size: int | None, stride: int | None) -> Settings:
        """It shows all at once."""
        return self


class Pipeline:
    """Stands in for `RAGPipeline`: selects the last K documents."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @classmethod
    def from_pretrained(cls, directory: Path, *, settings: Settings) -> Pipeline:
        """Nothing to load."""
        return cls(settings)

    def answer(self, question: str, documents: Sequence[Document]) -> Answer:
        """Say what was asked."""
        numbers = tuple(range(len(documents), 0, -1))[: self.settings.num_selected]
        return Answer(f"so: {question}", Selection(numbers, True), -1.25)


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the pipeline, which needs models."""
    module = types.ModuleType("dro_rl.pipeline")
    module.RAGPipeline = Pipeline  # type: ignore[attr-defined]
    module.read_settings = lambda directory: Settings()  # type: ignore[attr-defined]
    module.read = lambda selection, question, k: selection.numbers  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dro_rl.pipeline", module)


@pytest.fixture
def documents_file(tmp_path: Path) -> Path:
    """Three documents, of which text is all that is required."""
    path = tmp_path / "documents.jsonl"
    path.write_text('{"text": "one"}\n\n{"title": "Zwei", "text": "two"}\n{"id": "x", "text": "drei\\nthree"}\n')
    return path


@pytest.mark.usefixtures("pipeline")
def test_ask_answers_from_a_document_file(tmp_path: Path, documents_file: Path) -> None:
    """The answer first, then its log-probability, then what was read, best first."""
    arguments = ("ask", tmp_path, "Warum?", "--documents", documents_file)
    lines = invoke(*arguments).stdout.splitlines()
    assert lines[:2] == ["so: Warum?", "log-probability -1.25 nats"]
    assert [line.strip() for line in lines[3:]] == ["[3]  drei three", "[2]  Zwei"]
    found = document(*arguments, "--k", 3)
    assert (found["answer"], found["logp"]) == ("so: Warum?", -1.25)
    assert [item["number"] for item in found["documents"]] == [3, 2, 1]
    assert found["documents"][0]["id"] == "x"


@pytest.mark.usefixtures("pipeline")
def test_ask_takes_a_question_from_a_question_file(tmp_path: Path) -> None:
    """With its accepted answers and labels beside the answer."""
    path = tmp_path / "q.jsonl"
    row = {"id": "a", "question": "Q?", "answers": ["A"], "documents": [{"id": "d", "text": "t"}]}
    path.write_text(json.dumps(row | {"supporting": ["d"]}))
    found = document("ask", tmp_path, "--question-file", path, "--id", "a")
    assert (found["question"], found["accepted"], found["supporting_numbers"]) == ("Q?", ["A"], [1])
    assert "Its first id is 'a'" in refusal("ask", tmp_path, "--question-file", path, "--id", "b")


@pytest.mark.usefixtures("pipeline")
def test_ask_refuses_what_it_cannot_read(tmp_path: Path, documents_file: Path) -> None:
    """A wrong document is named by file and line or field."""
    assert "not one question" in refusal("ask", tmp_path, "Warum?")
    assert "not one question" in refusal("ask", tmp_path, "--question-file", documents_file)
    assert "no such file" in refusal("ask", tmp_path, "Warum?", "--documents", tmp_path / "none.jsonl")
    documents_file.write_text('{"text": "one"}\n{"text": \n')
    assert "line 2" in refusal("ask", tmp_path, "Warum?", "--documents", documents_file)
    documents_file.write_text('{"text": "one"}\n{"title": "two"}\n')
    assert "documents[2].text: missing" in refusal("ask", tmp_path, "Warum?", "--documents", documents_file)
