"""Background tasks of a service: done again and again, woken early when there is something to do."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from lathe.common.clock import Clock
from lathe.common.errors import RetryableError

log = logging.getLogger(__name__)


class Wakeup:
    """Set by those who leave work, waited for by the one who does it. Work left while it works is not missed."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def set(self) -> None:
        """There is something to do."""
        self._event.set()

    async def wait(self, clock: Clock, timeout: float) -> None:
        """Return when it is set, or after `timeout` seconds; it is unset then."""
        waits = (asyncio.ensure_future(self._event.wait()), asyncio.ensure_future(clock.sleep(timeout)))
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        self._event.clear()


async def repeat(
    name: str,
    step: Callable[[], Awaitable[None]],
    *,
    clock: Clock,
    wakeup: Wakeup,
    interval: float,
    retry: float = 2.0,
) -> None:
    """Take `step` at once, then whenever `wakeup` is set and every `interval` seconds, until cancelled.

    A step that fails is logged and taken again after `retry` seconds: an outage is no reason to stop.
    """
    while True:
        wait = interval
        try:
            await step()
        except RetryableError as error:
            log.warning("%s waits: %s", name, error.message)
            wait = retry
        except Exception:
            log.exception("%s failed and is tried again.", name)
            wait = retry
        await wakeup.wait(clock, wait)


@asynccontextmanager
async def in_background(*work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run the coroutines as tasks while inside; leaving cancels them and waits until they have ended."""
    tasks = [asyncio.create_task(coroutine) for coroutine in work]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
