"""jobs as a running service: its gRPC door, credentials, and an engine's calls."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from lathe.common.db import Database, migrate
from lathe.common.errors import (
    Aborted,
    FailedPrecondition,
    NotFound,
    PermissionDenied,
    Unavailable,
)
from lathe.common.metrics import Metrics
from lathe.common.rpc.channel import call, connect, stream
from lathe.common.rpc.principal import Principal
from lathe.common.settings import DatabaseSettings, RpcSettings
from lathe.common.trainingconfig import CONFIG_VERSION
from lathe.jobs.main import running
from lathe.jobs.settings import JobsSettings
from lathe.v1 import jobs_pb2, worker_pb2
from lathe.v1.jobs_pb2_grpc import JobsInternalServiceStub, JobsServiceStub
from lathe.v1.worker_pb2_grpc import WorkerServiceStub
from tests.fixtures.servers import free_ports

MEMBER = Principal("acme", "member", "key_1")


@dataclass
class Doors:
    services: grpc.aio.Channel
    engines: grpc.aio.Channel


@pytest.fixture
async def doors(tmp_path: Path) -> AsyncIterator[Doors]:
    url = f"sqlite+aiosqlite:///{tmp_path / 'jobs.sqlite'}"
    database = Database(url)
    await migrate(database, "lathe.jobs")
    await database.close()
    for name in ("service", "engine"):
        (tmp_path / name).write_text(f"{name}-secret")
    away = f"127.0.0.1:{free_ports(1)[0]}"
    settings = JobsSettings(
        rpc=RpcSettings(
            port=0,
            health_port=None,
            service_token_file=tmp_path / "service",
            engine_token_file=tmp_path / "engine",
        ),
        db=DatabaseSettings(url=url),
        accounts_address=away,
        models_address=away,
        datasets_address=away,
    )
    async with running(settings, Metrics()) as service:
        address = f"127.0.0.1:{service.port}"
        async with (
            connect(address, "service-secret") as services,
            connect(address, "engine-secret") as engines,
        ):
            yield Doors(services, engines)


def registration(engine_id: str = "eng-1") -> worker_pb2.RegisterRequest:
    return worker_pb2.RegisterRequest(
        engine_id=engine_id,
        base_model="baseModels/tiny",
        base_digest="d" * 64,
        address="127.0.0.1:9",
        capacity=worker_pb2.Capacity(max_attempts=1, max_sequences=8, device="cpu", threads=2),
    )


async def test_an_engine_registers_and_is_told_to_the_gateway(doors: Doors) -> None:
    workers = WorkerServiceStub(doors.engines)
    terms = await call(workers.Register, registration())
    assert terms.lease_term.ToSeconds() == 15
    watch = stream(JobsInternalServiceStub(doors.services).WatchEngines, jobs_pb2.WatchEnginesRequest())
    first = await anext(aiter(watch))
    assert [(engine.engine_id, engine.base_model) for engine in first.engines] == [
        ("eng-1", "baseModels/tiny")
    ]
    await watch.aclose()  # type: ignore[attr-defined]
    ensured = await call(
        JobsInternalServiceStub(doors.services).EnsureEngine,
        jobs_pb2.EnsureEngineRequest(base_model="baseModels/tiny"),
    )
    assert ensured.ready
    nothing = await call(
        workers.LeaseAttempt, worker_pb2.LeaseAttemptRequest(engine_id="eng-1", config_version=CONFIG_VERSION)
    )
    assert not nothing.HasField("attempt")
    beat = await call(
        workers.Heartbeat, worker_pb2.HeartbeatRequest(engine_id="eng-1", config_version=CONFIG_VERSION)
    )
    assert not beat.reregister
    with pytest.raises(Aborted):
        await call(workers.ReportProgress, worker_pb2.ReportProgressRequest(attempt_id="a", lease_token="b"))
    await call(workers.Deregister, worker_pb2.DeregisterRequest(engine_id="eng-1"))
    with pytest.raises(FailedPrecondition):
        await call(
            workers.LeaseAttempt,
            worker_pb2.LeaseAttemptRequest(engine_id="eng-1", config_version=CONFIG_VERSION),
        )


async def test_an_engine_may_not_call_what_users_call(doors: Doors) -> None:
    with pytest.raises(PermissionDenied):
        await call(JobsServiceStub(doors.engines).GetJob, jobs_pb2.GetJobRequest(name="projects/acme/jobs/x"))


async def test_users_see_their_own_project_only(doors: Doors) -> None:
    jobs = JobsServiceStub(doors.services)
    empty = await call(jobs.ListJobs, jobs_pb2.ListJobsRequest(parent="projects/acme"), principal=MEMBER)
    assert not empty.jobs
    for name in ("projects/acme/jobs/ftjob-x", "projects/beta/jobs/ftjob-x"):
        with pytest.raises(NotFound):
            await call(jobs.GetJob, jobs_pb2.GetJobRequest(name=name), principal=MEMBER)
    request = jobs_pb2.CreateJobRequest(parent="projects/acme", job=jobs_pb2.Job(model="tiny"))
    viewer = Principal("acme", "viewer", "key_2")
    with pytest.raises(PermissionDenied):
        await call(jobs.CreateJob, request, principal=viewer)
    request.job.training_dataset = "projects/acme/datasets/file-1"
    with pytest.raises(Unavailable):
        await call(jobs.CreateJob, request, principal=MEMBER)
