"""What goes out: JSON, errors, server-sent events; and noticing that nobody listens any more."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import aclosing
from datetime import datetime
from typing import Any, TypeVar

from google.protobuf.timestamp_pb2 import Timestamp
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from lathe.common.errors import Internal, LatheError
from lathe.gateway.http.errors import ErrorAnswer, error_answer

log = logging.getLogger(__name__)

T = TypeVar("T")

Json = dict[str, Any]


def error_response(answer: ErrorAnswer) -> JSONResponse:
    return JSONResponse(answer.body, answer.status, answer.headers)


def seconds(time: datetime) -> int:
    """Unix time, as OpenAI writes it."""
    return int(time.timestamp())


def stamp(message: Any, field: str) -> int | None:
    """A timestamp field of a message as Unix time; None when it is unset."""
    value: Timestamp = getattr(message, field)
    return value.seconds if message.HasField(field) else None


def event(data: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


async def events(items: AsyncGenerator[Json, None]) -> AsyncGenerator[bytes, None]:
    """The items as events, then DONE. An error on the way is an event too: the status is sent already."""
    try:
        async with aclosing(items):
            async for item in items:
                yield event(item)
    except LatheError as error:
        yield event(error_answer(error).body)
    except Exception:
        log.exception("A stream broke")
        yield event(error_answer(Internal("unexpected")).body)
    yield DONE


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The work's result. Raises ClientDisconnect, and cancels the work, if the client goes away first.

    To be used when the request's body has been read.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A response of server-sent events.

    source: where the items come from in the end; it is closed when the client goes away, or was never there.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[bytes, None], source: AsyncGenerator[Any, None]) -> None:
        self._chunks = chunks
        self._source = source
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._run(send))
        finally:
            await self._source.aclose()

    async def _run(self, send: Send) -> None:
        async with aclosing(self._chunks) as chunks:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def with_first(first: T, rest: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """A generator whose first item was taken already."""
    async with aclosing(rest):
        yield first
        async for item in rest:
            yield item


async def first_of(receive: Receive, items: AsyncGenerator[T, None]) -> T:
    """The first item. Until it is there errors can still have a status of their own; they close `items`."""
    try:
        return await while_connected(receive, _next(items))
    except BaseException:
        await items.aclose()
        raise


async def _next(items: AsyncGenerator[T, None]) -> T:
    return await anext(items)
