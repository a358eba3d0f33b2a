"""Waiting for what will come back: the store, room on the disk."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from lathe.common.clock import Clock
from lathe.common.errors import DeadlineExceeded, Unavailable
from lathe.engine.model import is_disk_full

logger = logging.getLogger(__name__)

AWAY = (Unavailable, DeadlineExceeded)
FIRST_WAIT_S = 0.5
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Patience:
    """who: for the log. max_wait_s: between two tries."""

    who: str
    clock: Clock
    max_wait_s: float

    async def __call__(self, work: Callable[[], Awaitable[T]]) -> T:
        """Repeat while the store is away or the disk is full."""
        wait = FIRST_WAIT_S
        while True:
            try:
                return await work()
            except (*AWAY, OSError) as error:
                if isinstance(error, OSError) and not is_disk_full(error):
                    raise
                logger.warning("%s waits: %s", self.who, error)
                await self.clock.sleep(wait)
                wait = min(wait * 2, self.max_wait_s)
