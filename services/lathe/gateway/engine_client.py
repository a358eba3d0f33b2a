"""Sampling on engines over gRPC (the EngineConnector port)."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Literal

import grpc
from grpc_health.v1 import health_pb2

from lathe.common.rpc import channel as rpc
from lathe.common.rpc.dialer import Dialer
from lathe.gateway.model import SampleCall, SampledToken, SampleEvent
from lathe.v1 import engine_pb2, engine_pb2_grpc, models_pb2

_FINISHES: dict[int, Literal["stop", "length"]] = {
    engine_pb2.FINISH_REASON_STOP: "stop",
    engine_pb2.FINISH_REASON_LENGTH: "length",
}
_REACH_S = 3.0


class EngineClients:
    """One channel per engine address, kept while the engine is listed."""

    def __init__(self, dialer: Dialer) -> None:
        self._dialer = dialer
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def sample(self, address: str, call: SampleCall) -> AsyncGenerator[SampleEvent, None]:
        stub = engine_pb2_grpc.EngineServiceStub(self._channel(address))
        messages = rpc.stream(stub.Sample, _request(call))
        async with aclosing(messages):  # type: ignore[type-var]
            async for message in messages:
                yield _event(message)

    async def reach(self, address: str) -> None:
        """Raise Unavailable unless the engine says that it is well."""
        check = self._channel(address).unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        await rpc.call(check, health_pb2.HealthCheckRequest(), timeout=_REACH_S)

    async def keep_only(self, addresses: set[str]) -> None:
        """Close the channels to engines that are gone."""
        for address in set(self._channels) - addresses:
            await self._channels.pop(address).close()

    async def close(self) -> None:
        await self.keep_only(set())

    def _channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = self._dialer.connect_engine(address)
        return self._channels[address]


def _request(call: SampleCall) -> engine_pb2.SampleRequest:
    params = engine_pb2.SamplingParams(
        max_tokens=call.max_tokens,
        temperature=call.temperature,
        top_p=call.top_p,
        seed=call.seed,
        presence_penalty=call.presence_penalty,
        frequency_penalty=call.frequency_penalty,
        logit_bias=dict(call.logit_bias),
        top_logprobs=call.top_logprobs,
        stop_token_ids=call.stop_token_ids,
    )
    request = engine_pb2.SampleRequest(base_digest=call.base_digest, prompt_tokens=call.prompt, params=params)
    if call.adapter is not None:
        request.adapter.CopyFrom(
            models_pb2.AdapterObject(prefix=call.adapter.prefix, manifest_sha256=call.adapter.manifest_sha256)
        )
    return request


def _event(message: engine_pb2.SampleResponse) -> SampleEvent:
    tokens = tuple(
        SampledToken(
            token.token_id, token.logprob, tuple((top.token_id, top.logprob) for top in token.top_logprobs)
        )
        for token in message.tokens
    )
    return SampleEvent(tokens, _FINISHES.get(message.finish_reason), message.cached_prompt_tokens)
