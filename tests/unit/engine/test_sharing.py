"""The promise to the oldest attempt, and the others' shares, in a simulation with passes of a known cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lathe.engine.sharing import PassCost, Share, credit_after, join, spare

SLOWDOWN = 1.6
SHARES = st.lists(
    st.builds(
        Share,
        order=st.integers(0, 99),
        consumed=st.integers(0, 500),
        tokens=st.integers(1, 100),
        rows=st.integers(1, 4),
        longest=st.integers(1, 100),
        joins=st.booleans(),
    ),
    min_size=1,
    max_size=8,
    unique_by=lambda share: share.order,
)
Cost = Callable[[int, int], float]


def cost_of(fixed: float, token: float, job: float) -> PassCost:
    cost = PassCost()
    for _ in range(3):
        for tokens in (10, 50, 200):
            for jobs in (1, 2, 4):
                cost.learn(tokens, jobs, fixed + token * tokens + job * jobs, 0 if jobs == 1 else None)
    return cost


def share(order: int, consumed: int, tokens: int, **others: int) -> Share:
    return Share(order, consumed, tokens, **{"rows": 1, "longest": tokens, **others})  # type: ignore[arg-type]


# What a pass costs.


@given(st.floats(0, 1), st.floats(1e-5, 1e-2), st.floats(0, 0.1))
def test_the_cost_of_a_pass_is_learned(fixed: float, token: float, job: float) -> None:
    cost = cost_of(fixed, token, job)
    for tokens, jobs in ((50, 1), (100, 2), (200, 4), (300, 3)):
        assert cost.seconds(tokens, jobs) == pytest.approx(fixed + token * tokens + job * jobs, rel=0.02)


@given(st.lists(st.tuples(st.integers(1, 500), st.integers(1, 4), st.floats(0, 10)), min_size=1, max_size=40))
def test_more_tokens_or_jobs_never_cost_less(seen: list[tuple[int, int, float]]) -> None:
    cost = PassCost()
    for one in seen:
        cost.learn(*one)
    assert 0 <= cost.seconds(50, 1) <= cost.seconds(100, 1) <= cost.seconds(100, 2)


def test_before_anything_differed_a_second_job_is_thought_to_cost_most_of_another_pass() -> None:
    cost = PassCost()
    assert not cost.known
    for _ in range(5):
        cost.learn(50, 1, 0.12)
    assert cost.seconds(50, 1) == pytest.approx(0.12, rel=0.01)
    assert cost.seconds(100, 2) == pytest.approx(0.20, rel=0.01)


def test_a_cold_first_pass_is_soon_forgotten() -> None:
    cost = PassCost()
    cost.learn(50, 1, 1.0)
    for _ in range(6):
        cost.learn(50, 1, 0.1)
    assert cost.seconds(50, 1) == pytest.approx(0.1, rel=0.05)


def test_a_machine_that_has_become_slower_is_noticed() -> None:
    cost = cost_of(0.1, 1e-3, 0.01)
    for _ in range(60):
        cost.learn(50, 1, 0.5)
    assert cost.seconds(50, 1) == pytest.approx(0.5, rel=0.05)


# Who is in a pass.


@given(SHARES, st.integers(1, 300), st.floats(-1, 1))
def test_a_pass_is_one_slice_or_training_slices_within_the_room(
    waiting: list[Share], room: int, credit: float
) -> None:
    cost = cost_of(0.05, 1e-3, 0.01)
    chosen = join(waiting, room, cost, credit=credit, earns=spare(SLOWDOWN))
    some = [waiting[index] for index in chosen]
    assert len(set(chosen)) == len(chosen) >= 1
    oldest = min(range(len(waiting)), key=lambda index: waiting[index].order)
    if oldest not in chosen:
        assert cost.seconds(sum(one.tokens for one in some), len(some)) <= credit + 1e-9
    if len(chosen) > 1:
        assert all(one.joins for one in some)
        assert sum(one.tokens for one in some) <= room
        padded = sum(one.rows for one in some) * max(one.longest for one in some)
        assert padded <= max(room, *(one.padded for one in some))


def test_others_join_by_share_as_far_as_room_and_credit_reach() -> None:
    cost = cost_of(0.05, 1e-3, 0.01)  # another slice of 40 tokens adds 50 ms
    waiting = [share(3, 0, 40), share(1, 50, 40), share(2, 10, 40)]
    assert join(waiting, 200, cost, credit=0.11) == [1, 0, 2]
    assert join(waiting, 100, cost, credit=0.11) == [1, 0]
    assert join(waiting, 200, cost, credit=0.06) == [1, 0]
    assert join(waiting, 200, cost, credit=0.04) == [1]
    # What the oldest's own 100 ms earn is spent in the same pass.
    assert join(waiting, 200, cost, credit=0.0, earns=0.6) == [1, 0]


def test_credit_is_saved_for_the_one_with_the_fewest_tokens() -> None:
    cost = cost_of(0.05, 1e-3, 0.01)
    waiting = [
        share(1, 500, 90, rows=9, longest=10),
        share(2, 100, 90, rows=9, longest=10),
        share(3, 200, 10),
    ]
    # 90 do not fit beside 90; the ten that would fit have had more already.
    assert join(waiting, 100, cost, credit=0.1) == [0]
    assert join(waiting, 100, cost, credit=0.16) == [1]
    assert join(waiting, 100, cost, credit=0.18) == [1, 2]


def test_a_long_row_takes_no_others_that_it_would_pad() -> None:
    cost = cost_of(0.05, 1e-4, 0.001)
    long = share(1, 0, 200)
    assert join([long, share(2, 0, 80, rows=8, longest=10)], 320, cost) == [1]
    assert join([long, share(2, 0, 10)], 320, cost, credit=0.0, earns=0.6) == [0]
    assert join([share(1, 0, 100), share(2, 0, 90)], 320, cost) == [0, 1]
    # A slice that pads more by itself has been measured by its preflight.
    uneven = share(1, 0, 240, rows=5, longest=200)
    assert join([uneven, share(2, 0, 30)], 320, cost) == [1]
    assert join([share(1, 0, 240, rows=3, longest=200), share(2, 0, 30)], 320, cost) == [1]


# A simulation.


@dataclass
class Simulated:
    """Jobs with slices of these tokens, on a machine with this cost, as Trainer does it."""

    tokens: Sequence[int]
    cost: Cost
    room: int = 320
    now: float = 0.0

    def __post_init__(self) -> None:
        self.consumed = [0] * len(self.tokens)
        self.passes = [0] * len(self.tokens)
        self.learned = PassCost()
        self.credit = 0.0
        self.largest = 0.0

    def turn(self) -> list[int]:
        shares = [share(i, self.consumed[i], tokens) for i, tokens in enumerate(self.tokens)]
        chosen = join(shares, self.room, self.learned, credit=self.credit, earns=spare(SLOWDOWN))
        seconds = self.cost(sum(self.tokens[i] for i in chosen), len(chosen))
        self.learned.learn(
            sum(self.tokens[i] for i in chosen), len(chosen), seconds, 0 if chosen == [0] else None
        )
        self.credit = credit_after(
            shares,
            chosen,
            seconds,
            self.room,
            self.learned,
            credit=self.credit,
            earns=spare(SLOWDOWN),
        )
        for i in chosen:
            self.consumed[i] += self.tokens[i]
            self.passes[i] += 1
        self.now += seconds
        self.largest = max(self.largest, seconds)
        return chosen


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(5, 300), min_size=2, max_size=4),
    st.floats(0.0, 0.2),
    st.floats(1e-4, 3e-3),
    st.floats(0.0, 0.05),
)
@example([50, 50, 50, 50], 0.05, 1.5e-3, 0.01)
@example([5, 193], 0.125, 1e-4, 0.0)
@example([104, 128], 0.125, 0.001, 0.03125)
@example([109, 179, 29], 0.0, 0.001999752234287436, 0.044475760202366536)
def test_the_oldest_keeps_its_speed_and_nobody_starves(
    tokens: list[int], fixed: float, token: float, job: float
) -> None:
    jobs = Simulated(tokens, lambda n, k: fixed + token * n + job * k)
    waited, longest = [0.0] * len(tokens), [0.0] * len(tokens)
    for _ in range(200):
        before = jobs.now
        chosen = jobs.turn()
        for i in range(len(tokens)):
            waited[i] = 0.0 if i in chosen else waited[i] + jobs.now - before
            longest[i] = max(longest[i], waited[i])
    alone = jobs.passes[0] * jobs.cost(tokens[0], 1)
    # But for one piece of work that is not cut.
    assert jobs.now <= SLOWDOWN * alone + jobs.largest
    # Whoever has the fewest tokens is served when the credit for its pass is earned; those behind it come first. Until
    # a longer pass was measured it is thought to cost no more than in proportion.
    turns = sum(max(tokens) // own + 2 for own in tokens[1:])
    priced = max(jobs.cost(max(tokens), 1), jobs.cost(tokens[0], 1) * max(tokens) / tokens[0])
    once = priced * (1 + 1 / spare(SLOWDOWN)) + jobs.cost(tokens[0], 1)
    assert max(longest) <= 2 * turns * once


def test_equal_others_get_equal_shares() -> None:
    jobs = Simulated([50, 60, 30, 90], lambda n, k: 0.05 + 1.5e-3 * n + 0.01 * k)
    for _ in range(300):
        jobs.turn()
    others = jobs.consumed[1:]
    assert max(others) - min(others) <= 90
    assert jobs.consumed[0] > max(others)


def test_small_slices_leave_the_oldest_what_was_promised_and_use_what_is_left() -> None:
    jobs = Simulated([50] * 4, lambda n, k: 0.04 + 0.8e-3 * n + 0.02 * k)
    for _ in range(300):
        jobs.turn()
    slowdown = jobs.now / (jobs.passes[0] * jobs.cost(50, 1))
    assert 1.5 <= slowdown <= SLOWDOWN
    assert sum(jobs.passes) * jobs.cost(50, 1) / jobs.now >= 1.2
