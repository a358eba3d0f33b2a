"""Owners with what the OpenAI door needs beside: lists, deletes and jobs, each as small as it can be."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.empty_pb2 import Empty

from lathe.common.errors import FieldViolation, InvalidArgument, NotFound
from lathe.common.metrics import Metrics
from lathe.common.rpc.auth import ServiceAuthenticator, ServiceCredentials
from lathe.common.rpc.principal import require_project
from lathe.common.rpc.server import Registration, RpcServer, build_server
from lathe.common.settings import RpcSettings
from lathe.v1 import (
    accounts_pb2_grpc,
    datasets_pb2,
    datasets_pb2_grpc,
    engine_pb2,
    engine_pb2_grpc,
    jobs_pb2,
    jobs_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
)
from tests.fakes.owners import Owners

_SERVICES: tuple[tuple[Any, str], ...] = (
    (accounts_pb2_grpc.add_AccountsInternalServiceServicer_to_server, "AccountsInternalService"),
    (datasets_pb2_grpc.add_DatasetsServiceServicer_to_server, "DatasetsService"),
    (datasets_pb2_grpc.add_DatasetsInternalServiceServicer_to_server, "DatasetsInternalService"),
    (models_pb2_grpc.add_ModelsServiceServicer_to_server, "ModelsService"),
    (models_pb2_grpc.add_ModelsInternalServiceServicer_to_server, "ModelsInternalService"),
    (jobs_pb2_grpc.add_JobsServiceServicer_to_server, "JobsService"),
    (jobs_pb2_grpc.add_JobsInternalServiceServicer_to_server, "JobsInternalService"),
    (engine_pb2_grpc.add_EngineServiceServicer_to_server, "EngineService"),
)


def _after(names: list[str], after: str, size: int) -> tuple[list[str], str]:
    start = names.index(after) + 1 if after else 0
    return names[start : start + size], "more" if start + size < len(names) else ""


@dataclass
class AllOwners(Owners, jobs_pb2_grpc.JobsServiceServicer):
    """`jobs`, `events` and `checkpoints` are by job name, `adapters` by resource name; newest last."""

    jobs: dict[str, jobs_pb2.Job] = field(default_factory=dict)
    requests: dict[str, str] = field(default_factory=dict)
    events: dict[str, list[jobs_pb2.JobEvent]] = field(default_factory=dict)
    checkpoints: dict[str, list[jobs_pb2.JobCheckpoint]] = field(default_factory=dict)
    adapters: dict[str, models_pb2.Adapter] = field(default_factory=dict)
    job_errors: list[Exception] = field(default_factory=list)
    numbers: Any = field(default_factory=lambda: itertools.count(1))
    # The engine: seconds before each token, streams that are open, tokens sent by the last one.
    pause_s: float = 0.0
    sampling: int = 0
    sampled: int = 0

    async def start(self, token: str) -> RpcServer:
        registrations = [Registration(add, self, f"lathe.v1.{name}") for add, name in _SERVICES]
        credentials = ServiceAuthenticator(ServiceCredentials.from_tokens({"lathe": token}))
        settings = RpcSettings(port=0, health_port=None, grace_s=0)
        server = build_server(registrations, settings, credentials, Metrics())
        self.address = f"127.0.0.1:{await server.start()}"
        return server

    async def Sample(self, request: Any, context: Any) -> AsyncIterator[engine_pb2.SampleResponse]:
        self.sampling, self.sampled = self.sampling + 1, 0
        try:
            async for item in super().Sample(request, context):
                await asyncio.sleep(self.pause_s)
                self.sampled += 1
                yield item
        finally:
            self.sampling -= 1

    # --- datasets

    async def CreateDataset(self, request: Any, context: Any) -> datasets_pb2.Dataset:
        project = require_project(request.parent)
        if request.dataset.purpose not in ("fine-tune", "user_data"):
            text = "dataset.purpose must be one of fine-tune, user_data."
            raise InvalidArgument(text, violations=[FieldViolation("dataset.purpose", text)])
        name = f"projects/{project}/datasets/file-{next(self.numbers)}"
        made = datasets_pb2.Dataset(name=name, state=datasets_pb2.DATASET_STATE_UPLOADING)
        made.MergeFrom(request.dataset)
        made.create_time.FromSeconds(1_700_000_000)
        self.datasets[name] = made
        return made

    async def CommitUpload(self, request: Any, context: Any) -> datasets_pb2.Dataset:
        found = await super().CommitUpload(request, context)
        await self.store.delete(request.staging_key)
        answer = datasets_pb2.Dataset()
        answer.CopyFrom(found)
        answer.state = datasets_pb2.DATASET_STATE_VALIDATING
        return answer

    async def ListDatasets(self, request: Any, context: Any) -> datasets_pb2.ListDatasetsResponse:
        project = require_project(request.parent)
        names = [
            name
            for name, item in self.datasets.items()
            if name.startswith(f"projects/{project}/") and request.purpose in ("", item.purpose)
        ]
        page, token = _after(names if request.ascending else names[::-1], request.after, request.page_size)
        return datasets_pb2.ListDatasetsResponse(
            datasets=[self.datasets[name] for name in page], next_page_token=token
        )

    async def DeleteDataset(self, request: Any, context: Any) -> Empty:
        await self.GetDataset(request, context)
        del self.datasets[request.name]
        return Empty()

    # --- models

    async def ListBaseModels(self, request: Any, context: Any) -> models_pb2.ListBaseModelsResponse:
        ready = models_pb2.BaseModel(name="baseModels/tiny", state=models_pb2.BASE_MODEL_STATE_READY)
        coming = models_pb2.BaseModel(name="baseModels/next", state=models_pb2.BASE_MODEL_STATE_UPLOADING)
        return models_pb2.ListBaseModelsResponse(base_models=[ready, coming])

    async def ListAdapters(self, request: Any, context: Any) -> models_pb2.ListAdaptersResponse:
        project = require_project(request.parent)
        found = [a for name, a in self.adapters.items() if name.startswith(f"projects/{project}/")]
        return models_pb2.ListAdaptersResponse(adapters=found)

    async def ResolveModel(self, request: Any, context: Any) -> models_pb2.ResolvedModel:
        project = require_project(request.project)
        for name, adapter in self.adapters.items():
            if name.startswith(f"projects/{project}/") and adapter.model_id == request.model_id:
                base = await self.GetBaseModel(request, context)
                return models_pb2.ResolvedModel(base_model=base, adapter=adapter)
        try:
            return await super().ResolveModel(request, context)
        except NotFound as error:
            raise NotFound(
                f"The model {request.model_id!r} was not found.", reason="MODEL_NOT_FOUND"
            ) from error

    async def DeleteAdapter(self, request: Any, context: Any) -> Empty:
        require_project(request.name)
        del self.adapters[request.name]
        return Empty()

    # --- jobs

    async def CreateJob(self, request: Any, context: Any) -> jobs_pb2.Job:
        project = require_project(request.parent)
        if request.request_id in self.requests:
            return self.jobs[self.requests[request.request_id]]
        if request.job.training_dataset not in self.datasets:
            file = request.job.training_dataset.rsplit("/", 1)[-1]
            text = f"The training file {file} does not exist."
            raise NotFound(text, violations=[FieldViolation("job.training_dataset", text)])
        job = jobs_pb2.Job(
            name=f"projects/{project}/jobs/ftjob-{next(self.numbers)}",
            state=jobs_pb2.JOB_STATE_VALIDATING_FILES,
        )
        job.MergeFrom(request.job)
        job.create_time.FromSeconds(1_700_000_000)
        self.jobs[job.name] = job
        self.requests[request.request_id] = job.name
        if self.job_errors:
            raise self.job_errors.pop(0)
        return job

    async def GetJob(self, request: Any, context: Any) -> jobs_pb2.Job:
        require_project(request.name)
        if request.name not in self.jobs:
            raise NotFound(f"{request.name} was not found.")
        return self.jobs[request.name]

    async def ListJobs(self, request: Any, context: Any) -> jobs_pb2.ListJobsResponse:
        project = require_project(request.parent)
        names = [
            name
            for name, job in self.jobs.items()
            if name.startswith(f"projects/{project}/") and request.metadata.items() <= job.metadata.items()
        ]
        after = f"projects/{project}/jobs/{request.after}" if request.after else ""
        page, token = _after(names[::-1], after, request.page_size)
        return jobs_pb2.ListJobsResponse(jobs=[self.jobs[name] for name in page], next_page_token=token)

    async def CancelJob(self, request: Any, context: Any) -> jobs_pb2.Job:
        job = await self.GetJob(request, context)
        job.state = jobs_pb2.JOB_STATE_CANCELLED
        return job

    async def ListJobEvents(self, request: Any, context: Any) -> jobs_pb2.ListJobEventsResponse:
        require_project(request.parent)
        by_id = {event.event_id: event for event in self.events.get(request.parent, [])}
        page, token = _after(list(by_id)[::-1], request.after, request.page_size)
        return jobs_pb2.ListJobEventsResponse(events=[by_id[id_] for id_ in page], next_page_token=token)

    async def ListJobCheckpoints(self, request: Any, context: Any) -> jobs_pb2.ListJobCheckpointsResponse:
        require_project(request.parent)
        return jobs_pb2.ListJobCheckpointsResponse(checkpoints=self.checkpoints.get(request.parent, [])[::-1])

    async def WatchJob(self, request: Any, context: Any) -> Any:
        raise InvalidArgument("No test of the door watches a job.")
        yield
