"""Watching what a service depends on, so that an outage is seen before somebody complains."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from lathe.common.clock import Clock
from lathe.common.errors import LatheError
from lathe.common.metrics import Metrics

log = logging.getLogger(__name__)

Check = Callable[[], Awaitable[None]]


async def watch_dependencies(
    service: str, checks: Mapping[str, Check], metrics: Metrics, clock: Clock, interval_s: float = 15.0
) -> None:
    """Set `lathe_dependency_up` for each check, at once and every `interval_s` seconds, until cancelled.

    checks: by the dependency's name; one that raises a LatheError is down. The log tells of changes only.
    """
    last: dict[str, bool] = {}

    async def look(name: str, check: Check) -> None:
        try:
            await check()
            up, why = True, ""
        except LatheError as error:
            up, why = False, error.message
        metrics.dependency_up.labels(service, name).set(up)
        if not up and last.get(name, True):
            log.warning("%s does not reach its %s: %s", service, name, why)
        elif up and not last.get(name, True):
            log.info("%s reaches its %s again.", service, name)
        last[name] = up

    while True:
        await asyncio.gather(*(look(name, check) for name, check in checks.items()))
        await clock.sleep(interval_s)
