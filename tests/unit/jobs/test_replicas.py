"""Several replicas of jobs on one database and one launcher."""

import asyncio
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from sqlalchemy import select, update

from lathe.jobs import policy
from lathe.jobs.model import EngineState, JobState
from lathe.jobs.policy import Launch
from lathe.jobs.ports import LaunchedEngine
from lathe.jobs.reconciler import Reconciler
from lathe.jobs.sharedclock import SharedClock
from lathe.jobs.store import SqlJobStore, tables
from lathe.jobs.training import TrainingSpec
from lathe.jobs.workers import Beat
from tests.fakes.clock import FakeClock
from tests.fakes.jobs import OTHER, World, a_world
from tests.fixtures.until import until


async def engines(world: World) -> list[tuple[str, EngineState]]:
    async with world.store.read() as session:
        return [(engine.id, engine.state) for engine in await session.engines()]


async def test_a_row_whose_process_another_replica_is_about_to_start_is_left_alone(world: World) -> None:
    other = world.replica()
    await world.queued()
    await world.reconciler.run_once()
    [engine_id] = world.launcher.processes
    # As if the start were still on its way to the launcher.
    world.launcher.processes.clear()
    await other.pass_time(50, step=5)
    assert await engines(other) == [(engine_id, EngineState.LAUNCHING)]
    # As if the replica had died before it started it.
    await other.pass_time(15, step=5)
    assert [name for name, _ in await engines(other)] != [engine_id]


async def test_what_the_launcher_says_ended_is_buried_at_once_and_once(world: World) -> None:
    other = world.replica()
    await world.queued()
    await world.reconciler.run_once()
    [engine_id] = world.launcher.processes
    world.launcher.die(engine_id, log="no weights")
    await asyncio.gather(world.reconciler.run_once(), other.reconciler.run_once())
    async with world.store.read() as session:
        [pool] = await session.pools()
    assert (pool.start_failures, pool.last_error) == (1, "no weights")


async def test_two_replicas_that_see_the_same_launch_one_engine(world: World) -> None:
    other = world.replica()
    await world.queued()
    pictures = [await one.reconciler._picture(await one.reconciler._load()) for one in (world, other)]
    for one, picture in zip((world, other), pictures, strict=True):
        [launch] = [decision for decision in policy.decide(picture) if isinstance(decision, Launch)]
        await one.reconciler._launch(launch, picture)
        await one.reconciler._calls.settle()
    assert len(await engines(world)) == len(world.launcher.launches) == 1


async def test_two_replicas_keep_to_the_most_engines_together() -> None:
    async with a_world(limits=policy.Limits(max_engines=1)) as world:
        other = world.replica()
        await world.queued()
        await world.queued(model=OTHER.id)
        pictures = [await one.reconciler._picture(await one.reconciler._load()) for one in (world, other)]
        for one, picture, base in zip((world, other), pictures, ("tiny", "other"), strict=True):
            wanted = replace(picture, queued=[job for job in picture.queued if job.base.id == base])
            [launch] = [decision for decision in policy.decide(wanted) if isinstance(decision, Launch)]
            await one.reconciler._launch(launch, picture)
        assert len(await engines(world)) == 1


async def test_a_process_that_nobody_owns_ends_after_a_while(world: World) -> None:
    other = world.replica()
    world.launcher.processes["eng-stray"] = LaunchedEngine("eng-stray", running=True)
    for _ in range(5):
        world.clock.tick(10)
        await asyncio.gather(world.reconciler.run_once(), other.reconciler.run_once())
    assert "eng-stray" in world.launcher.processes
    for _ in range(3):
        world.clock.tick(10)
        await asyncio.gather(world.reconciler.run_once(), other.reconciler.run_once())
    assert not world.launcher.processes


async def test_what_another_replica_wrote_is_told_within_a_second(world: World) -> None:
    other = world.replica()
    job = await world.queued()
    jobs, serving = other.service.watch("acme", job.id, 0), other.directory.watch()
    await anext(jobs)
    assert await anext(serving) == []
    job_told, engines_told = asyncio.ensure_future(anext(jobs)), asyncio.ensure_future(anext(serving))
    await until(lambda: world.clock.sleeping == 2)
    await world.register()
    assert await world.workers.lease("eng-a") is not None
    await world.clock.advance(1)
    (told, _), [engine] = await asyncio.wait_for(asyncio.gather(job_told, engines_told), 60)
    assert (told.state, engine.id) == (JobState.STARTING, "eng-a")
    await jobs.aclose()  # type: ignore[attr-defined]
    await serving.aclose()  # type: ignore[attr-defined]


@dataclass
class SkewedStore:
    """A store whose database has a clock of its own."""

    store: SqlJobStore
    database: FakeClock
    asks: SharedClock

    def read(self):  # type: ignore[no-untyped-def]
        return self.store.read()

    def write(self):  # type: ignore[no-untyped-def]
        return self.store.write()

    async def clock_offset(self) -> float:
        return (self.database.now() - self.asks.now()).total_seconds()


async def test_a_replica_whose_clock_is_wrong_takes_no_lease_away(world: World) -> None:
    lease = await world.leased()
    machine = FakeClock(datetime(2026, 1, 1, 0, 1, tzinfo=UTC))
    clock = SharedClock(machine)
    other = World(world.store, clock, world.ids, world.limits, launcher=world.launcher)  # type: ignore[arg-type]
    made = other.reconciler
    store = SkewedStore(world.store, world.clock, clock)
    reconciler = Reconciler(
        store,
        made.launcher,
        made.quotas,
        made.changes,
        made.contact,
        clock,
        made.ids,
        made.metrics,
        made.limits,
    )
    for _ in range(20):
        await world.workers.heartbeat(Beat("eng-a", [(lease.attempt.id, lease.attempt.lease_token)]))
        for each in (world.clock, machine):
            each.tick(3)
        await reconciler.run_once()
    assert abs(clock.now() - world.clock.now()) < timedelta(seconds=0.2)
    assert (await world.job(lease.job.id)).state is JobState.STARTING
    for _ in range(6):
        for each in (world.clock, machine):
            each.tick(3)
        await reconciler.run_once()
    assert (await world.job(lease.job.id)).state is JobState.QUEUED


async def test_an_answer_that_took_long_says_nothing_of_the_databases_clock() -> None:
    """A process that stood still between question and answer would be half of that time behind, and its leases too."""
    machine = FakeClock()
    clock = SharedClock(machine)

    async def stopped_on_the_way() -> float:
        answered = machine.now()
        machine.tick(60)
        return (answered - machine.now()).total_seconds() / 2

    async def at_once() -> float:
        return 5.0

    await clock.agree(stopped_on_the_way)
    assert clock.now() == machine.now()
    # It is asked again at the next pass.
    await clock.agree(at_once)
    assert clock.now() - machine.now() == timedelta(seconds=5)


async def resolved_by_the_version_before(world: World, job_id: str) -> None:
    """As version 0.1 writes what it resolved: the members that it knows, and nothing in the column that came later."""
    async with world.store._db.write() as connection:
        row = (
            (await connection.execute(select(tables.jobs).where(tables.jobs.c.id == job_id))).mappings().one()
        )
        extra = {key: value for key, value in row["extra"].items() if key != "hyperparameters"}
        await connection.execute(update(tables.jobs).where(tables.jobs.c.id == job_id).values(extra=extra))


async def test_what_an_older_replica_resolved_is_resolved_again_before_it_is_leased(world: World) -> None:
    asked = TrainingSpec(use_dora=True, schedule="linear", lora_r=4)
    job = await world.queued(spec=asked)
    assert job.hyperparameters is not None and job.hyperparameters.use_dora
    await resolved_by_the_version_before(world, job.id)
    await world.register()
    assert await world.workers.lease("eng-a") is None
    before = await world.messages(job.id)
    world.clock.tick(60)
    await world.steps.run_once()
    assert await world.messages(job.id) == before
    lease = await world.workers.lease("eng-a")
    assert lease is not None and lease.job.hyperparameters == job.hyperparameters
    assert lease.job.queue_time == job.queue_time


async def test_what_an_older_replica_let_an_engine_train_is_said_as_it_was_trained(world: World) -> None:
    lease = await world.leased(spec=TrainingSpec(use_dora=True))
    await resolved_by_the_version_before(world, lease.job.id)
    found = (await world.job(lease.job.id)).hyperparameters
    assert found is not None and not found.use_dora
