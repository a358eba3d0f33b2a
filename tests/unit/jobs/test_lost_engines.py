"""An engine whose node is gone: what it held goes on elsewhere at once, and it stays given up when it wakes."""

import pytest

from lathe.common.errors import Aborted, FailedPrecondition
from lathe.jobs.model import Action, EngineState, JobState, Outcome
from lathe.jobs.policy import Limits
from lathe.jobs.workers import Beat, Lease
from tests.fakes.jobs import World, a_world


async def beating(world: World, lease: Lease | None, engine_id: str, seconds: int) -> None:
    """Heartbeats every three seconds, and passes every half."""
    held = [(lease.attempt.id, lease.attempt.lease_token)] if lease is not None else []
    for _ in range(seconds // 3):
        await world.workers.heartbeat(Beat(engine_id, held))
        await world.pass_time(3, step=0.5)


async def training(world: World) -> tuple[str, Lease]:
    """A launched engine that has trained a while."""
    await world.queued()
    await world.reconciler.run_once()
    [engine_id] = world.launcher.processes
    await world.register(engine_id)
    lease = await world.workers.lease(engine_id)
    assert lease is not None
    await beating(world, lease, engine_id, 30)
    await world.report(lease, 1)
    return engine_id, lease


async def states(world: World) -> dict[str, EngineState]:
    async with world.store.read() as session:
        return {engine.id: engine.state for engine in await session.engines()}


async def ends(world: World) -> dict[str, float]:
    """What lathe_engine_ends_total counts."""
    whys = ("stopped", "failed", "died", "lost")
    return {why: n for why in whys if (n := world.metrics.engine_ends.labels(why)._value.get())}


async def test_within_a_lease_term_a_new_engine_is_on_its_way(world: World) -> None:
    """max_engines_per_base is 1: the lost one does not count."""
    engine_id, lease = await training(world)
    # The node dies: from here on there are no heartbeats, and its pod's object cannot be removed.
    world.launcher.hangs = True
    # The last heartbeat was three seconds ago.
    await world.pass_time(12, step=0.5)
    assert (await world.job(lease.job.id)).state is JobState.RUNNING
    world.launcher.hangs = False
    await world.pass_time(0.5, step=0.5)
    job = await world.job(lease.job.id)
    assert (job.state, job.lost_lease_count) == (JobState.QUEUED, 1)
    [(successor, state)] = (await states(world)).items()
    assert successor != engine_id and state is EngineState.LAUNCHING
    assert successor in world.launcher.processes
    assert await ends(world) == {"lost": 1.0}


async def test_the_next_engine_is_told_where_not_to_go(world: World) -> None:
    """Kubernetes takes the lost one's node for alive for a minute, and as it is empty prefers it."""
    engine_id, _ = await training(world)
    await world.pass_time(16, step=0.5)
    [successor] = await states(world)
    assert world.launcher.launches[successor].avoid == (engine_id,)
    await world.pass_time(130, step=2)
    world.launcher.die(successor)
    await world.pass_time(30, step=0.5)
    [third] = await states(world)
    assert world.launcher.launches[third].avoid == (successor,)


async def test_an_idle_engine_is_given_up_as_soon(world: World) -> None:
    engine_id, lease = await training(world)
    await world.complete(lease, Outcome.FAILED)
    await world.pass_time(16)
    assert not await states(world) and engine_id not in world.launcher.processes
    assert not await world.directory.serving()


async def test_a_launcher_that_hangs_holds_up_no_pass() -> None:
    async with a_world(limits=Limits(max_engines=2, max_engines_per_base=1)) as world:
        engine_id, _ = await training(world)
        world.launcher.hangs = True
        await world.pass_time(16, step=2)
        [successor] = await states(world)
        assert successor != engine_id and engine_id in world.launcher.processes
        # Longer than a row may be without a process: its start is under way.
        await world.pass_time(90, step=2)
        assert list(await states(world)) == [successor]
        await world.reconciler._calls.close()
        world.launcher.hangs = False
        await world.pass_time(2)
        assert engine_id not in world.launcher.processes


async def test_a_zombie_is_told_to_end_and_changes_nothing(world: World) -> None:
    engine_id, old = await training(world)
    await world.pass_time(60)
    [successor] = await states(world)
    await world.register(successor)
    new = await world.workers.lease(successor)
    assert new is not None and new.job.id == old.job.id
    # It wakes.
    with pytest.raises(Aborted):
        await world.report(old, 2)
    with pytest.raises(Aborted):
        await world.complete(old, Outcome.SUCCEEDED)
    answer = await world.workers.heartbeat(Beat(engine_id, [(old.attempt.id, old.attempt.lease_token)]))
    assert answer.directives == [(old.attempt.id, Action.LEASE_LOST)]
    assert answer.shut_down and not answer.reregister
    await world.register(engine_id)
    with pytest.raises(FailedPrecondition):
        await world.workers.lease(engine_id)
    await world.workers.deregister(engine_id)
    assert list(await states(world)) == [successor]
    await world.report(new, 2)
    assert (await world.job(old.job.id)).lost_lease_count == 1


async def test_an_engine_that_was_killed_from_outside_does_not_come_back_either(world: World) -> None:
    """Its object was deleted; its process has some seconds left to live."""
    engine_id, _ = await training(world)
    del world.launcher.processes[engine_id]
    await world.pass_time(1)
    assert (await world.workers.heartbeat(Beat(engine_id))).shut_down
    assert await ends(world) == {"died": 1.0}


async def test_who_was_given_up_is_forgotten_after_an_hour(world: World) -> None:
    engine_id, _ = await training(world)
    await world.pass_time(20, step=5)
    async with world.store.read() as session:
        assert list(await session.lost_engines()) == [engine_id]
    await world.pass_time(4000, step=1000)
    async with world.store.read() as session:
        assert engine_id not in await session.lost_engines()


async def test_an_engine_of_somebody_elses_comes_back_by_registering(world: World) -> None:
    """Nobody would start another in its place."""
    lease = await world.leased("eng-mine")
    await world.pass_time(20)
    assert "eng-mine" not in await states(world)
    answer = await world.workers.heartbeat(Beat("eng-mine", [(lease.attempt.id, lease.attempt.lease_token)]))
    assert answer.reregister and not answer.shut_down
    await world.register("eng-mine")
    assert await world.workers.lease("eng-mine") is not None


async def test_no_engine_is_given_up_just_after_an_outage_of_ours(world: World) -> None:
    engine_id, _ = await training(world)
    world.contact.lost()
    world.clock.tick(20)
    await world.pass_time(14)
    assert list(await states(world)) == [engine_id]


async def test_what_the_longest_wait_is(world: World) -> None:
    job = await world.queued()
    await world.pass_time(30, step=5)
    wait = world.metrics.job_oldest_wait_seconds._value.get
    assert wait() == 30
    await world.service.cancel("acme", job.id)
    await world.pass_time(1)
    assert wait() == 0
    # A job that had an engine waits since it has none.
    _, lease = await training(world)
    await world.pass_time(10)
    assert wait() == 0
    await world.complete(lease, Outcome.RELEASED)
    await world.pass_time(4)
    assert wait() == 4
