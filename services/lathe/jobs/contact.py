"""Whether this process has been in touch with its database for long enough to call a lease expired."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from lathe.common.clock import Clock
from lathe.common.errors import Unavailable


class Contact:
    """An engine cannot renew a lease while jobs or its database is away, so silence proves nothing then.

    Trusted once a whole lease term has passed without a failure, a start or a pause of this process, and without a
    leap of the wall clock: leases end by that one, and a machine that slept finds them all past.
    """

    def __init__(self, clock: Clock, lease_term_s: float) -> None:
        self._clock = clock
        self._term_s = lease_term_s
        self._since: float | None = None
        self._last = 0.0
        self._offset = 0.0

    def seen(self) -> None:
        """The database answered."""
        now = self._clock.monotonic()
        if self._since is None or self._stood_still(now) or self._leapt():
            self._since = now
            self._offset = self._wall_offset()
        self._last = now

    def lost(self) -> None:
        """The database did not answer."""
        self._since = None

    def trusted(self) -> bool:
        """Whether a lease that was not renewed in time may be taken away."""
        now = self._clock.monotonic()
        if self._since is None or self._stood_still(now) or self._leapt():
            return False
        return now - self._since >= self._term_s

    def _stood_still(self, now: float) -> bool:
        """A gap since the database last answered: heartbeats may be waiting in this process's sockets."""
        return now - self._last > self._term_s / 2

    def _leapt(self) -> bool:
        return abs(self._wall_offset() - self._offset) > self._term_s / 2

    def _wall_offset(self) -> float:
        """Seconds from the monotonic clock to the wall clock; steady while neither leaps."""
        return self._clock.now().timestamp() - self._clock.monotonic()

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Note an outage that happens inside."""
        try:
            yield
        except Unavailable:
            self.lost()
            raise
