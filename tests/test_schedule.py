"""Claims about the schedule: who is seen when, as a pure function of the seed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from dro_rl.em.schedule import Schedule, Slots, SlotSampler

SCHEDULE = Schedule(
    num_questions=10,
    questions_per_iteration=6,
    questions_per_step=2,
    m_step_epochs=3,
    num_iterations=5,
    num_generations=4,
    seed=7,
)


def test_lengths_follow_from_the_settings() -> None:
    assert SCHEDULE.steps_per_iteration == 3 * 6 // 2
    assert SCHEDULE.total_steps == 5 * 9
    assert [SCHEDULE.iteration(step) for step in (0, 8, 9, 44)] == [0, 0, 1, 4]


def test_every_question_is_used_equally_often() -> None:
    """5 iterations of 6 are three passes over 10, though passes end within iterations."""
    used = Counter(q for iteration in range(5) for q in SCHEDULE.questions(iteration))
    assert used == dict.fromkeys(range(10), 3)


def test_no_question_waits_for_another_to_be_used_twice_more() -> None:
    """At any moment: a pass begins when the one before has ended."""
    used: Counter[int] = Counter(dict.fromkeys(range(10), 0))
    for iteration in range(20):
        for question in SCHEDULE.questions(iteration):
            used[question] += 1
            assert max(used.values()) - min(used.values()) <= 1


@pytest.mark.parametrize("per_iteration", [2, 10])
def test_an_iteration_is_a_batch_or_the_whole_training_set(per_iteration: int) -> None:
    schedule = replace(SCHEDULE, questions_per_iteration=per_iteration)
    for iteration in range(5):
        assert len(set(schedule.questions(iteration))) == per_iteration


def test_passes_have_different_orders() -> None:
    schedule = replace(SCHEDULE, questions_per_iteration=10)
    orders = {tuple(schedule.questions(iteration)) for iteration in range(5)}
    assert len(orders) == 5
    assert all(sorted(order) == list(range(10)) for order in orders)


def test_epochs_of_an_iteration_differ_in_order_and_not_in_content() -> None:
    epochs = [tuple(p for step in range(3 * e, 3 * e + 3) for p in SCHEDULE.positions(step)) for e in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(6))] * 3
    assert len(set(epochs)) == 3


def test_the_seed_decides_everything() -> None:
    """Resuming needs no memory: another object of the same settings gives the same."""
    again, other = replace(SCHEDULE), replace(SCHEDULE, seed=8)
    assert list(SlotSampler(SCHEDULE)) == list(SlotSampler(again))
    assert SCHEDULE.questions(3) == again.questions(3)
    assert list(SlotSampler(SCHEDULE)) != list(SlotSampler(other))
    assert SCHEDULE.questions(3) != other.questions(3)


def test_a_step_holds_whole_groups() -> None:
    """All m rollouts of a question stand together in one step, in the order in which they were sampled."""
    slots = list(SlotSampler(SCHEDULE))
    per_step = 2 * 4
    assert len(slots) == len(SlotSampler(SCHEDULE)) == len(Slots(SCHEDULE)) == SCHEDULE.total_steps * per_step
    for step in range(SCHEDULE.total_steps):
        mine = slots[step * per_step : (step + 1) * per_step]
        expected = [p * 4 + sample for p in SCHEDULE.positions(step) for sample in range(4)]
        assert mine == expected
        assert len(set(mine)) == per_step


def test_slots_carry_their_number() -> None:
    slots = Slots(SCHEDULE)
    assert [slots[i] for i in (0, 5, 23)] == [0, 5, 23]


def test_a_run_that_has_stopped_early_draws_nothing() -> None:
    assert list(SlotSampler(SCHEDULE, steps=0)) == []
