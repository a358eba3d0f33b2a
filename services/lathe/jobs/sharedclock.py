"""One clock for all replicas of jobs: the database's. A lease that one of them renews is judged by another."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta

from lathe.common.clock import Clock

# Below it the way to the database and back makes the difference.
_NOTICED_S = 0.1
_ASKED_EVERY_S = 10.0
# Half of it is how wrong the answer may be: far less than leases have to spare.
_LONGEST_ANSWER_S = 1.0


class SharedClock:
    """This machine's clock, moved to where the database's stands. Implements Clock."""

    def __init__(self, machine: Clock) -> None:
        self._machine = machine
        self._offset = timedelta(0)
        self._agreed: float | None = None

    def now(self) -> datetime:
        return self._machine.now() + self._offset

    def monotonic(self) -> float:
        return self._machine.monotonic()

    async def sleep(self, seconds: float) -> None:
        await self._machine.sleep(seconds)

    async def agree(self, offset: Callable[[], Awaitable[float]]) -> None:
        """Follow the database's clock, asked every ten seconds. Raises what asking it does.

        offset: seconds that the database's clock is ahead of what `now` answers.
        """
        asked = self.monotonic()
        if self._agreed is not None and asked - self._agreed < _ASKED_EVERY_S:
            return
        behind_s = await offset()
        if self.monotonic() - asked > _LONGEST_ANSWER_S:
            # The database or this process stood still meanwhile: nobody knows when the clock was read.
            return
        self._agreed = asked
        if abs(behind_s) >= _NOTICED_S:
            self._offset += timedelta(seconds=behind_s)
