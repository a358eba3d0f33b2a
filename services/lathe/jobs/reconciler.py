"""Engines, leases and the queue: load in a short transaction, decide purely, act without one, apply guarded."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta

from lathe.common.clock import Clock
from lathe.common.errors import Aborted, LatheError, RetryableError
from lathe.common.ids import IdFactory
from lathe.common.metrics import Metrics
from lathe.jobs import lifecycle, policy
from lathe.jobs.changes import Changes
from lathe.jobs.contact import Contact
from lathe.jobs.model import (
    LEASED_STATES,
    Attempt,
    BaseRef,
    EngineRecord,
    EngineState,
    Job,
    JobError,
    JobState,
    Pool,
)
from lathe.jobs.policy import Explain, Launch, Limits, Refuse, Snapshot, StopEngine
from lathe.jobs.ports import EngineLaunch, JobSession, JobStore, LaunchedEngine, Launcher
from lathe.jobs.quotas import Quotas
from lathe.jobs.transitions import Trigger
from lathe.jobs.workers import lose

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Loaded:
    queued: Sequence[Job]
    running: Sequence[Job]
    engines: Sequence[EngineRecord]
    pools: Sequence[Pool]
    open_attempts: Sequence[Attempt]


@dataclass(slots=True)
class Reconciler:
    """Runs in every replica of jobs; guards in the database let one of them act."""

    store: JobStore
    launcher: Launcher | None
    quotas: Quotas
    changes: Changes
    contact: Contact
    clock: Clock
    ids: IdFactory
    metrics: Metrics
    limits: Limits
    interval_s: float = 0.5
    # Processes without a row, and since when; they get time to end by themselves.
    _strays: dict[str, float] = field(default_factory=dict)

    async def run(self) -> None:
        """Reconcile until cancelled. An outage makes it wait, nothing makes it end."""
        while True:
            try:
                await self.run_once()
            except LatheError as error:
                log.warning("Reconciling waits: %s", error)
            except Exception:
                log.exception("Reconciling failed and is tried again.")
            await self.changes.wait(self.interval_s)

    async def run_once(self) -> None:
        """One pass. Raises Unavailable while the database is away."""
        async with self.contact.watched():
            loaded = await self._load()
            self.contact.seen()
            wrote = await self._settle_processes(loaded.engines)
            wrote |= await self._expire(loaded.open_attempts)
            # What was just written must be seen before anything is decided.
            picture = await self._picture(await self._load() if wrote else loaded)
            for decision in policy.decide(picture):
                wrote |= await self._act(decision, picture)
            await self._measure(picture.engines)
        if wrote:
            self.changes.ring()

    async def _load(self) -> _Loaded:
        async with self.store.read() as session:
            leased = await session.jobs_in(sorted(LEASED_STATES))
            return _Loaded(
                queued=await session.jobs_in([JobState.QUEUED]),
                running=[job for job in leased if not job.final_attempt_id],
                engines=await session.engines(),
                pools=await session.pools(),
                open_attempts=await session.open_attempts(),
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
            quotas=await self.quotas.running(job.project for job in loaded.queued),
            limits=self.limits,
            trusted=self.contact.trusted(),
        )

    # --- what the launcher knows ---

    async def _settle_processes(self, engines: Sequence[EngineRecord]) -> bool:
        """Take notice of processes that ended, at once, without waiting for a lease to run out."""
        if self.launcher is None:
            return False
        try:
            found = {process.engine_id: process for process in await self.launcher.list()}
        except LatheError as error:
            # What cannot be seen is not dead: leases decide meanwhile.
            log.warning("The launcher does not answer: %s", error)
            return False
        wrote = False
        for engine in engines:
            process = found.get(engine.id)
            if process is not None and process.running:
                wrote |= await self._claim(engine)
            elif process is not None or engine.launched:
                wrote |= await self._bury(engine, process)
        known = {engine.id for engine in engines}
        await self._clear_strays({name: p for name, p in found.items() if name not in known})
        return wrote

    async def _claim(self, engine: EngineRecord) -> bool:
        """A process of ours that registered anew after its row was gone."""
        if engine.launched:
            return False
        async with self.store.write() as session:
            current = await session.engine(engine.id, lock=True)
            if current is not None:
                await session.put_engine(replace(current, launched=True))
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
                await self._note_failure(session, engine.base, why, counts=not killed)
        log.warning("Engine %s ended (%s). %s", engine.id, status, said)
        await self._forget(engine.id)
        return True

    async def _clear_strays(self, strays: Mapping[str, LaunchedEngine]) -> None:
        now = self.clock.monotonic()
        self._strays = {name: self._strays.get(name, now) for name in strays}
        for name, process in strays.items():
            if not process.running or now - self._strays[name] > self.limits.engine_stop_timeout_s:
                await self._forget(name)

    async def _forget(self, engine_id: str) -> bool:
        """End the process if it runs. False if the launcher could not do it now."""
        if self.launcher is None:
            return True
        try:
            await self.launcher.stop(engine_id)
        except LatheError as error:
            log.warning("Engine %s cannot be stopped now: %s", engine_id, error)
            return False
        return True

    # --- leases ---

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
                case Launch(base):
                    return await self._launch(base)
                case StopEngine():
                    return await self._stop(decision)
                case Explain(job_id, reason):
                    return await self._explain(job_id, reason)
                case Refuse(job_id, reason):
                    return await self._refuse(job_id, reason)
        except Aborted:
            # Somebody else changed the row since the picture was taken: the next pass sees it.
            return False

    async def _launch(self, base: BaseRef) -> bool:
        if self.launcher is None:
            return False
        engine = EngineRecord(
            self.ids.new("eng"), base, EngineState.LAUNCHING, self.clock.now(), launched=True
        )
        # The row first: a process that nobody knows of would be worse than a row without a process.
        async with self.store.write() as session:
            pool = await _pool(session, base.digest)
            if not await session.save_pool(pool, pool or Pool(base)):
                return False
            await session.put_engine(engine)
        log.info("Starting engine %s for %s.", engine.id, base.id)
        try:
            await self.launcher.start(EngineLaunch(engine.id, base.name, base.digest, "default"))
        except LatheError as error:
            log.warning("Engine %s could not be started: %s", engine.id, error)
            # A launcher that is away says nothing about the engine: jobs wait for it.
            counts = not isinstance(error, RetryableError)
            async with self.store.write() as session:
                await session.delete_engine(engine.id)
                await self._note_failure(session, base, error.message, counts=counts)
        return True

    async def _stop(self, decision: StopEngine) -> bool:
        if decision.force and not await self._forget(decision.engine_id):
            return False
        async with self.store.write() as session:
            engine = await session.engine(decision.engine_id, lock=True)
            if engine is None:
                return False
            log.info("Stopping engine %s: %s.", engine.id, decision.reason)
            if decision.force:
                await self._remove(session, engine, f"its engine was ended because {decision.reason}")
                if engine.state is EngineState.LAUNCHING:
                    await self._note_failure(session, engine.base, decision.reason, counts=True)
            elif engine.state is EngineState.READY and not await session.open_attempts(engine.id):
                await session.put_engine(
                    replace(engine, state=EngineState.STOPPING, stop_time=self.clock.now())
                )
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
            pool = await _pool(session, job.base.digest)
            if pool is not None:
                await session.save_pool(pool, replace(pool, start_failures=0, next_launch_time=None))
        return True

    async def _remove(self, session: JobSession, engine: EngineRecord, why: str) -> None:
        for attempt in await session.open_attempts(engine.id):
            await lose(session, attempt, why, self.clock)
        await session.delete_engine(engine.id)

    async def _note_failure(self, session: JobSession, base: BaseRef, said: str, *, counts: bool) -> None:
        """said: shown to those who wait; empty leaves what was said before."""
        pool = await _pool(session, base.digest)
        old = pool or Pool(base)
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

    async def _measure(self, engines: Sequence[EngineRecord]) -> None:
        async with self.store.read() as session:
            counts = await session.count_by_state()
        for state, count in counts.items():
            self.metrics.jobs.labels(state=str(state)).set(count)
        for engine_state in EngineState:
            of_state = sum(engine.state is engine_state for engine in engines)
            self.metrics.engines.labels(state=str(engine_state)).set(of_state)


async def _pool(session: JobSession, digest: str) -> Pool | None:
    return next((pool for pool in await session.pools() if pool.base.digest == digest), None)
