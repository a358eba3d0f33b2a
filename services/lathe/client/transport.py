"""One channel to a gateway: credentials, deadlines, typed errors, and retries of what is safe to repeat."""

from __future__ import annotations

import random
import ssl
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc

from lathe.common.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    LatheError,
    ResourceExhausted,
    Unavailable,
)
from lathe.common.rpc.status import from_rpc_error

MAX_MESSAGE_BYTES = 4 * 1024 * 1024
_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A platform that has vanished is noticed within 20 s, also by a stream on which nothing comes for long.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.enable_retries", 0),
)
_FIRST_WAIT_S = 0.2
_LONGEST_WAIT_S = 5.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Tls:
    """ca_file: PEM authorities, the system's if None. server_name: expected instead of the address's host."""

    ca_file: Path | None = None
    server_name: str | None = None


def new_request_id() -> str:
    """A fresh request_id: it makes a create safe to repeat."""
    return str(uuid.uuid4())


class Transport:
    """timeout: seconds that one unary call may take, all of its retries together."""

    def __init__(self, address: str, api_key: str, *, tls: Tls | None, timeout: float) -> None:
        self.timeout = timeout
        self._tls = tls
        self._metadata = (("authorization", f"Bearer {api_key}"),)
        options: list[tuple[str, Any]] = list(_OPTIONS)
        if tls is None:
            self.channel = grpc.insecure_channel(address, options=options)
            return
        if tls.server_name is not None:
            options.append(("grpc.ssl_target_name_override", tls.server_name))
        try:
            roots = tls.ca_file.read_bytes() if tls.ca_file is not None else None
        except OSError as error:
            raise FailedPrecondition(
                f"The CA file {tls.ca_file} cannot be read: {error.strerror}."
            ) from error
        self.channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(roots), options=options)

    def tls_context(self) -> ssl.SSLContext:
        """For what is reached by HTTPS beside the gateway: the system's authorities, and the platform's own."""
        context = ssl.create_default_context()
        if self._tls is not None and self._tls.ca_file is not None:
            context.load_verify_locations(self._tls.ca_file)
        return context

    def call(self, method: Callable[..., T], request: object, *, timeout: float | None = None) -> T:
        """Call, and again with growing waits while the platform is away. Raises LatheErrors.

        Every unary method may be repeated: reads and deletes by nature, creates by their request_id.
        """
        deadline = time.monotonic() + (timeout if timeout is not None else self.timeout)

        def once() -> T:
            left = max(0.05, deadline - time.monotonic())
            try:
                return method(request, timeout=left, metadata=self._metadata)
            except grpc.RpcError as error:
                raise from_rpc_error(error) from error

        return retrying(once, deadline)

    def once(self, method: Callable[..., T], request: object, *, timeout: float | None = None) -> T:
        """Call once: for what must not be repeated (sampling). Raises LatheErrors."""
        try:
            return method(request, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error

    def send(
        self, method: Callable[..., T], requests: Iterable[object], *, timeout: float | None = None
    ) -> T:
        """Send a client stream once. Raises LatheErrors."""
        try:
            return method(iter(requests), timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error

    def stream(
        self, method: Callable[..., Any], request: object, *, timeout: float | None = None
    ) -> Iterator[Any]:
        """The messages of a server stream; leaving the loop cancels it. Raises LatheErrors."""
        running = method(request, timeout=timeout, metadata=self._metadata)
        try:
            yield from running
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        finally:
            running.cancel()

    def download(self, method: Callable[..., Any], request: Callable[[int], object]) -> Iterator[bytes]:
        """The `data` of a server stream's messages; one that breaks is gone on with by the request for that offset.

        Raises LatheErrors, Unavailable once nothing more has come for as long as a call may take.
        """
        offset = 0
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                for message in self.stream(method, request(offset)):
                    offset += len(message.data)
                    deadline = time.monotonic() + self.timeout
                    yield message.data
                return
            except Unavailable as error:
                pause(error, deadline)

    def close(self) -> None:
        """Close the channel."""
        self.channel.close()


def pause(error: LatheError, deadline: float) -> None:
    """Wait a moment before the next try; raise `error` when the time (monotonic) is up."""
    wait = (error.retry_after if isinstance(error, Unavailable) else None) or 0.5
    if time.monotonic() + wait > deadline:
        raise error
    time.sleep(wait)


def retrying(once: Callable[[], T], deadline: float) -> T:
    """Repeat `once` while it raises Unavailable or ResourceExhausted with a hint, until `deadline` (monotonic)."""
    wait = _FIRST_WAIT_S
    refused: Unavailable | None = None
    while True:
        try:
            return once()
        except DeadlineExceeded as error:
            # It was the last try's own little time: why all of them failed was said before.
            raise refused or error from error
        except Unavailable as error:
            refused = error
            pause = error.retry_after if error.retry_after is not None else wait
            if time.monotonic() + pause >= deadline:
                raise
        except ResourceExhausted as error:
            if error.retry_after is None or time.monotonic() + error.retry_after >= deadline:
                raise
            pause = error.retry_after
        time.sleep(pause * random.uniform(0.8, 1.2))
        wait = min(wait * 2, _LONGEST_WAIT_S)
