"""POST /v1/chat/completions."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from lathe.gateway.http.answers import EventStream, Json, events, first_of, while_connected, with_first
from lathe.gateway.http.chat_json import ChatBody, chat_request, chunks_json, completion_json, field_names
from lathe.gateway.http.errors import door_words
from lathe.gateway.http.requests import GatewayDep, PrincipalDep, read_json, validated
from lathe.gateway.model import ChatDelta

router = APIRouter()


@router.post("/v1/chat/completions")
async def create(request: Request, gateway: GatewayDep, principal: PrincipalDep) -> Response:
    """Streamed or not; a client that goes away frees the engine."""
    body = validated(ChatBody, await read_json(request))
    chat = chat_request(body)
    with door_words(field_names(body)):
        if not body.stream:
            work = gateway.inference.chat(principal, chat)
            return JSONResponse(completion_json(await while_connected(request.receive, work)))
        deltas = gateway.inference.stream(principal, chat)
        first = await first_of(request.receive, deltas)
    include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    chunks = _chunks(with_first(first, deltas), include_usage)
    return EventStream(events(chunks), deltas)


async def _chunks(deltas: AsyncGenerator[ChatDelta, None], include_usage: bool) -> AsyncGenerator[Json, None]:
    async with aclosing(deltas):
        async for delta in deltas:
            for chunk in chunks_json(delta, include_usage=include_usage):
                yield chunk
