"""What every service's `main` has in common: start, say when ready, stop on a signal.

A service's `main.py` gives `running(settings, …)`, an async context manager that yields a RunningService. One process
of its own runs it with `run_service`; `lathe up` enters several of them on one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lathe import __version__
from lathe.common.errors import LatheError
from lathe.common.log import configure as configure_logging
from lathe.common.metrics import Metrics, MetricsServer
from lathe.common.rpc.server import RpcServer
from lathe.common.settings import LogSettings, MetricsSettings, ServiceSettings

log = logging.getLogger(__name__)

S = TypeVar("S", bound="ProcessSettings")


class ProcessSettings(ServiceSettings):
    """What a process of its own needs beside its service's settings."""

    metrics: MetricsSettings = MetricsSettings()
    log: LogSettings = LogSettings()


@dataclass(frozen=True, slots=True)
class RunningService:
    """A service that answers. `port` is gRPC's; `http_port` only the gateway has."""

    name: str
    port: int
    health_port: int | None = None
    http_port: int | None = None


@asynccontextmanager
async def serving(server: RpcServer, name: str) -> AsyncIterator[RunningService]:
    """Start a built server; stop it gracefully when left."""
    await server.start()
    try:
        yield RunningService(name, server.port, server.health_port)
    finally:
        await server.stop()


Running = Callable[[S, Metrics], AbstractAsyncContextManager[RunningService]]


def run_service(running: Running[S], settings_class: type[S], config: Path | None = None) -> int:
    """Run one service until SIGTERM or SIGINT; the process's exit code.

    A setting that is wrong, a port in use, a database that is away or of a newer version: 1, and one sentence as the
    last line on stderr, so that a container that is restarted again and again says why.
    """
    try:
        settings = settings_class.load(config)
    except LatheError as error:
        print(error.message, file=sys.stderr)
        return 1
    configure_logging(settings.log.level, settings.log.format)
    try:
        asyncio.run(_serve(running, settings))
    except LatheError as error:
        if settings.log.format == "json":
            log.critical(error.message, extra={"reason": error.reason})
        else:
            print(error.message, file=sys.stderr)
        return 1
    except Exception as error:
        log.critical("Ended by a fault of Lathe itself: %s: %s", type(error).__name__, error, exc_info=error)
        return 1
    return 0


async def _serve(running: Running[S], settings: S) -> None:
    """Also the first process of a container ends at a signal that comes while it starts: by default it would not."""
    stopping, answers = asyncio.create_task(until_signal()), asyncio.Event()
    serving = asyncio.create_task(_serve_until(running, settings, stopping, answers))
    await asyncio.wait((stopping, serving), return_when=asyncio.FIRST_COMPLETED)
    if not answers.is_set() and not serving.done():
        serving.cancel()
        await asyncio.wait((serving,))
        log.info("Stopped before it answered.")
        logging.shutdown()
        # What threads still do, such as fetching a base model, cannot be cancelled, and nobody needs it any more.
        os._exit(0)
    stopping.cancel()
    await serving


async def _serve_until(
    running: Running[S], settings: S, stopping: asyncio.Task[None], answers: asyncio.Event
) -> None:
    metrics = Metrics(__version__)
    with metrics_endpoint(metrics, settings.metrics):
        async with running(settings, metrics) as service:
            answers.set()
            log.info("%s answers on port %s.", service.name, service.port)
            await stopping
            log.info("%s drains and stops.", service.name)


@contextmanager
def metrics_endpoint(metrics: Metrics, settings: MetricsSettings) -> Iterator[int | None]:
    """`/metrics` while inside; yields its port, None where the settings want none."""
    if settings.port is None:
        yield None
        return
    server = MetricsServer(metrics.registry, settings.host, settings.port)
    try:
        yield server.port
    finally:
        server.stop()


async def until_signal() -> None:
    """Return at the first SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await stop.wait()
