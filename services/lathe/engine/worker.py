"""The lease shell: register, heartbeat, lease attempts, obey, and know when to leave.

Runs in the event loop, which never waits for the model: heartbeats go on whatever the model does.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from lathe.common.clock import Clock
from lathe.common.errors import Aborted, LatheError
from lathe.common.objectstore.base import ObjectStore
from lathe.engine.attempts import AttemptRunner
from lathe.engine.loop import ModelLoop
from lathe.engine.model import Action, Attempt, HeartbeatReply, HeldLease, Outcome, Registration, Terms
from lathe.engine.ports import Jobs, TrainVerbs
from lathe.engine.preparing import AttemptSettings

logger = logging.getLogger(__name__)

POLL_S = 1.0
AWAY_POLL_S = 10.0
WATCH_S = 0.25


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """orphan_timeout_s: how long jobs may be out of reach. parent_died: asked four times a second."""

    orphan_timeout_s: float = 600.0
    parent_died: Callable[[], bool] = lambda: False


@dataclass(frozen=True, slots=True)
class Left:
    """Why the worker left, and whether jobs will still hear what it says."""

    reason: str
    jobs_listens: bool = True


@dataclass(slots=True)
class _Held:
    lease: HeldLease
    runner: AttemptRunner
    renewed_at: float
    suspended: bool = False
    task: asyncio.Task[None] | None = None


class Worker:
    """`run` works until there is a reason to leave and returns it; `drain` gives everything back."""

    def __init__(
        self,
        *,
        registration: Registration,
        engine: TrainVerbs,
        loop: ModelLoop,
        jobs: Jobs,
        store: ObjectStore,
        clock: Clock,
        attempts: AttemptSettings,
        settings: WorkerSettings,
    ) -> None:
        self._me, self._engine, self._loop, self._jobs = registration, engine, loop, jobs
        self._store, self._clock, self._attempt_settings, self._settings = store, clock, attempts, settings
        self._terms: Terms | None = None
        self._held: dict[str, _Held] = {}
        self._contact = clock.monotonic()
        self._left: Left | None = None
        self._leave = asyncio.Event()
        self.draining = False

    @property
    def attempts(self) -> tuple[str, ...]:
        """Ids of the attempts it holds."""
        return tuple(self._held)

    def leave(self, reason: str, *, jobs_listens: bool = True) -> None:
        """Make `run` return."""
        if self._left is None:
            self._left = Left(reason, jobs_listens)
            self._leave.set()

    async def run(self) -> Left:
        """Work; returns why it is time to leave. Call `drain` then."""
        self._contact = self._clock.monotonic()
        tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self._work())]
        try:
            await self._leave.wait()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return self._left or Left("it was stopped")

    async def drain(self, grace_s: float, *, report: bool = True) -> None:
        """Checkpoint and release every attempt, within the grace, then deregister.

        report False: jobs is gone; only store the checkpoints. Heartbeats go on meanwhile.
        """
        self.draining = True
        for held in self._held.values():
            held.runner.stop(Outcome.RELEASED)
            if not report:
                held.runner.abandon()
        tasks = [held.task for held in self._held.values() if held.task is not None]
        heartbeats = asyncio.create_task(self._heartbeats()) if report and self._terms is not None else None
        try:
            if tasks:
                await asyncio.wait(tasks, timeout=grace_s)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if report and self._terms is not None:
                await asyncio.wait_for(self._jobs.deregister(self._me.engine_id), 5.0)
        except (LatheError, TimeoutError) as error:
            logger.warning("jobs did not hear that engine %s leaves: %s", self._me.engine_id, error)
        finally:
            if heartbeats is not None:
                heartbeats.cancel()
                await asyncio.gather(heartbeats, return_exceptions=True)

    async def _work(self) -> None:
        try:
            await self._register()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._heartbeats())
                tasks.create_task(self._lease_attempts())
        except asyncio.CancelledError:
            raise
        except BaseException:
            logger.exception("the engine's worker broke")
            self.leave("the engine's worker broke; the log says how")

    async def _register(self) -> None:
        wait = 0.2
        while True:
            sent = self._clock.monotonic()
            try:
                self._terms = await self._jobs.register(self._me)
            except LatheError as error:
                logger.warning("jobs does not take the registration: %s", error)
                await self._clock.sleep(wait)
                wait = min(wait * 2, 5.0)
            else:
                self._contact = sent
                logger.info("registered as %s", self._me.engine_id)
                return

    async def _heartbeats(self) -> None:
        while True:
            interval = self._terms.heartbeat_interval if self._terms is not None else 1.0
            sent = self._clock.monotonic()
            leases = [held.lease for held in self._held.values()]
            status = self._loop.status
            try:
                reply = await self._jobs.heartbeat(
                    self._me.engine_id,
                    leases,
                    active_sequences=status.active,
                    memory_bytes=status.memory_bytes,
                    draining=self.draining,
                )
            except LatheError as error:
                logger.warning("jobs did not answer the heartbeat: %s", error)
            else:
                self._contact = sent
                await self._obey(reply, leases, sent)
            await self._clock.sleep(max(0.0, interval - (self._clock.monotonic() - sent)))

    async def _obey(self, reply: HeartbeatReply, leases: list[HeldLease], sent: float) -> None:
        if reply.reregister:
            # Jobs knows none of the leases either; they are not renewed until it says so.
            await self._register()
            return
        actions = dict(reply.directives)
        for lease in leases:
            held = self._held.get(lease.attempt_id)
            if held is None or held.lease != lease:
                continue
            action = actions.get(lease.attempt_id)
            if action is Action.LEASE_LOST:
                self._lose(held)
                continue
            held.renewed_at = sent
            if held.suspended:
                held.suspended = False
                held.runner.suspend(False)
            if action is Action.CANCEL:
                held.runner.stop(Outcome.CANCELLED)
            elif action in (Action.PAUSE, Action.PREEMPT):
                held.runner.stop(Outcome.RELEASED)
        if reply.shut_down:
            self.leave("jobs does not need this engine any more")

    async def _lease_attempts(self) -> None:
        wait = POLL_S
        while True:
            if len(self._held) < self._me.max_attempts and not self.draining:
                sent = self._clock.monotonic()
                try:
                    attempt = await self._jobs.lease(self._me.engine_id)
                    wait = POLL_S
                    if attempt is not None:
                        self._hold(attempt, sent)
                        continue
                except LatheError as error:
                    logger.warning("no attempt could be leased: %s", error)
                    wait = min(wait * 2, AWAY_POLL_S)
            await self._clock.sleep(wait)

    def _hold(self, attempt: Attempt, sent: float) -> None:
        if attempt.attempt_id in self._held:
            return
        logger.info("attempt %s of %s begins", attempt.attempt_id, attempt.job)
        runner = AttemptRunner(
            attempt=attempt,
            engine=self._engine,
            loop=self._loop,
            jobs=self._jobs,
            store=self._store,
            clock=self._clock,
            settings=self._attempt_settings,
        )
        held = _Held(HeldLease(attempt.attempt_id, attempt.lease_token), runner, sent)
        self._held[attempt.attempt_id] = held
        held.task = asyncio.create_task(self._run_attempt(held))

    async def _run_attempt(self, held: _Held) -> None:
        try:
            await held.runner.run()
        except Aborted as error:
            logger.warning("the lease of attempt %s is lost: %s", held.lease.attempt_id, error)
        except asyncio.CancelledError:
            raise
        except Exception:
            # Its lease runs out, and jobs gives it to a new attempt.
            logger.exception("attempt %s broke", held.lease.attempt_id)
        finally:
            if self._held.get(held.lease.attempt_id) is held:
                del self._held[held.lease.attempt_id]

    def _lose(self, held: _Held) -> None:
        logger.warning("jobs says that the lease of attempt %s is lost", held.lease.attempt_id)
        if held.task is not None:
            held.task.cancel()

    async def _watch(self) -> None:
        """Leases and jobs by our own clock, and the parent."""
        while True:
            now = self._clock.monotonic()
            term = self._terms.lease_term if self._terms is not None else float("inf")
            for held in self._held.values():
                if not held.suspended and now - held.renewed_at > term:
                    logger.warning("the lease of attempt %s was not renewed in time", held.lease.attempt_id)
                    held.suspended = True
                    held.runner.suspend(True)
            if now - self._contact > self._settings.orphan_timeout_s:
                self.leave(
                    f"jobs was out of reach for {self._settings.orphan_timeout_s:.0f} seconds",
                    jobs_listens=False,
                )
            if self._settings.parent_died():
                self.leave("the process that started this engine has died", jobs_listens=False)
            await self._clock.sleep(WATCH_S)
