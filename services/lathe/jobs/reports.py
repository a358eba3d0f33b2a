"""What engines say of their attempts: progress and the end. All under fencing tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lathe.common.clock import Clock
from lathe.common.errors import Aborted, FieldViolation, InvalidArgument
from lathe.common.ids import IdFactory
from lathe.jobs import lifecycle, messages
from lathe.jobs.changes import Changes
from lathe.jobs.model import (
    AdapterObject,
    Attempt,
    Checkpoint,
    EngineReceipt,
    Job,
    JobError,
    Outcome,
    StepMetrics,
    WeightComparison,
)
from lathe.jobs.ports import JobSession, JobStore
from lathe.jobs.progress import DAMAGED, Note, Progress, ReportedCheckpoint, estimate, note_events, progressed
from lathe.jobs.speeds import begun, continued, pass_memory
from lathe.jobs.workers import LEASE_LOST, stopping

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Completion:
    attempt_id: str
    lease_token: str
    outcome: Outcome
    final_adapter: AdapterObject | None = None
    trained_tokens: int = 0
    error: JobError | None = None
    step: int = 0
    receipt: EngineReceipt | None = None
    comparison: WeightComparison | None = None


@dataclass(frozen=True, slots=True)
class ReportsService:
    """What an engine can do with the attempts that it holds."""

    store: JobStore
    changes: Changes
    clock: Clock
    ids: IdFactory

    async def report(self, progress: Progress) -> None:
        """Keep metrics, checkpoints and the plan. Safe to repeat.

        Raises Aborted for a stale token, InvalidArgument for a checkpoint that lies outside the job's folder.
        """
        now = self.clock.now()
        async with self.store.write() as session:
            attempt, job = await _current(session, progress.attempt_id, progress.lease_token)
            for checkpoint in progress.checkpoints:
                _check_place(checkpoint.object, job.output_prefix, "checkpoints.object.prefix")
            changed, events = progressed(job, attempt, progress)
            measured = [*progress.metrics, *(c.metrics for c in progress.checkpoints if c.metrics)]
            fresh = await session.put_metrics(job.id, measured)
            by_step = {row.step: row for row in measured}
            events += [messages.step(by_step[step]) for step in sorted(fresh)]
            for checkpoint in sorted(progress.checkpoints, key=lambda one: one.step):
                created = messages.checkpoint_created(checkpoint.step)
                if checkpoint.step in progress.dropped_checkpoints:
                    # It came and went while jobs was away: the story has it all the same, once.
                    if not await session.has_event(job.id, created):
                        events.append(created)
                elif await session.put_checkpoint(self._checkpoint(job, checkpoint)):
                    events.append(created)
                elif await _replaces(session, attempt, checkpoint, progress.notes):
                    await session.replace_checkpoint(job.id, checkpoint.step, checkpoint.object)
            for step in progress.dropped_checkpoints:
                await session.delete_checkpoint(job.id, step)
            for told in note_events(progress.notes):
                if not await session.has_event(job.id, told):
                    events.append(told)
            events.sort(key=lambda event: event.step)
            fresh_rows = [by_step[step] for step in fresh]
            await self._keep_speed(session, attempt, changed, fresh_rows, progress.notes)
            trained = sum(by_step[step].trained_tokens for step in fresh)
            changed = replace(
                changed,
                trained_tokens=changed.trained_tokens + trained,
                estimated_finish_time=estimate(changed, progress.metrics, now),
            )
            await session.save(job, changed, events)
        self.changes.ring()

    async def _keep_speed(
        self,
        session: JobSession,
        attempt: Attempt,
        job: Job,
        fresh: Sequence[StepMetrics],
        notes: Sequence[Note],
    ) -> None:
        """Add steps that were not heard of before to what the attempt has done, and what its heaviest slice takes."""
        timed = [row for row in fresh if row.step_seconds > 0 and row.tokens_per_second > 0]
        memory = pass_memory(notes)
        if not timed and memory is None:
            return
        engine = await session.engine(attempt.engine_id)
        known = await session.speed(attempt.id) or begun(attempt, job, engine, self.clock.now())
        if memory is not None:
            known = replace(known, pass_bytes=memory[0], pass_tokens=memory[1])
        await session.put_speed(continued(known, timed, engine, self.clock.now()))

    def _checkpoint(self, job: Job, reported: ReportedCheckpoint) -> Checkpoint:
        return Checkpoint(
            self.ids.new("ftckpt"),
            job.id,
            reported.step,
            self.clock.now(),
            reported.object,
            reported.metrics,
        )

    async def complete(self, completion: Completion) -> None:
        """Record how the attempt ended. Safe to repeat.

        Raises Aborted for a stale token, InvalidArgument for a success without an adapter in the attempt's folder.
        """
        if completion.outcome is Outcome.SUCCEEDED and completion.final_adapter is None:
            path = "final_adapter"
            text = "final_adapter is required with the outcome SUCCEEDED."
            raise InvalidArgument(text, violations=[FieldViolation(path, text)])
        now = self.clock.now()
        async with self.store.write() as session:
            earlier = await session.attempt(completion.attempt_id)
            if (
                earlier is not None
                and earlier.outcome is completion.outcome
                and earlier.lease_token == completion.lease_token
            ):
                return
            # The engine before its attempt, as everywhere.
            engine = await session.engine(earlier.engine_id, lock=True) if earlier is not None else None
            attempt, job = await _current(session, completion.attempt_id, completion.lease_token)
            if completion.final_adapter is not None:
                _check_place(completion.final_adapter, attempt.prefix, "final_adapter.prefix")
            done = replace(
                attempt,
                outcome=completion.outcome,
                end_time=now,
                final_adapter=completion.final_adapter,
                trained_tokens=completion.trained_tokens,
                error=completion.error,
                step=completion.step,
                receipt=completion.receipt,
            )
            if not await session.end_attempt(done):
                raise _stale(completion.attempt_id)
            if engine is not None and completion.outcome is Outcome.LOST:
                # It has lost a worker, for which it cannot get another one.
                await session.put_engine(stopping(engine, now))
            changed, events = lifecycle.after_attempt(job, done, "", now)
            if completion.comparison is not None:
                changed = replace(changed, comparison=completion.comparison)
            await session.save(job, changed, events)
        log.info("Attempt %s of %s ended: %s.", attempt.number, job.name, completion.outcome)
        self.changes.ring()


def _check_place(made: AdapterObject, folder: str, field: str) -> None:
    """An engine may hand over what is its own only: deleting an adapter deletes its folder."""
    if not made.prefix.startswith(folder) or ".." in made.prefix.split("/"):
        text = f"{field} is {made.prefix!r}, which is not below {folder}."
        raise InvalidArgument(text, violations=[FieldViolation(field, text)])


def _stale(attempt_id: str) -> Aborted:
    return Aborted(
        f"{attempt_id} does not hold its lease any more; stop it and report nothing more.", reason=LEASE_LOST
    )


async def _current(session: JobSession, attempt_id: str, token: str) -> tuple[Attempt, Job]:
    """The attempt and its job, locked, if `token` is the valid one. Raises Aborted otherwise."""
    attempt = await session.attempt(attempt_id)
    if attempt is None or not token or attempt.lease_token != token or attempt.outcome is not None:
        raise _stale(attempt_id)
    job = await session.job(attempt.job_id, lock=True)
    if job is None or job.attempt_id != attempt_id or job.lease_token != token:
        raise _stale(attempt_id)
    return attempt, job


async def _replaces(
    session: JobSession, attempt: Attempt, reported: ReportedCheckpoint, notes: Sequence[Note]
) -> bool:
    """Whether the attempt has written the checkpoint anew because the one that jobs has of this step is damaged."""
    if not reported.object.prefix.startswith(attempt.prefix):
        return False
    if any((note.step, note.kind) == (reported.step, DAMAGED) for note in notes):
        return True
    return await session.has_note(attempt.job_id, reported.step, DAMAGED)
