"""EngineService over gRPC: sampling, as tokens come out of the model thread."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from lathe.common.errors import FailedPrecondition, InvalidArgument, LatheError, Unavailable
from lathe.common.rpc.context import ServicerContext
from lathe.engine.adaptercache import AdapterCache
from lathe.engine.loop import ModelLoop
from lathe.engine.model import AdapterRef
from lathe.engine.sampling import Sampled, SamplingParams
from lathe.engine.streams import StreamFinished, StreamItem, StreamStarted
from lathe.v1 import engine_pb2 as pb
from lathe.v1 import engine_pb2_grpc as pb_grpc
from lathe.v1 import models_pb2

_REASONS = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}


@dataclass(frozen=True, slots=True)
class Serving:
    """What a loaded engine serves with."""

    engine_id: str
    base_model: str
    base_digest: str
    context_length: int
    dtype: str
    threads: int
    loop: ModelLoop
    adapters: AdapterCache
    attempts: Callable[[], Sequence[str]]


class EngineServicer(pb_grpc.EngineServiceServicer):
    """Answers Unavailable until `attach`. drain(grace in seconds or None) returns when all is given back."""

    def __init__(
        self, new_seed: Callable[[], int], drain: Callable[[float | None], asyncio.Future[None]]
    ) -> None:
        self._serving: Serving | None = None
        self._new_seed, self._drain = new_seed, drain
        self.draining = False

    def attach(self, serving: Serving) -> None:
        """The model is loaded."""
        self._serving = serving

    async def Sample(
        self, request: pb.SampleRequest, context: ServicerContext
    ) -> AsyncIterator[pb.SampleResponse]:
        serving = self._open()
        if request.base_digest != serving.base_digest:
            raise FailedPrecondition(
                f"This engine holds base model {serving.base_digest}, not {request.base_digest}.",
                reason="WRONG_BASE_MODEL",
            )
        params = sampling_params(request.params, self._new_seed)
        check_length(len(request.prompt_tokens), params.max_tokens, serving.context_length)
        ref = _ref(request.adapter) if request.HasField("adapter") else None
        async with serving.adapters.using(ref) as key:
            async for items in sampled(serving.loop, key, list(request.prompt_tokens), params):
                yield response(items)

    async def LoadAdapter(
        self, request: pb.LoadAdapterRequest, context: ServicerContext
    ) -> pb.LoadAdapterResponse:
        return pb.LoadAdapterResponse(loaded=await self._open().adapters.load(_ref(request.adapter)))

    async def GetEngineStatus(
        self, request: pb.GetEngineStatusRequest, context: ServicerContext
    ) -> pb.GetEngineStatusResponse:
        serving = self._loaded()
        status = serving.loop.status
        return pb.GetEngineStatusResponse(
            engine_id=serving.engine_id,
            base_model=serving.base_model,
            base_digest=serving.base_digest,
            active_sequences=status.active,
            waiting_sequences=status.waiting,
            attempts=list(serving.attempts()),
            adapters_loaded=serving.adapters.loaded,
            memory_bytes=status.memory_bytes,
            dtype=serving.dtype,
            threads=serving.threads,
            draining=self.draining,
        )

    async def Drain(self, request: pb.DrainRequest, context: ServicerContext) -> pb.DrainResponse:
        grace = request.grace.ToNanoseconds() / 1e9 if request.HasField("grace") else None
        await asyncio.shield(self._drain(grace))
        return pb.DrainResponse()

    def _loaded(self) -> Serving:
        if self._serving is None:
            raise Unavailable("The engine is still loading its base model.", retry_after=1.0)
        return self._serving

    def _open(self) -> Serving:
        if self.draining:
            raise Unavailable("This engine is draining; ask another one.", retry_after=1.0)
        return self._loaded()


async def sampled(
    loop: ModelLoop, key: str, prompt: Sequence[int], params: SamplingParams
) -> AsyncIterator[Sequence[StreamItem]]:
    """Whatever has come out since the last time, until the sequence ends; leaving early frees it.

    Raises the LatheError that ended it.
    """
    io, ready = asyncio.get_running_loop(), asyncio.Event()
    stream = loop.open(key, prompt, params, lambda: _wake(io, ready))
    try:
        while True:
            await ready.wait()
            ready.clear()
            items = stream.take()
            good = [item for item in items if not isinstance(item, LatheError)]
            if good:
                yield good
            for item in items:
                if isinstance(item, LatheError):
                    raise item
                if isinstance(item, StreamFinished):
                    return
    finally:
        loop.cancel(stream)


def _wake(io: asyncio.AbstractEventLoop, ready: asyncio.Event) -> None:
    if not io.is_closed():
        io.call_soon_threadsafe(ready.set)


def check_length(prompt: int, max_tokens: int | None, context_length: int) -> None:
    """Raises InvalidArgument when prompt and answer together are longer than the context."""
    if prompt + (max_tokens or 1) > context_length:
        raise InvalidArgument(
            f"The prompt has {prompt} tokens and max_tokens is {max_tokens or 'not set'}; together they must fit "
            f"into this model's context of {context_length} tokens.",
            reason="CONTEXT_LENGTH_EXCEEDED",
        )


def sampling_params(params: pb.SamplingParams, new_seed: Callable[[], int]) -> SamplingParams:
    """Raises InvalidArgument naming the field. max_tokens 0 means to the end of the context."""
    return SamplingParams(
        max_tokens=params.max_tokens or None,
        temperature=params.temperature,
        top_p=params.top_p or 1.0,
        seed=params.seed if params.HasField("seed") else new_seed(),
        stop_ids=frozenset(params.stop_token_ids),
        logit_bias=dict(params.logit_bias),
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        top_logprobs=params.top_logprobs if params.top_logprobs >= 0 else None,
    )


def response(items: Sequence[StreamItem]) -> pb.SampleResponse:
    """One message for what has come out since the last."""
    message = pb.SampleResponse()
    for item in items:
        if isinstance(item, StreamStarted):
            message.cached_prompt_tokens = item.cached_tokens
        elif isinstance(item, Sampled):
            token = message.tokens.add(token_id=item.token)
            if not math.isnan(item.logprob):
                token.logprob = item.logprob
            for other, logprob in item.top:
                token.top_logprobs.add(token_id=other, logprob=logprob)
        elif isinstance(item, StreamFinished):
            message.finish_reason = _REASONS[item.reason]
    return message


def _ref(adapter: models_pb2.AdapterObject) -> AdapterRef:
    return AdapterRef(adapter.prefix, adapter.manifest_sha256)
