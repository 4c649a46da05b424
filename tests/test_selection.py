"""Claims about the selection format: what is written is read, and what else a model writes does no harm."""

from __future__ import annotations

import itertools
import time

import pytest

from dro_rl.records import Selection
from dro_rl.selection import SelectionSpec, format_selection, parse_selection


def test_what_is_written_is_read() -> None:
    """The round trip is exact and without problems for every ordered selection of a small list."""
    for k in (1, 2, 3):
        for numbers in itertools.permutations(range(1, 6), k):
            assert parse_selection(format_selection(numbers), 5, k) == Selection(numbers, True)


def test_the_format_is_one_based_and_best_first() -> None:
    """The spelling that models are trained on: a change of it breaks every trained selector."""
    assert format_selection([3, 1, 12]) == "[3] > [1] > [12]"
    assert format_selection([]) == ""


@pytest.mark.parametrize("text", ["[3]>[1]", " [3] > [1]\n", "[ 3 ]  >  [ 1 ]", "[3] >\n[1]", "[03] > [1]"])
def test_white_space_and_leading_zeros_do_not_matter(text: str) -> None:
    """Guards that harmless variants are not reported as problems."""
    assert parse_selection(text, 5, 2) == Selection((3, 1), True)


# The defects of the first implementation --------------------------------------------------------------


def test_digits_in_prose_are_not_document_numbers() -> None:
    """Defect: reading every run of digits, so that this gives documents 5, 2018, 3 and 7."""
    selection = parse_selection("top 5 passages from 2018: [3] > [7]", 20, 2)
    assert selection == Selection((3, 7), True, ("format",))


def test_bad_numbers_are_dropped_before_the_cut_to_k() -> None:
    """Defect: slice to K, then drop the invalid: here that leaves one document of the three asked for."""
    selection = parse_selection("[25] > [1] > [0] > [2] > [3] > [4]", 20, 3)
    assert selection.numbers == (1, 2, 3)
    assert selection.problems == ("out_of_range", "too_many")


def test_repeats_are_dropped_before_the_cut_to_k() -> None:
    """Defect: a repeat that takes a place among the K."""
    selection = parse_selection("[2] > [2] > [1] > [2] > [3]", 5, 3)
    assert selection.numbers == (2, 1, 3)
    assert selection.problems == ("repeated",)


def test_numbers_outside_the_list_never_get_through() -> None:
    """Defect: checking how many numbers there are but not their range, so that 0 and 21 become targets."""
    selection = parse_selection("[0] > [21] > [20] > [1] > [5]", 20, 5)
    assert selection.numbers == (20, 1, 5)
    assert selection.problems == ("out_of_range", "too_few")


def test_fewer_than_k_is_used_not_thrown_away() -> None:
    """Defect: dropping every rollout that does not name exactly K."""
    assert parse_selection("[4] > [2]", 20, 5) == Selection((4, 2), True, ("too_few",))


def test_a_ranking_of_all_candidates_is_cut_to_k() -> None:
    """Defect: dropping the full permutations that ranking models write, all of them."""
    everything = list(range(20, 0, -1))
    assert parse_selection(format_selection(everything), 20, 5) == Selection((20, 19, 18, 17, 16), True, ("too_many",))


def test_missing_numbers_are_not_made_up() -> None:
    """Defect: filling up with unnamed documents in ascending order, which credits the selector for them."""
    assert parse_selection("[4]", 5, 3).numbers == (4,)


@pytest.mark.parametrize("text", ["", "   ", "I cannot tell.", "[]", "[x]", "5 > 3", "[21] > [0]", "[1", "[-1]"])
def test_a_text_that_names_no_document_is_invalid(text: str) -> None:
    """Defect: answering from an empty context as if a selection had been made."""
    selection = parse_selection(text, 20, 2)
    assert selection.numbers == ()
    assert not selection.valid
    assert "too_few" in selection.problems


def test_a_list_that_breaks_off_keeps_what_was_said() -> None:
    """A completion cut at its maximum length still names its first documents."""
    assert parse_selection("[4] > [2] > [1", 20, 3) == Selection((4, 2), True, ("format", "too_few"))


# Hostile input ----------------------------------------------------------------------------------------


def test_huge_numbers_are_out_of_range_and_cheap() -> None:
    """Defect: int() of thousands of digits raises; ignoring long numbers calls a bad list perfect."""
    assert parse_selection("[3] > [99999999999]", 5, 1) == Selection((3,), True, ("out_of_range",))
    assert parse_selection(f"[{'9' * 100_000}] > [3]", 5, 1) == Selection((3,), True, ("out_of_range",))
    assert parse_selection(f"[{'0' * 100_000}3]", 5, 1) == Selection((3,), True)


@pytest.mark.parametrize("digit", ["٣", "３", "³", "𝟑", "Ⅲ"])
def test_digits_of_other_scripts_are_not_numbers(digit: str) -> None:
    """Defect: `\\d` and int() accept them, so that what was trained on and what is read differ."""
    assert not parse_selection(f"[{digit}]", 5, 1).valid


@pytest.mark.parametrize(
    "text",
    [
        "[" * 1_000_000,
        "]" * 1_000_000,
        "[]" * 500_000,
        "[" + " " * 1_000_000,
        "[1" + " " * 1_000_000,
        "[" + "1" * 1_000_000,
        "[1] > " * 200_000,
        "[1]" + " " * 1_000_000 + ">",
        "[7]\n" * 250_000,
    ],
    ids=["open", "close", "empty", "spaces", "open number", "long number", "list", "gap", "lines"],
)
def test_a_million_characters_take_linear_time(text: str) -> None:
    """Defect: a pattern that backtracks; one such completion would stop a run."""
    start = time.perf_counter()
    selection = parse_selection(text, 5, 2)
    assert time.perf_counter() - start < 5
    assert len(selection.numbers) <= 1


def test_line_breaks_separate_but_are_not_the_format() -> None:
    """A list over lines is read in order and reported."""
    assert parse_selection("[2]\n[1]\r\n", 5, 2) == Selection((2, 1), True, ("format",))


def test_prose_after_the_list_is_reported() -> None:
    """Guards that the whole text is looked at: the log counts chatter."""
    assert parse_selection("[2] > [1]. Document [4] is off.", 5, 2) == Selection((2, 1), True, ("format", "too_many"))


# Thinking ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "<think>[3] fits, [1] not</think>\n[2] > [4]",
        "<think>\n\n</think>\n\n[2] > [4]",
        "[3] fits, [1] not</think>\n[2] > [4]",
        "<think>[1]<think>[3]</think>[5]</think>[2] > [4]",
        "<think>[1]</think><think>[3]</think>[2] > [4]",
        "[2] > [4]<think>[1] would do too</think>",
        "<Thinking>[3]</Thinking>[2] > [4]",
        "<thought>[3]</thought>[2] > [4]",
        "<reasoning>[3]</reasoning>[2] > [4]",
        "<seed:think>[3]</seed:think>[2] > [4]",
        "[THINK][3][/THINK][2] > [4]",
        "◁think▷[3]◁/think▷[2] > [4]",
        "<|begin_of_thought|>[3]<|end_of_thought|>[2] > [4]",
        "<|channel|>analysis<|message|>[3]<|end|><|start|>assistant<|channel|>final<|message|>[2] > [4]",
    ],
)
def test_what_stands_in_a_thinking_block_is_not_the_selection(text: str) -> None:
    assert parse_selection(text, 5, 2) == Selection((2, 4), True)


@pytest.mark.parametrize("text", ["<think>[3] fits", "<think>[3] fits\n[2] > [4]", "[THINK]I take [2]", "[2]</think>"])
def test_a_block_that_is_not_closed_holds_no_selection(text: str) -> None:
    """The completion was too short for the thoughts: what they name was not chosen."""
    assert not parse_selection(text, 5, 2).valid


def test_a_word_that_names_thinking_is_no_mark() -> None:
    assert parse_selection("I think [2] > [4] <thinks>", 5, 2).numbers == (2, 4)


@pytest.mark.parametrize(
    "text", ["<think>" * 200_000, "</think>" * 200_000 + "[1]", "<think" * 200_000, "<" * 1_000_000]
)
def test_a_million_marks_are_read_once(text: str) -> None:
    assert len(parse_selection(text, 5, 2).numbers) <= 1


@pytest.mark.parametrize(
    ("text", "numbers", "problems"),
    [
        ("[4]", (4,), ()),
        ("[4] > [2]", (4, 2), ()),
        ("[4] > [2] > [1]", (4, 2, 1), ()),
        ("[4] > [2] > [1] > [5]", (4, 2, 1), ("too_many",)),
        ("none", (), ("format", "too_few")),
    ],
)
def test_where_one_to_three_are_asked_for_each_of_these_numbers_is_as_asked(text, numbers, problems) -> None:
    assert parse_selection(text, 5, 3, 1) == Selection(numbers, bool(numbers), problems)


def test_fewer_than_the_fewest_asked_for_are_read_and_said() -> None:
    assert parse_selection("[4]", 5, 3, 2) == Selection((4,), True, ("too_few",))


@pytest.mark.parametrize(
    ("num_selected", "least", "most", "said"),
    [(5, 5, 5, "5"), ({"min": 1, "max": 5}, 1, 5, "1 to 5"), ({"max": 2, "min": 2}, 2, 2, "2")],
)
def test_how_many_is_a_number_or_a_range(num_selected, least: int, most: int, said: str) -> None:
    spec = SelectionSpec.of(num_selected)
    assert (spec.least, spec.most, str(spec), spec.chooses) == (least, most, said, least < most)


@pytest.mark.parametrize(
    "num_selected",
    [
        0, -1, True, {}, {"min": 1}, {"max": 5}, {"min": 0, "max": 5}, {"min": 3, "max": 2},
        {"min": 1, "max": 5, "mean": 2}, {"min": 1.0, "max": 5}, {"min": True, "max": 5}, {"min": "1", "max": 5},
        {"least": 1, "most": 5}, {"min": None, "max": 5},
    ],
)  # fmt: skip
def test_what_is_neither_is_refused(num_selected) -> None:
    with pytest.raises(ValueError, match="neither a number from 1 upward nor"):
        SelectionSpec.of(num_selected)
