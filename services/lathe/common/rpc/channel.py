"""Channels between services: the caller's credential, a deadline on every unary call, typed errors."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import grpc

from lathe.common.errors import DeadlineExceeded, Unavailable
from lathe.common.rpc.auth import AUTHORIZATION_KEY
from lathe.common.rpc.following import FollowingChannel
from lathe.common.rpc.principal import PRINCIPAL_KEY, Principal
from lathe.common.rpc.status import from_rpc_error
from lathe.common.rpc.tls import ClientTls, Pem, follow_pem

DEFAULT_TIMEOUT_S = 10.0
MAX_MESSAGE_BYTES = 4 * 1024 * 1024

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A peer whose machine has vanished is noticed within 15 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # What gRPC waits for the answer to a ping; the keepalive timeout alone leaves it at a minute.
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Otherwise the pings of a quiet stream stop after the second.
    ("grpc.http2.max_pings_without_data", 0),
    # A peer that restarts must be found again at once, not after two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # Retrying is the caller's decision alone: it knows what is safe to repeat.
    ("grpc.enable_retries", 0),
)

Q = TypeVar("Q")
R = TypeVar("R")
Token = str | Callable[[], str] | None


def connect(target: str, token: Token = None, tls: ClientTls | None = None) -> grpc.aio.Channel:
    """A channel to `host:port` that shows `token` on every call, or what it gives then.

    Unary calls without a deadline get one of 10 s. It connects when first used, and anew for the next call after a
    TLS file has changed. The caller closes it. Raises FailedPrecondition if a TLS file is wrong.
    """
    interceptors: list[grpc.aio.ClientInterceptor] = [
        _UnaryUnary(token),
        _UnaryStream(token),
        _StreamUnary(token),
        _StreamStream(token),
    ]
    options: list[tuple[str, Any]] = list(CHANNEL_OPTIONS)
    if tls is None:
        return grpc.aio.insecure_channel(target, options=options, interceptors=interceptors)
    if tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", tls.server_name))

    def open_channel(pem: Pem) -> grpc.aio.Channel:
        proof = grpc.ssl_channel_credentials(pem.ca, pem.key, pem.cert)
        return grpc.aio.secure_channel(target, proof, options=options, interceptors=interceptors)

    return FollowingChannel(follow_pem(tls.ca_file, tls.cert_file, tls.key_file), open_channel)


def principal_metadata(principal: Principal | None) -> tuple[tuple[str, str], ...]:
    """The metadata with which a service calls for a user; empty without one."""
    return ((PRINCIPAL_KEY, principal.encode()),) if principal is not None else ()


@contextmanager
def rpc_errors() -> Iterator[None]:
    """Turn a failed call's grpc error into its LatheError."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error


async def call(
    method: grpc.aio.UnaryUnaryMultiCallable[Q, R],
    request: Q,
    *,
    principal: Principal | None = None,
    timeout: float = DEFAULT_TIMEOUT_S,
) -> R:
    """Call once, for `principal` if given. Raises LatheErrors; never retries by itself.

    A peer that does not answer within `timeout` is Unavailable: the deadline is ours, not that of who called us.
    """
    try:
        with rpc_errors():
            return await method(request, timeout=timeout, metadata=_metadata(principal))
    except DeadlineExceeded as error:
        raise peer_is_silent() from error


def peer_is_silent() -> Unavailable:
    """For a deadline of our own that has passed."""
    return Unavailable(
        "A part of the platform did not answer in time; try again.", reason="PEER_TIMEOUT", retry_after=1.0
    )


async def stream(
    method: grpc.aio.UnaryStreamMultiCallable[Q, R],
    request: Q,
    *,
    principal: Principal | None = None,
    timeout: float | None = None,
) -> AsyncIterator[R]:
    """The messages of a server stream; leaving the loop cancels it. Raises LatheErrors."""
    running = method(request, timeout=timeout, metadata=_metadata(principal))
    try:
        with rpc_errors():
            async for message in running:
                yield message
    finally:
        running.cancel()


async def upload(
    method: grpc.aio.StreamUnaryMultiCallable[Q, R],
    requests: AsyncIterator[Q],
    *,
    principal: Principal | None = None,
    timeout: float | None = None,
) -> R:
    """Send a client stream and wait for the answer. Raises LatheErrors."""
    with rpc_errors():
        return await method(requests, timeout=timeout, metadata=_metadata(principal))


def _metadata(principal: Principal | None) -> grpc.aio.Metadata:
    return grpc.aio.Metadata(*principal_metadata(principal))


class _Credential:
    """Puts the token on a call, in place of any that is there."""

    def __init__(self, token: Token) -> None:
        self._token = token

    def _prepared(self, details: Any, timeout: float | None = None) -> Any:
        metadata = grpc.aio.Metadata(
            *((key, value) for key, value in details.metadata or () if key != AUTHORIZATION_KEY)
        )
        token = self._token() if callable(self._token) else self._token
        if token is not None:
            metadata.add(AUTHORIZATION_KEY, f"Bearer {token}")
        wait = details.timeout if details.timeout is not None else timeout
        return details._replace(metadata=metadata, timeout=wait)


class _UnaryUnary(_Credential, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await continuation(self._prepared(client_call_details, DEFAULT_TIMEOUT_S), request)


class _UnaryStream(_Credential, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await continuation(self._prepared(client_call_details), request)


class _StreamUnary(_Credential, grpc.aio.StreamUnaryClientInterceptor):
    async def intercept_stream_unary(
        self, continuation: Any, client_call_details: Any, request_iterator: Any
    ) -> Any:
        return await continuation(self._prepared(client_call_details), request_iterator)


class _StreamStream(_Credential, grpc.aio.StreamStreamClientInterceptor):
    async def intercept_stream_stream(
        self, continuation: Any, client_call_details: Any, request_iterator: Any
    ) -> Any:
        return await continuation(self._prepared(client_call_details), request_iterator)
