"""The gRPC server that every service runs: health, reflection, keepalive, TLS, a graceful end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from lathe.common.errors import FailedPrecondition
from lathe.common.metrics import Metrics
from lathe.common.rpc.auth import Authenticator
from lathe.common.rpc.interceptors import server_interceptors
from lathe.common.rpc.tls import server_credentials
from lathe.common.settings import RpcSettings

MAX_MESSAGE_BYTES = 4 * 1024 * 1024

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # What gRPC waits for the answer to a ping; the keepalive timeout alone leaves it at a minute.
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Otherwise the pings of a quiet stream stop after the second.
    ("grpc.http2.max_pings_without_data", 0),
    # Our own channels ping every 10 s; less than 5 s is abuse.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    # Otherwise a second process could bind the same port, and calls would go to either.
    ("grpc.so_reuseport", 0),
)


@dataclass(frozen=True, slots=True)
class Registration:
    """One service: the generated `add_…Servicer_to_server`, the servicer, and `lathe.v1.JobsService`."""

    add: Callable[[Any, grpc.aio.Server], None]
    servicer: object
    service_full_name: str


class RpcServer:
    """A built server. `start`, then `stop`; `wait` in between."""

    def __init__(
        self,
        server: grpc.aio.Server,
        settings: RpcSettings,
        services: Sequence[str],
        checks: health.aio.HealthServicer,
    ) -> None:
        self._server = server
        self._settings = settings
        self._services = services
        self._health = checks
        self._health_server: grpc.aio.Server | None = None
        self._draining: asyncio.Task[None] | None = None
        self.port = 0
        self.health_port: int | None = None

    async def start(self) -> int:
        """Open the ports and answer. Returns the gRPC port (chosen now if the setting is 0).

        Raises FailedPrecondition if a port is taken or a TLS file cannot be read.
        """
        settings = self._settings
        self.port = _bind(
            self._server, settings.host, settings.port, "rpc.port", server_credentials(settings)
        )
        if settings.health_port is not None:
            # kubelet's probes cannot speak TLS.
            self._health_server = grpc.aio.server(options=SERVER_OPTIONS)
            health_pb2_grpc.add_HealthServicer_to_server(self._health, self._health_server)
            self.health_port = _bind(
                self._health_server, settings.host, settings.health_port, "rpc.health_port", None
            )
        await self._server.start()
        if self._health_server is not None:
            await self._health_server.start()
        await self.set_serving(True)
        return self.port

    async def set_serving(self, serving: bool) -> None:
        """What the health protocol answers for each service and for the whole server."""
        answer = health_pb2.HealthCheckResponse
        status = answer.SERVING if serving else answer.NOT_SERVING
        for service in ("", *self._services):
            await self._health.set(service, status)

    @property
    def draining(self) -> bool:
        """Whether it is about to stop: it still answers, but who comes anew should go elsewhere."""
        return self._draining is not None

    async def drain(self) -> None:
        """Say NOT_SERVING and go on answering for `drain_delay_s`, until all who send calls here have heard it."""
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain())
        await asyncio.shield(self._draining)

    async def _drain(self) -> None:
        await self._health.enter_graceful_shutdown()
        await asyncio.sleep(self._settings.drain_delay_s)

    async def stop(self, grace: float | None = None) -> None:
        """Drain, refuse new calls, let running ones end for `grace` s (`grace_s` of the settings if None)."""
        await self.drain()
        await self._server.stop(self._settings.grace_s if grace is None else grace)
        if self._health_server is not None:
            await self._health_server.stop(0)

    async def wait(self) -> None:
        """Return when the server has been stopped."""
        await self._server.wait_for_termination()


def build_server(
    registrations: Sequence[Registration],
    settings: RpcSettings,
    authenticator: Authenticator,
    metrics: Metrics,
    *,
    handlers: Sequence[grpc.GenericRpcHandler] = (),
) -> RpcServer:
    """A server with every interceptor, health and (by setting) reflection.

    handlers: generic handlers for methods forwarded as raw bytes; they are asked after the registrations.
    """
    server = grpc.aio.server(interceptors=server_interceptors(authenticator, metrics), options=SERVER_OPTIONS)
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    names = [registration.service_full_name for registration in registrations]
    for registration in registrations:
        registration.add(registration.servicer, server)
    if settings.reflection:
        shown = (*names, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(shown, server)
    if handlers:
        server.add_generic_rpc_handlers(tuple(handlers))
    return RpcServer(server, settings, names, checks)


def _bind(
    server: grpc.aio.Server, host: str, port: int, setting: str, tls: grpc.ServerCredentials | None
) -> int:
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    taken = FailedPrecondition(
        f"Port {port} on {host} is already in use or may not be opened; choose another with {setting}.",
        reason="PORT_IN_USE",
        metadata={"port": str(port)},
    )
    try:
        bound = server.add_secure_port(address, tls) if tls else server.add_insecure_port(address)
    except RuntimeError as error:
        raise taken from error
    if bound == 0:
        raise taken
    return bound
