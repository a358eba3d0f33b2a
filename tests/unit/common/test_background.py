"""Background tasks: woken, repeated, never stopped by an error."""

import asyncio

from lathe.common.background import Wakeup, in_background, repeat
from lathe.common.errors import Unavailable
from tests.fakes.clock import FakeClock


async def settle():
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_step_is_taken_at_once_when_woken_and_at_intervals():
    clock, wakeup, steps = FakeClock(), Wakeup(), []

    async def step():
        steps.append(clock.monotonic())

    async with in_background(repeat("it", step, clock=clock, wakeup=wakeup, interval=10)):
        await settle()
        assert steps == [0]
        await clock.advance(4)
        wakeup.set()
        await settle()
        assert steps == [0, 4]
        await clock.advance(10)
        await settle()
        assert steps == [0, 4, 14]
    await clock.advance(100)
    assert len(steps) == 3


async def test_work_left_during_a_step_is_not_missed():
    clock, wakeup, steps = FakeClock(), Wakeup(), []

    async def step():
        steps.append(1)
        if len(steps) == 1:
            wakeup.set()

    async with in_background(repeat("it", step, clock=clock, wakeup=wakeup, interval=10)):
        await settle()
        assert len(steps) == 2


async def test_errors_are_no_reason_to_stop():
    clock, steps = FakeClock(), []
    errors = [Unavailable("away", retry_after=1), ValueError("a fault"), None]

    async def step():
        steps.append(clock.monotonic())
        error = errors.pop(0)
        if error is not None:
            raise error

    async with in_background(repeat("it", step, clock=clock, wakeup=Wakeup(), interval=10, retry=2)):
        await settle()
        await clock.advance(2)
        await settle()
        await clock.advance(2)
        await settle()
        assert steps == [0, 2, 4]


async def test_several_waiters_are_all_woken():
    clock, wakeup, steps = FakeClock(), Wakeup(), []

    async def step():
        steps.append(1)

    loops = [repeat("it", step, clock=clock, wakeup=wakeup, interval=10) for _ in range(3)]
    async with in_background(*loops):
        await settle()
        wakeup.set()
        await settle()
        assert len(steps) == 6
