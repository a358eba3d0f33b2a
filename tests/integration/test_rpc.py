"""The gRPC server and channel over loopback, with a service made of bytes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lathe.common.errors import (
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
from lathe.common.metrics import Metrics, MetricsServer
from lathe.common.rpc.auth import ServiceAuthenticator, ServiceCredentials
from lathe.common.rpc.channel import call, connect, stream, upload
from lathe.common.rpc.principal import Principal, current_caller
from lathe.common.rpc.server import MAX_MESSAGE_BYTES, Registration, RpcServer, build_server
from lathe.common.settings import RpcSettings
from tests.fixtures.relay import relay
from tests.fixtures.until import until

SERVICE = "lathe.v1.EchoService"
USER = Principal("acme", "member", "key_1")


class Echo:
    """One method of each kind; the request's text says what happens."""

    async def unary(self, request: bytes, context: Any) -> bytes:
        match request:
            case b"missing":
                raise NotFound("no such thing", metadata={"thing": "x"})
            case b"broken":
                raise ValueError("secret detail")
            case b"unimplemented":
                raise NotImplementedError
            case b"slow":
                await asyncio.sleep(30)
        principal = current_caller().principal
        return request + (principal.project.encode() if principal else b"")

    async def server_stream(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield request
        if request == b"missing":
            raise NotFound("gone half-way")
        if request == b"quiet":
            await asyncio.Event().wait()
        if request == b"endless":
            while True:
                await asyncio.sleep(0.01)
                yield b"more"
        yield request

    async def writes(self, request: bytes, context: Any) -> None:
        await context.write(request)
        await context.write(b"written")

    async def client_stream(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        return b"".join([request async for request in requests])

    async def bidi(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request.upper()


def add_echo(servicer: Any, server: grpc.aio.Server) -> None:
    handlers = {
        "Unary": grpc.unary_unary_rpc_method_handler(servicer.unary),
        "ServerStream": grpc.unary_stream_rpc_method_handler(servicer.server_stream),
        "Writes": grpc.unary_stream_rpc_method_handler(servicer.writes),
        "ClientStream": grpc.stream_unary_rpc_method_handler(servicer.client_stream),
        "Bidi": grpc.stream_stream_rpc_method_handler(servicer.bidi),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


@dataclass
class Running:
    server: RpcServer
    channel: grpc.aio.Channel
    metrics: Metrics

    def method(self, name: str, kind: str = "unary_unary") -> Any:
        return getattr(self.channel, kind)(f"/{SERVICE}/{name}")

    def handled(self, method: str, code: str, kind: str = "unary") -> float:
        labels = {"grpc_service": SERVICE, "grpc_method": method, "grpc_type": kind, "grpc_code": code}
        return self.metrics.registry.get_sample_value("grpc_server_handled_total", labels) or 0.0

    async def counted(self, method: str, code: str, kind: str = "unary") -> None:
        """Wait until one such call is: it is counted after its answer has left."""
        await until(lambda: self.handled(method, code, kind), lambda calls: calls == 1)


@asynccontextmanager
async def run(token: str | None = "service-token", **settings: Any) -> AsyncIterator[Running]:
    metrics = Metrics()
    server = build_server(
        [Registration(add_echo, Echo(), SERVICE)],
        RpcSettings(**{"port": 0, "health_port": 0, "grace_s": 0.2, **settings}),
        ServiceAuthenticator(ServiceCredentials.from_tokens({"lathe": "service-token"})),
        metrics,
    )
    port = await server.start()
    async with connect(f"127.0.0.1:{port}", token) as channel:
        yield Running(server, channel, metrics)
    await server.stop()


@pytest.fixture
async def echo() -> AsyncIterator[Running]:
    async with run() as running:
        yield running


async def test_the_four_kinds(echo: Running) -> None:
    async def requests() -> AsyncIterator[bytes]:
        yield b"a"
        yield b"b"

    assert await call(echo.method("Unary"), b"x", principal=USER) == b"xacme"
    streamed = stream(echo.method("ServerStream", "unary_stream"), b"x", principal=USER)
    assert [message async for message in streamed] == [b"x", b"x"]
    written = stream(echo.method("Writes", "unary_stream"), b"x", principal=USER)
    assert [message async for message in written] == [b"x", b"written"]
    assert await upload(echo.method("ClientStream", "stream_unary"), requests(), principal=USER) == b"ab"
    metadata = grpc.aio.Metadata(("lathe-principal", USER.encode()))
    bidi = echo.method("Bidi", "stream_stream")(requests(), metadata=metadata)
    assert [message async for message in bidi] == [b"A", b"B"]
    kinds = [("Unary", "unary"), ("ServerStream", "server_stream"), ("ClientStream", "client_stream")]
    for method, kind in (*kinds, ("Bidi", "bidi_stream")):
        await echo.counted(method, "OK", kind)


async def test_errors(echo: Running) -> None:
    with pytest.raises(NotFound, match="no such thing") as missing:
        await call(echo.method("Unary"), b"missing", principal=USER)
    assert missing.value.metadata == {"thing": "x"}
    with pytest.raises(Internal, match="reference") as broken:
        await call(echo.method("Unary"), b"broken", principal=USER)
    assert "secret detail" not in str(broken.value)
    with pytest.raises(Unimplemented):
        await call(echo.method("Unary"), b"unimplemented", principal=USER)
    with pytest.raises(Unimplemented):
        await call(echo.method("Nowhere"), b"", principal=USER)
    received = []
    with pytest.raises(NotFound, match="half-way"):
        async for message in stream(echo.method("ServerStream", "unary_stream"), b"missing", principal=USER):
            received.append(message)
    assert received == [b"missing"]
    await echo.counted("Unary", "NOT_FOUND")
    await echo.counted("Unary", "INTERNAL")


async def test_a_caller_without_credential_is_refused() -> None:
    async with run(token=None) as echo:
        with pytest.raises(Unauthenticated):
            await call(echo.method("Unary"), b"x", principal=USER)
        await echo.counted("Unary", "UNAUTHENTICATED")


async def test_deadlines(echo: Running) -> None:
    async def late() -> bool:
        # The deadline was ours: whoever called us may try again.
        with pytest.raises(Unavailable, match="did not answer in time") as caught:
            await call(echo.method("Unary"), b"slow", principal=USER, timeout=0.1)
        assert caught.value.retry_after == 1.0
        return echo.handled("Unary", "DEADLINE_EXCEEDED") + echo.handled("Unary", "CANCELLED") > 0

    bare = grpc.aio.insecure_channel(f"127.0.0.1:{echo.server.port}")
    async with bare:
        metadata = (("authorization", "Bearer service-token"), ("lathe-principal", USER.encode()))
        with pytest.raises(InvalidArgument, match="deadline"):
            await call_bare(bare, metadata)
    # On a busy machine it may be over before the server hears of the call.
    await until(late)


async def call_bare(channel: grpc.aio.Channel, metadata: tuple[tuple[str, str], ...]) -> Any:
    from lathe.common.rpc.channel import rpc_errors

    with rpc_errors():
        return await channel.unary_unary(f"/{SERVICE}/Unary")(b"x", metadata=grpc.aio.Metadata(*metadata))


async def test_leaving_a_stream_cancels_it(echo: Running) -> None:
    endless = stream(echo.method("ServerStream", "unary_stream"), b"endless", principal=USER)
    assert await anext(endless) == b"endless"
    await endless.aclose()
    await echo.counted("ServerStream", "CANCELLED", "server_stream")


async def test_both_sides_of_a_quiet_stream_notice_that_the_other_has_vanished(echo: Running) -> None:
    with relay(f"127.0.0.1:{echo.server.port}") as between:
        async with connect(between.address, "service-token") as channel:
            method = channel.unary_stream(f"/{SERVICE}/ServerStream")
            quiet = stream(method, b"quiet", principal=USER)
            assert await anext(quiet) == b"quiet"
            between.freeze()
            with pytest.raises(Unavailable):
                await asyncio.wait_for(anext(quiet), 60)
            await echo.counted("ServerStream", "CANCELLED", "server_stream")


async def test_health_is_open_and_says_when_it_drains() -> None:
    async with run(token=None, drain_delay_s=1) as echo:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{echo.server.health_port}") as channel:
            health = health_pb2_grpc.HealthStub(channel)
            serving = health_pb2.HealthCheckResponse.SERVING
            for stub in (health, health_pb2_grpc.HealthStub(echo.channel)):
                for service in ("", SERVICE):
                    answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
                    assert answer.status == serving
            stopping = asyncio.create_task(echo.server.stop())
            while answer.status == serving:
                answer = await health.Check(health_pb2.HealthCheckRequest(service=SERVICE))
            assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
            await stopping
        with pytest.raises(Unavailable):
            await call(echo.method("Unary"), b"x", principal=USER, timeout=1.0)


async def test_a_port_in_use_is_one_clear_sentence(echo: Running) -> None:
    with pytest.raises(FailedPrecondition, match=f"Port {echo.server.port} .* already in use.*rpc.port"):
        async with run(port=echo.server.port):
            raise AssertionError("two servers on one port")
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(FailedPrecondition, match="metrics port"):
            MetricsServer(Metrics().registry, "127.0.0.1", taken.getsockname()[1])


async def test_messages_above_4_mib_are_refused(echo: Running) -> None:
    from lathe.common.errors import ResourceExhausted

    with pytest.raises(ResourceExhausted):
        await call(echo.method("Unary"), b"x" * (MAX_MESSAGE_BYTES + 1), principal=USER)


async def test_reflection_by_a_setting() -> None:
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    async def requests() -> AsyncIterator[Any]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")

    async with run(token=None, reflection=True) as echo:
        stub = reflection_pb2_grpc.ServerReflectionStub(echo.channel)
        answers = [answer async for answer in stub.ServerReflectionInfo(requests())]
        assert SERVICE in {service.name for service in answers[0].list_services_response.service}


async def test_the_metrics_endpoint() -> None:
    metrics = Metrics(version="9.9")
    server = MetricsServer(metrics.registry, "127.0.0.1", 0)
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
        body = (await reader.read()).decode()
        writer.close()
    finally:
        await asyncio.to_thread(server.stop)
    assert 'lathe_build_info{version="9.9"} 1.0' in body
    assert "_created" not in body
