"""The use cases of users: create, watch, cancel."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from lathe.common.clock import Clock
from lathe.common.errors import (
    AlreadyExists,
    FailedPrecondition,
    FieldViolation,
    InvalidArgument,
    LatheError,
    NotFound,
    ResourceExhausted,
)
from lathe.common.ids import IdFactory
from lathe.jobs import lifecycle, messages, model, receipts, requests, training, transitions
from lathe.jobs.changes import Changes
from lathe.jobs.gangs import Gangs
from lathe.jobs.model import (
    ONE_CLASS,
    TERMINAL_STATES,
    Attempt,
    Checkpoint,
    ComputeSpec,
    DatasetRef,
    EngineClasses,
    Job,
    JobEvent,
    JobState,
    NewEvent,
)
from lathe.jobs.ports import (
    Accounts,
    DatasetInfo,
    Datasets,
    DatasetState,
    JobSession,
    JobStore,
    Models,
    ResolvedModel,
    User,
)
from lathe.jobs.requests import JobRequest
from lathe.jobs.training import TrainingSpec
from lathe.jobs.transitions import Trigger

log = logging.getLogger(__name__)

_WAITING = (JobState.VALIDATING_FILES, JobState.QUEUED)
# What another replica wrote is told within a second.
_WATCH_POLL_S = 0.8
_EVENTS_PER_MESSAGE = 500


@dataclass(frozen=True, slots=True)
class CheckedRequest:
    """What a request names. spec: with what a tuned model brings; compute: with the operator's default."""

    model: ResolvedModel
    spec: TrainingSpec
    compute: ComputeSpec
    training: DatasetRef
    validation: DatasetRef | None


@dataclass(frozen=True, slots=True)
class JobsService:
    """What users can do with jobs. Names of jobs are (project, job id) pairs here."""

    store: JobStore
    accounts: Accounts
    models: Models
    datasets: Datasets
    changes: Changes
    clock: Clock
    ids: IdFactory
    classes: EngineClasses = ONE_CLASS
    gangs: Gangs = field(default_factory=Gangs)

    async def create(self, request: JobRequest, user: User) -> Job:
        """A new job in validating_files, or the one that the same request_id made.

        Raises InvalidArgument (also for a request_id of another call), NotFound (model or dataset),
        FailedPrecondition, ResourceExhausted (quota).
        """
        requests.check_request(request)
        earlier = await self._by_request(request.project, request.request_id)
        if earlier is not None:
            return earlier
        job = self.draft(request, await self.checked(request, user))
        return await self._add(job, messages.created(job.id), request.request_id)

    async def checked(self, request: JobRequest, user: User) -> CheckedRequest:
        """What a request names, if a job can be made of it. Raises as `create` does, quotas apart."""
        requests.check_request(request)
        compute = request.compute
        await self.gangs.check(compute.workers)
        # Workers wait for each other at every step: they are one job's alone.
        compute = replace(
            compute,
            engine_class=self.classes.choose(compute.engine_class),
            dedicated=compute.dedicated or compute.workers > 1,
        )
        resolved = await self._resolve(request)
        spec, project = request.spec, request.project
        examples = await self._dataset(project, request.training, "training", spec, user, model=resolved)
        validation = (
            await self._dataset(project, request.validation, "validation", spec, user, model=resolved)
            if request.validation
            else None
        )
        return CheckedRequest(resolved, _inherit(spec, resolved), compute, examples, validation)

    async def _add(self, job: Job, created: NewEvent, request_id: str) -> Job:
        """Keep a new job, if the quota has room; or what another call with its request_id made meanwhile."""
        quota = await self.accounts.get_quota(job.project)
        validation = job.validation.id if job.validation is not None else None
        events = [created, messages.validating(job.training.id, validation)]
        try:
            async with self.store.write() as session:
                if quota.max_queued_jobs:
                    await self._check_room(session, job.project, quota.max_queued_jobs)
                await session.add_job(job, request_id, events)
        except AlreadyExists:
            earlier = await self._by_request(job.project, request_id, job.rerun_of)
            if earlier is None:
                raise
            return earlier
        self.changes.ring()
        return replace(job, event_sequence=len(events))

    async def _by_request(self, project: str, request_id: str, rerun_of: str = "") -> Job | None:
        """The job that the same call made. Raises InvalidArgument if another call used the request_id."""
        if not request_id:
            return None
        async with self.store.read() as session:
            earlier = await session.job_by_request(project, request_id)
        if earlier is not None and earlier.rerun_of != rerun_of:
            text = f"request_id was used by another call, which made {earlier.name}; choose a new one."
            raise _field_error(InvalidArgument, "request_id", text)
        return earlier

    async def _resolve_model(self, project: str, model_id: str) -> ResolvedModel:
        try:
            return await self.models.resolve(project, model_id)
        except NotFound as error:
            shown = "`lathe models list`, or GET /v1/models, shows those there are."
            text = f"The model {model_id!r} does not exist; {shown}"
            raise _field_error(NotFound, "job.model", text, "MODEL_NOT_FOUND") from error

    async def _resolve(self, request: JobRequest) -> ResolvedModel:
        resolved = await self._resolve_model(request.project, request.model)
        method = request.spec.method
        if not resolved.tunable or method not in resolved.methods:
            why = resolved.not_tunable_reason or f"it does not offer the method {method}"
            raise _field_error(
                InvalidArgument,
                "job.model",
                f"The model {request.model!r} cannot be tuned: {why.rstrip('.')}.",
                "MODEL_NOT_TUNABLE",
            )
        base = resolved.base
        training.check_target_modules(request.spec, base.id, base.target_modules)
        return resolved

    async def _dataset(
        self, project: str, dataset: str, kind: str, spec: TrainingSpec, user: User, *, model: ResolvedModel
    ) -> DatasetRef:
        path = f"job.{kind}_dataset"
        try:
            info = await self.datasets.get(project, dataset, user)
        except NotFound as error:
            raise _field_error(NotFound, path, f"The {kind} file {dataset} does not exist.") from error
        _check_dataset(info, kind, path)
        training.check_format(spec, info.format, path, f"the {kind} file {dataset}")
        if not model.chats:
            training.check_needs_no_template(model.base.id, info.format, path, f"the {kind} file {dataset}")
        return DatasetRef(dataset, info.sha256)

    async def _check_room(self, session: JobSession, project: str, limit: int) -> None:
        await session.lock_project(project)
        waiting = await session.count_jobs(project, _WAITING)
        if waiting >= limit:
            raise ResourceExhausted(
                f"{waiting} jobs of this project wait already and its quota is {limit}; "
                "try again when one has started, or cancel one.",
                reason="JOB_QUOTA",
                retry_after=60.0,
            )

    def draft(self, request: JobRequest, checked: CheckedRequest) -> Job:
        """The job that the request asks for; it is not kept."""
        resolved = checked.model
        job_id = self.ids.new("ftjob")
        return Job(
            id=job_id,
            project=request.project,
            model=request.model,
            base=resolved.base,
            training=checked.training,
            validation=checked.validation,
            suffix=request.suffix,
            seed=model.choose_seed(job_id) if request.seed is None else request.seed,
            spec=checked.spec,
            compute=checked.compute,
            metadata=dict(request.metadata),
            parent_model=resolved.model_id,
            initial_adapter=resolved.adapter,
            create_time=self.clock.now(),
            state_reason=messages.VALIDATING,
        )

    async def receipt(self, project: str, job_id: str) -> tuple[Job, str]:
        """The job and its receipt, a JSON document. Raises NotFound; FailedPrecondition until it has succeeded."""
        job, attempt = await self._finished(project, job_id)
        return job, receipts.document(job, attempt)

    async def _finished(self, project: str, job_id: str) -> tuple[Job, Attempt]:
        async with self.store.read() as session:
            job = await _existing(session, project, job_id)
            attempt = await session.attempt(job.final_attempt_id) if job.final_attempt_id else None
        if job.state is not JobState.SUCCEEDED or attempt is None:
            raise FailedPrecondition(
                f"{job.name} is {job.state.replace('_', ' ')}; a receipt is written when a job has succeeded.",
                reason="JOB_STATE",
            )
        return job, attempt

    async def rerun(self, project: str, job_id: str, request_id: str, user: User) -> Job:
        """A new job that repeats one that has succeeded, from its receipt; or what the same request_id made.

        It runs on an engine of its own, where nothing else changes the order of its sums. Raises NotFound (job, model,
        dataset), FailedPrecondition (no receipt; the model is another by now), InvalidArgument (as many workers cannot
        be had any more; a request_id that is too long, or of another call), ResourceExhausted.
        """
        requests.check_request_id(request_id)
        earlier = await self._by_request(project, request_id, job_id)
        if earlier is not None:
            return earlier
        first, attempt = await self._finished(project, job_id)
        resolved = await self._resolve_model(project, first.model)
        if (resolved.base.digest, resolved.adapter) != (first.base.digest, first.initial_adapter):
            raise FailedPrecondition(
                f"The model {first.model!r} is not what {first.name} started from any more.",
                reason="MODEL_CHANGED",
            )
        for kind, dataset in (("training", first.training), ("validation", first.validation)):
            if dataset is not None:
                await self._dataset(project, dataset.id, kind, first.spec, user, model=resolved)
        await self.gangs.check(first.compute.workers)
        job = receipts.rerun(first, attempt, self.ids.new("ftjob"), self.clock.now())
        return await self._add(job, messages.rerun_created(job.id, first.id), request_id)

    async def get(self, project: str, job_id: str) -> Job:
        """Raises NotFound, the same for an unknown and for another project's job."""
        async with self.store.read() as session:
            return await _existing(session, project, job_id)

    async def list(
        self,
        project: str,
        *,
        states: Sequence[JobState],
        metadata: Mapping[str, str],
        after: tuple[datetime, str] | None,
        limit: int,
    ) -> Sequence[Job]:
        """Newest first."""
        async with self.store.read() as session:
            return await session.list_jobs(
                project, states=states, metadata=sorted(metadata.items()), after=after, limit=limit
            )

    async def cancel(self, project: str, job_id: str) -> Job:
        """At once while no engine has it, otherwise cancelling until the engine has stopped.

        Cancelling twice is fine. Raises NotFound; FailedPrecondition once the job ended otherwise, or once its
        training is complete and only the registration is left.
        """
        async with self.store.write() as session:
            job = await _existing(session, project, job_id, lock=True)
            if job.state in (JobState.CANCELLED, JobState.CANCELLING):
                return job
            if job.final_attempt_id:
                raise FailedPrecondition(
                    f"{job.name} has completed its training and cannot be cancelled any more.",
                    reason="JOB_STATE",
                )
            state = transitions.apply(job.state, Trigger.CANCEL)
            if state is JobState.CANCELLED:
                after = lifecycle.ended(job, state, "Cancelled by the user.", self.clock.now())
                saved = await session.save(job, after, [messages.cancelled()])
            else:
                reason = "The engine is being told to stop."
                saved = await session.save(job, replace(job, state=state, state_reason=reason))
        self.changes.ring()
        return saved

    async def events(
        self, project: str, job_id: str, *, before: int | None, limit: int
    ) -> Sequence[JobEvent]:
        """Newest first, of a lower sequence than `before`. Raises NotFound."""
        async with self.store.read() as session:
            await _existing(session, project, job_id)
            return await session.events(job_id, before=before, limit=limit)

    async def event_sequence(self, project: str, job_id: str, event_id: str) -> int:
        """Where an event stands. Raises NotFound for the job, InvalidArgument for the event."""
        async with self.store.read() as session:
            await _existing(session, project, job_id)
            event = await session.event(job_id, event_id)
        if event is None:
            raise _field_error(InvalidArgument, "after", f"{job_id} has no event {event_id}.")
        return event.sequence

    async def checkpoints(
        self, project: str, job_id: str, *, before_step: int | None, limit: int | None
    ) -> tuple[Job, Sequence[Checkpoint]]:
        """The job and its checkpoints, newest first. Raises NotFound."""
        async with self.store.read() as session:
            job = await _existing(session, project, job_id)
            return job, await session.checkpoints(job_id, before_step=before_step, limit=limit)

    async def checkpoint_step(self, project: str, job_id: str, checkpoint_id: str) -> int:
        """The step of a checkpoint. Raises NotFound for the job, InvalidArgument for the checkpoint."""
        _, found = await self.checkpoints(project, job_id, before_step=None, limit=None)
        for checkpoint in found:
            if checkpoint.id == checkpoint_id:
                return checkpoint.step
        raise _field_error(InvalidArgument, "after", f"{job_id} has no checkpoint {checkpoint_id}.")

    async def watch(
        self, project: str, job_id: str, after_sequence: int
    ) -> AsyncIterator[tuple[Job, Sequence[JobEvent]]]:
        """The job with its events from `after_sequence` on; again on every change, until it has ended.

        Raises NotFound.
        """
        seen, sequence = 0, after_sequence
        while True:
            async with self.store.read() as session:
                job = await _existing(session, project, job_id)
                events = await session.events(job_id, after=sequence, limit=_EVENTS_PER_MESSAGE)
            if job.version != seen or events:
                yield job, events
            seen = job.version
            sequence = events[-1].sequence if events else sequence
            if len(events) == _EVENTS_PER_MESSAGE:
                continue
            if job.state in TERMINAL_STATES:
                return
            await self.changes.wait(_WATCH_POLL_S)


async def _existing(session: JobSession, project: str, job_id: str, *, lock: bool = False) -> Job:
    job = await session.job(job_id, lock=lock)
    if job is None or job.project != project:
        raise NotFound(f"projects/{project}/jobs/{job_id} was not found.")
    return job


def _field_error(kind: type[LatheError], path: str, message: str, reason: str | None = None) -> LatheError:
    return kind(message, reason=reason, violations=[FieldViolation(path, message)])


def _check_dataset(info: DatasetInfo, kind: str, path: str) -> None:
    if info.state is DatasetState.DELETING:
        raise _field_error(NotFound, path, f"The {kind} file {info.id} does not exist.")
    if info.purpose != "fine-tune":
        raise _field_error(
            InvalidArgument,
            path,
            f"The {kind} file {info.id} has the purpose {info.purpose!r}; upload it with 'fine-tune'.",
            "WRONG_PURPOSE",
        )
    if info.state is DatasetState.UPLOADING:
        raise _field_error(
            FailedPrecondition, path, f"The {kind} file {info.id} has not been uploaded completely."
        )
    if info.state is DatasetState.ERROR:
        error = messages.file_error(f"{kind}_file", info.id, info.findings, info.finding_count)
        raise _field_error(InvalidArgument, path, error.message, error.code.upper())


def _inherit(spec: TrainingSpec, resolved: ResolvedModel) -> TrainingSpec:
    """Raises InvalidArgument if the adapter to start from is of another shape than what was asked for."""
    if resolved.adapter is None or resolved.lora is None:
        return spec
    return training.inherit(spec, resolved.lora)
