"""A channel whose certificates are read again when their files change."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import grpc

from lathe.common.follow import Followed
from lathe.common.rpc.tls import Pem

# A call that began on the old connection at this moment gets this long to reach the wire.
_SETTLE_S = 5.0
# Calls on the old connection may go on for so long; only streams that follow something last longer.
_OLD_CALLS_S = 3600.0


class FollowingChannel(grpc.aio.Channel):
    """Calls go over a channel that `open_channel` made from the files as they are now.

    After a change the next call gets a new channel; calls that run go on over the old one.
    """

    def __init__(self, files: Followed[Pem], open_channel: Callable[[Pem], grpc.aio.Channel]) -> None:
        self._files, self._open = files, open_channel
        self._pem = files.current()
        self._channel = open_channel(self._pem)
        self._retiring: dict[asyncio.Task[None], grpc.aio.Channel] = {}

    def current(self) -> grpc.aio.Channel:
        """The channel for a call that begins now."""
        pem = self._files.current()
        if pem is not self._pem:
            old, self._channel, self._pem = self._channel, self._open(pem), pem
            task = asyncio.get_running_loop().create_task(_retire(old))
            self._retiring[task] = old
            task.add_done_callback(lambda done: self._retiring.pop(done, None))
        return self._channel

    def unary_unary(self, method: str, *args: Any, **options: Any) -> Any:
        return self._method("unary_unary", method, *args, **options)

    def unary_stream(self, method: str, *args: Any, **options: Any) -> Any:
        return self._method("unary_stream", method, *args, **options)

    def stream_unary(self, method: str, *args: Any, **options: Any) -> Any:
        return self._method("stream_unary", method, *args, **options)

    def stream_stream(self, method: str, *args: Any, **options: Any) -> Any:
        return self._method("stream_stream", method, *args, **options)

    def _method(self, kind: str, *args: Any, **options: Any) -> Callable[..., Any]:
        def call(*given: Any, **how: Any) -> Any:
            # At each call: stubs keep what they got when they were made.
            return getattr(self.current(), kind)(*args, **options)(*given, **how)

        return call

    async def close(self, grace: float | None = None) -> None:
        await self._channel.close(grace)
        retiring = dict(self._retiring)
        for task, channel in retiring.items():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            await channel.close()

    async def __aenter__(self) -> FollowingChannel:
        return self

    async def __aexit__(self, *failure: object) -> None:
        await self.close()

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self.current().get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self.current().wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self.current().channel_ready()


async def _retire(channel: grpc.aio.Channel) -> None:
    await asyncio.sleep(_SETTLE_S)
    await channel.close(_OLD_CALLS_S)
