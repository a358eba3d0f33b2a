"""One clock for all replicas of jobs: the database's. A lease that one of them renews is judged by another."""

from __future__ import annotations

from datetime import datetime, timedelta

from lathe.common.clock import Clock

# Below it the way to the database and back makes the difference.
_NOTICED_S = 0.1


class SharedClock:
    """This machine's clock, moved to where the database's stands. Implements Clock."""

    def __init__(self, machine: Clock) -> None:
        self._machine = machine
        self._offset = timedelta(0)

    def now(self) -> datetime:
        return self._machine.now() + self._offset

    def monotonic(self) -> float:
        return self._machine.monotonic()

    async def sleep(self, seconds: float) -> None:
        await self._machine.sleep(seconds)

    def correct(self, behind_s: float) -> None:
        """The database's clock is so many seconds ahead of what `now` answers."""
        if abs(behind_s) >= _NOTICED_S:
            self._offset += timedelta(seconds=behind_s)
