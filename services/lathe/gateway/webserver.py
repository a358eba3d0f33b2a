"""uvicorn inside a running event loop: port known at once, no signal handlers, a graceful end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from lathe.common.errors import FailedPrecondition, Internal
from lathe.common.follow import Followed
from lathe.common.rpc.tls import server_context

_BACKLOG = 1024


class _Server(uvicorn.Server):
    """The process has one place that handles signals, and this is not it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@dataclass(frozen=True, slots=True)
class HttpOptions:
    """Where to listen and how. cert_file and key_file: TLS; each connection gets the files as they are then.

    grace_s: seconds that running requests get at the end.
    """

    host: str
    port: int
    grace_s: float
    cert_file: Path | None = None
    key_file: Path | None = None


class HttpServer:
    """An ASGI app that is served between `start` and `stop`."""

    def __init__(self, app: Any, options: HttpOptions) -> None:
        self._options = options
        self._app = app
        self._server: _Server | None = None
        self._task: asyncio.Task[None] | None = None
        self.port = 0

    async def start(self) -> int:
        """Answer; returns the port (chosen now if the option is 0).

        Raises FailedPrecondition if the port is taken or a TLS file is wrong, Internal if the app does not start.
        """
        options = self._options
        config = uvicorn.Config(
            self._app,
            log_config=None,
            log_level="warning",
            access_log=False,
            lifespan="on",
            timeout_graceful_shutdown=max(1, round(options.grace_s)),
            server_header=False,
            ssl_context_factory=_tls(options.cert_file, options.key_file),
        )
        listener = bind(options.host, options.port)
        self.port = int(listener.getsockname()[1])
        self._server = _Server(config)
        self._task = asyncio.create_task(self._serve(self._server, listener))
        while not self._server.started:
            if self._task.done():
                await self._task
                raise Internal("The HTTP application did not start; the log says why.")
            await asyncio.sleep(0.01)
        return self.port

    async def stop(self) -> None:
        """Refuse new connections at once, let running requests end for `grace_s` seconds."""
        if self._server is not None and self._task is not None:
            self._server.should_exit = True
            await asyncio.gather(self._task, return_exceptions=True)

    @staticmethod
    async def _serve(server: _Server, listener: socket.socket) -> None:
        try:
            await server.serve(sockets=[listener])
        finally:
            listener.close()


def _tls(cert_file: Path | None, key_file: Path | None) -> Callable[..., ssl.SSLContext] | None:
    """What makes the context of the listener. Raises FailedPrecondition naming the file that is wrong."""
    if cert_file is None or key_file is None:
        return None
    files = Followed((cert_file, key_file), lambda: server_context(cert_file, key_file))

    def hello(connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        connection.context = files.current()

    listening = server_context(cert_file, key_file)
    listening.sni_callback = hello
    return lambda config, default: listening


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
