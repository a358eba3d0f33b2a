"""Calls of a launcher, which may hang while a node is gone: they run beside the reconciler's passes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from lathe.common.errors import LatheError
from lathe.jobs.ports import LaunchedEngine, Launcher

log = logging.getLogger(__name__)

# A pass looks at the leases after it: they must not wait for as long as a launcher may take.
_LIST_S = 5.0
# Longer than any launcher's own deadlines; only what would hang for ever meets it.
_CALL_S = 90.0


@dataclass(slots=True)
class LauncherCalls:
    """At most one call at a time for each engine. patience_s: how long a pass waits for those that it began."""

    launcher: Launcher | None
    patience_s: float = 2.0
    _pending: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    _fresh: set[asyncio.Task[None]] = field(default_factory=set)

    async def list(self) -> dict[str, LaunchedEngine] | None:
        """By engine id; None if the launcher does not answer."""
        if self.launcher is None:
            return None
        try:
            async with asyncio.timeout(_LIST_S):
                return {process.engine_id: process for process in await self.launcher.list()}
        except (LatheError, TimeoutError) as error:
            # What cannot be seen is not dead: leases decide meanwhile.
            log.warning("The launcher does not answer: %s", error or f"nothing for {_LIST_S:.0f} seconds")
            return None

    def busy(self, engine_id: str) -> bool:
        """Whether a call for this engine is under way."""
        return engine_id in self._pending

    def begin(self, engine_id: str, call: Callable[[], Awaitable[None]]) -> None:
        """Make the call soon, unless one for this engine is under way: who wants it tries again."""
        if not self.busy(engine_id):
            task = asyncio.create_task(self._run(engine_id, call))
            self._pending[engine_id] = task
            self._fresh.add(task)

    def end(self, engine_id: str) -> None:
        """End the process if it runs, and have the launcher forget it."""
        launcher = self.launcher
        if launcher is not None:
            self.begin(engine_id, lambda: launcher.stop(engine_id))

    async def settle(self) -> None:
        """Wait a moment for the calls that were begun since the last time."""
        fresh, self._fresh = self._fresh, set()
        if fresh:
            await asyncio.wait(fresh, timeout=self.patience_s)

    async def close(self) -> None:
        """Give up what is under way."""
        tasks = [*self._pending.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, engine_id: str, call: Callable[[], Awaitable[None]]) -> None:
        try:
            async with asyncio.timeout(_CALL_S):
                await call()
        except LatheError as error:
            log.warning("The launcher cannot serve engine %s now: %s", engine_id, error)
        except TimeoutError:
            log.warning("The launcher did not answer about engine %s in %.0f seconds.", engine_id, _CALL_S)
        except Exception:
            log.exception("A call of the launcher about engine %s broke.", engine_id)
        finally:
            del self._pending[engine_id]
