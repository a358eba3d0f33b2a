"""Public methods through a real gateway server to a real owner: bytes, metadata, status, cancel, deadline."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from lathe.common.errors import FieldViolation, InvalidArgument, Unauthenticated, Unavailable
from lathe.common.metrics import Metrics
from lathe.common.rpc.auth import ServiceAuthenticator, ServiceCredentials
from lathe.common.rpc.channel import connect
from lathe.common.rpc.principal import Principal, current_caller
from lathe.common.rpc.server import Registration, build_server
from lathe.common.rpc.status import from_rpc_error
from lathe.common.settings import RpcSettings
from lathe.gateway.auth import Authenticator, MetadataAuthenticator
from lathe.gateway.forward import Forwarder, methods_of
from lathe.v1 import jobs_pb2, jobs_pb2_grpc
from tests.fakes.clock import FakeClock
from tests.fakes.gateway import FakeKeys
from tests.fixtures.until import until

TOKEN = "service-token"
ALICE = Principal("acme", "member", "key_1")
RPC = RpcSettings(port=0, health_port=None, grace_s=0)


@dataclass
class JobsDouble(jobs_pb2_grpc.JobsServiceServicer):
    """An owner that remembers what reached it."""

    metadata: list[tuple[str, Any]] = field(default_factory=list)
    principal: Principal | None = None
    time_left: float | None = None
    called: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    async def GetJob(self, request: Any, context: Any) -> jobs_pb2.Job:
        self.metadata = list(context.invocation_metadata())
        self.called.set()
        self.principal = current_caller().principal
        self.time_left = context.time_remaining()
        if request.name == "slow":
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled.set()
        if request.name == "wrong":
            raise InvalidArgument(
                "name is wrong.", reason="WRONG", violations=[FieldViolation("name", "is wrong")]
            )
        await context.send_initial_metadata((("first", "a"),))
        context.set_trailing_metadata((("last", "b"), ("lathe-secret", "x")))
        return jobs_pb2.Job(name=request.name, state_reason="ünïcode")

    async def WatchJob(self, request: Any, context: Any) -> AsyncIterator[jobs_pb2.WatchJobResponse]:
        try:
            for number in range(3):
                yield jobs_pb2.WatchJobResponse(job=jobs_pb2.Job(name=request.name, step=number))
            if request.name == "broken":
                raise InvalidArgument("It broke.", reason="BROKE")
            if request.name == "endless":
                await asyncio.Event().wait()
        finally:
            if request.name == "endless":
                self.cancelled.set()

    def _unused(self, request: Any, context: Any) -> Any:
        raise InvalidArgument("This test does not call it.")

    CreateJob = ListJobs = CancelJob = ListJobEvents = ListJobCheckpoints = _unused


@asynccontextmanager
async def owner_server(jobs: JobsDouble) -> AsyncIterator[int]:
    registration = Registration(jobs_pb2_grpc.add_JobsServiceServicer_to_server, jobs, "lathe.v1.JobsService")
    authenticator = ServiceAuthenticator(ServiceCredentials.from_tokens({"lathe": TOKEN}))
    server = build_server([registration], RPC, authenticator, Metrics())
    yield await server.start()
    await server.stop(0)


@asynccontextmanager
async def gateway_server(owner_port: int, default_timeout_s: float = 60.0) -> AsyncIterator[int]:
    channel = connect(f"127.0.0.1:{owner_port}", TOKEN)
    forwarder = Forwarder(
        {"lathe.v1.JobsService": channel},
        methods_of(jobs_pb2.DESCRIPTOR, "JobsService"),
        {},
        default_timeout_s,
    )
    keys = Authenticator(FakeKeys({"sk-alice": ALICE}), FakeClock())
    server = build_server([], RPC, MetadataAuthenticator(keys), Metrics(), handlers=[forwarder])
    yield await server.start()
    await server.stop(0)
    await channel.close()


@pytest.fixture
def jobs() -> JobsDouble:
    return JobsDouble()


@pytest.fixture
async def stub(jobs: JobsDouble) -> AsyncIterator[Any]:
    async with (
        owner_server(jobs) as owner,
        gateway_server(owner) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        yield jobs_pb2_grpc.JobsServiceStub(channel)


KEY = (("authorization", "Bearer sk-alice"),)


async def test_unary_call_carries_principal_and_other_metadata_both_ways(stub: Any, jobs: JobsDouble) -> None:
    sent = (
        *KEY,
        ("api-key", "sk-other"),
        ("lathe-principal", '{"project":"victim","role":"admin","key_id":"k"}'),
        ("lathe-anything", "1"),
        ("traceparent", "00-abc"),
    )
    call = stub.GetJob(jobs_pb2.GetJobRequest(name="job"), metadata=sent, timeout=20)
    job = await call

    assert (job.name, job.state_reason) == ("job", "ünïcode")
    assert jobs.principal == ALICE
    arrived = [key for key, _ in jobs.metadata]
    assert arrived.count("lathe-principal") == 1
    assert ("authorization", f"Bearer {TOKEN}") in jobs.metadata
    assert ("traceparent", "00-abc") in jobs.metadata
    assert "api-key" not in arrived and "lathe-anything" not in arrived
    assert jobs.time_left is not None and 15 < jobs.time_left <= 21
    assert ("first", "a") in [(k, v) for k, v in await call.initial_metadata()]
    trailing = [(k, v) for k, v in await call.trailing_metadata()]
    assert ("last", "b") in trailing
    assert not any(key.startswith("lathe-") for key, _ in trailing)


async def test_a_call_without_deadline_gets_one(stub: Any, jobs: JobsDouble) -> None:
    await stub.GetJob(jobs_pb2.GetJobRequest(name="job"), metadata=KEY)
    assert jobs.time_left is not None and jobs.time_left <= 61


async def test_an_owner_that_is_silent_is_unavailable_to_who_set_no_deadline(jobs: JobsDouble) -> None:
    async with (
        owner_server(jobs) as owner,
        gateway_server(owner, default_timeout_s=0.2) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        stub = jobs_pb2_grpc.JobsServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetJob(jobs_pb2.GetJobRequest(name="slow"), metadata=KEY)
    error = from_rpc_error(caught.value)
    assert isinstance(error, Unavailable)
    assert error.retry_after


async def test_error_details_pass_through(stub: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetJob(jobs_pb2.GetJobRequest(name="wrong"), metadata=KEY)
    error = from_rpc_error(caught.value)
    assert isinstance(error, InvalidArgument)
    assert (error.message, error.reason) == ("name is wrong.", "WRONG")
    assert error.violations == (FieldViolation("name", "is wrong"),)


async def test_stream_and_its_error(stub: Any) -> None:
    request = jobs_pb2.WatchJobRequest(name="job")
    assert [m.job.step async for m in stub.WatchJob(request, metadata=KEY)] == [0, 1, 2]

    seen = []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for message in stub.WatchJob(jobs_pb2.WatchJobRequest(name="broken"), metadata=KEY):
            seen.append(message.job.step)
    assert seen == [0, 1, 2]
    assert from_rpc_error(caught.value).reason == "BROKE"


async def test_cancel_reaches_the_owner(stub: Any, jobs: JobsDouble) -> None:
    stream = stub.WatchJob(jobs_pb2.WatchJobRequest(name="endless"), metadata=KEY)
    for _ in range(3):
        await stream.read()
    stream.cancel()
    assert await asyncio.wait_for(jobs.cancelled.wait(), 30)

    jobs.cancelled.clear()
    call = stub.GetJob(jobs_pb2.GetJobRequest(name="slow"), metadata=KEY)
    await asyncio.wait_for(jobs.called.wait(), 30)
    call.cancel()
    assert await asyncio.wait_for(jobs.cancelled.wait(), 30)


async def test_deadline_reaches_the_owner(stub: Any, jobs: JobsDouble) -> None:
    async def late() -> bool:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetJob(jobs_pb2.GetJobRequest(name="slow"), metadata=KEY, timeout=0.3)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        return jobs.called.is_set()

    # On a busy machine it may be over before the owner hears of the call.
    await until(late)
    await asyncio.wait_for(jobs.cancelled.wait(), 30)


@pytest.mark.parametrize("metadata", [(), (("authorization", "Bearer sk-no"),), (("api-key", "sk-no"),)])
async def test_without_a_good_key_nothing_is_forwarded(stub: Any, jobs: JobsDouble, metadata: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetJob(jobs_pb2.GetJobRequest(name="job"), metadata=metadata)
    assert isinstance(from_rpc_error(caught.value), Unauthenticated)
    assert jobs.metadata == []


async def test_owner_away_is_unavailable_with_a_hint() -> None:
    async with gateway_server(1) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = jobs_pb2_grpc.JobsServiceStub(channel)
        for call in (
            stub.GetJob(jobs_pb2.GetJobRequest(name="job"), metadata=grpc.aio.Metadata(*KEY)),
            stub.WatchJob(jobs_pb2.WatchJobRequest(name="job"), metadata=grpc.aio.Metadata(*KEY)).read(),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            error: Any = from_rpc_error(caught.value)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert error.retry_after == 1.0
            assert "127.0.0.1" not in error.message


async def test_internal_methods_are_not_forwarded(jobs: JobsDouble) -> None:
    async with (
        owner_server(jobs) as owner,
        gateway_server(owner) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        internal = jobs_pb2_grpc.JobsInternalServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await internal.EnsureEngine(
                jobs_pb2.EnsureEngineRequest(base_model="x"), metadata=grpc.aio.Metadata(*KEY)
            )
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_two_principals_are_refused_by_the_owner(jobs: JobsDouble) -> None:
    async with owner_server(jobs) as owner, grpc.aio.insecure_channel(f"127.0.0.1:{owner}") as channel:
        stub = jobs_pb2_grpc.JobsServiceStub(channel)
        metadata = (
            ("authorization", f"Bearer {TOKEN}"),
            ("lathe-principal", ALICE.encode()),
            ("lathe-principal", ALICE.encode()),
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetJob(
                jobs_pb2.GetJobRequest(name="job"), metadata=grpc.aio.Metadata(*metadata), timeout=30
            )
    assert from_rpc_error(caught.value).reason == "TWO_PRINCIPALS"
