"""Public methods of other services, passed on as the bytes they are.

What a client sends under `authorization`, `api-key` or any `lathe-*` key stays here; the owner gets the
gateway's credential (from its channel) and exactly one `lathe-principal`. Deadline, cancel, all other
metadata in both directions, and the owner's status with its details go through unchanged.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import grpc
from google.protobuf.descriptor import FileDescriptor

from lathe.common.errors import Unavailable
from lathe.common.rpc.auth import AUTHORIZATION_KEY
from lathe.common.rpc.channel import peer_is_silent, principal_metadata
from lathe.common.rpc.context import ServicerContext
from lathe.common.rpc.principal import current_caller
from lathe.common.rpc.status import DETAILS_KEY
from lathe.gateway.auth import API_KEY

# A string, because grpc's own classes are generic in their stubs only.
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Pair = tuple[str, str | bytes]

# The owners refuse unary calls without a deadline; a client that sets none gets this one.
DEFAULT_TIMEOUT_S = 60.0
RETRY_AFTER_S = 1.0
# The transport's own: gRPC writes them anew for each hop.
_HOP_KEYS = frozenset({"user-agent", "content-type", "te", "host"})


@dataclass(frozen=True, slots=True)
class Method:
    """A public method: its full path `/lathe.v1.JobsService/GetJob` and which sides stream."""

    path: str
    client_streams: bool
    server_streams: bool


def methods_of(file: FileDescriptor, service: str) -> list[Method]:
    """Every method of a service in a contract, such as (jobs_pb2.DESCRIPTOR, "JobsService")."""
    descriptor = file.services_by_name[service]
    return [
        Method(f"/{descriptor.full_name}/{m.name}", bool(m.client_streaming), bool(m.server_streaming))
        for m in descriptor.methods
    ]


def travels(key: str) -> bool:
    """Whether a client's metadata goes on to the owner."""
    return not (
        key in (AUTHORIZATION_KEY, API_KEY) or key in _HOP_KEYS or key.startswith(("lathe-", "grpc-", ":"))
    )


def returns(key: str) -> bool:
    """Whether an owner's metadata goes back to the client; the status details do."""
    return key == DETAILS_KEY or travels(key)


class Forwarder(grpc.GenericRpcHandler):
    """Serves every method it is given: `local` ones by their own handler, the rest by their owner's."""

    def __init__(
        self,
        channels: Mapping[str, grpc.aio.Channel],
        methods: Iterable[Method],
        local: Mapping[str, Handler],
        default_timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        """channels: full service name -> channel to its owner, which adds the gateway's credential."""
        self._timeout_s = default_timeout_s
        self._handlers: dict[str, Handler] = dict(local)
        for method in methods:
            if method.path not in self._handlers:
                channel = channels[method.path.split("/")[1]]
                self._handlers[method.path] = self._forwarding(channel, method)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Handler | None:
        """The handler of one call; None for what is not public, which gRPC answers with UNIMPLEMENTED."""
        return self._handlers.get(handler_call_details.method)

    def _forwarding(self, channel: grpc.aio.Channel, method: Method) -> Handler:
        kinds: dict[tuple[bool, bool], tuple[Callable[..., Any], Callable[..., Any]]] = {
            (False, False): (channel.unary_unary, grpc.unary_unary_rpc_method_handler),
            (True, False): (channel.stream_unary, grpc.stream_unary_rpc_method_handler),
            (False, True): (channel.unary_stream, grpc.unary_stream_rpc_method_handler),
            (True, True): (channel.stream_stream, grpc.stream_stream_rpc_method_handler),
        }
        outgoing, incoming = kinds[(method.client_streams, method.server_streams)]
        owner = method.path.split("/")[1]
        # No serializers: both sides hand over the bytes of the wire.
        multicallable = outgoing(method.path)
        fallback = None if method.client_streams or method.server_streams else self._timeout_s

        def start(request: Any, context: ServicerContext) -> Any:
            left = context.time_remaining()
            return multicallable(
                request,
                metadata=_outgoing_metadata(context),
                timeout=left if left is not None else fallback,
            )

        async def once(request: Any, context: ServicerContext) -> bytes:
            call = start(request, context)
            try:
                answer: bytes = await call
                await _pass_initial(call, context)
                context.set_trailing_metadata(_returning(await call.trailing_metadata()))
                return answer
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and context.time_remaining() is None:
                    raise peer_is_silent() from error
                await _pass_error(owner, error, context)
            finally:
                call.cancel()

        async def often(request: Any, context: ServicerContext) -> AsyncIterator[bytes]:
            call = start(request, context)
            try:
                await _pass_initial(call, context)
                async for message in call:
                    yield message
                context.set_trailing_metadata(_returning(await call.trailing_metadata()))
            except grpc.aio.AioRpcError as error:
                await _pass_error(owner, error, context)
            finally:
                call.cancel()

        handler: Handler = incoming(often if method.server_streams else once)
        return handler


def _outgoing_metadata(context: ServicerContext) -> grpc.aio.Metadata:
    sent: list[Pair] = [(key, value) for key, value in context.invocation_metadata() or () if travels(key)]
    return grpc.aio.Metadata(*sent, *principal_metadata(current_caller().principal))


def _returning(metadata: Iterable[Pair] | None) -> tuple[Pair, ...]:
    return tuple((key, value) for key, value in metadata or () if returns(key))


async def _pass_initial(call: Any, context: ServicerContext) -> None:
    metadata = _returning(await call.initial_metadata())
    if metadata:
        await context.send_initial_metadata(metadata)


async def _pass_error(owner: str, error: grpc.aio.AioRpcError, context: ServicerContext) -> NoReturn:
    trailing = _returning(error.trailing_metadata())
    named = any(key == DETAILS_KEY for key, _ in trailing)
    if error.code() is grpc.StatusCode.UNAVAILABLE and not named:
        # gRPC's own words about a broken connection would show addresses of the inside.
        raise Unavailable(
            f"{owner} cannot be reached at the moment; try again.", retry_after=RETRY_AFTER_S
        ) from error
    await context.abort(error.code(), error.details() or "", trailing)
