"""Draining the engine of this container or machine, as a container's last command before it is stopped."""

from __future__ import annotations

import asyncio

from lathe.common.clock import Clock
from lathe.common.errors import Unavailable
from lathe.common.rpc.channel import call
from lathe.common.rpc.dialer import Dialer
from lathe.common.settings import RpcSettings
from lathe.v1 import engine_pb2, engine_pb2_grpc

# Beside the grace: checkpoints that are being written, and telling jobs.
_EXTRA_S = 30.0
# Between the answer and the end of the process.
_END_S = 10.0
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}


async def drain(settings: RpcSettings, grace_s: float, clock: Clock) -> bool:
    """Have the engine checkpoint, give its work back, finish its streams and end; returns when it has ended.

    settings: the engine's own. grace_s: seconds for streams and checkpoints. False when no engine answers here. Raises
    LatheErrors, Unavailable for an engine that is there and cannot be called.
    """
    host = _EVERYWHERE.get(settings.host, settings.host)
    if not await _listens(host, settings.port):
        return False
    request = engine_pb2.DrainRequest()
    request.grace.FromNanoseconds(round(grace_s * 1e9))
    target = f"[{host}]:{settings.port}" if ":" in host else f"{host}:{settings.port}"
    async with Dialer.of_service(settings).connect_engine(target) as channel:
        try:
            await call(engine_pb2_grpc.EngineServiceStub(channel).Drain, request, timeout=grace_s + _EXTRA_S)
        except Unavailable:
            # One that was still loading ends without an answer.
            if await _listens(host, settings.port):
                raise
            return True
    end = clock.monotonic() + _END_S
    while clock.monotonic() < end and await _listens(host, settings.port):
        await clock.sleep(0.1)
    return True


async def _listens(host: str, port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection(host, port)
    except OSError:
        return False
    writer.close()
    return True
