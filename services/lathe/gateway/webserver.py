"""uvicorn inside a running event loop: port known at once, no signal handlers, a graceful end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn

from lathe.common.errors import FailedPrecondition, Internal

_BACKLOG = 1024


class _Server(uvicorn.Server):
    """The process has one place that handles signals, and this is not it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def serving_http(app: Any, host: str, port: int, grace_s: float) -> AsyncIterator[int]:
    """Serve an ASGI app while inside; yields the port (chosen now if `port` is 0).

    Leaving stops taking connections and gives running requests `grace_s` seconds. Raises FailedPrecondition
    if the port is taken, Internal if the app does not start.
    """
    listener = bind(host, port)
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=max(1, round(grace_s)),
        server_header=False,
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        while not server.started:
            if task.done():
                await task
                raise Internal("The HTTP application did not start; the log says why.")
            await asyncio.sleep(0.01)
        yield int(listener.getsockname()[1])
    finally:
        server.should_exit = True
        await asyncio.gather(task, return_exceptions=True)
        listener.close()


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises FailedPrecondition, one sentence, if the port cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    # Only for what lingers after a close: on Linux two listeners still exclude each other.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        why = {
            errno.EADDRINUSE: "is already in use",
            errno.EACCES: "may not be opened by this user",
        }.get(error.errno or 0, f"cannot be opened ({error.strerror})")
        raise FailedPrecondition(
            f"Port {port} on {host} {why}; choose another with http_port.",
            reason="PORT_IN_USE",
            metadata={"port": str(port)},
        ) from error
    listener.setblocking(False)
    return listener
