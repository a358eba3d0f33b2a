"""Around every request: its id, its metrics, the path that is routed on, and an answer whatever happens."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from contextlib import suppress

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lathe.common.errors import Internal
from lathe.gateway.gateway import Gateway
from lathe.gateway.http.errors import error_answer
from lathe.gateway.http.requests import routing_path

log = logging.getLogger(__name__)

_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
# What servers write into their logs when the client went away before an answer.
_CLIENT_GONE = "499"
# How much of a refused request is still read.
_DRAIN_BYTES = 64 * 1024 * 1024
_DRAIN_S = 10.0


class Door:
    """Pure ASGI, so that streams pass through untouched."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app = app
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # In place: what routing adds to the scope is read afterwards.
        scope["path"] = routing_path(scope.get("raw_path") or scope["path"].encode())
        exchange = _Exchange(f"req_{self._gateway.ids.token(24)}", receive, send, self._gateway.draining)
        started = self._gateway.clock.monotonic()
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except ClientDisconnect:
            log.debug("The client of %s went away.", exchange.request_id)
        except Exception:
            named = {"request_id": exchange.request_id}
            log.exception("%s %s failed", scope["method"], scope["path"], extra=named)
            if exchange.status is not None:
                raise
            await exchange.fail()
        finally:
            self._count(scope, exchange.status, self._gateway.clock.monotonic() - started)

    def _count(self, scope: Scope, status: int | None, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unknown")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        metrics = self._gateway.metrics
        code = str(status) if status is not None else _CLIENT_GONE
        metrics.http_requests.labels(route, method, code).inc()
        metrics.http_request_seconds.labels(route).observe(seconds)


class _Exchange:
    """One request and its answer as they pass: adds the id, remembers the status."""

    def __init__(
        self, request_id: str, receive: Receive, send: Send, closing: Callable[[], bool] = lambda: False
    ) -> None:
        self.request_id = request_id
        self._closing = closing
        self.status: int | None = None
        self._receive = receive
        self._send = send
        self._whole = False

    async def receive(self) -> Message:
        message = await self._receive()
        self._whole = message["type"] != "http.request" or not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if 400 <= self.status < 500:
                await self._drain()
            headers = [*message.get("headers", []), (b"x-request-id", self.request_id.encode())]
            if self._closing():
                # The client's next request then goes to another replica.
                headers.append((b"connection", b"close"))
            message = {**message, "headers": headers}
        await self._send(message)

    async def _drain(self) -> None:
        """Read on for a while: a client in the middle of sending would see a broken connection, not the reason."""
        left = _DRAIN_BYTES
        with suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_S):
                while not self._whole and left > 0:
                    left -= len((await self.receive()).get("body", b""))

    async def fail(self) -> None:
        answer = error_answer(Internal("unexpected"))
        headers = [(b"content-type", b"application/json")]
        await self.send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": json.dumps(answer.body).encode()})
