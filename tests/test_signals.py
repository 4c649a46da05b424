"""Claims about the signals: each fires on what it names and on nothing else, names keys to turn, and is said once."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dro_rl.config import DROConfig
from dro_rl.em import progress
from dro_rl.em.progress import LineProgress, SignalWatch
from dro_rl.em.schedule import Schedule
from dro_rl.errors import InputError, as_size
from dro_rl.evaluation.stages import write_stages
from dro_rl.job.console import print_signals, signal_spans
from dro_rl.progress import INTERVAL, Progress, duration, how_far
from dro_rl.recipe import RunConfig
from dro_rl.records import Document, Question, Rollout, Selection
from dro_rl.rollouts import log
from dro_rl.rollouts.diagnostics import Summary
from dro_rl.rollouts.signals import QUESTIONS, RULES, Estimate, Iteration, of_iteration
from dro_rl.selection import SelectionSpec

GOOD = Summary(
    questions=QUESTIONS, rollouts=8 * QUESTIONS, valid_rollouts=8 * QUESTIONS, valid_questions=QUESTIONS,
    repeatable=7 * QUESTIONS, labelled=QUESTIONS, evidence_bound=-2.0, evidence_bound_sd=1.0, answer_logp=-3.0, ess=4.0,
    ess_share=0.5, weight_entropy=1.0, weight_temperature=1.0, selector_entropy=4.0, kl=0.1, valid=1.0, clean=1.0,
    duplicate=0.2, prompt_cut=0.0, all_tie=0.1, all_invalid=0.0, temperature=1.0, log_ratio_mean=0.0, log_ratio_max=0.1,
    ratio_mean=1.0, truncated=0.0, dropped_mass=math.nan, recall={1: 0.4, 3: 0.5, 5: 0.6},
    recall_sd={1: 0.4, 3: 0.4, 5: 0.4}, weighted_recall={1: 0.5, 3: 0.6, 5: 0.7}, first=(0.3, 0.25, 0.25, 0.2),
    selected=(0.5, 0.5, 0.5, 0.5), first_chance=0.25, problems={}, likely_rollouts=8.0 * QUESTIONS, documents=2.0,
    resampled=0.0,
)  # fmt: skip
"""An iteration that nothing is wrong with."""
REPLAY = Path(__file__).parent / "data" / "quickstart_iterations.json"


def run(*summaries: Summary, **of_the_last: Any) -> list[Iteration]:
    """A run of these iterations."""
    history = [Iteration(number, number, number, summary) for number, summary in enumerate(summaries, start=1)]
    return [*history[:-1], replace(history[-1], **of_the_last)]


def fired(history: Sequence[Iteration]) -> list[str]:
    return [signal.rule.name for signal in of_iteration(history) if signal.fired]


def series(count: int = 4, **ends: tuple[float, float]) -> list[Summary]:
    """Iterations in which figures go in a straight line from the first to the last; recalls are those at 5."""
    found = []
    for step in range(count):
        now = {name: first + (last - first) * step / (count - 1) for name, (first, last) in ends.items()}
        by_k = [name for name in ("recall", "weighted_recall") if name in now]
        recall = {name: {**getattr(GOOD, name), 5: now.pop(name)} for name in by_k}
        found.append(replace(GOOD, **now, **recall))
    return found


def quickstart() -> list[Iteration]:
    """The 120 iterations of the quick start in which the policy learned to write more than it was asked for."""
    kept = json.loads(REPLAY.read_text())
    figures, dev = kept["iterations"], kept["dev_em"]
    recall, deviation = figures.pop("recall@5"), figures.pop("recall_sd@5")

    def at(values: Any, place: int) -> Any:
        value = values[place] if isinstance(values, list) else values
        return tuple(value) if isinstance(value, list) else value

    return [
        Iteration(
            place + 1,
            place,
            place,
            replace(
                GOOD,
                **{name: at(values, place) for name, values in figures.items()},
                recall={**GOOD.recall, 5: at(recall, place)},
                recall_sd={**GOOD.recall_sd, 5: at(deviation, place)},
            ),
            dev=Estimate(dev[str(place + 1)], 3.0) if str(place + 1) in dev else None,
        )
        for place in range(120)
    ]


# What fires -------------------------------------------------------------------------------------------------


def test_nothing_is_wrong_with_a_good_run() -> None:
    assert fired(run(*[GOOD] * 6)) == []
    assert fired(run(GOOD)) == []
    assert of_iteration([]) == []


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("clean", {"clean": 0.89}),
        ("valid", {"valid": 0.89}),
        ("all_invalid", {"all_invalid": 0.11}),
        ("all_tie", {"all_tie": 0.51}),
        ("duplicate", {"duplicate": 0.81}),
        ("ess_share", {"ess_share": 0.19}),
        ("truncated", {"truncated": 0.11}),
        ("entropy", {"selector_entropy": 0.39}),
        ("kl", {"kl": 7.1}),
        ("position", {"first": (0.02, 0.02, 0.64, 0.32)}),
        ("position", {"first": (0.97, 0.03, 0.0, 0.0)}),
        ("position", {"first": (0.0,) * 9 + (0.6, *[0.0] * 10), "first_chance": 0.05}),
    ],
)
def test_a_level_fires_beyond_its_limit_alone(name: str, change: dict[str, Any]) -> None:
    assert fired(run(GOOD, replace(GOOD, **change))) == [name]


def test_a_policy_that_begins_anywhere_has_no_place() -> None:
    """Half of a two-document question is chance, and a single document leaves no other place."""
    assert fired(run(replace(GOOD, first=(0.5, 0.5), first_chance=0.5))) == []
    assert fired(run(replace(GOOD, first=(1.0,), first_chance=1.0))) == []


def test_the_engine_is_judged_where_it_was_compared() -> None:
    assert fired(run(GOOD, engine_difference=0.2)) == ["engine"]
    assert fired(run(GOOD, engine_difference=0.02)) == []


def test_evidence_that_falls_from_window_to_window() -> None:
    assert fired(run(*series(evidence_bound=(-2.0, -2.6)))) == ["evidence_falling"]
    noise = [replace(GOOD, evidence_bound=bound) for bound in (-2.0, -2.3, -2.2, -2.6)]
    assert fired(run(*noise)) == [], "not each time"
    assert fired(run(*series(evidence_bound=(-2.0, -2.1)))) == [], "within two standard errors"
    assert fired(run(*series(3, evidence_bound=(-2.0, -2.6)))) == [], "too few windows to say"


def test_a_short_run_has_trends_too() -> None:
    """Thirty iterations of eight questions: less than four windows, cut into four."""
    few = {"questions": 8, "rollouts": 64, "valid_rollouts": 64, "valid_questions": 8, "repeatable": 56, "labelled": 8}
    falling = [replace(each, **few) for each in series(30, evidence_bound=(-2.0, -3.5))]
    assert fired(run(*falling)) == ["evidence_falling"]
    assert fired(run(*falling[:12])) == [], "of 96 questions there is no trend"
    forgetting = series(30, evidence_bound=(-2.0, -0.5), recall=(0.9, 0.2), weighted_recall=(0.9, 0.2))
    assert fired(run(*(replace(each, **few) for each in forgetting))) == ["recall_falling"]
    noise = [replace(GOOD, evidence_bound=-2 - 0.3 * (n % 2), **few) for n in range(30)]
    assert fired(run(*noise)) == []


@pytest.mark.parametrize(
    ("m", "ess", "expected"),
    [
        (1, 1.0, []), (2, 1.02, ["ess_share"]), (2, 1.1, []), (4, 1.02, ["ess_share"]), (4, 1.1, []),
        (8, 1.5, ["ess_share"]), (8, 1.7, []), (32, 6.0, ["ess_share"]), (32, 7.0, []),
    ],
)  # fmt: skip
def test_one_rollout_with_all_the_weight_is_named_however_few_there_are(
    m: int, ess: float, expected: list[str]
) -> None:
    assert fired(run(replace(GOOD, ess=ess, ess_share=ess / m))) == expected


def test_recall_that_falls_while_the_evidence_rises() -> None:
    """The generator learns to do without documents."""
    assert fired(run(*series(evidence_bound=(-2.0, -1.4), recall=(0.6, 0.4)))) == ["recall_falling"]
    assert fired(run(*series(evidence_bound=(-2.0, -2.0), recall=(0.6, 0.4)))) == [], "both suffer"
    assert fired(run(*series(evidence_bound=(-2.0, -1.4), recall=(0.6, 0.58)))) == []


def test_weights_that_the_selector_does_not_follow() -> None:
    """Recall has not moved since the first window, and by weight it is 20 points higher."""
    stuck = series(evidence_bound=(-2.0, -2.0), recall=(0.3, 0.3), weighted_recall=(0.9, 0.9))
    assert fired(run(*stuck)) == ["not_followed"]
    assert fired(run(*stuck[:3])) == [], "three windows of four"
    assert fired(run(*series(evidence_bound=(-2.0, -2.0), recall=(0.3, 0.6), weighted_recall=(0.9, 0.9)))) == []
    assert fired(run(*series(evidence_bound=(-2.0, -2.0), recall=(0.3, 0.3), weighted_recall=(0.4, 0.4)))) == []


def test_dev_that_falls_while_training_rises() -> None:
    history = run(*series(6, evidence_bound=(-2.0, -1.0)))
    for place, value in ((1, 60.0), (3, 59.0), (5, 50.0)):
        history[place] = replace(history[place], dev=Estimate(value, 2.0))
    assert fired(history) == ["dev_falling"]
    assert fired(history[:5]) == [], "59 is not below 60"
    rewarded = series(6, reward=(0.3, 0.8), reward_sd=(0.4, 0.4))  # the evidence stays; the reward is another
    assert fired([replace(i, rollouts=s) for i, s in zip(history, rewarded, strict=True)]) == ["dev_falling"]
    flat = [replace(iteration, rollouts=GOOD) for iteration in history]
    assert fired(flat) == []


def test_levels_pool_small_iterations_and_judge_the_present() -> None:
    """Online iterations of a few questions are noise; a collapse is not hidden by a good beginning."""
    small = replace(GOOD, questions=10, rollouts=80, valid_rollouts=80, valid_questions=10, repeatable=70, labelled=10)
    assert fired(run(*[small] * 9, replace(small, clean=0.7))) == [], "one of ten"
    assert fired(run(*[small] * 50, *[replace(small, clean=0.7)] * 4)) == ["clean"]
    found = of_iteration(run(*[small] * 50))[0]
    assert (found.first_iteration, found.last_iteration, found.questions) == (41, 50, 100)


def test_every_rule_names_keys_that_recipes_have_and_says_what_to_do() -> None:
    """Advice to change a key that does not exist would be worse than none."""
    known = {*DROConfig.__dataclass_fields__, *RunConfig.__dataclass_fields__}
    assert len({rule.name for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert set(rule.keys) <= known, rule.name
        assert rule.meaning.endswith(".")
        assert rule.advice.endswith(".")


def test_the_quick_start_that_gamed_the_parser_warns_within_ten_iterations() -> None:
    """`clean` was below 0.9 from the first iteration on, near 0 in the last forty, and all rollouts were valid."""
    history = quickstart()
    passed = next(place for place, iteration in enumerate(history) if iteration.rollouts.clean < 0.9)
    assert any("clean" in fired(history[: end + 1]) for end in range(passed, passed + 10))
    assert all("clean" in fired(history[:end]) for end in range(passed + 10, 121))
    assert all("valid" not in fired(history[:end]) for end in range(1, 121))


def test_it_would_have_warned_within_ten_iterations_after_a_clean_start() -> None:
    """The same run, begun by a policy that writes as it is asked: what falls below 0.9 by and by."""
    history = [
        replace(iteration, rollouts=replace(iteration.rollouts, clean=1 - 0.02 * max(iteration.number - 20, 0)))
        for iteration in quickstart()[:60]
    ]
    passed = next(iteration.number for iteration in history if iteration.rollouts.clean < 0.9)
    warned = next(end for end in range(1, 61) if "clean" in fired(history[:end]))
    assert passed <= warned <= passed + 10


# While it runs ----------------------------------------------------------------------------------------------


def schedule(steps: int = 1) -> Schedule:
    """Ten iterations of a hundred questions, in so many steps each."""
    return Schedule(1000, 100, 100 // steps, 1, 10, 8, 0)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Any:
    """What was said so far."""
    caplog.set_level(logging.INFO, logger="dro_rl")
    return lambda: [record.getMessage() for record in caplog.records]


def test_a_signal_is_said_when_it_appears_and_when_it_is_over(said: Any, tmp_path: Path) -> None:
    watch = SignalWatch(schedule(), tmp_path)
    cleans = (1.0, 0.5, 0.4, 1.0, 1.0, 1.0, 1.0)
    logs = [watch.end_iteration(n, replace(GOOD, clean=clean)) for n, clean in enumerate(cleans, start=1)]
    assert [line["signals/clean"] for line in logs] == [0, 1, 1, 1, 1, 0, 0]
    appeared, over = said()
    assert "iteration 2: signal: clean 50 % (signals below 90 %)" in appeared
    assert "constrain_selection" in appeared
    assert "iteration 6: signal: clean 100 % (signals below 90 %) is over" in over
    assert watch.spans == {"clean": [(2, 6)]}


def test_the_quick_start_that_gamed_the_parser_is_said_where_people_look(
    said: Any, tmp_path: Path, capsys: Any
) -> None:
    """In the log, in the figures of trackers, among what the line of progress names, and in the table at the end."""
    watch = SignalWatch(schedule(), tmp_path)
    logs = [watch.end_iteration(iteration.number, iteration.rollouts) for iteration in quickstart()]
    warned = next(number for number, line in enumerate(logs, start=1) if line["signals/clean"])
    assert warned <= 10
    assert any(f"iteration {warned}: signal: clean" in text for text in said())
    assert all(line["signals/clean"] for line in logs[warned - 1 :])
    assert "clean" in {signal.rule.name for signal in watch.standing}
    assert watch.spans["clean"] == [(warned, None)]
    print_signals(signal_spans(watch.found, watch.spans))
    assert f"{warned}- " in (shown := capsys.readouterr().out)
    assert "constrain_selection" in shown


def test_a_value_about_its_limit_does_not_come_and_go(said: Any, tmp_path: Path) -> None:
    watch = SignalWatch(schedule(), tmp_path)
    for number in range(1, 40):
        watch.end_iteration(number, replace(GOOD, all_tie=0.51 if number % 3 == 0 else 0.48))
    assert len(said()) == 1
    assert [signal.rule.name for signal in watch.standing] == ["all_tie"]


def test_a_run_that_goes_on_remembers_its_iterations(said: Any, tmp_path: Path) -> None:
    """From its log and its evaluations, up to where it stands; what was said before is not said again."""
    documents = tuple(Document(f"d{n}", "", "text") for n in (1, 2))
    question = Question("q", "?", ("a",), documents)
    for number in (1, 2, 3):
        group = [
            Rollout(
                question=0, sample=sample, token_ids=(1,), proposal_logps=(-1.0,), text="x",
                selection=Selection((1,), True, ("format",)), selection_logp=-1.0, answer_logp=-2.0 - sample,
                reward=-2.0 - sample,
                weight=0.5, proposal_weight=0.5, ess=2.0, weight_temperature=1.0,
            )
            for sample in (0, 1)
        ]  # fmt: skip
        log.write(log.to_table(group, [question], number, number, 0, 2), log.part_path(tmp_path, number, 0))
    write_stages(tmp_path, [{"stage": "base", "em": 1.0, "n": 9}, {"stage": "iteration-2", "em": 50.0, "n": 100}])
    watch = SignalWatch(schedule(), tmp_path, "em")
    state: Any = SimpleNamespace(global_step=2)
    watch.on_train_begin(None, state, None)  # type: ignore[arg-type]
    assert [iteration.number for iteration in watch.history] == [1, 2]
    assert [iteration.dev for iteration in watch.history] == [None, Estimate(50.0, 5.0)]
    assert said() == []
    assert "clean" in {signal.rule.name for signal in watch.standing}


def test_one_process_speaks(said: Any, tmp_path: Path) -> None:
    SignalWatch(schedule(), tmp_path, speaks=False).end_iteration(1, replace(GOOD, clean=0.0))
    assert said() == []


def test_dev_reaches_the_iteration_that_it_followed_once(tmp_path: Path) -> None:
    """The last evaluation, of the best weights, is not the last iteration's."""
    watch = SignalWatch(schedule(), tmp_path, "em")
    evaluated = lambda value: watch.on_evaluate(None, None, None, {"eval_em": value, "eval_n": 100})  # noqa: E731
    evaluated(20.0)
    watch.end_iteration(1, GOOD)
    evaluated(50.0)
    evaluated(80.0)
    assert watch.history[0].dev == Estimate(50.0, 5.0)


def test_a_run_without_a_valid_rollout_stops(tmp_path: Path) -> None:
    """Defect: it trained on to a loss of −52, and ended well."""
    watch = SignalWatch(schedule(), tmp_path, speaks=False)
    nothing = replace(
        GOOD, valid=0.0, all_invalid=1.0, valid_rollouts=0, valid_questions=0, repeatable=0, first=(), selected=(),
        evidence_bound=math.nan, evidence_bound_sd=math.nan, duplicate=math.nan, first_chance=math.nan,
        problems={"format": 800},
    )  # fmt: skip
    few = replace(nothing, questions=10, rollouts=80)
    watch.end_iteration(1, few)
    assert {"valid", "all_invalid"} <= {signal.rule.name for signal in watch.standing}, "too few to give up"
    with pytest.raises(InputError) as caught:
        watch.end_iteration(2, nothing)
    for key in ("constrain_selection", "warmup", "max_completion_length"):
        assert key in str(caught.value)
    assert "none of 800 names a document (format" in str(caught.value)


def test_the_table_at_the_end_has_what_stands_and_what_is_over(tmp_path: Path, capsys: Any) -> None:
    watch = SignalWatch(schedule(), tmp_path, speaks=False)
    for number, change in enumerate(({"clean": 0.5}, {}, {}, {"duplicate": 0.95}, {"duplicate": 0.95}), start=1):
        watch.end_iteration(number, replace(GOOD, **change))
    print_signals(signal_spans(watch.found, watch.spans))
    text = capsys.readouterr().out
    assert "clean: over" in text
    assert "1-4" in text
    assert "4- " in text
    assert "duplicate 95 %" in text
    print_signals(signal_spans(watch.found, {}))
    assert capsys.readouterr().out == ""


# How far it is ----------------------------------------------------------------------------------------------


def test_a_line_says_what_a_person_asks(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No terminal: questions done, rate, time left, and the signals that stand."""
    monkeypatch.setattr(progress.time, "monotonic", iter([100.0, 110.0, 120.0]).__next__)
    watch = SignalWatch(schedule(2), tmp_path, speaks=False)
    lines = LineProgress(schedule(2), watch)
    settings: Any = SimpleNamespace(disable_tqdm=True, spec=SelectionSpec.of(2))
    state: Any = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=20)
    lines.on_train_begin(settings, state, None)  # type: ignore[arg-type]
    watch.end_iteration(1, replace(GOOD, clean=0.5))
    state.global_step = 1
    times = {"time/rollout": 1.5, "time/evaluation": 100.0}  # which a line of its own is about
    step = {"loss": 0.5, "ess": 3.2, "recall@1": 0.4, "recall@3": 0.6, **times}
    lines.on_log(settings, state, None, step)  # type: ignore[arg-type]
    state.global_step = 2
    lines.on_step_end(settings, state, None)  # type: ignore[arg-type]
    dev = {"eval_em": 17.0, "eval_f1": 24.5, "eval_recall@1": 40.0, "eval_recall@3": 60.0, "eval_valid": 100.0}
    lines.on_log(settings, state, None, dev)  # type: ignore[arg-type]
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == (
        "iteration 1/10  step 1/20  loss 0.500  ess 3.2  recall@1 0.40  1.5 s  "
        "50 of 1,000 questions, 5.0 a second, 3 min left  !clean"
    )
    assert second == "iteration 1/10  step 2/20  100 of 1,000 questions, 5.0 a second, 3 min left  !clean"
    assert third == "iteration 1/10  step 2/20  dev: em 17.0  f1 24.5  recall@1 40.0  valid 100.0"  # two are selected


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((0, 40, "questions", 5.0), "0 of 40 questions"),
        ((10, 40, "questions", 50.0), "10 of 40 questions, 5.0 s each, 2 min left"),
        ((1500, 30_000, "questions", 60.0), "1,500 of 30,000 questions, 25 a second, 19 min left"),
        ((40, 40, "questions", 80.0), "40 of 40 questions, 2.0 s each"),
        ((30, 40, "questions", 20.0, 10), "30 of 40 questions, 2.0 s each, 20 s left"),
    ],
)
def test_how_far(arguments: Any, text: str) -> None:
    assert how_far(*arguments) == text


def test_durations_are_in_the_unit_that_one_would_say() -> None:
    assert [duration(seconds) for seconds in (0.4, 45, 89, 300, 7500)] == ["0 s", "45 s", "89 s", "5 min", "2 h 05 min"]


def test_sizes_are_in_the_unit_that_one_would_say() -> None:
    sizes = (0, 1023, 1024, 2**20 - 1, 2**20, 1.55 * 2**30, 3000 * 2**40)
    said = ["0 B", "1,023 B", "1 KiB", "1,024 KiB", "1.0 MiB", "1.6 GiB", "3,000.0 TiB"]
    assert [as_size(size) for size in sizes] == said


def test_a_long_loop_is_not_silent_and_a_short_one_is(capsys: Any) -> None:
    """Defect: minutes without a word where no terminal shows a bar."""
    now = iter([0.0, 1.0, INTERVAL + 1, INTERVAL + 1, INTERVAL + 2])
    with Progress(4, "evaluation of base", clock=now.__next__) as loop:
        for _ in range(3):
            loop.update(1)
    text = capsys.readouterr().err
    assert text == "evaluation of base: 2 of 4 questions, 15.5 s each, 31 s left\n"


def test_what_was_done_before_took_no_time_of_this(capsys: Any) -> None:
    now = iter([0.0, INTERVAL, INTERVAL])
    with Progress(100, "evaluation", clock=now.__next__) as loop:
        loop.skip(80)
        loop.update(10, "em 50.0")
    assert capsys.readouterr().err == "evaluation: 90 of 100 questions, 3.0 s each, 30 s left, em 50.0\n"
