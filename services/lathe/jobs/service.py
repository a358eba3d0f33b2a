"""The use cases of users: create, watch, cancel."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from lathe.jobs import lifecycle, messages, model, transitions
from lathe.jobs.changes import Changes
from lathe.jobs.model import (
    ONE_CLASS,
    TERMINAL_STATES,
    Checkpoint,
    DatasetRef,
    EngineClasses,
    Job,
    JobEvent,
    JobRequest,
    JobState,
    SupervisedSpec,
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
from lathe.jobs.transitions import Trigger

log = logging.getLogger(__name__)

_WAITING = (JobState.VALIDATING_FILES, JobState.QUEUED)
_METHOD = "supervised"
# What another replica wrote is told within a second.
_WATCH_POLL_S = 0.8
_EVENTS_PER_MESSAGE = 500


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

    async def create(self, request: JobRequest, user: User) -> Job:
        """A new job in validating_files, or the one that the same request_id made.

        Raises InvalidArgument, NotFound (model or dataset), FailedPrecondition, ResourceExhausted (quota).
        """
        model.check_request(request)
        earlier = await self._by_request(request)
        if earlier is not None:
            return earlier
        engine_class = self.classes.choose(request.compute.engine_class)
        request = replace(request, compute=replace(request.compute, engine_class=engine_class))
        resolved = await self._resolve(request)
        training = await self._dataset(request, request.training, "training", user)
        validation = (
            await self._dataset(request, request.validation, "validation", user)
            if request.validation
            else None
        )
        quota = await self.accounts.get_quota(request.project)
        job = self._new_job(request, resolved, training, validation)
        events = [messages.created(job.id), messages.validating(request.training, request.validation or None)]
        try:
            async with self.store.write() as session:
                if quota.max_queued_jobs:
                    await self._check_room(session, request.project, quota.max_queued_jobs)
                await session.add_job(job, request.request_id, events)
        except AlreadyExists:
            # Another call with the same request_id was quicker.
            earlier = await self._by_request(request)
            if earlier is None:
                raise
            return earlier
        self.changes.ring()
        return replace(job, event_sequence=len(events))

    async def _by_request(self, request: JobRequest) -> Job | None:
        if not request.request_id:
            return None
        async with self.store.read() as session:
            return await session.job_by_request(request.project, request.request_id)

    async def _resolve(self, request: JobRequest) -> ResolvedModel:
        try:
            resolved = await self.models.resolve(request.project, request.model)
        except NotFound as error:
            raise _field_error(
                NotFound, "job.model", f"The model {request.model!r} does not exist.", "MODEL_NOT_FOUND"
            ) from error
        if not resolved.tunable or _METHOD not in resolved.methods:
            why = resolved.not_tunable_reason or f"it does not offer the method {_METHOD}"
            raise _field_error(
                InvalidArgument,
                "job.model",
                f"The model {request.model!r} cannot be tuned: {why.rstrip('.')}.",
                "MODEL_NOT_TUNABLE",
            )
        model.check_target_modules(request.spec, resolved.base)
        return resolved

    async def _dataset(self, request: JobRequest, dataset: str, kind: str, user: User) -> DatasetRef:
        path = f"job.{kind}_dataset"
        try:
            info = await self.datasets.get(request.project, dataset, user)
        except NotFound as error:
            raise _field_error(NotFound, path, f"The {kind} file {dataset} does not exist.") from error
        _check_dataset(info, kind, path)
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

    def _new_job(
        self,
        request: JobRequest,
        resolved: ResolvedModel,
        training: DatasetRef,
        validation: DatasetRef | None,
    ) -> Job:
        job_id = self.ids.new("ftjob")
        return Job(
            id=job_id,
            project=request.project,
            model=request.model,
            base=resolved.base,
            training=training,
            validation=validation,
            suffix=request.suffix,
            seed=model.choose_seed(job_id) if request.seed is None else request.seed,
            spec=_inherit(request.spec, resolved),
            compute=request.compute,
            metadata=dict(request.metadata),
            initial_adapter=resolved.adapter,
            create_time=self.clock.now(),
            state_reason=messages.VALIDATING,
        )

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
        self, project: str, job_id: str, *, before_step: int | None, limit: int
    ) -> tuple[Job, Sequence[Checkpoint]]:
        """The job and its checkpoints, newest first. Raises NotFound."""
        async with self.store.read() as session:
            job = await _existing(session, project, job_id)
            return job, await session.checkpoints(job_id, before_step=before_step, limit=limit)

    async def checkpoint_step(self, project: str, job_id: str, checkpoint_id: str) -> int:
        """The step of a checkpoint. Raises NotFound for the job, InvalidArgument for the checkpoint."""
        _, found = await self.checkpoints(project, job_id, before_step=None, limit=model.KEPT_CHECKPOINTS)
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


def _inherit(spec: SupervisedSpec, resolved: ResolvedModel) -> SupervisedSpec:
    """A job on a tuned model goes on with that adapter, so its LoRA shape is given.

    Raises InvalidArgument if another shape was asked for.
    """
    lora: SupervisedSpec | None = resolved.lora
    if resolved.adapter is None or lora is None:
        return spec
    path = "job.method.supervised.lora"
    if spec.lora_r not in (None, lora.lora_r):
        raise _field_error(
            InvalidArgument, f"{path}.r", f"{path}.r must be {lora.lora_r}, as in the adapter to start from."
        )
    if spec.target_modules and set(spec.target_modules) != set(lora.target_modules):
        text = f"{path}.target_modules must be those of the adapter to start from."
        raise _field_error(InvalidArgument, f"{path}.target_modules", text)
    if spec.lora_alpha not in (None, lora.lora_alpha):
        text = f"{path}.lora_alpha must be {lora.lora_alpha}, as in the adapter to start from."
        raise _field_error(InvalidArgument, f"{path}.lora_alpha", text)
    return replace(spec, lora_r=lora.lora_r, lora_alpha=lora.lora_alpha, target_modules=lora.target_modules)
