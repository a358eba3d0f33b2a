"""Server interceptors: metrics, then errors, then authentication, then deadlines.

Each is one asynchronous context manager around a call; `_wrap` applies it to the four kinds of method.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc

from lathe.common.errors import Internal, InvalidArgument, LatheError, Unimplemented
from lathe.common.metrics import Metrics
from lathe.common.rpc.auth import Authenticator
from lathe.common.rpc.principal import current_caller, set_caller
from lathe.common.rpc.status import to_rpc_status

logger = logging.getLogger(__name__)

# Strings, because grpc's own classes are generic in their stubs only.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Continuation: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]"

_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}
# Open to everybody: probes and tools have no credential.
_OPEN_PREFIXES = ("grpc.health.", "grpc.reflection.")


@dataclass(frozen=True, slots=True)
class Call:
    """Which method is called: `lathe.v1.JobsService`, `GetJob`, and gRPC's name of its kind (`unary`, …)."""

    service: str
    method: str
    type: str

    @property
    def open(self) -> bool:
        return self.service.startswith(_OPEN_PREFIXES)


Around = Callable[[Call, Context], AbstractAsyncContextManager[None]]


class AroundInterceptor(grpc.aio.ServerInterceptor):
    """Runs every call inside the context manager that `around(call, context)` gives."""

    def __init__(self, around: Around) -> None:
        self._around = around

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        handler = await continuation(handler_call_details)
        if handler is None:  # no such method: grpc answers UNIMPLEMENTED
            return handler
        return _wrap(handler, handler_call_details.method, self._around)


def _wrap(handler: Handler, path: str, around: Around) -> Handler:
    _, service, method = path.split("/", 2)
    kind = {
        (False, False): "unary",
        (True, False): "client_stream",
        (False, True): "server_stream",
        (True, True): "bidi_stream",
    }[bool(handler.request_streaming), bool(handler.response_streaming)]
    call = Call(service, method, kind)
    inner: Any = handler.unary_unary or handler.stream_unary or handler.unary_stream or handler.stream_stream

    async def respond_once(request: Any, context: Context) -> Any:
        async with around(call, context):
            return await inner(request, context)

    async def respond_often(request: Any, context: Context) -> AsyncIterator[Any]:
        async with around(call, context):
            answer = inner(request, context)
            if inspect.isawaitable(answer):  # a method that writes to the context itself
                await answer
                return
            async with aclosing(answer):
                async for message in answer:
                    yield message

    make: Any = {
        "unary": grpc.unary_unary_rpc_method_handler,
        "client_stream": grpc.stream_unary_rpc_method_handler,
        "server_stream": grpc.unary_stream_rpc_method_handler,
        "bidi_stream": grpc.stream_stream_rpc_method_handler,
    }[kind]
    wrapped: Handler = make(
        respond_often if handler.response_streaming else respond_once,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
    return wrapped


def metrics_around(metrics: Metrics) -> Around:
    """Count and time each call under gRPC's conventional names."""

    @asynccontextmanager
    async def around(call: Call, context: Context) -> AsyncIterator[None]:
        labels = (call.type, call.service, call.method)
        metrics.grpc_started.labels(*labels).inc()
        start = time.perf_counter()
        code = grpc.StatusCode.UNKNOWN
        try:
            yield
            code = _code(context)
        except grpc.aio.AbortError:
            code = _code(context)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            remaining = context.time_remaining()
            late = remaining is not None and remaining <= 0
            code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
            raise
        finally:
            metrics.grpc_handled.labels(*labels, code.name).inc()
            metrics.grpc_handling_seconds.labels(*labels).observe(time.perf_counter() - start)

    return around


def _code(context: Context) -> grpc.StatusCode:
    code: Any = context.code()
    return code if isinstance(code, grpc.StatusCode) else _CODES.get(code or 0, grpc.StatusCode.UNKNOWN)


@asynccontextmanager
async def errors_around(call: Call, context: Context) -> AsyncIterator[None]:
    """LatheErrors become their status; anything else INTERNAL with a reference into the log."""
    try:
        yield
    except LatheError as error:
        await _abort(context, error)
    except grpc.aio.AbortError:
        raise
    except NotImplementedError:
        await _abort(context, Unimplemented(f"{call.service}/{call.method} is not implemented here."))
    except Exception:
        reference = secrets.token_hex(6)
        logger.exception(
            "%s/%s failed", call.service, call.method, extra={"reference": reference, "method": call.method}
        )
        message = f"Something went wrong inside Lathe; the log has it under reference {reference}."
        await _abort(context, Internal(message, metadata={"reference": reference}))


async def _abort(context: Context, error: LatheError) -> None:
    code, details, metadata = to_rpc_status(error)
    await context.abort(code, details, metadata)


def authentication_around(authenticator: Authenticator) -> Around:
    """Set the current caller, or refuse. Health and reflection are open."""

    @asynccontextmanager
    async def around(call: Call, context: Context) -> AsyncIterator[None]:
        if not call.open:
            metadata = tuple((key, value) for key, value in context.invocation_metadata() or ())
            # Each call is a task with a context of its own: there is nothing to reset.
            set_caller(await authenticator.authenticate(call.service, call.method, metadata))
        yield

    return around


@asynccontextmanager
async def deadline_around(call: Call, context: Context) -> AsyncIterator[None]:
    """Refuse a service's unary call without a deadline: it could wait for ever on a peer that hangs."""
    if call.type == "unary" and not call.open and context.time_remaining() is None:
        service = current_caller().service
        if service is not None:
            raise InvalidArgument(
                f"{call.service}/{call.method} was called by {service} without a deadline; set a timeout.",
                reason="DEADLINE_REQUIRED",
            )
    yield


def server_interceptors(authenticator: Authenticator, metrics: Metrics) -> list[grpc.aio.ServerInterceptor]:
    """All of them, outermost first."""
    chain = (metrics_around(metrics), errors_around, authentication_around(authenticator), deadline_around)
    return [AroundInterceptor(around) for around in chain]
