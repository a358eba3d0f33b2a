"""The store of jobs on SQLite and on PostgreSQL, with the schema that the migrations make."""

import asyncio
import math
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import select, text, update

from lathe.common.clock import SystemClock
from lathe.common.db import Database, migrate, schema_state
from lathe.common.errors import Aborted, AlreadyExists, Unavailable
from lathe.jobs.figures import EngineEstimate, JobEstimate, Range, Speed, Work
from lathe.jobs.model import (
    DEFAULT_CLASS,
    TERMINAL_STATES,
    AdapterObject,
    Attempt,
    BaseRef,
    ComputeSpec,
    DatasetRef,
    EngineRecord,
    EngineState,
    EventType,
    Job,
    JobError,
    JobState,
    NewEvent,
    Outcome,
    Pool,
    SlicePlan,
    TokenObject,
    WeightComparison,
)
from lathe.jobs.ports import Quota
from lathe.jobs.progress import Note
from lathe.jobs.store import SqlJobStore, tables
from lathe.jobs.store.tables import metadata
from lathe.jobs.tokens import TokenKeeper
from lathe.jobs.training import Hyperparameters, Method, TrainingSpec
from lathe.jobs.workers import Beat
from tests.fakes.clock import FakeClock
from tests.fakes.ids import FakeIds
from tests.fakes.jobs import BASE, World, measured


class OneClockStore(SqlJobStore):
    """Its database keeps the fake clock's time, whatever its own says."""

    async def clock_offset(self) -> float:
        return 0.0


@pytest.fixture(params=["sqlite", "postgres"])
async def db(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Database]:
    if request.param == "sqlite":
        url = f"sqlite+aiosqlite:///{tmp_path / 'jobs.sqlite'}"
    else:
        url = request.getfixturevalue("postgres").new_database(f"jobs_{uuid.uuid4().hex[:8]}")
    database = Database(url)
    await migrate(database, "lathe.jobs")
    yield database
    await database.close()


@pytest.fixture
def world(db: Database) -> World:
    clock, ids = FakeClock(), FakeIds()
    return World(OneClockStore(db, clock, ids), clock, ids)


def full_job(now: FakeClock) -> Job:
    """Every field set to something that is not its default."""
    at = now.now()
    return Job(
        id="ftjob-full",
        project="acme",
        model="ft:x",
        base=BaseRef("tiny", "d" * 64, 5, ("q_proj", "k_proj")),
        training=DatasetRef("file-1", "a" * 64),
        validation=DatasetRef("file-2"),
        seed=2**31 - 1,
        create_time=at,
        spec=TrainingSpec(1, 2, 0.5, 4, 8.0, ("q_proj",), Method.DPO, beta=0.2, schedule="linear"),
        compute=ComputeSpec("gpu", True, 2),
        suffix="s",
        metadata={'a"b.c': "x\u00e9"},
        parent_model="ft:x",
        initial_adapter=AdapterObject("p", "0" * 64),
        rerun_of="ftjob-first",
        halvings=((3, 1), (7, 2)),
        compare_with=AdapterObject("q", "9" * 64),
        estimate=JobEstimate(
            1, 2, 3, 4, 5, 6, 7, 8, (EngineEstimate("gpu", seconds=Range(1, 2, 3)),), "EUR", 0.5
        ),
        comparison=WeightComparison(False, 1e-7, "lora_A"),
        state=JobState.RUNNING,
        state_reason="r",
        queue_time=at,
        start_time=at + timedelta(microseconds=1),
        finish_time=at,
        estimated_finish_time=at,
        hold_until=at,
        turn_time=at,
        hyperparameters=Hyperparameters(
            1, 2, 0.5, 1e-3, 4, 8.0, ("q_proj",), method=Method.DPO, beta=0.2, use_dora=True, eval_every=3
        ),
        training_tokens=TokenObject("k", "1" * 64),
        validation_tokens=TokenObject("k2", "2" * 64),
        audit_key="ak",
        slice_plan=SlicePlan(320, 2, "bfloat16", "cpu"),
        fine_tuned_model="ft:y",
        trained_tokens=2**40,
        result_files=("file-3",),
        error=JobError("c", "m", "p"),
        attempt_count=3,
        lost_lease_count=2,
        retry_count=1,
        step=7,
        total_steps=9,
        attempt_id="att-1",
        lease_token="t",
        final_attempt_id="att-0",
    )


async def test_the_migrations_make_the_tables_of_the_code(db: Database) -> None:
    assert await schema_state(db, "lathe.jobs") == "current"
    async with db.read() as connection:
        context_differences = await connection.run_sync(
            lambda sync: compare_metadata(MigrationContext.configure(sync), metadata)
        )
    names = {difference[1].name for difference in context_differences if difference[0] == "remove_table"}
    assert names <= {"alembic_version"}
    assert not [d for d in context_differences if d[0] != "remove_table"]


async def test_a_job_comes_back_as_it_went_in(world: World) -> None:
    job = full_job(world.clock)
    async with world.store.write() as session:
        await session.add_job(job, "r", [NewEvent("one")])
    expected = replace(job, event_sequence=1)
    async with world.store.read() as session:
        assert await session.job(job.id) == expected
        assert await session.job_by_request("acme", "r") == expected
        assert list(await session.list_jobs("acme", metadata=[('a"b.c', "x\u00e9")], limit=5)) == [expected]
        assert not await session.list_jobs("acme", metadata=[('a"b.c', "y")], limit=5)
        assert (await session.count_by_state())[JobState.RUNNING] == 1


async def test_the_version_before_finds_what_it_knows(world: World, db: Database) -> None:
    """It reads each member of the body as the whole of a class, and never names the columns that came later."""
    job = full_job(world.clock)
    async with world.store.write() as session:
        await session.add_job(job, "r", [])
    async with db.write() as connection:
        [body] = (await connection.execute(select(tables.jobs.c.body))).scalars()
        await connection.execute(update(tables.jobs).values(extra=None))
    assert set(body["spec"]) == {
        *("n_epochs", "batch_size", "learning_rate_multiplier", "lora_r", "lora_alpha", "target_modules")
    }
    assert set(body["compute"]) == {"engine_class", "dedicated"}
    later = {"parent_model", "rerun_of", "halvings", "compare_with", "comparison", "estimate", "turn_time"}
    assert not later & set(body)
    async with world.store.read() as session:
        found = await session.job(job.id)
    assert found is not None and found.hyperparameters is not None
    assert (found.spec.method, found.spec.n_epochs, found.hyperparameters.schedule) == (
        "supervised",
        1,
        "cosine",
    )
    assert (found.parent_model, found.comparison, found.compute) == ("", None, ComputeSpec("gpu", True))


async def test_a_job_of_a_newer_format_is_left_to_newer_replicas(world: World, db: Database) -> None:
    """As in the middle of an upgrade: what this version cannot read it neither tells, nor ends, nor fails."""
    lease = await world.leased()
    newer, plain = lease.job, await world.create()
    async with db.write() as connection:
        changed = update(tables.jobs).where(tables.jobs.c.id == newer.id)
        body = {"method": {"of": "the next version"}}
        await connection.execute(changed.values(format=2, state="evaluating", body=body))

    async with world.store.read() as session:
        leased = await session.jobs_in([JobState.STARTING, JobState.RUNNING])
        waiting = await session.jobs_in([JobState.VALIDATING_FILES])
        [unread] = await session.newer_jobs()
    assert (list(leased), [job.id for job in waiting]) == ([], [plain.id])
    assert (unread.id, unread.leased, unread.alone) == (newer.id, True, True)
    listed = await world.service.list("acme", states=[], metadata={}, after=None, limit=10)
    assert [job.id for job in listed] == [plain.id]
    for work in (world.service.get("acme", newer.id), world.report(lease, 1)):
        with pytest.raises(Unavailable, match="newer version") as caught:
            await work
        assert caught.value.reason == "NEWER_JOB"
    # What it needs is not known here, and datasets must not take what others need for all there is.
    await TokenKeeper(world.store, world.datasets).step()
    assert world.datasets.kept_tokens == []
    # Its engine keeps the lease through this replica too.
    answer = await world.workers.heartbeat(Beat("eng-a", [(lease.attempt.id, lease.attempt.lease_token)]))
    assert list(answer.directives) == []
    await world.pass_time(40, step=5)
    await world.reconciler.run_once()
    async with world.store.read() as session:
        assert (await session.count_by_state())[JobState.VALIDATING_FILES] == 1
        attempt = await session.attempt(lease.attempt.id)
        assert attempt is not None and attempt.outcome is None
        assert await session.job_state(newer.id) == "evaluating"


async def test_jobs_that_have_ended_are_swept_once_the_oldest_first(world: World, db: Database) -> None:
    job, at = full_job(world.clock), world.clock.now()
    ends = [*TERMINAL_STATES, JobState.RUNNING, JobState.QUEUED]
    async with world.store.write() as session:
        for number, state in enumerate(ends):
            created = at - timedelta(seconds=number)
            await session.add_job(
                replace(job, id=f"ftjob-{number}", state=state, create_time=created), "", []
            )
    async with world.store.write() as session:
        assert [found.id for found in await session.unswept(5)] == ["ftjob-2", "ftjob-1", "ftjob-0"]
        assert [found.id for found in await session.unswept(1)] == ["ftjob-2"]
        await session.set_swept("ftjob-2")
        assert [found.id for found in await session.unswept(5)] == ["ftjob-1", "ftjob-0"]
    async with db.write() as connection:
        await connection.execute(update(tables.jobs).where(tables.jobs.c.id == "ftjob-1").values(format=2))
    async with world.store.read() as session:
        assert [found.id for found in await session.unswept(5)] == ["ftjob-0"]


async def test_a_request_id_is_used_once_per_project(world: World) -> None:
    job = full_job(world.clock)
    async with world.store.write() as session:
        await session.add_job(job, "r", [])
    with pytest.raises(AlreadyExists):
        async with world.store.write() as session:
            await session.add_job(replace(job, id="ftjob-2"), "r", [])
    async with world.store.write() as session:
        await session.add_job(replace(job, id="ftjob-3", project="beta"), "r", [])
        await session.add_job(replace(job, id="ftjob-4"), "", [])
        await session.add_job(replace(job, id="ftjob-5"), "", [])


@pytest.mark.parametrize(
    "seen", [{"version": 9}, {"state": JobState.QUEUED}, {"lease_token": "other"}, {"id": "ftjob-other"}]
)
async def test_a_write_over_something_else_is_stale(world: World, seen: dict[str, object]) -> None:
    job = full_job(world.clock)
    async with world.store.write() as session:
        await session.add_job(job, "", [])
    with pytest.raises(Aborted):
        async with world.store.write() as session:
            await session.save(replace(job, **seen), job, [NewEvent("lost")])  # type: ignore[arg-type]
    async with world.store.write() as session:
        saved = await session.save(job, replace(job, step=8), [NewEvent("kept")])
        assert (saved.version, saved.event_sequence) == (2, 1)
    async with world.store.read() as session:
        assert [event.message for event in await session.events(job.id, limit=5)] == ["kept"]


async def test_events_are_numbered_and_carry_their_numbers(world: World) -> None:
    job = full_job(world.clock)
    async with world.store.write() as session:
        await session.add_job(job, "", [NewEvent("one"), NewEvent("two", EventType.METRICS, step=3)])
        await session.put_metrics(job.id, [measured(3, loss=math.nan)])
    async with world.store.read() as session:
        newest = await session.events(job.id, limit=1)
        assert [(event.sequence, event.message) for event in newest] == [(2, "two")]
        assert newest[0].metrics is not None and math.isnan(newest[0].metrics.train_loss)
        assert newest[0].metrics.valid_loss is None
        assert [event.message for event in await session.events(job.id, before=2, limit=5)] == ["one"]
        assert [event.message for event in await session.events(job.id, after=1, limit=5)] == ["two"]
        found = await session.event(job.id, newest[0].id)
        assert found is not None and found.sequence == 2


async def test_an_attempt_ends_once(world: World) -> None:
    job, now = full_job(world.clock), world.clock.now()
    attempt = Attempt("att-1", job.id, 1, "eng-a", "token", now, now, code_version="v")
    async with world.store.write() as session:
        await session.add_job(job, "", [])
        await session.add_attempt(attempt)
        assert list(await session.open_attempts("eng-a")) == [attempt]
        assert not await session.open_attempts("eng-b")
        later = now + timedelta(seconds=15)
        assert not await session.renew("att-1", "wrong", later)
        assert await session.renew("att-1", "token", later)
        done = replace(
            attempt,
            outcome=Outcome.SUCCEEDED,
            end_time=now,
            final_adapter=AdapterObject("p", "0" * 64),
            error=JobError("c", "m"),
            trained_tokens=2**40,
        )
        assert not await session.end_attempt(done, expired_at=now)
        assert await session.end_attempt(done, expired_at=later)
        assert not await session.end_attempt(replace(done, outcome=Outcome.LOST))
        assert not await session.renew("att-1", "token", later)
        assert await session.attempt("att-1") == replace(done, lease_expire_time=later)


async def test_what_attempts_did_is_kept_the_newest_first(world: World) -> None:
    first = Speed(
        "att-1", Work("d" * 64, 7, "dpo", True, 2), "gpu", "cuda", 4, 10.5, 2.5, 3, world.clock.now()
    )
    later = world.clock.now() + timedelta(seconds=1)
    async with world.store.write() as session:
        await session.put_speed(first)
        await session.put_speed(replace(first, attempt_id="att-2", update_time=later))
        assert [one.attempt_id for one in await session.speeds(5)] == ["att-2", "att-1"]
        grown = replace(first, tokens=20.0, held_bytes=2**40, update_time=later + timedelta(seconds=1))
        await session.put_speed(grown)
        assert list(await session.speeds(1)) == [grown] == [await session.speed("att-1")]
        assert await session.speed("att-9") is None


async def test_engines_and_pools(world: World) -> None:
    now = world.clock.now()
    engine = EngineRecord("eng-a", BaseRef("tiny", "d"), EngineState.LAUNCHING, now, launched=True)
    ready = replace(
        engine,
        state=EngineState.READY,
        address="a:1",
        memory_bytes=2**40,
        heartbeat_time=now,
        engine_class="gpu",
        job_id="ftjob-1",
        waiting_for="a node",
        waiting_time=now,
    )
    async with world.store.write() as session:
        await session.put_engine(engine)
        await session.put_engine(ready)
        assert list(await session.engines()) == [ready]
        await session.delete_engine("eng-a")
        assert await session.engine("eng-a") is None
        pool = Pool(BaseRef("tiny", "d"), "cpu", now, 1, now, "boom")
        other = replace(pool, engine_class="gpu", start_failures=7)
        assert await session.save_pool(None, other)
        assert await session.save_pool(None, pool)
        assert not await session.save_pool(None, pool)
        assert await session.save_pool(pool, replace(pool, start_failures=2))
        assert not await session.save_pool(pool, replace(pool, start_failures=3))
        assert [p.start_failures for p in await session.pools()] == [2, 7]


async def test_engines_that_were_given_up_are_remembered_for_a_while(world: World) -> None:
    now = world.clock.now()
    async with world.store.write() as session:
        await session.put_lost_engine("eng-a", now - timedelta(hours=2))
        await session.put_lost_engine("eng-b", now - timedelta(hours=2))
        await session.put_lost_engine("eng-b", now)
    async with world.store.write() as session:
        assert await session.is_lost_engine("eng-a") and not await session.is_lost_engine("eng-c")
        await session.delete_lost_engines(now - timedelta(hours=1))
        assert await session.lost_engines() == {"eng-b": now}


async def test_the_databases_clock_is_this_machines_on_one_machine(db: Database) -> None:
    assert abs(await SqlJobStore(db, SystemClock(), FakeIds()).clock_offset()) < 5


async def test_what_the_version_before_writes_has_the_default_class(db: Database, world: World) -> None:
    async with db.write() as connection:
        await connection.execute(
            text(
                "INSERT INTO pools (base_digest, base_id, start_failures, last_error, version) "
                "VALUES ('d', 'tiny', 0, '', 1)"
            )
        )
    async with world.store.read() as session:
        [pool] = await session.pools()
    assert pool == Pool(BaseRef("tiny", "d"), DEFAULT_CLASS)


async def test_engines_at_the_same_time_keep_the_quota(world: World) -> None:
    world.accounts.quota = Quota(max_running_jobs=2)
    for _ in range(5):
        await world.queued()
    names = [f"eng-{number}" for number in range(4)]
    for name in names:
        await world.register(name)
    leases = await asyncio.gather(*(world.workers.lease(name) for name in names))
    for name in names:
        leases.append(await world.workers.lease(name))
    given = [lease for lease in leases if lease is not None]
    assert len(given) == 2 and len({lease.job.id for lease in given}) == 2


async def test_a_whole_job_with_a_lost_engine(world: World) -> None:
    first = await world.leased()
    await world.report(first, 1, 2)
    await world.pass_time(40, step=5)
    await world.register("eng-b", BASE)
    second = await world.workers.lease("eng-b")
    assert second is not None and second.earlier_prefixes == [first.attempt.prefix]
    with pytest.raises(Aborted):
        await world.complete(first, Outcome.SUCCEEDED)
    # The same report from two calls at once: a retry that overtakes its first.
    await asyncio.gather(*(world.report(second, 2, 3) for _ in range(3)))
    await world.complete(second, Outcome.SUCCEEDED)
    await world.steps.run_once()
    job = await world.job(first.job.id)
    assert (job.state, job.lost_lease_count, job.trained_tokens) == (JobState.SUCCEEDED, 1, 21)
    assert sum(m.startswith("Step") for m in await world.messages(job.id)) == 3


async def test_a_nul_in_what_an_engine_says_is_kept_as_a_replacement_character(world: World) -> None:
    """A sampled answer may have one, and PostgreSQL's text takes none."""
    lease = await world.leased()
    note = Note(1, "generation", "The answer: a\0b", {"answer": "a\0b"})
    for _ in range(2):
        await world.report(lease, 1, notes=[note])
    await world.complete(lease, Outcome.FAILED, error=JobError("invalid", "It has a\0b", "p\0"))
    told = await world.messages(lease.job.id)
    assert [m for m in told if "a\ufffdb" in m] == ["The answer: a\ufffdb", "The job failed: It has a\ufffdb"]
    async with world.store.read() as session:
        attempt = await session.attempt(lease.attempt.id)
    assert attempt is not None and attempt.error == JobError("invalid", "It has a\ufffdb", "p\ufffd")
    assert (await world.job(lease.job.id)).state is JobState.FAILED


async def test_replicas_launch_one_engine_together(world: World) -> None:
    replicas = [world, world.replica(), world.replica()]
    await world.queued()
    await world.queued(model="other")
    for _ in range(3):
        await asyncio.gather(*(replica.reconciler.run_once() for replica in replicas))
    async with world.store.read() as session:
        bases = sorted(engine.base.id for engine in await session.engines())
    assert bases == ["other", "tiny"] and len(world.launcher.launches) == 2


async def test_replicas_take_a_silent_engines_job_away_once(world: World) -> None:
    replicas = [world, world.replica(), world.replica()]
    lease = await world.leased()
    for _ in range(40):
        world.clock.tick(1)
        await asyncio.gather(*(replica.reconciler.run_once() for replica in replicas))
    job = await world.job(lease.job.id)
    assert (job.state, job.lost_lease_count) == (JobState.QUEUED, 1)
    async with world.store.read() as session:
        assert len(await session.engines()) == len(world.launcher.launches) == 1
