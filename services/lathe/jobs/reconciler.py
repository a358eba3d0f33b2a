"""Engines, leases and the queue: load in a short transaction, decide purely, act without one, apply guarded."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from lathe.common.errors import Aborted, LatheError, RetryableError
from lathe.common.ids import IdFactory
from lathe.common.metrics import Metrics
from lathe.jobs import lifecycle, policy
from lathe.jobs.calls import LauncherCalls
from lathe.jobs.changes import Changes
from lathe.jobs.contact import Contact
from lathe.jobs.measures import measure
from lathe.jobs.model import (
    LEASED_STATES,
    ONE_CLASS,
    Attempt,
    EngineClasses,
    EngineRecord,
    EngineState,
    Job,
    JobError,
    JobState,
    NewerJob,
    Place,
    Pool,
)
from lathe.jobs.policy import Explain, Launch, Limits, Refuse, Snapshot, StopEngine
from lathe.jobs.ports import EngineLaunch, JobSession, JobStore, LaunchedEngine, Launcher
from lathe.jobs.quotas import Quotas
from lathe.jobs.sharedclock import SharedClock
from lathe.jobs.transitions import Trigger
from lathe.jobs.workers import lose

log = logging.getLogger(__name__)

# A zombie that is out of touch for longer has ended by itself.
LOST_ENGINES_KEPT = timedelta(hours=1)
_WAITING_FOR_LENGTH = 300


@dataclass(frozen=True, slots=True)
class _Loaded:
    queued: Sequence[Job]
    running: Sequence[Job]
    newer: Sequence[NewerJob]
    engines: Sequence[EngineRecord]
    pools: Sequence[Pool]
    open_attempts: Sequence[Attempt]
    lost: Mapping[str, datetime]


@dataclass(slots=True)
class Reconciler:
    """Runs in every replica of jobs; guards in the database let one of them act."""

    store: JobStore
    launcher: Launcher | None
    quotas: Quotas
    changes: Changes
    contact: Contact
    clock: SharedClock
    ids: IdFactory
    metrics: Metrics
    limits: Limits
    interval_s: float = 0.5
    classes: EngineClasses = ONE_CLASS
    # How long a pass waits for the launcher's calls that it began; they go on without it.
    patience_s: float = 2.0
    _calls: LauncherCalls = field(init=False)
    # Processes without a row, and since when; they get time to end by themselves.
    _strays: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._calls = LauncherCalls(self.launcher, self.patience_s)

    async def run(self) -> None:
        """Reconcile until cancelled. An outage makes it wait, nothing makes it end."""
        try:
            while True:
                try:
                    await self.run_once()
                except LatheError as error:
                    log.warning("Reconciling waits: %s", error)
                except Exception:
                    log.exception("Reconciling failed and is tried again.")
                await self.changes.wait(self.interval_s)
        finally:
            await self._calls.close()

    async def run_once(self) -> None:
        """One pass. Raises Unavailable while the database is away."""
        async with self.contact.watched():
            await self.clock.agree(self.store.clock_offset)
            loaded = await self._load()
            self.contact.seen()
            wrote = await self._settle_processes(loaded)
            wrote |= await self._give_up(loaded)
            wrote |= await self._expire(loaded.open_attempts)
            # What was just written must be seen before anything is decided.
            picture = await self._picture(await self._load() if wrote else loaded)
            for decision in policy.decide(picture):
                wrote |= await self._act(decision, picture)
            await self._calls.settle()
            await measure(self.store, self.metrics, picture.queued, picture.engines, picture.now)
            # What a pass waits for others is no gap in the contact with the database.
            self.contact.seen()
        if wrote:
            self.changes.ring()

    async def _load(self) -> _Loaded:
        async with self.store.read() as session:
            # Each query sees what was committed before it: an engine that another replica launches meanwhile must
            # never be missing beside the pool that tells of its launch (see `_launch`), so pools come first.
            pools = await session.pools()
            leased = await session.jobs_in(sorted(LEASED_STATES))
            return _Loaded(
                queued=await session.jobs_in([JobState.QUEUED]),
                running=[job for job in leased if not job.final_attempt_id],
                newer=await session.newer_jobs(),
                engines=await session.engines(),
                pools=pools,
                open_attempts=await session.open_attempts(),
                lost=await session.lost_engines(),
            )

    async def _picture(self, loaded: _Loaded) -> Snapshot:
        held: dict[str, int] = {}
        for attempt in loaded.open_attempts:
            held[attempt.engine_id] = held.get(attempt.engine_id, 0) + 1
        return Snapshot(
            now=self.clock.now(),
            queued=loaded.queued,
            running=loaded.running,
            engines=loaded.engines,
            pools=loaded.pools,
            attempts=held,
            alone=policy.alone_on(loaded.open_attempts, [*loaded.running, *loaded.newer]),
            newer=loaded.newer,
            quotas=await self.quotas.running(job.project for job in loaded.queued),
            lost=loaded.lost,
            limits=self.limits,
            trusted=self.contact.trusted(),
        )

    # --- what the launcher knows ---

    async def _settle_processes(self, loaded: _Loaded) -> bool:
        """Take notice of processes that ended, at once, without waiting for a lease to run out."""
        found = await self._calls.list()
        if found is None:
            return False
        wrote = False
        for engine in loaded.engines:
            process = found.get(engine.id)
            if process is not None and process.running:
                wrote |= await self._claim(engine, process)
            elif process is not None or (engine.launched and not self._may_be_unknown(engine)):
                wrote |= await self._bury(engine, process)
        known = {engine.id for engine in loaded.engines}
        self._clear_strays({name: p for name, p in found.items() if name not in known}, loaded.lost)
        return wrote

    def _may_be_unknown(self, engine: EngineRecord) -> bool:
        return self._calls.busy(engine.id) or policy.may_be_unknown(engine, self.clock.now(), self.limits)

    async def _claim(self, engine: EngineRecord, process: LaunchedEngine) -> bool:
        """Note what a process waits for, and one of ours that registered anew after its row was gone."""
        now = self.clock.now()
        waiting = process.waiting_for[:_WAITING_FOR_LENGTH] if engine.state is EngineState.LAUNCHING else ""
        if engine.launched and not policy.waits_anew(engine, waiting, now):
            return False
        async with self.store.write() as session:
            current = await session.engine(engine.id, lock=True)
            if current is None or current.state is not engine.state:
                return False
            noted = replace(
                current,
                launched=True,
                waiting_for=waiting,
                waiting_time=now if waiting else current.waiting_time,
            )
            await session.put_engine(noted)
        return True

    async def _bury(self, engine: EngineRecord, process: LaunchedEngine | None) -> bool:
        status = process.exit_status if process is not None and process.exit_status else "its process is gone"
        said = process.last_log_line if process is not None else ""
        async with self.store.write() as session:
            current = await session.engine(engine.id, lock=True)
            if current is None:
                return False
            await self._remove(session, current, f"its engine died: {status}")
            # A kill from outside says nothing about whether the next start will work.
            killed = process is None or process.killed
            if current.state is EngineState.LAUNCHING:
                why = "" if killed else said or status
                await self._note_failure(session, engine, why, counts=not killed)
        self._ended(policy.end_of(current))
        log.warning("Engine %s ended (%s). %s", engine.id, status, said)
        if process is not None:
            self._calls.end(engine.id)
        return True

    def _clear_strays(self, strays: Mapping[str, LaunchedEngine], lost: Mapping[str, datetime]) -> None:
        """End processes without a row: given up ones at once, others if they stay.

        One that is seen for the first time may have got its row since the rows were read.
        """
        now = self.clock.monotonic()
        seen, self._strays = self._strays, {name: self._strays.get(name, now) for name in strays}
        for name, process in strays.items():
            stays = now - self._strays[name] > self.limits.engine_stop_timeout_s
            if name in lost or stays or (name in seen and not process.running):
                self._calls.end(name)

    # --- leases ---

    async def _give_up(self, loaded: _Loaded) -> bool:
        """Silent engines lose everything at once; their processes end when they can be reached."""
        wrote = False
        for engine in loaded.engines if self.contact.trusted() else ():
            if not policy.is_silent(engine, self.clock.now(), self.limits):
                continue
            async with self.store.write() as session:
                current = await session.engine(engine.id, lock=True)
                if current is None or not policy.is_silent(current, self.clock.now(), self.limits):
                    continue
                await self._remove(session, current, "its engine was not heard of in time")
            self._ended("lost")
            log.warning("Engine %s was not heard of in time and is given up.", engine.id)
            if engine.launched:
                self._calls.end(engine.id)
            wrote = True
        old = self.clock.now() - LOST_ENGINES_KEPT
        if any(lost_time < old for lost_time in loaded.lost.values()):
            async with self.store.write() as session:
                await session.delete_lost_engines(old)
        return wrote

    async def _expire(self, attempts: Sequence[Attempt]) -> bool:
        now = self.clock.now()
        wrote = False
        for attempt in attempts:
            if attempt.lease_expire_time >= now or not self.contact.trusted():
                continue
            async with self.store.write() as session:
                wrote |= await lose(
                    session, attempt, "its engine was not heard of in time", self.clock, expired_at=True
                )
        return wrote

    # --- decisions ---

    async def _act(self, decision: policy.Decision, picture: Snapshot) -> bool:
        try:
            match decision:
                case Launch():
                    return await self._launch(decision, picture)
                case StopEngine():
                    return await self._stop(decision)
                case Explain(job_id, reason):
                    return await self._explain(job_id, reason)
                case Refuse(job_id, reason):
                    return await self._refuse(job_id, reason)
        except Aborted:
            # Somebody else changed the row since the picture was taken: the next pass sees it.
            return False

    async def _launch(self, decision: Launch, picture: Snapshot) -> bool:
        if self.launcher is None:
            return False
        base, place = decision.base, decision.place
        engine = EngineRecord(
            self.ids.new("eng"),
            base,
            EngineState.LAUNCHING,
            self.clock.now(),
            launched=True,
            engine_class=place.engine_class,
            job_id=place.job_id,
        )
        seen = next((pool for pool in picture.pools if pool.place == place.shared), None)
        # The row first: a process that nobody knows of would be worse than a row without a process.
        async with self.store.write() as session:
            await session.lock_launches()
            pool = await _pool(session, place)
            launched = sum(one.launched for one in await session.engines())
            # Every launch changes its pool: what another replica has launched since, this one need not.
            if _version(pool) != _version(seen) or launched >= self.limits.max_engines:
                return False
            if not await session.save_pool(pool, pool or Pool(base, place.engine_class)):
                return False
            await session.put_engine(engine)
        log.info("Starting engine %s of class %s for %s.", engine.id, place.engine_class, base.id)
        launcher, avoid = self.launcher, policy.suspects(picture)
        self._calls.begin(engine.id, lambda: self._start(launcher, engine, decision.workers, avoid))
        return True

    async def _start(
        self, launcher: Launcher, engine: EngineRecord, workers: int, avoid: tuple[str, ...]
    ) -> None:
        engine_class = self.classes.to_start(engine.engine_class)
        base = engine.base
        launch = EngineLaunch(engine.id, base.name, base.digest, engine_class, engine.job_id, avoid, workers)
        try:
            await launcher.start(launch)
        except LatheError as error:
            log.warning("Engine %s could not be started: %s", engine.id, error)
            # A launcher that is away says nothing about the engine: jobs wait for it.
            counts = not isinstance(error, RetryableError)
            async with self.store.write() as session:
                current = await session.engine(engine.id, lock=True)
                if current is not None and current.state is EngineState.LAUNCHING:
                    # An answer that got lost on its way may have started it nevertheless.
                    await self._remove(session, current, "its engine could not be started")
                    await self._note_failure(session, engine, error.message, counts=counts)
            self._ended("failed")
            self.changes.ring()

    async def _stop(self, decision: StopEngine) -> bool:
        async with self.store.write() as session:
            engine = await session.engine(decision.engine_id, lock=True)
            if engine is None:
                return False
            log.info("Stopping engine %s: %s.", engine.id, decision.reason)
            if decision.force:
                await self._remove(session, engine, f"its engine was ended because {decision.reason}")
                if decision.failed:
                    await self._note_failure(session, engine, decision.reason, counts=True)
            elif engine.state is EngineState.READY and not await session.open_attempts(engine.id):
                await session.put_engine(
                    replace(engine, state=EngineState.STOPPING, stop_time=self.clock.now())
                )
        if decision.force:
            self._ended("failed" if decision.failed else "stopped")
            self._calls.end(decision.engine_id)
        return True

    async def _explain(self, job_id: str, reason: str) -> bool:
        async with self.store.write() as session:
            job = await session.job(job_id, lock=True)
            if job is None or job.state is not JobState.QUEUED:
                return False
            await session.save(job, replace(job, state_reason=reason))
        return True

    async def _refuse(self, job_id: str, reason: str) -> bool:
        async with self.store.write() as session:
            job = await session.job(job_id, lock=True)
            if job is None or job.state is not JobState.QUEUED:
                return False
            error = JobError("server_error", reason)
            changed, events = lifecycle.failed(job, Trigger.REFUSED, error, self.clock.now())
            await session.save(job, changed, events)
            # A job that comes later gets tries of its own.
            pool = await _pool(session, job.place)
            if pool is not None:
                await session.save_pool(pool, replace(pool, start_failures=0, next_launch_time=None))
        return True

    async def _remove(self, session: JobSession, engine: EngineRecord, why: str) -> None:
        for attempt in await session.open_attempts(engine.id):
            await lose(session, attempt, why, self.clock)
        await session.delete_engine(engine.id)
        if engine.launched:
            await session.put_lost_engine(engine.id, self.clock.now())

    async def _note_failure(
        self, session: JobSession, engine: EngineRecord, said: str, *, counts: bool
    ) -> None:
        """said: shown to those who wait; empty leaves what was said before."""
        pool = await _pool(session, engine.place)
        old = pool or Pool(engine.base, engine.engine_class)
        failures = old.start_failures + (1 if counts else 0)
        wait = timedelta(seconds=policy.backoff_s(max(1, failures)))
        await session.save_pool(
            pool,
            replace(
                old,
                start_failures=failures,
                next_launch_time=self.clock.now() + wait,
                last_error=said[-500:] or old.last_error,
            ),
        )

    def _ended(self, why: str) -> None:
        self.metrics.engine_ends.labels(why).inc()


async def _pool(session: JobSession, place: Place) -> Pool | None:
    return next((pool for pool in await session.pools() if pool.place == place.shared), None)


def _version(pool: Pool | None) -> int:
    return pool.version if pool is not None else 0
