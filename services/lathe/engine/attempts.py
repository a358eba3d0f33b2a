"""One leased attempt on the asynchronous side: prepare it, upload its snapshots, report, complete."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from shutil import rmtree

from lathe.common.clock import Clock
from lathe.common.errors import (
    Aborted,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    LatheError,
    NotFound,
    OutOfRange,
    Unimplemented,
)
from lathe.common.objectstore.base import ObjectStore
from lathe.engine.loop import ModelLoop
from lathe.engine.model import (
    Attempt,
    AttemptError,
    AttemptEvent,
    Ended,
    HeldLease,
    Note,
    Outcome,
    Progress,
    SlicePlan,
    Snapshot,
    StepMetrics,
    outcome_of,
)
from lathe.engine.outbox import Outbox
from lathe.engine.patience import Patience
from lathe.engine.ports import Jobs, TrainVerbs
from lathe.engine.preparing import AttemptSettings, Preparation, Prepared
from lathe.engine.uploads import Uploads

logger = logging.getLogger(__name__)

# Answers of jobs that will most likely be the same the next time.
REFUSALS = (InvalidArgument, FailedPrecondition, NotFound, OutOfRange, Unimplemented, Internal)
MAX_REFUSALS = 5
# After these no attempt goes on.
_LAST = frozenset({Outcome.SUCCEEDED, Outcome.FAILED, Outcome.CANCELLED})


class AttemptRunner:
    """Lives in the event loop. `run` returns when jobs knows the end, or when the lease is lost."""

    def __init__(
        self,
        *,
        attempt: Attempt,
        engine: TrainVerbs,
        loop: ModelLoop,
        jobs: Jobs,
        store: ObjectStore,
        clock: Clock,
        settings: AttemptSettings,
    ) -> None:
        self._attempt, self._loop, self._jobs, self._clock = attempt, loop, jobs, clock
        self._settings = settings
        self._lease = HeldLease(attempt.attempt_id, attempt.lease_token)
        self._folder = settings.work / attempt.attempt_id
        self._outbox = Outbox(settings.report_rows)
        patience = Patience(f"attempt {attempt.attempt_id}", clock, settings.retry_max_s)
        self._preparation = Preparation(
            attempt, engine, settings, store=store, clock=clock, folder=self._folder, patience=patience
        )
        self._uploads = Uploads(
            attempt,
            self._outbox,
            store=store,
            clock=clock,
            patience=patience,
            cache=settings.cache,
            environment=settings.environment,
        )
        self._ended: Ended | None = None
        self._uploaded = False
        self._refusals = 0
        self._gave_up = False
        self._preparing: asyncio.Task[Prepared] | None = None
        self._wanted: Outcome | None = None
        self._abandoned = False
        self._is_prepared = False
        self._may_report = asyncio.Event()
        self._may_report.set()
        self._changed = asyncio.Event()

    # What the worker tells it.

    def stop(self, outcome: Outcome) -> None:
        """End as CANCELLED, or as RELEASED after a checkpoint."""
        if self._wanted is not None:
            return
        self._wanted = outcome
        if self._preparing is not None and not self._preparing.done():
            self._preparing.cancel()
        else:
            self._end_in_loop(outcome)

    def _end_in_loop(self, outcome: Outcome) -> None:
        if outcome is Outcome.CANCELLED:
            self._loop.cancel_attempt(self._attempt.attempt_id)
        else:
            self._loop.release_attempt(self._attempt.attempt_id)

    def suspend(self, suspended: bool) -> None:
        """The lease ran out by our own clock (train and report nothing), or it was renewed after all."""
        self._loop.suspend_attempt(self._attempt.attempt_id, suspended)
        if suspended:
            self._may_report.clear()
        else:
            self._may_report.set()

    def abandon(self) -> None:
        """Nobody hears our reports any more: return once the checkpoint is stored."""
        self._abandoned = True
        self._may_report.set()
        self._changed.set()

    # The run.

    async def run(self) -> None:
        """Raises Aborted when the lease is another engine's; nothing of the attempt is left running then."""
        uploads: asyncio.Task[None] | None = None
        try:
            prepared = await self._prepared()
            if prepared is not None:
                deliver = self._deliver(asyncio.get_running_loop())
                self._loop.start(self._attempt.attempt_id, prepared.run, deliver)
                # What was said before the loop knew the attempt went past it.
                if not self._may_report.is_set():
                    self._loop.suspend_attempt(self._attempt.attempt_id, True)
                if self._wanted is not None:
                    self._end_in_loop(self._wanted)
                uploads = asyncio.create_task(self._upload_all(prepared.plan))
            await self._report_all()
        finally:
            self._loop.drop_attempt(self._attempt.attempt_id)
            if uploads is not None:
                uploads.cancel()
                await asyncio.gather(uploads, return_exceptions=True)
            await asyncio.to_thread(rmtree, self._folder, ignore_errors=True)

    def _deliver(self, io: asyncio.AbstractEventLoop) -> Callable[[AttemptEvent], None]:
        return lambda event: _call_in(io, self._take, event)

    def _take(self, event: AttemptEvent) -> None:
        if self._gave_up:
            return
        if isinstance(event, StepMetrics):
            self._outbox.metrics.append(event)
        elif isinstance(event, Note):
            self._outbox.notes.append(event)
        elif isinstance(event, Snapshot):
            self._uploads.waiting.append(event)
        else:
            self._ended = event
        self._changed.set()

    async def _prepared(self) -> Prepared | None:
        """None when it ended before it began; `_ended` says how."""
        self._preparing = asyncio.create_task(self._preparation.run())
        if self._wanted is not None:
            self._preparing.cancel()
        try:
            prepared = await self._preparing
        except asyncio.CancelledError:
            if self._wanted is None:
                self._preparing.cancel()
                raise
            self._ended = Ended(self._wanted, 0)
        except Exception as error:
            logger.exception("attempt %s could not be prepared", self._attempt.attempt_id)
            outcome, reason = outcome_of(error)
            self._ended = Ended(outcome, 0, 0, reason)
        else:
            self._tell_of(prepared)
            return prepared
        self._uploaded = True
        return None

    def _tell_of(self, prepared: Prepared) -> None:
        self._is_prepared = True
        found = prepared.found
        self._outbox.first = Progress(slice_plan=prepared.plan, total_steps=prepared.run.total_steps)
        self._outbox.notes.extend(prepared.damaged)
        if found is None:
            self._outbox.notes.extend(self._settings.notes)
        else:
            self._uploads.found(found.stored, found.epochs)
            self._outbox.metrics.extend(found.manifest.unreported)

    # Uploads, in order.

    async def _upload_all(self, plan: SlicePlan) -> None:
        try:
            while True:
                self._changed.clear()
                cancelled = self._ended is not None and self._ended.outcome is Outcome.CANCELLED
                await self._uploads.store(plan, cancelled=cancelled)
                # Without a lease another attempt may be reading them.
                if self._may_report.is_set() and not self._abandoned:
                    await self._uploads.remove_superseded()
                if self._ended is not None and not self._uploads.waiting:
                    break
                await self._changed.wait()
        except Exception as error:
            logger.exception("attempt %s cannot store its checkpoint", self._attempt.attempt_id)
            self._loop.drop_attempt(self._attempt.attempt_id)
            self._ended = Ended(Outcome.RETRYABLE, self._last_step(), 0, outcome_of(error)[1])
        self._uploaded = True

    # Reports, in order.

    async def _report_all(self) -> None:
        wait = self._settings.report_interval_s
        while True:
            await self._may_report.wait()
            try:
                if self._ended is not None and self._uploaded and self._abandoned:
                    return
                await self._report()
                if self._ended is not None and self._uploaded and not self._outbox.pending():
                    await self._complete(self._ended)
                    return
                wait = self._settings.report_interval_s
                self._refusals = 0
            except Aborted:
                raise
            except LatheError as error:
                if isinstance(error, REFUSALS):
                    self._refused(error)
                logger.warning("attempt %s: report not taken: %s", self._attempt.attempt_id, error)
                wait = min(max(wait, 0.5) * 2, self._settings.retry_max_s)
            await self._clock.sleep(wait)

    def _refused(self, error: LatheError) -> None:
        """After several in a row nothing will change: end the attempt, or jobs would renew its lease for ever.

        Raises the error when even that is not taken; the lease runs out then.
        """
        self._refusals += 1
        if self._refusals < MAX_REFUSALS:
            return
        if self._gave_up:
            raise error
        step = self._last_step()
        said = f"jobs refuses the reports of this attempt: {error.message}"
        self._loop.drop_attempt(self._attempt.attempt_id)
        self._gave_up, self._refusals = True, 0
        self._outbox.clear()
        self._uploads.waiting.clear()
        self._ended = Ended(Outcome.RETRYABLE, step, 0, AttemptError("server_error", said))
        self._changed.set()

    def _last_step(self) -> int:
        return self._outbox.metrics[-1].step if self._outbox.metrics else 0

    async def _report(self) -> None:
        while self._outbox.pending():
            report = self._outbox.next_report()
            await self._jobs.report(self._lease, report)
            self._outbox.told(report)
            if report.dropped_checkpoints:
                self._changed.set()

    async def _complete(self, ended: Ended) -> None:
        if ended.outcome is Outcome.SUCCEEDED and self._uploads.final is None:
            ended = Ended(Outcome.RETRYABLE, ended.step)
        await self._jobs.complete(
            self._lease,
            ended.outcome,
            step=ended.step,
            trained_tokens=ended.trained_tokens,
            final_adapter=self._uploads.final if ended.outcome is Outcome.SUCCEEDED else None,
            error=ended.error,
            receipt=self._uploads.receipt if ended.outcome is Outcome.SUCCEEDED else None,
        )
        # Before it was prepared nobody knows here which of the earlier attempts' checkpoints are kept.
        if ended.outcome in _LAST and self._is_prepared:
            await self._uploads.sweep()


def _call_in(
    io: asyncio.AbstractEventLoop, take: Callable[[AttemptEvent], None], event: AttemptEvent
) -> None:
    # The event loop is closed only when the process is about to exit; then nobody is left to hear it.
    if not io.is_closed():
        io.call_soon_threadsafe(take, event)
