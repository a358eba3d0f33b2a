"""The use cases of engines: register, beat, lease, deregister. What they say of an attempt is in reports.py."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from lathe.common.clock import Clock
from lathe.common.errors import FailedPrecondition, FieldViolation, InvalidArgument, Unavailable
from lathe.common.ids import IdFactory
from lathe.common.metrics import Metrics
from lathe.common.trainingconfig import CONFIG_VERSION
from lathe.jobs import lifecycle, policy, transitions
from lathe.jobs.changes import Changes
from lathe.jobs.contact import Contact
from lathe.jobs.model import (
    LEASED_STATES,
    ONE_CLASS,
    Action,
    Attempt,
    BaseRef,
    EngineClasses,
    EngineRecord,
    EngineState,
    Job,
    JobError,
    JobState,
    Outcome,
    Place,
)
from lathe.jobs.ports import NEWER_JOB, JobSession, JobStore
from lathe.jobs.quotas import Quotas
from lathe.jobs.transitions import Trigger

log = logging.getLogger(__name__)

LEASE_LOST = "LEASE_LOST"
ENGINE_UNKNOWN = "ENGINE_UNKNOWN"

_DIRECTIVES: Mapping[str, Action] = {
    JobState.CANCELLING: Action.CANCEL,
    JobState.PAUSING: Action.PAUSE,
    JobState.PREEMPTING: Action.PREEMPT,
}


@dataclass(frozen=True, slots=True)
class Registration:
    """What an engine says of itself."""

    engine_id: str
    base: BaseRef
    address: str
    max_attempts: int
    max_sequences: int
    device: str
    threads: int
    code_version: str
    # Of an engine that jobs does not know; what jobs knows wins.
    engine_class: str = ""
    job_id: str = ""


@dataclass(frozen=True, slots=True)
class Beat:
    """leases: (attempt id, token) of every attempt that the engine holds."""

    engine_id: str
    leases: Sequence[tuple[str, str]] = ()
    active_sequences: int = 0
    memory_bytes: int = 0
    draining: bool = False
    config_version: int = CONFIG_VERSION


@dataclass(frozen=True, slots=True)
class BeatAnswer:
    directives: Sequence[tuple[str, Action]]
    reregister: bool
    shut_down: bool


@dataclass(frozen=True, slots=True)
class Lease:
    """A new attempt, its job, and the prefixes of the job's earlier attempts, newest first."""

    attempt: Attempt
    job: Job
    earlier_prefixes: Sequence[str]


@dataclass(frozen=True, slots=True)
class LeaseTerms:
    """Seconds."""

    lease_term_s: float = 15.0
    heartbeat_s: float = 3.0


@dataclass(frozen=True, slots=True)
class WorkersService:
    """What engines can do."""

    store: JobStore
    quotas: Quotas
    changes: Changes
    contact: Contact
    clock: Clock
    ids: IdFactory
    metrics: Metrics
    terms: LeaseTerms = LeaseTerms()
    classes: EngineClasses = ONE_CLASS

    async def register(self, engine: Registration) -> LeaseTerms:
        """Take the engine up, or take its new address. Safe to repeat.

        One that was given up stays given up: its next heartbeat tells it to end.
        """
        _check_registration(engine)
        now = self.clock.now()
        async with self.store.write() as session:
            known = await session.engine(engine.engine_id, lock=True)
            if known is None and await session.is_lost_engine(engine.engine_id):
                log.warning("Engine %s was given up and comes back; it is told to end.", engine.engine_id)
                return self.terms
            record = _record(engine, known, now, self.classes.default)
            await session.put_engine(record)
            await _forget_failures(session, record.place)
        log.info("Engine %s registered for %s at %s.", engine.engine_id, engine.base.id, engine.address)
        self.changes.ring()
        return self.terms

    async def heartbeat(self, beat: Beat) -> BeatAnswer:
        """Renew the registration and the leases; what the engine must do."""
        now = self.clock.now()
        expire = now + timedelta(seconds=self.terms.lease_term_s)
        directives: list[tuple[str, Action]] = []
        async with self.contact.watched(), self.store.write() as session:
            # The engine before its attempts, as whoever removes an engine locks them: no deadlock between the two.
            engine = await session.engine(beat.engine_id, lock=True)
            for attempt_id, token in beat.leases:
                action = await _renew(session, beat.engine_id, attempt_id, token, expire)
                if action is not None:
                    directives.append((attempt_id, action))
            if engine is not None:
                busy = bool(beat.leases) or beat.active_sequences > 0
                engine = _of_this_version(engine, beat, now)
                await session.put_engine(
                    replace(
                        engine,
                        heartbeat_time=now,
                        active_sequences=beat.active_sequences,
                        memory_bytes=beat.memory_bytes,
                        draining=beat.draining,
                        busy_time=now if busy else engine.busy_time,
                    )
                )
            lost = engine is None and await session.is_lost_engine(beat.engine_id)
        if engine is not None and (engine.draining, engine.active_sequences) != (
            beat.draining,
            beat.active_sequences,
        ):
            self.changes.ring()
        stop = lost or (engine is not None and engine.state is EngineState.STOPPING)
        return BeatAnswer(directives, reregister=engine is None and not lost, shut_down=stop)

    async def lease(self, engine_id: str, config_version: int = CONFIG_VERSION) -> Lease | None:
        """The next attempt for this engine; None when there is nothing that it can do.

        Raises FailedPrecondition for an engine that is not registered.
        """
        async with self.store.read() as session:
            engine = await _registered(session, engine_id)
            waiting = [job for job in await session.jobs_in([JobState.QUEUED]) if job.place == engine.place]
        if not waiting or not policy.takes_work(engine):
            return None
        if config_version != CONFIG_VERSION:
            return None
        quotas = await self.quotas.running(job.project for job in waiting)
        async with self.store.write() as session:
            lease = await self._take(session, engine_id, quotas)
        if lease is None:
            return None
        if lease.attempt.number == 1 and lease.job.queue_time is not None:
            wait = self.clock.now() - lease.job.queue_time
            self.metrics.job_queue_wait_seconds.observe(max(0.0, wait.total_seconds()))
        self.changes.ring()
        return lease

    async def _take(self, session: JobSession, engine_id: str, quotas: dict[str, int]) -> Lease | None:
        now = self.clock.now()
        engine = await session.engine(engine_id, lock=True)
        if engine is None or not policy.takes_work(engine):
            return None
        held = await session.open_attempts(engine_id)
        running = await holding(session)
        runs_alone = bool(policy.alone_on(held, running))
        if not policy.free_places(engine, len(held), runs_alone=runs_alone):
            return None
        # A project whose quota was not looked up in time waits for the next call.
        queued = [job for job in await session.jobs_in([JobState.QUEUED]) if job.project in quotas]
        chosen = policy.next_job(engine.place, queued, running, quotas, now)
        if chosen is None:
            return None
        if policy.has_room(engine, chosen, len(held), runs_alone=runs_alone):
            return await self._take_one(session, chosen, engine, quotas)
        await self._keep_turn(session, chosen)
        return None

    async def _take_one(
        self, session: JobSession, chosen: Job, engine: EngineRecord, quotas: dict[str, int]
    ) -> Lease | None:
        # Another engine may have taken a job of this project since: look again with the project locked.
        await session.lock_project(chosen.project)
        job = await session.job(chosen.id, lock=True)
        if job is None or job.state is not JobState.QUEUED:
            return None
        running = await holding(session)
        if policy.next_job(engine.place, [job], running, quotas, self.clock.now()) is None:
            return None
        return await self._start(session, job, engine)

    async def _keep_turn(self, session: JobSession, chosen: Job) -> None:
        """One that must be alone waits for the others' end. Nobody passes it: a job of a project that has fewer running
        jobs by then would, and the engine never be empty."""
        job = await session.job(chosen.id, lock=True)
        if job is not None and job.state is JobState.QUEUED and job.turn_time is None:
            await session.save(job, replace(job, turn_time=self.clock.now()))

    async def _start(self, session: JobSession, job: Job, engine: EngineRecord) -> Lease:
        now = self.clock.now()
        earlier = await session.attempts(job.id)
        attempt = Attempt(
            id=self.ids.new("att"),
            job_id=job.id,
            number=job.attempt_count + 1,
            engine_id=engine.id,
            # 22 base62 characters hold 131 bits.
            lease_token=self.ids.token(22),
            lease_expire_time=now + timedelta(seconds=self.terms.lease_term_s),
            create_time=now,
            code_version=engine.code_version,
        )
        leased = replace(
            job,
            state=transitions.apply(job.state, Trigger.LEASED),
            state_reason=f"Engine {engine.id} has taken it and is preparing attempt {attempt.number}.",
            attempt_id=attempt.id,
            lease_token=attempt.lease_token,
            attempt_count=attempt.number,
            hold_until=None,
            turn_time=None,
        )
        saved = await session.save(job, leased)
        await session.add_attempt(attempt)
        return Lease(attempt, saved, [one.prefix for one in earlier])

    async def deregister(self, engine_id: str) -> None:
        """The engine ends. What it still held is lost. Safe to repeat."""
        async with self.store.write() as session:
            engine = await session.engine(engine_id, lock=True)
            for attempt in await session.open_attempts(engine_id):
                await lose(session, attempt, "its engine ended", self.clock)
            if engine is not None:
                await session.delete_engine(engine_id)
        if engine is not None:
            self.metrics.engine_ends.labels("stopped").inc()
        self.changes.ring()


async def lose(
    session: JobSession, attempt: Attempt, why: str, clock: Clock, *, expired_at: bool = False
) -> bool:
    """End an attempt whose lease ran out or whose engine died, and give its job back.

    expired_at: only if the lease has not been renewed since `attempt` was read. False if nothing was done.
    """
    try:
        job = await session.job(attempt.job_id, lock=True)
    except Unavailable as error:
        if error.reason != NEWER_JOB:
            raise
        return False  # its end is for a replica that can read it
    now = clock.now()
    done = replace(attempt, outcome=Outcome.LOST, end_time=now, error=JobError("lease_lost", why))
    guard = attempt.lease_expire_time if expired_at else None
    if job is None or not await session.end_attempt(done, expired_at=guard):
        return False
    if job.attempt_id != attempt.id:
        return False
    changed, events = lifecycle.after_attempt(job, done, why, now)
    await session.save(job, changed, events)
    log.warning("Attempt %s of %s is lost: %s.", attempt.number, job.name, why)
    return True


def _check_registration(engine: Registration) -> None:
    for field, value in (
        ("engine_id", engine.engine_id),
        ("base_digest", engine.base.digest),
        ("address", engine.address),
    ):
        if not value:
            text = f"{field} is required."
            raise InvalidArgument(text, violations=[FieldViolation(field, text)])


def _record(
    engine: Registration, known: EngineRecord | None, now: datetime, default_class: str
) -> EngineRecord:
    """The engine as it registers; what jobs knew of it goes on to hold."""
    old = known or EngineRecord(
        engine.engine_id,
        engine.base,
        EngineState.READY,
        now,
        engine_class=engine.engine_class or default_class,
        job_id=engine.job_id,
    )
    return EngineRecord(
        id=engine.engine_id,
        base=engine.base,
        # One that was told to end stays told.
        state=EngineState.STOPPING if old.state is EngineState.STOPPING else EngineState.READY,
        create_time=old.create_time,
        launched=old.launched,
        address=engine.address,
        max_attempts=engine.max_attempts,
        max_sequences=engine.max_sequences,
        device=engine.device,
        threads=engine.threads,
        code_version=engine.code_version,
        heartbeat_time=now,
        busy_time=now,
        stop_time=old.stop_time,
        engine_class=old.engine_class,
        job_id=old.job_id,
    )


def _of_this_version(engine: EngineRecord, beat: Beat, now: datetime) -> EngineRecord:
    """The engine, told to end if it would train without settings that it does not know.

    What it trains already it was given by a jobs of its own version: that it ends first.
    """
    if beat.config_version == CONFIG_VERSION or beat.leases or engine.state is EngineState.STOPPING:
        return engine
    log.info("Engine %s is of another version of the training configuration; it is told to end.", engine.id)
    return stopping(engine, now)


def stopping(engine: EngineRecord, now: datetime) -> EngineRecord:
    """The engine as one that is told to end."""
    if engine.state is EngineState.STOPPING:
        return engine
    return replace(engine, state=EngineState.STOPPING, stop_time=now)


async def _registered(session: JobSession, engine_id: str) -> EngineRecord:
    engine = await session.engine(engine_id)
    if engine is None:
        raise FailedPrecondition(
            f"Engine {engine_id} is not registered; register first.", reason=ENGINE_UNKNOWN
        )
    return engine


async def holding(session: JobSession) -> list[policy.Running]:
    """Jobs that hold a place: one that only waits for its registration does not."""
    known = [job for job in await session.jobs_in(sorted(LEASED_STATES)) if not job.final_attempt_id]
    return [*known, *(job for job in await session.newer_jobs() if job.leased)]


async def _forget_failures(session: JobSession, place: Place) -> None:
    for pool in await session.pools():
        if pool.place == place.shared and (pool.start_failures or pool.last_error):
            healed = replace(pool, start_failures=0, last_error="", next_launch_time=None)
            await session.save_pool(pool, healed)


async def _renew(
    session: JobSession, engine_id: str, attempt_id: str, token: str, expire: datetime
) -> Action | None:
    attempt = await session.attempt(attempt_id)
    if attempt is None or attempt.engine_id != engine_id:
        return Action.LEASE_LOST
    if not await session.renew(attempt_id, token, expire):
        return Action.LEASE_LOST
    state = await session.job_state(attempt.job_id)
    return _DIRECTIVES.get(state) if state is not None else Action.LEASE_LOST
