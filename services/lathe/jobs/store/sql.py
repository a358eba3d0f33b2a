"""The database of jobs: SQLAlchemy Core, the same statements on SQLite and PostgreSQL."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime
from typing import Any

from sqlalchemy import Select, and_, delete, exists, func, insert, or_, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from lathe.common.clock import Clock
from lathe.common.db import Database, is_unique_violation
from lathe.common.errors import Aborted, AlreadyExists
from lathe.common.ids import IdFactory
from lathe.jobs.figures import Speed
from lathe.jobs.model import (
    TERMINAL_STATES,
    AdapterObject,
    Attempt,
    Checkpoint,
    EngineRecord,
    Job,
    JobEvent,
    JobState,
    NewerJob,
    NewEvent,
    Pool,
    StepMetrics,
)
from lathe.jobs.ports import JobSession
from lathe.jobs.store import rows
from lathe.jobs.store import tables as t

STALE = "STALE"
# Any number that nothing else in the database of jobs locks.
_LAUNCHES = 0x1A7E
_POOL_KEY = (t.pools.c.base_digest, t.pools.c.engine_class)


class SqlJobStore:
    """Implements ports.JobStore."""

    def __init__(self, db: Database, clock: Clock, ids: IdFactory) -> None:
        self._db = db
        self._clock = clock
        self._ids = ids

    @asynccontextmanager
    async def read(self) -> AsyncIterator[JobSession]:
        async with self._db.read() as connection:
            yield SqlSession(connection, self._clock, self._ids)

    @asynccontextmanager
    async def write(self) -> AsyncIterator[JobSession]:
        async with self._db.write() as connection:
            yield SqlSession(connection, self._clock, self._ids)

    async def clock_offset(self) -> float:
        if self._db.dialect == "sqlite":
            return 0.0
        async with self._db.read() as connection:
            asked = self._clock.now()
            answered = (await connection.execute(text("SELECT clock_timestamp()"))).scalar_one()
            heard = self._clock.now()
        middle = asked + (heard - asked) / 2
        return float((answered - middle).total_seconds())


class _Base:
    def __init__(self, connection: AsyncConnection, clock: Clock, ids: IdFactory) -> None:
        self._connection = connection
        self._clock = clock
        self._ids = ids

    async def _all(self, query: Select[Any]) -> list[rows.Row]:
        return [dict(row) for row in (await self._connection.execute(query)).mappings()]

    async def _first(self, query: Select[Any]) -> rows.Row | None:
        row = (await self._connection.execute(query)).mappings().first()
        return dict(row) if row is not None else None


class _Jobs(_Base):
    async def add_job(self, job: Job, request_id: str, events: Sequence[NewEvent]) -> None:
        values = rows.job_values(job) | {"request_id": request_id or None, "event_sequence": len(events)}
        try:
            await self._connection.execute(insert(t.jobs), values)
        except IntegrityError as error:
            if not is_unique_violation(error):
                raise
            raise AlreadyExists("There is a job with this request_id already.") from error
        if job.metadata:
            pairs = [{"job_id": job.id, "key": k, "value": v} for k, v in job.metadata.items()]
            await self._connection.execute(insert(t.job_metadata), pairs)
        await self._connection.execute(
            text("INSERT INTO projects (project, lock_count) VALUES (:project, 0) ON CONFLICT DO NOTHING"),
            {"project": job.project},
        )
        await self._append(job.id, 0, events)

    async def _append(self, job_id: str, last: int, events: Sequence[NewEvent]) -> None:
        now = self._clock.now()
        values = [
            rows.new_event_values(job_id, self._ids.new("ftevent"), last + place, now, event)
            for place, event in enumerate(events, start=1)
        ]
        if values:
            await self._connection.execute(insert(t.events), values)

    async def job_by_request(self, project: str, request_id: str) -> Job | None:
        row = await self._first(
            select(t.jobs).where(t.jobs.c.project == project, t.jobs.c.request_id == request_id)
        )
        return rows.job(row) if row is not None else None

    async def job(self, job_id: str, *, lock: bool = False) -> Job | None:
        query = select(t.jobs).where(t.jobs.c.id == job_id)
        row = await self._first(query.with_for_update() if lock else query)
        return rows.job(row) if row is not None else None

    async def job_state(self, job_id: str) -> str | None:
        query = select(t.jobs.c.state).where(t.jobs.c.id == job_id)
        found: str | None = (await self._connection.execute(query)).scalar_one_or_none()
        return found

    async def save(self, before: Job, after: Job, events: Sequence[NewEvent] = ()) -> Job:
        saved = replace(after, version=before.version + 1, event_sequence=before.event_sequence + len(events))
        values = rows.job_values(saved) | {"event_sequence": saved.event_sequence}
        result = await self._connection.execute(
            update(t.jobs)
            .where(
                t.jobs.c.id == before.id,
                t.jobs.c.version == before.version,
                t.jobs.c.state == str(before.state),
                t.jobs.c.lease_token == before.lease_token,
            )
            .values(values)
        )
        if result.rowcount != 1:
            raise Aborted(f"{before.name} was changed by somebody else at the same time.", reason=STALE)
        await self._append(before.id, before.event_sequence, events)
        return saved

    async def jobs_in(self, states: Sequence[JobState]) -> Sequence[Job]:
        query = (
            select(t.jobs)
            .where(t.jobs.c.state.in_([str(state) for state in states]), t.jobs.c.format <= rows.JOB_FORMAT)
            .order_by(t.jobs.c.create_time, t.jobs.c.id)
        )
        return [rows.job(row) for row in await self._all(query)]

    async def newer_jobs(self) -> Sequence[NewerJob]:
        leased = exists().where(t.attempts.c.job_id == t.jobs.c.id, t.attempts.c.outcome.is_(None))
        query = (
            select(t.jobs.c.id, t.jobs.c.project, leased.label("leased"))
            .where(
                t.jobs.c.format > rows.JOB_FORMAT,
                t.jobs.c.state.not_in([str(state) for state in TERMINAL_STATES]),
            )
            .order_by(t.jobs.c.create_time, t.jobs.c.id)
        )
        return [NewerJob(row["id"], row["project"], bool(row["leased"])) for row in await self._all(query)]

    async def list_jobs(
        self,
        project: str,
        *,
        states: Sequence[JobState] = (),
        metadata: Sequence[tuple[str, str]] = (),
        after: tuple[datetime, str] | None = None,
        limit: int,
    ) -> Sequence[Job]:
        query = select(t.jobs).where(t.jobs.c.project == project, t.jobs.c.format <= rows.JOB_FORMAT)
        if states:
            query = query.where(t.jobs.c.state.in_([str(state) for state in states]))
        for key, value in metadata:
            query = query.where(
                exists().where(
                    t.job_metadata.c.job_id == t.jobs.c.id,
                    t.job_metadata.c.key == key,
                    t.job_metadata.c.value == value,
                )
            )
        if after is not None:
            created, job_id = after
            query = query.where(
                or_(
                    t.jobs.c.create_time < created,
                    and_(t.jobs.c.create_time == created, t.jobs.c.id < job_id),
                )
            )
        query = query.order_by(t.jobs.c.create_time.desc(), t.jobs.c.id.desc()).limit(limit)
        return [rows.job(row) for row in await self._all(query)]

    async def count_jobs(self, project: str, states: Sequence[JobState]) -> int:
        query = select(func.count()).where(
            t.jobs.c.project == project, t.jobs.c.state.in_([str(state) for state in states])
        )
        return int((await self._connection.execute(query)).scalar_one())

    async def count_by_state(self) -> dict[JobState, int]:
        known = t.jobs.c.state.in_([str(state) for state in JobState])
        query = select(t.jobs.c.state, func.count()).where(known).group_by(t.jobs.c.state)
        found = {JobState(state): int(count) for state, count in await self._connection.execute(query)}
        return {state: found.get(state, 0) for state in JobState}

    async def unswept(self, limit: int) -> Sequence[Job]:
        query = (
            select(t.jobs)
            .where(
                ~t.jobs.c.swept,
                t.jobs.c.state.in_([str(state) for state in sorted(TERMINAL_STATES)]),
                t.jobs.c.format <= rows.JOB_FORMAT,
            )
            .order_by(t.jobs.c.create_time, t.jobs.c.id)
            .limit(limit)
        )
        return [rows.job(row) for row in await self._all(query)]

    async def set_swept(self, job_id: str) -> None:
        await self._connection.execute(update(t.jobs).where(t.jobs.c.id == job_id).values(swept=True))

    async def lock_project(self, project: str) -> None:
        await self._connection.execute(
            update(t.projects)
            .where(t.projects.c.project == project)
            .values(lock_count=t.projects.c.lock_count + 1)
        )


class _Attempts(_Base):
    async def add_attempt(self, attempt: Attempt) -> None:
        await self._connection.execute(insert(t.attempts), rows.attempt_values(attempt))

    async def attempt(self, attempt_id: str) -> Attempt | None:
        row = await self._first(select(t.attempts).where(t.attempts.c.id == attempt_id))
        return rows.attempt(row) if row is not None else None

    async def attempts(self, job_id: str) -> Sequence[Attempt]:
        query = select(t.attempts).where(t.attempts.c.job_id == job_id).order_by(t.attempts.c.number.desc())
        return [rows.attempt(row) for row in await self._all(query)]

    async def open_attempts(self, engine_id: str | None = None) -> Sequence[Attempt]:
        query = select(t.attempts).where(t.attempts.c.outcome.is_(None)).order_by(t.attempts.c.create_time)
        if engine_id is not None:
            query = query.where(t.attempts.c.engine_id == engine_id)
        return [rows.attempt(row) for row in await self._all(query)]

    async def renew(self, attempt_id: str, lease_token: str, expire_time: datetime) -> bool:
        result = await self._connection.execute(
            update(t.attempts)
            .where(
                t.attempts.c.id == attempt_id,
                t.attempts.c.lease_token == lease_token,
                t.attempts.c.outcome.is_(None),
            )
            .values(lease_expire_time=expire_time)
        )
        return bool(result.rowcount == 1)

    async def end_attempt(self, ended: Attempt, *, expired_at: datetime | None = None) -> bool:
        query = update(t.attempts).where(
            t.attempts.c.id == ended.id,
            t.attempts.c.lease_token == ended.lease_token,
            t.attempts.c.outcome.is_(None),
        )
        if expired_at is not None:
            query = query.where(t.attempts.c.lease_expire_time == expired_at)
        values = rows.attempt_values(ended)
        # The end of the lease is renewed without a look at the rest of the row: leave it as it is.
        del values["lease_expire_time"]
        return bool((await self._connection.execute(query.values(values))).rowcount == 1)


class _Progress(_Base):
    async def put_metrics(self, job_id: str, measured: Sequence[StepMetrics]) -> set[int]:
        # The last report of a step stands, also within one call.
        latest = {row.step: row for row in measured}
        if not latest:
            return set()
        mine = and_(t.metrics.c.job_id == job_id, t.metrics.c.step.in_(latest))
        known = set((await self._connection.execute(select(t.metrics.c.step).where(mine))).scalars())
        await self._connection.execute(delete(t.metrics).where(mine))
        values = [rows.metrics_values(job_id, row) for row in latest.values()]
        await self._connection.execute(insert(t.metrics), values)
        return set(latest) - known

    async def metrics(self, job_id: str) -> Sequence[StepMetrics]:
        query = select(t.metrics).where(t.metrics.c.job_id == job_id).order_by(t.metrics.c.step)
        return [rows.metrics(row) for row in await self._all(query)]

    async def _of_steps(self, job_id: str, steps: set[int]) -> dict[int, StepMetrics]:
        if not steps:
            return {}
        query = select(t.metrics).where(t.metrics.c.job_id == job_id, t.metrics.c.step.in_(steps))
        return {row["step"]: rows.metrics(row) for row in await self._all(query)}

    async def put_checkpoint(self, checkpoint: Checkpoint) -> bool:
        known = select(t.checkpoints.c.id).where(
            t.checkpoints.c.job_id == checkpoint.job_id, t.checkpoints.c.step == checkpoint.step
        )
        if await self._first(known) is not None:
            return False
        await self._connection.execute(insert(t.checkpoints), rows.checkpoint_values(checkpoint))
        return True

    async def replace_checkpoint(self, job_id: str, step: int, written: AdapterObject) -> None:
        await self._connection.execute(
            update(t.checkpoints)
            .where(t.checkpoints.c.job_id == job_id, t.checkpoints.c.step == step)
            .values(prefix=written.prefix, manifest_sha256=written.manifest_sha256)
        )

    async def delete_checkpoint(self, job_id: str, step: int) -> None:
        await self._connection.execute(
            delete(t.checkpoints).where(t.checkpoints.c.job_id == job_id, t.checkpoints.c.step == step)
        )

    async def checkpoints(
        self, job_id: str, *, before_step: int | None = None, limit: int | None = None
    ) -> Sequence[Checkpoint]:
        query = select(t.checkpoints).where(t.checkpoints.c.job_id == job_id)
        if before_step is not None:
            query = query.where(t.checkpoints.c.step < before_step)
        query = query.order_by(t.checkpoints.c.step.desc())
        found = await self._all(query.limit(limit) if limit is not None else query)
        numbers = await self._of_steps(job_id, {row["step"] for row in found})
        return [rows.checkpoint(row, numbers.get(row["step"])) for row in found]

    async def events(
        self, job_id: str, *, before: int | None = None, after: int | None = None, limit: int
    ) -> Sequence[JobEvent]:
        query = select(t.events).where(t.events.c.job_id == job_id).limit(limit)
        if before is not None:
            query = query.where(t.events.c.sequence < before)
        if after is not None:
            query = query.where(t.events.c.sequence > after).order_by(t.events.c.sequence)
        else:
            query = query.order_by(t.events.c.sequence.desc())
        return await self._events(job_id, query)

    async def event(self, job_id: str, event_id: str) -> JobEvent | None:
        query = select(t.events).where(t.events.c.job_id == job_id, t.events.c.id == event_id)
        found = await self._events(job_id, query)
        return found[0] if found else None

    async def has_note(self, job_id: str, step: int, kind: str) -> bool:
        query = select(t.events.c.id).where(
            t.events.c.job_id == job_id, t.events.c.step == step, t.events.c.kind == kind
        )
        return await self._first(query.limit(1)) is not None

    async def has_event(self, job_id: str, event: NewEvent) -> bool:
        query = select(t.events.c.id).where(
            t.events.c.job_id == job_id,
            t.events.c.step == event.step,
            t.events.c.kind == rows.storable(event.kind),
            t.events.c.message == rows.storable(event.message),
        )
        return await self._first(query.limit(1)) is not None

    async def _events(self, job_id: str, query: Select[Any]) -> list[JobEvent]:
        found = await self._all(query)
        measured = {row["step"] for row in found if row["type"] == "metrics"}
        numbers = await self._of_steps(job_id, measured)
        return [
            rows.event(row, numbers.get(row["step"]) if row["type"] == "metrics" else None) for row in found
        ]


class _Engines(_Base):
    async def put_speed(self, speed: Speed) -> None:
        values = rows.speed_values(speed)
        result = await self._connection.execute(
            update(t.speeds).where(t.speeds.c.attempt_id == speed.attempt_id).values(values)
        )
        if result.rowcount == 0:
            await self._connection.execute(insert(t.speeds), values)

    async def speed(self, attempt_id: str) -> Speed | None:
        row = await self._first(select(t.speeds).where(t.speeds.c.attempt_id == attempt_id))
        return rows.speed(row) if row is not None else None

    async def speeds(self, limit: int) -> Sequence[Speed]:
        query = select(t.speeds).order_by(t.speeds.c.update_time.desc(), t.speeds.c.attempt_id).limit(limit)
        return [rows.speed(row) for row in await self._all(query)]

    async def put_engine(self, engine: EngineRecord) -> None:
        values = rows.engine_values(engine)
        result = await self._connection.execute(
            update(t.engines).where(t.engines.c.id == engine.id).values(values)
        )
        if result.rowcount == 0:
            await self._connection.execute(insert(t.engines), values)

    async def engine(self, engine_id: str, *, lock: bool = False) -> EngineRecord | None:
        query = select(t.engines).where(t.engines.c.id == engine_id)
        row = await self._first(query.with_for_update() if lock else query)
        return rows.engine(row) if row is not None else None

    async def engines(self) -> Sequence[EngineRecord]:
        query = select(t.engines).order_by(t.engines.c.create_time, t.engines.c.id)
        return [rows.engine(row) for row in await self._all(query)]

    async def delete_engine(self, engine_id: str) -> None:
        await self._connection.execute(delete(t.engines).where(t.engines.c.id == engine_id))

    async def lock_launches(self) -> None:
        # SQLite has one writer at a time anyway.
        if self._connection.dialect.name == "postgresql":
            await self._connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LAUNCHES})

    async def put_lost_engine(self, engine_id: str, lost_time: datetime) -> None:
        await self._connection.execute(delete(t.lost_engines).where(t.lost_engines.c.id == engine_id))
        await self._connection.execute(insert(t.lost_engines), {"id": engine_id, "lost_time": lost_time})

    async def lost_engines(self) -> dict[str, datetime]:
        return {row["id"]: row["lost_time"] for row in await self._all(select(t.lost_engines))}

    async def is_lost_engine(self, engine_id: str) -> bool:
        found = await self._first(select(t.lost_engines).where(t.lost_engines.c.id == engine_id))
        return found is not None

    async def delete_lost_engines(self, before: datetime) -> None:
        await self._connection.execute(delete(t.lost_engines).where(t.lost_engines.c.lost_time < before))

    async def pools(self) -> Sequence[Pool]:
        return [rows.pool(row) for row in await self._all(select(t.pools).order_by(*_POOL_KEY))]

    async def save_pool(self, before: Pool | None, after: Pool) -> bool:
        if before is None:
            try:
                async with self._connection.begin_nested():
                    await self._connection.execute(insert(t.pools), rows.pool_values(after))
            except IntegrityError as error:
                if not is_unique_violation(error):
                    raise
                return False
            return True
        values = rows.pool_values(replace(after, version=before.version + 1))
        result = await self._connection.execute(
            update(t.pools)
            .where(
                t.pools.c.base_digest == before.base.digest,
                t.pools.c.engine_class == before.engine_class,
                t.pools.c.version == before.version,
            )
            .values(values)
        )
        return bool(result.rowcount == 1)


class SqlSession(_Jobs, _Attempts, _Progress, _Engines):
    """Implements ports.JobSession on one connection."""
