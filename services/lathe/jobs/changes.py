"""A bell inside one process: whoever waits for a change need not wait for its next poll."""

from __future__ import annotations

import asyncio

from lathe.common.clock import Clock


class Changes:
    """Rung after every write of this process. Other replicas' writes are found by polling."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._event = asyncio.Event()

    def ring(self) -> None:
        """Wake everyone who waits now."""
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self, timeout: float) -> None:
        """Return at the next ring, or after `timeout` seconds."""
        bell = asyncio.ensure_future(self._event.wait())
        alarm = asyncio.ensure_future(self._clock.sleep(timeout))
        try:
            await asyncio.wait((bell, alarm), return_when=asyncio.FIRST_COMPLETED)
        finally:
            bell.cancel()
            alarm.cancel()
