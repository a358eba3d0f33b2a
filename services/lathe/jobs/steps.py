"""What a job needs from other services: the audit of its files, and the registration of what it made.

Every outside call is safe to repeat and every write is guarded, so a process that dies between two of them costs
nothing. An outage elsewhere makes a job wait; only an answer that cannot change makes it fail.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta

from lathe.common.clock import Clock
from lathe.common.errors import Aborted, LatheError
from lathe.jobs import hyperparameters, lifecycle, messages, model, receipts, transitions
from lathe.jobs.auditing import FINAL, Files, are_ready, audit_files
from lathe.jobs.changes import Changes
from lathe.jobs.estimating import Estimator
from lathe.jobs.figures import JobEstimate
from lathe.jobs.model import AdapterObject, Attempt, Checkpoint, Job, JobError, JobState, NewEvent
from lathe.jobs.ports import AdapterRegistration, Audit, Datasets, JobStore, Models
from lathe.jobs.transitions import Trigger

log = logging.getLogger(__name__)

_AT_ONCE = 8
# A call carries at most 4 MiB; a row has about 50 bytes.
_MAX_RESULT_ROWS = 40_000


@dataclass(frozen=True, slots=True)
class JobSteps:
    """Moves jobs on that wait for another service."""

    store: JobStore
    datasets: Datasets
    models: Models
    changes: Changes
    clock: Clock
    estimator: Estimator
    interval_s: float = 0.5

    async def run(self) -> None:
        """Work until cancelled. Nothing makes it end."""
        while True:
            try:
                await self.run_once()
            except LatheError as error:
                log.warning("Jobs wait: %s", error)
            except Exception:
                log.exception("A job could not be moved on and is tried again.")
            await self.changes.wait(self.interval_s)

    async def run_once(self) -> None:
        """Try every job that waits for another service once. Raises Unavailable while the database is away."""
        async with self.store.read() as session:
            waiting = [
                job
                for job in await session.jobs_in(
                    [JobState.VALIDATING_FILES, JobState.QUEUED, JobState.RUNNING]
                )
                if _to_validate(job) or job.final_attempt_id
            ]
        room = asyncio.Semaphore(_AT_ONCE)
        await asyncio.gather(*(self._try(job, room) for job in waiting))

    async def _try(self, job: Job, room: asyncio.Semaphore) -> None:
        async with room:
            try:
                if _to_validate(job):
                    await self._validate(job)
                else:
                    await self._register(job)
            except LatheError as error:
                log.warning("%s waits: %s", job.name, error)
                await self._apply(
                    job, replace(job, state_reason=f"Waits and is tried again: {error.message}"), []
                )

    async def _apply(self, before: Job, after: Job, events: Sequence[NewEvent]) -> None:
        """Write unless the job was changed meanwhile; then the next pass starts from what it is now."""
        if after == before:
            return
        try:
            async with self.store.write() as session:
                await session.save(before, after, events)
        except Aborted:
            return
        self.changes.ring()

    # --- files ---

    async def _validate(self, job: Job) -> None:
        files = Files(job.project, job.base, job.spec.method, job.training, job.validation)
        audits = await audit_files(self.datasets, files)
        if isinstance(audits, JobError):
            await self._invalid(job, audits)
        elif are_ready(audits):
            await self._queue(job, audits)
        else:
            await self._apply(job, replace(job, state_reason=messages.VALIDATING), [])

    async def _invalid(self, job: Job, error: JobError) -> None:
        changed, events = lifecycle.failed(job, Trigger.FILES_INVALID, error, self.clock.now())
        await self._apply(job, changed, events)

    async def _queue(self, job: Job, audits: Sequence[Audit]) -> None:
        training = audits[0]
        # A rerun brings its own, and the digest of the tokens that it should train on.
        chosen = job.hyperparameters or hyperparameters.resolve(job.spec, job.base, training.rows)
        events = [
            messages.file_warning(noun, warning)
            for audit, noun in zip(audits, ("training file", "validation file"), strict=False)
            for warning in audit.warnings
        ]
        reason = messages.files_valid(len(events))
        if job.rerun_of and job.training_tokens and training.tokens != job.training_tokens:
            events.append(messages.other_tokens(job.rerun_of))
        estimate = await self.estimator.estimate(job, chosen, audits)
        now = self.clock.now()
        changed = replace(
            job,
            state=transitions.apply(job.state, Trigger.FILES_VALID),
            state_reason=reason,
            queue_time=job.queue_time or now,
            estimate=replace(estimate, engines=estimate.engines[:1]),
            estimated_finish_time=finish_time(estimate, now),
            hyperparameters=chosen,
            total_steps=hyperparameters.total_steps(chosen, training.rows),
            training_tokens=training.tokens,
            validation_tokens=audits[1].tokens if len(audits) > 1 else None,
            audit_key=training.key,
        )
        # A queued one has told it already.
        told = [*events, messages.validated()] if job.state is JobState.VALIDATING_FILES else []
        await self._apply(job, changed, told)

    # --- results ---

    async def _register(self, job: Job) -> None:
        async with self.store.read() as session:
            attempt = await session.attempt(job.final_attempt_id)
            checkpoints = await session.checkpoints(job.id)
            metrics = await session.metrics(job.id)
        if attempt is None or attempt.final_adapter is None:
            await self._refused(job, "the attempt that succeeded left no adapter")
            return
        model_id = model.tuned_model_id(job)
        try:
            await self.models.register_adapter(_registration(job, attempt, attempt.final_adapter, job.step))
        except FINAL as error:
            await self._refused(job, error.message)
            return
        gone = [point for point in checkpoints if not await self._register_checkpoint(job, attempt, point)]
        stride = -(-len(metrics) // _MAX_RESULT_ROWS) or 1
        content = messages.results_csv(metrics[::stride])
        result = await self.datasets.create_result_file(
            job.project, "results.csv", content, f"{job.id}-results"
        )
        document = receipts.document(job, attempt)
        kept = await self.datasets.create_result_file(
            job.project, "receipt.json", document.encode(), f"{job.id}-receipt"
        )
        done = replace(
            lifecycle.ended(
                job,
                transitions.apply(job.state, Trigger.REGISTERED),
                "The model is ready to be called.",
                self.clock.now(),
            ),
            fine_tuned_model=model_id,
            result_files=(result, kept),
        )
        events = [
            lifecycle.warning(f"The checkpoint of step {point.step} cannot be read and is left out")
            for point in gone
        ]
        if job.comparison is not None:
            events.append(messages.compared(job.rerun_of, job.comparison))
        try:
            async with self.store.write() as session:
                for point in gone:
                    await session.delete_checkpoint(job.id, point.step)
                await session.save(
                    job, done, [*events, messages.model_created(model_id), messages.succeeded()]
                )
        except Aborted:
            return
        self.changes.ring()

    async def _register_checkpoint(self, job: Job, final: Attempt, point: Checkpoint) -> bool:
        """False if its files are not what was reported; the job is not worse for it."""
        try:
            await self.models.register_adapter(
                _registration(job, final, point.object, point.step, is_final=False)
            )
        except FINAL as error:
            log.warning("The checkpoint of step %s of %s is left out: %s", point.step, job.name, error)
            return False
        return True

    async def _refused(self, job: Job, why: str) -> None:
        error = JobError("server_error", f"The trained model cannot be registered: {why}")
        changed, events = lifecycle.failed(job, Trigger.REGISTRATION_REFUSED, error, self.clock.now())
        await self._apply(job, changed, events)


def finish_time(estimate: JobEstimate, now: datetime) -> datetime | None:
    """When the job will likely be done; None where its time or its wait is not known."""
    engine = estimate.engines[0]
    if engine.seconds is None or engine.queue_seconds is None:
        return None
    return now + timedelta(seconds=engine.queue_seconds + engine.seconds.likely)


def _to_validate(job: Job) -> bool:
    return job.state is JobState.VALIDATING_FILES or (
        job.state is JobState.QUEUED and job.hyperparameters is None
    )


def _registration(
    job: Job, attempt: Attempt, made: AdapterObject, step: int, *, is_final: bool = True
) -> AdapterRegistration:
    chosen = asdict(job.hyperparameters) if job.hyperparameters is not None else {}
    plan = {"slice_plan": asdict(job.slice_plan)} if job.slice_plan is not None else {}
    return AdapterRegistration(
        project=job.project,
        model_id=model.tuned_model_id(job) if is_final else model.checkpoint_model_id(job, step),
        base=job.base,
        object=made,
        is_final=is_final,
        job=job.name,
        # A checkpoint may be of an earlier attempt: its prefix says which.
        attempt=attempt.id if is_final else _attempt_of(made.prefix, attempt.id),
        step=step,
        dataset=job.training,
        audit_key=job.audit_key,
        hyperparameters_json=json.dumps({**chosen, **plan}, sort_keys=True),
        seed=job.seed,
        code_version=attempt.code_version,
        method=job.spec.method,
        parent_model_id=job.parent,
        parent_manifest_sha256=job.initial_adapter.manifest_sha256 if job.initial_adapter else "",
    )


def _attempt_of(prefix: str, otherwise: str) -> str:
    parts = prefix.split("/")
    return parts[2] if len(parts) > 2 and parts[0] == "jobs" else otherwise
