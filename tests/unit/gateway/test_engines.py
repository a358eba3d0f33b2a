from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from lathe.common.errors import DeadlineExceeded, LatheError, Unavailable
from lathe.gateway.engines import EngineDirectory
from lathe.gateway.model import EngineInfo, SampleCall, SampledToken, SampleEvent
from tests.fakes.clock import FakeClock
from tests.fakes.gateway import FakeEngineFeed, FakeEngines

ENGINE = EngineInfo("eng-a", "a:1", "baseModels/b", "d1", max_sequences=4)
CALL = SampleCall("d1", None, (1,), 5)


class World:
    def __init__(self) -> None:
        self.clock = FakeClock()
        self.feed = FakeEngineFeed()
        self.engines = FakeEngines()
        self.directory = EngineDirectory(self.feed, self.engines, self.clock)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    task = asyncio.create_task(world.directory.run())
    yield world
    task.cancel()


async def test_a_listed_engine_is_found_at_once(world: World) -> None:
    world.feed.publish([ENGINE])
    await world.clock.advance(0)
    channel = await world.directory.engine_for("d1", "baseModels/b", deadline=10)
    assert channel.info == ENGINE
    assert world.feed.wishes == []


async def test_an_engine_is_asked_for_and_waited_for(world: World) -> None:
    wait = asyncio.create_task(world.directory.engine_for("d1", "baseModels/b", deadline=120))
    await world.clock.advance(11)
    assert world.feed.wishes == ["baseModels/b"] * 3
    world.feed.publish([ENGINE])
    await world.clock.advance(0)
    assert (await wait).info == ENGINE


@pytest.mark.parametrize("error", [Unavailable("away"), DeadlineExceeded("slow")])
async def test_jobs_that_cannot_be_asked_is_asked_again(world: World, error: LatheError) -> None:
    def away(base_model: str) -> None:
        raise error

    world.feed.on_ensure = away
    wait = asyncio.create_task(world.directory.engine_for("d1", "baseModels/b", deadline=120))
    await world.clock.advance(11)
    assert world.feed.wishes == ["baseModels/b"] * 3
    world.feed.publish([ENGINE])
    await world.clock.advance(0)
    assert (await wait).info == ENGINE


async def test_no_engine_in_time_is_unavailable_with_a_hint(world: World) -> None:
    wait = asyncio.create_task(world.directory.engine_for("d1", "baseModels/b", deadline=120))
    await world.clock.advance(119)
    assert not wait.done()
    await world.clock.advance(2)
    with pytest.raises(Unavailable) as caught:
        await wait
    assert (caught.value.reason, caught.value.retry_after) == ("ENGINE_STARTING", 10)


async def test_the_last_list_stands_while_jobs_is_away(world: World) -> None:
    world.feed.publish([ENGINE])
    world.feed.publish(Unavailable("jobs is away"))
    await world.clock.advance(60)
    assert world.directory.engines == (ENGINE,)
    assert world.feed.watches == 2


async def test_a_lost_engine_is_suspect_until_the_next_list(world: World) -> None:
    world.engines.scripts = {"a:1": [Unavailable("connection refused")]}
    world.feed.publish([ENGINE])
    await world.clock.advance(0)
    channel = await world.directory.engine_for("d1", "baseModels/b", deadline=0)
    with pytest.raises(Unavailable):
        await anext(channel.sample(CALL))
    with pytest.raises(Unavailable):
        await world.directory.engine_for("d1", "baseModels/b", deadline=0)
    world.feed.publish([ENGINE])
    await world.clock.advance(0)
    assert (await world.directory.engine_for("d1", "baseModels/b", deadline=0)).info == ENGINE


async def test_closing_frees_the_sequence_and_keeps_the_connection_meanwhile(world: World) -> None:
    world.engines.scripts = {"a:1": [SampleEvent((SampledToken(1),)), asyncio.Event()]}
    world.feed.publish([ENGINE])
    await world.clock.advance(0)
    events = (await world.directory.engine_for("d1", "baseModels/b", deadline=0)).sample(CALL)
    await anext(events)
    world.feed.publish([])
    await world.clock.advance(0)
    assert world.engines.kept == {"a:1"} and world.engines.open == 1
    await events.aclose()
    assert world.engines.open == 0
