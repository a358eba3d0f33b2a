"""jobs over gRPC: proto to model and back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime
from typing import NoReturn

from google.protobuf.duration_pb2 import Duration

from lathe.common import names
from lathe.common.errors import FieldViolation, InvalidArgument, PermissionDenied
from lathe.common.pages import coerce_page_size, decode_page_token, encode_page_token
from lathe.common.rpc.context import ServicerContext
from lathe.common.rpc.principal import Role, current_caller, require_project, require_role
from lathe.jobs import estimateprotos, protos
from lathe.jobs.directory import EngineDirectory
from lathe.jobs.estimating import EstimatesService
from lathe.jobs.ports import User
from lathe.jobs.reports import ReportsService
from lathe.jobs.service import JobsService
from lathe.jobs.workers import WorkersService
from lathe.v1 import jobs_pb2 as pb
from lathe.v1 import jobs_pb2_grpc as pb_grpc
from lathe.v1 import worker_pb2, worker_pb2_grpc


class JobsServicer(pb_grpc.JobsServiceServicer):
    """The public methods."""

    def __init__(self, service: JobsService, estimates: EstimatesService) -> None:
        self._service = service
        self._estimates = estimates

    async def CreateJob(self, request: pb.CreateJobRequest, context: ServicerContext) -> pb.Job:
        require_project(request.parent, field="parent")
        require_role(Role.MEMBER)
        return protos.job_pb(await self._service.create(protos.job_request(request), _user()))

    async def EstimateJob(
        self, request: pb.EstimateJobRequest, context: ServicerContext
    ) -> pb.EstimateJobResponse:
        require_project(request.parent, field="parent")
        require_role(Role.MEMBER)
        asked = protos.job_request(pb.CreateJobRequest(parent=request.parent, job=request.job))
        replaced = estimateprotos.replaced(request)
        return estimateprotos.answer_pb(await self._estimates.estimate(asked, replaced, _user()))

    async def GetJob(self, request: pb.GetJobRequest, context: ServicerContext) -> pb.Job:
        return protos.job_pb(await self._service.get(*_job_ids(request.name, "name")))

    async def ListJobs(self, request: pb.ListJobsRequest, context: ServicerContext) -> pb.ListJobsResponse:
        project = require_project(request.parent, field="parent")
        names.PROJECT.parse(request.parent, field="parent")
        size = coerce_page_size(request.page_size)
        query: dict[str, object] = {
            "parent": request.parent,
            "states": list(request.states),
            "metadata": dict(request.metadata),
        }
        jobs = await self._service.list(
            project,
            states=protos.states(list(request.states)),
            metadata=dict(request.metadata),
            after=await self._job_cursor(request, project, query),
            limit=size + 1,
        )
        token = ""
        if len(jobs) > size:
            last = jobs[size - 1]
            token = encode_page_token([last.create_time.isoformat(), last.id], query)
        return pb.ListJobsResponse(jobs=[protos.job_pb(job) for job in jobs[:size]], next_page_token=token)

    async def _job_cursor(
        self, request: pb.ListJobsRequest, project: str, query: dict[str, object]
    ) -> tuple[datetime, str] | None:
        _one_cursor(request.after, request.page_token)
        if request.after:
            last = await self._service.get(project, names.last_id(request.after))
            return last.create_time, last.id
        cursor = decode_page_token(request.page_token, query)
        return (datetime.fromisoformat(str(cursor[0])), str(cursor[1])) if cursor else None

    async def CancelJob(self, request: pb.CancelJobRequest, context: ServicerContext) -> pb.Job:
        ids = _job_ids(request.name, "name")
        require_role(Role.MEMBER)
        return protos.job_pb(await self._service.cancel(*ids))

    async def GetJobReceipt(
        self, request: pb.GetJobReceiptRequest, context: ServicerContext
    ) -> pb.JobReceipt:
        job, document = await self._service.receipt(*_job_ids(request.name, "name"))
        return pb.JobReceipt(job=job.name, document=document)

    async def RerunJob(self, request: pb.RerunJobRequest, context: ServicerContext) -> pb.Job:
        ids = _job_ids(request.name, "name")
        require_role(Role.MEMBER)
        return protos.job_pb(await self._service.rerun(*ids, request.request_id, _user()))

    async def ListJobEvents(
        self, request: pb.ListJobEventsRequest, context: ServicerContext
    ) -> pb.ListJobEventsResponse:
        project, job = _job_ids(request.parent, "parent")
        size = coerce_page_size(request.page_size)
        _one_cursor(request.after, request.page_token)
        query = {"parent": request.parent}
        cursor = decode_page_token(request.page_token, query)
        before = int(cursor[0]) if cursor else None
        if request.after:
            before = await self._service.event_sequence(project, job, request.after)
        events = await self._service.events(project, job, before=before, limit=size + 1)
        token = encode_page_token([events[size - 1].sequence], query) if len(events) > size else ""
        return pb.ListJobEventsResponse(
            events=[protos.event_pb(event) for event in events[:size]], next_page_token=token
        )

    async def WatchJob(
        self, request: pb.WatchJobRequest, context: ServicerContext
    ) -> AsyncIterator[pb.WatchJobResponse]:
        project, job_id = _job_ids(request.name, "name")
        async for job, events in self._service.watch(project, job_id, request.after_sequence):
            yield pb.WatchJobResponse(
                job=protos.job_pb(job), events=[protos.event_pb(event) for event in events]
            )

    async def ListJobCheckpoints(
        self, request: pb.ListJobCheckpointsRequest, context: ServicerContext
    ) -> pb.ListJobCheckpointsResponse:
        project, job_id = _job_ids(request.parent, "parent")
        size = coerce_page_size(request.page_size)
        _one_cursor(request.after, request.page_token)
        query = {"parent": request.parent}
        cursor = decode_page_token(request.page_token, query)
        before = int(cursor[0]) if cursor else None
        if request.after:
            before = await self._service.checkpoint_step(project, job_id, names.last_id(request.after))
        job, found = await self._service.checkpoints(project, job_id, before_step=before, limit=size + 1)
        token = encode_page_token([found[size - 1].step], query) if len(found) > size else ""
        return pb.ListJobCheckpointsResponse(
            checkpoints=[protos.checkpoint_pb(job, point) for point in found[:size]], next_page_token=token
        )


class JobsInternalServicer(pb_grpc.JobsInternalServiceServicer):
    """What the gateway calls."""

    def __init__(self, directory: EngineDirectory) -> None:
        self._directory = directory

    async def WatchEngines(
        self, request: pb.WatchEnginesRequest, context: ServicerContext
    ) -> AsyncIterator[pb.WatchEnginesResponse]:
        async for engines in self._directory.watch():
            yield pb.WatchEnginesResponse(engines=[protos.engine_pb(engine) for engine in engines])

    async def EnsureEngine(
        self, request: pb.EnsureEngineRequest, context: ServicerContext
    ) -> pb.EnsureEngineResponse:
        (base_id,) = names.BASE_MODEL.parse(request.base_model, field="base_model")
        return pb.EnsureEngineResponse(ready=await self._directory.ensure(base_id))


class WorkerServicer(worker_pb2_grpc.WorkerServiceServicer):
    """What engines call."""

    def __init__(self, workers: WorkersService, reports: ReportsService) -> None:
        self._workers, self._reports = workers, reports

    async def Register(
        self, request: worker_pb2.RegisterRequest, context: ServicerContext
    ) -> worker_pb2.RegisterResponse:
        terms = await self._workers.register(protos.registration(request))
        return worker_pb2.RegisterResponse(
            heartbeat_interval=_duration(terms.heartbeat_s), lease_term=_duration(terms.lease_term_s)
        )

    async def Heartbeat(
        self, request: worker_pb2.HeartbeatRequest, context: ServicerContext
    ) -> worker_pb2.HeartbeatResponse:
        answer = await self._workers.heartbeat(protos.beat(request))
        return worker_pb2.HeartbeatResponse(
            directives=[
                worker_pb2.Directive(attempt_id=attempt, action=protos.ACTIONS[action])
                for attempt, action in answer.directives
            ],
            reregister=answer.reregister,
            shut_down=answer.shut_down,
        )

    async def LeaseAttempt(
        self, request: worker_pb2.LeaseAttemptRequest, context: ServicerContext
    ) -> worker_pb2.LeaseAttemptResponse:
        lease = await self._workers.lease(request.engine_id, request.config_version)
        return worker_pb2.LeaseAttemptResponse(
            attempt=protos.attempt_pb(lease) if lease is not None else None
        )

    async def ReportProgress(
        self, request: worker_pb2.ReportProgressRequest, context: ServicerContext
    ) -> worker_pb2.ReportProgressResponse:
        await self._reports.report(protos.progress_of(request))
        return worker_pb2.ReportProgressResponse()

    async def CompleteAttempt(
        self, request: worker_pb2.CompleteAttemptRequest, context: ServicerContext
    ) -> worker_pb2.CompleteAttemptResponse:
        await self._reports.complete(protos.completion(request))
        return worker_pb2.CompleteAttemptResponse()

    async def Deregister(
        self, request: worker_pb2.DeregisterRequest, context: ServicerContext
    ) -> worker_pb2.DeregisterResponse:
        await self._workers.deregister(request.engine_id)
        return worker_pb2.DeregisterResponse()


def _job_ids(name: str, field: str) -> tuple[str, str]:
    project, job = names.JOB.parse(name, field=field)
    require_project(name, field=field)
    return project, job


def _user() -> User:
    principal = current_caller().principal
    if principal is None:
        raise PermissionDenied("A job is made for a user; this call has no principal.")
    return User(principal.project, principal.role, principal.key_id)


def _one_cursor(after: str, page_token: str) -> None:
    if after and page_token:
        _refuse("after", "after cannot be used together with page_token.")


def _refuse(path: str, message: str) -> NoReturn:
    raise InvalidArgument(message, violations=[FieldViolation(path, message)])


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromMilliseconds(round(seconds * 1000))
    return duration
