"""A clock that moves only when told."""

from __future__ import annotations

import asyncio
import heapq
from datetime import UTC, datetime, timedelta


class FakeClock:
    """Starts at a fixed instant; `advance` moves it and wakes the sleepers whose time has come, in order."""

    def __init__(self, start: datetime = datetime(2026, 1, 1, tzinfo=UTC)) -> None:
        self._start = start
        self._elapsed = 0.0
        self._count = 0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []

    def now(self) -> datetime:
        return self._start + timedelta(seconds=self._elapsed)

    def monotonic(self) -> float:
        return self._elapsed

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._count += 1
        heapq.heappush(self._sleepers, (self._elapsed + seconds, self._count, waiter))
        await waiter

    @property
    def sleeping(self) -> int:
        """How many tasks sleep now."""
        return sum(not waiter.done() for _, _, waiter in self._sleepers)

    def tick(self, seconds: float) -> None:
        """Move the time without letting other tasks run (for synchronous tests)."""
        self._elapsed += seconds
        while self._sleepers and self._sleepers[0][0] <= self._elapsed:
            waiter = heapq.heappop(self._sleepers)[2]
            if not waiter.done():
                waiter.set_result(None)

    def leap(self, seconds: float) -> None:
        """Move the wall clock alone, as after a sleep of the machine or a correction."""
        self._start += timedelta(seconds=seconds)

    async def advance(self, seconds: float) -> None:
        """Move the time, stopping at each sleeper on the way so that it may sleep again."""
        end = self._elapsed + seconds
        await self._settle()
        while self._sleepers and self._sleepers[0][0] <= end:
            self.tick(max(0.0, self._sleepers[0][0] - self._elapsed))
            await self._settle()
        self.tick(end - self._elapsed)
        await self._settle()

    @staticmethod
    async def _settle() -> None:
        for _ in range(10):
            await asyncio.sleep(0)
