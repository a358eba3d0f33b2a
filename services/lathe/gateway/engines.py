"""Which engines there are, and which one a request goes to."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from lathe.common.clock import Clock
from lathe.common.errors import DeadlineExceeded, LatheError, Unavailable
from lathe.gateway.model import EngineInfo, SampleCall, SampleEvent
from lathe.gateway.ports import EngineConnector, EngineFeed
from lathe.gateway.routing import Situation, pick_engine

log = logging.getLogger(__name__)

_FIRST_BACKOFF_S = 0.2
_LAST_BACKOFF_S = 5.0
# jobs forgets a wish for an engine after a while, so a waiting request repeats it.
_ENSURE_EVERY_S = 5.0
_RETRY_AFTER_S = 10.0
_MAX_REMEMBERED_ADAPTERS = 1000


@dataclass(frozen=True, slots=True)
class EngineChannel:
    """One engine to sample on; the directory counts what runs on it."""

    info: EngineInfo
    _directory: EngineDirectory

    def sample(self, call: SampleCall) -> AsyncGenerator[SampleEvent, None]:
        """Closing the generator frees the sequence. Raises LatheError.

        Unavailable means that this engine is lost; it is not picked again until jobs lists it anew.
        """
        return self._directory.sample_on(self.info, call)


class EngineDirectory:
    """The newest list of engines that jobs gave; it stands while jobs is away.

    `run` keeps it up to date and is to be a task as long as the directory is used.
    """

    def __init__(self, feed: EngineFeed, connector: EngineConnector, clock: Clock) -> None:
        self._feed = feed
        self._connector = connector
        self._clock = clock
        self._engines: tuple[EngineInfo, ...] = ()
        self._changed = asyncio.Event()
        self._own_load: Counter[str] = Counter()
        self._suspects: set[str] = set()
        self._served_by: OrderedDict[str, str] = OrderedDict()

    @property
    def engines(self) -> tuple[EngineInfo, ...]:
        return self._engines

    async def run(self) -> None:
        """Hold the stream of lists; connect again, slower each time, when it breaks."""
        backoff = _FIRST_BACKOFF_S
        away = False
        while True:
            try:
                async for engines in self._feed.watch():
                    if away:
                        log.info("jobs is back.")
                    away, backoff = False, _FIRST_BACKOFF_S
                    await self._replace(engines)
            except LatheError as error:
                if not away:
                    log.warning("jobs is away; the list of engines stays as it is: %s", error)
                away = True
            except Exception:
                # Without this task no new engine would ever be found: a fault of ours must not end it.
                log.exception("Watching the engines failed; trying again")
            await self._clock.sleep(backoff)
            backoff = min(backoff * 2, _LAST_BACKOFF_S)

    async def engine_for(
        self, base_digest: str, base_model: str, deadline: float, *, adapter: str | None = None
    ) -> EngineChannel:
        """An engine that serves this base, started now if there is none.

        deadline: on the clock's monotonic scale. adapter: its prefix, to find where it is loaded already.
        Raises Unavailable, with a hint when to retry, if no engine is there by then.
        """
        asked_at: float | None = None
        while True:
            self._changed.clear()
            situation = Situation(self._own_load, self._suspects, self._served_by)
            found = pick_engine(self._engines, base_digest, adapter, situation)
            if found is not None:
                self._remember(adapter, found.engine_id)
                return EngineChannel(found, self)
            now = self._clock.monotonic()
            if now >= deadline:
                raise Unavailable(
                    f"No engine serves {base_model} yet; one is being started. Try again in a while.",
                    reason="ENGINE_STARTING",
                    retry_after=_RETRY_AFTER_S,
                )
            if asked_at is None or now - asked_at >= _ENSURE_EVERY_S:
                asked_at = now
                await self._ensure(base_model)
            await self._wait_for_change(min(deadline - now, _ENSURE_EVERY_S))

    async def sample_on(self, engine: EngineInfo, call: SampleCall) -> AsyncGenerator[SampleEvent, None]:
        """Sample on one engine, counted as load; a lost connection makes it a suspect."""
        self._own_load[engine.engine_id] += 1
        try:
            async with aclosing(self._connector.sample(engine.address, call)) as events:
                async for event in events:
                    yield event
        except Unavailable:
            self.suspect(engine.engine_id)
            raise
        finally:
            self._own_load[engine.engine_id] -= 1

    def suspect(self, engine_id: str) -> None:
        """Do not pick this engine until the next list."""
        self._suspects.add(engine_id)

    async def _replace(self, engines: tuple[EngineInfo, ...]) -> None:
        # An engine that is gone from the list may still finish the streams it has.
        busy = {engine.address for engine in self._engines if self._own_load[engine.engine_id]}
        self._engines = engines
        self._suspects.clear()
        self._changed.set()
        await self._connector.keep_only(busy | {engine.address for engine in engines})

    async def _ensure(self, base_model: str) -> None:
        try:
            await self._feed.ensure(base_model)
        except (Unavailable, DeadlineExceeded) as error:
            log.warning("jobs could not be asked for an engine of %s: %s", base_model, error)

    async def _wait_for_change(self, seconds: float) -> None:
        waits = [
            asyncio.ensure_future(self._changed.wait()),
            asyncio.ensure_future(self._clock.sleep(seconds)),
        ]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def _remember(self, adapter: str | None, engine_id: str) -> None:
        if adapter is None:
            return
        self._served_by[adapter] = engine_id
        self._served_by.move_to_end(adapter)
        if len(self._served_by) > _MAX_REMEMBERED_ADAPTERS:
            self._served_by.popitem(last=False)
