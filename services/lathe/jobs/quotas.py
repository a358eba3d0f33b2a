"""How many jobs each project may run, as last heard from accounts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from lathe.common.clock import Clock
from lathe.common.errors import LatheError, NotFound
from lathe.jobs.policy import UNKNOWN_QUOTA
from lathe.jobs.ports import Accounts

log = logging.getLogger(__name__)


class Quotas:
    """Answers from memory for `ttl_s`, and from the last known answer while accounts is away."""

    def __init__(self, accounts: Accounts, clock: Clock, ttl_s: float = 15.0) -> None:
        self._accounts = accounts
        self._clock = clock
        self._ttl_s = ttl_s
        self._known: dict[str, tuple[float, int]] = {}

    async def running(self, projects: Iterable[str]) -> dict[str, int]:
        """Project -> jobs that may run at the same time; 0 is no limit, UNKNOWN_QUOTA if never heard."""
        asked = sorted(set(projects))
        # At once: if accounts hangs, its deadline passes once and not for each of them.
        limits = await asyncio.gather(*(self._get(project) for project in asked))
        return dict(zip(asked, limits, strict=True))

    async def _get(self, project: str) -> int:
        now = self._clock.monotonic()
        known = self._known.get(project)
        if known is not None and now - known[0] < self._ttl_s:
            return known[1]
        try:
            limit = (await self._accounts.get_quota(project)).max_running_jobs
        except NotFound:
            # The project is gone; nothing of it may start.
            limit = UNKNOWN_QUOTA
        except LatheError as error:
            log.warning("The quota of %s cannot be read: %s", project, error)
            limit = known[1] if known is not None else UNKNOWN_QUOTA
            # A short while without another try, so that an outage costs one time-out and not one per pass.
            self._known[project] = (now - self._ttl_s + 2.0, limit)
            return limit
        self._known[project] = (now, limit)
        return limit
