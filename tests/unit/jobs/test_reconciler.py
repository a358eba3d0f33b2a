"""Engines come and go; outages of ours cost waiting, not attempts."""

import asyncio
from dataclasses import replace

import pytest

from lathe.common.errors import FailedPrecondition, NotFound, Unavailable
from lathe.jobs.model import EngineState, JobState, Outcome
from lathe.jobs.policy import UNKNOWN_QUOTA
from lathe.jobs.ports import LaunchedEngine, Quota
from lathe.jobs.quotas import Quotas
from lathe.jobs.workers import Beat
from tests.fakes.clock import FakeClock
from tests.fakes.jobs import BASE, World
from tests.fixtures.until import until


async def engines(world: World) -> list[tuple[str, EngineState]]:
    async with world.store.read() as session:
        return [(engine.id, engine.state) for engine in await session.engines()]


async def launched(world: World) -> str:
    await world.reconciler.run_once()
    [engine_id] = world.launcher.processes
    return engine_id


async def test_a_waiting_job_gets_an_engine(world: World) -> None:
    job = await world.queued()
    engine_id = await launched(world)
    assert await engines(world) == [(engine_id, EngineState.LAUNCHING)]
    await world.reconciler.run_once()
    assert "is starting" in (await world.job(job.id)).state_reason
    await world.register(engine_id)
    assert await engines(world) == [(engine_id, EngineState.READY)]
    assert await world.workers.lease(engine_id) is not None
    assert len(world.launcher.processes) == 1


async def test_a_dead_engine_loses_its_job_at_once(world: World) -> None:
    await world.queued()
    engine_id = await launched(world)
    await world.register(engine_id)
    lease = await world.workers.lease(engine_id)
    assert lease is not None
    await world.report(lease, 1)
    world.launcher.die(engine_id, "killed by signal 9", killed=True)
    await world.reconciler.run_once()
    job = await world.job(lease.job.id)
    assert (job.state, job.lost_lease_count) == (JobState.QUEUED, 1)
    [successor] = world.launcher.processes
    assert successor != engine_id


async def test_a_killed_platform_finds_its_engine_dead(world: World) -> None:
    await world.queued()
    engine_id = await launched(world)
    await world.register(engine_id)
    lease = await world.workers.lease(engine_id)
    assert lease is not None
    world.start()
    world.launcher.processes.clear()
    await world.reconciler.run_once()
    assert (await world.job(lease.job.id)).state is JobState.QUEUED


async def test_a_launcher_that_does_not_answer_kills_nobody(world: World) -> None:
    lease = await world.leased()
    world.launcher.down = Unavailable("Ray is away.")
    await world.reconciler.run_once()
    assert (await world.job(lease.job.id)).state is JobState.STARTING


async def test_no_lease_expires_before_a_whole_term_of_contact(world: World) -> None:
    lease = await world.leased()
    await world.pass_time(5)
    # An hour without the process, then a start.
    world.clock.tick(3600)
    world.start()
    await world.pass_time(14)
    assert (await world.job(lease.job.id)).state is JobState.STARTING
    await world.workers.heartbeat(Beat("eng-a", [(lease.attempt.id, lease.attempt.lease_token)]))
    await world.pass_time(14)
    assert (await world.job(lease.job.id)).state is JobState.STARTING
    await world.pass_time(3)
    assert (await world.job(lease.job.id)).state is JobState.QUEUED


async def test_a_leap_of_the_wall_clock_takes_no_lease(world: World) -> None:
    lease = await world.leased()
    await world.pass_time(10)
    await world.workers.heartbeat(Beat("eng-a", [(lease.attempt.id, lease.attempt.lease_token)]))
    await world.pass_time(10)
    # A laptop that slept: its monotonic clock stood still.
    world.clock.leap(3600)
    await world.pass_time(3)
    assert (await world.job(lease.job.id)).state is JobState.STARTING
    await world.workers.heartbeat(Beat("eng-a", [(lease.attempt.id, lease.attempt.lease_token)]))
    await world.pass_time(13)
    assert (await world.job(lease.job.id)).state is JobState.STARTING
    await world.pass_time(20)
    assert (await world.job(lease.job.id)).state is JobState.QUEUED


async def test_waiting_for_others_is_no_standstill(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes hangs, and what is asked after it is slow: the leases of a lost engine end nevertheless."""
    lease = await world.leased()
    await world.queued(project="other")

    async def hangs() -> list[LaunchedEngine]:
        world.clock.tick(5)
        raise Unavailable("no answer")

    async def slow(project: str) -> Quota:
        world.clock.tick(2)
        return Quota()

    monkeypatch.setattr(world.launcher, "list", hangs)
    monkeypatch.setattr(world.accounts, "get_quota", slow)
    await world.pass_time(6, step=0.6)
    assert (await world.job(lease.job.id)).state is JobState.QUEUED


async def test_accounts_that_hangs_is_waited_for_once() -> None:
    """And not once for each project that has a job in line."""
    clock = FakeClock()

    class Hangs:
        async def get_quota(self, project: str) -> Quota:
            await clock.sleep(5)
            raise Unavailable("no answer")

    asked = asyncio.ensure_future(Quotas(Hangs(), clock).running(["one", "two", "three"]))
    await clock.advance(5)
    assert asked.done()
    assert set((await asked).values()) == {UNKNOWN_QUOTA}


async def test_an_outage_of_the_database_starts_the_term_anew(world: World) -> None:
    lease = await world.leased()
    await world.pass_time(14)
    world.contact.lost()
    await world.pass_time(14)
    assert (await world.job(lease.job.id)).state is JobState.STARTING
    await world.pass_time(3)
    assert (await world.job(lease.job.id)).state is JobState.QUEUED


async def test_failing_starts_back_off_and_then_fail_the_job(world: World) -> None:
    job = await world.queued()
    tries = 0
    for _ in range(24):
        await world.pass_time(5, step=5)
        for engine_id, process in list(world.launcher.processes.items()):
            if process.running:
                tries += 1
                world.launcher.die(engine_id, log="ModuleNotFoundError: torch")
    job = await world.job(job.id)
    assert (job.state, tries) == (JobState.FAILED, 5)
    assert job.error is not None and job.error.code == "server_error"
    assert "ModuleNotFoundError: torch" in job.error.message
    # The next job gets tries of its own.
    await world.queued()
    await world.pass_time(1)
    assert len(world.launcher.processes) == 1


async def test_a_launcher_that_cannot_start_counts_too(world: World) -> None:
    job = await world.queued()
    world.launcher.fails = FailedPrecondition("No such file.")
    await world.pass_time(2)
    assert "No such file." in (await world.job(job.id)).state_reason
    await world.pass_time(120, step=5)
    assert (await world.job(job.id)).state is JobState.FAILED


async def test_a_launcher_that_is_away_fails_no_job(world: World) -> None:
    job = await world.queued()
    world.launcher.fails = Unavailable("Ray does not answer.")
    await world.pass_time(300, step=5)
    waiting = await world.job(job.id)
    assert waiting.state is JobState.QUEUED
    assert "Ray does not answer." in waiting.state_reason
    world.launcher.fails = None
    await world.pass_time(3)
    assert len(world.launcher.processes) == 1


async def test_a_job_is_not_refused_for_starts_that_failed_before_it_came(world: World) -> None:
    for _ in range(24):
        await world.directory.ensure("tiny")
        await world.pass_time(5, step=5)
        for engine_id, process in list(world.launcher.processes.items()):
            if process.running:
                world.launcher.die(engine_id)
    await world.pass_time(1)
    job = await world.queued()
    await world.pass_time(1)
    assert (await world.job(job.id)).state is JobState.QUEUED
    await world.pass_time(60)
    assert len(world.launcher.processes) == 1


async def test_kills_from_outside_never_fail_a_job(world: World) -> None:
    job = await world.queued()
    for _ in range(12):
        await world.pass_time(5, step=5)
        for engine_id in list(world.launcher.processes):
            world.launcher.die(engine_id, "killed by signal 9", killed=True)
    assert (await world.job(job.id)).state is JobState.QUEUED


async def test_an_idle_engine_ends(world: World) -> None:
    await world.queued()
    engine_id = await launched(world)
    await world.register(engine_id)
    lease = await world.workers.lease(engine_id)
    assert lease is not None
    await world.complete(lease, Outcome.FAILED)
    for _ in range(62):
        await world.pass_time(10, step=10)
        answer = await world.workers.heartbeat(Beat(engine_id))
    assert answer.shut_down
    assert [engine.draining for engine in await world.directory.serving()] == [True]
    await world.workers.deregister(engine_id)
    world.launcher.die(engine_id, "exit code 0")
    await world.pass_time(2)
    assert not world.launcher.processes and not await engines(world)


async def test_a_silent_engine_is_ended_and_replaced(world: World) -> None:
    await world.queued()
    engine_id = await launched(world)
    await world.register(engine_id)
    assert await world.workers.lease(engine_id) is not None
    await world.pass_time(200, step=5)
    assert engine_id not in world.launcher.processes and len(world.launcher.processes) == 1


async def test_sampling_gets_an_engine_started(world: World) -> None:
    assert not await world.directory.ensure("tiny")
    engine_id = await launched(world)
    assert not await world.directory.serving()
    await world.register(engine_id)
    assert await world.directory.ensure("tiny")
    assert [engine.id for engine in await world.directory.serving()] == [engine_id]
    with pytest.raises(NotFound):
        await world.directory.ensure("unknown")


async def test_while_models_is_away_an_engine_there_is_enough(world: World) -> None:
    world.models.down = Unavailable("models is away.")
    with pytest.raises(Unavailable):
        await world.directory.ensure("tiny")
    await world.register()
    assert await world.directory.ensure("tiny")


async def test_an_engine_of_other_weights_under_the_same_id_does_not_do(world: World) -> None:
    old = replace(BASE, digest="0" * 64)
    await world.register("eng-old", old)
    assert not await world.directory.ensure("tiny")
    await world.reconciler.run_once()
    assert len(world.launcher.processes) == 1


async def test_the_list_of_engines_is_told_at_once_and_on_change(world: World) -> None:
    watch = world.directory.watch()
    assert await anext(watch) == []
    following = asyncio.ensure_future(anext(watch))
    await until(lambda: world.clock.sleeping == 1)
    assert not following.done()
    await world.register()
    assert [engine.id for engine in await asyncio.wait_for(following, 60)] == ["eng-a"]
    again, told = asyncio.ensure_future(anext(watch)), world.clock.monotonic()

    async def told_again() -> bool:
        if world.clock.sleeping:
            await world.clock.advance(1)
        return again.done()

    await until(told_again)
    assert len(again.result()) == 1 and world.clock.monotonic() - told <= 10
    await watch.aclose()  # type: ignore[attr-defined]


async def test_an_engine_forgotten_by_jobs_is_ours_again(world: World) -> None:
    await world.queued()
    engine_id = await launched(world)
    await world.workers.deregister(engine_id)
    await world.register(engine_id)
    await world.reconciler.run_once()
    async with world.store.read() as session:
        engine = await session.engine(engine_id)
    assert engine is not None and replace(engine).launched
