"""Which engines serve, for the gateway."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace

from lathe.common.clock import Clock
from lathe.common.errors import DeadlineExceeded, Unavailable
from lathe.jobs.changes import Changes
from lathe.jobs.contact import Contact
from lathe.jobs.model import ONE_CLASS, BaseRef, EngineClasses, EngineRecord, EngineState, Pool
from lathe.jobs.policy import Limits, is_serving
from lathe.jobs.ports import JobStore, Models

# What another replica wrote is told within a second.
_POLL_S = 0.5
_AT_LEAST_EVERY_S = 8.0
# Demand need not be written for every waiting request.
_DEMAND_EVERY_S = 5.0
# Base models belong to no project; any project's eyes see them.
_ANY_PROJECT = "default"


@dataclass(frozen=True, slots=True)
class EngineDirectory:
    """Registered engines, and the wish for one."""

    store: JobStore
    models: Models
    changes: Changes
    contact: Contact
    clock: Clock
    limits: Limits
    classes: EngineClasses = ONE_CLASS

    async def serving(self) -> Sequence[EngineRecord]:
        """Engines that answer and are no job's own; those about to end are marked as draining."""
        now = self.clock.now()
        async with self.store.read() as session:
            engines = await session.engines()
        found = []
        for engine in engines:
            if engine.state is EngineState.LAUNCHING or not engine.address or engine.job_id:
                continue
            leaving = engine.draining or engine.state is EngineState.STOPPING
            alive = replace(engine, draining=False, state=EngineState.READY)
            # Just after an outage of ours, silence proves nothing.
            if self.contact.trusted() and not is_serving(alive, now, self.limits):
                continue
            found.append(replace(engine, draining=leaving))
        return found

    async def watch(self) -> AsyncIterator[Sequence[EngineRecord]]:
        """The whole list at once, on every change, and at least every ten seconds."""
        last: Sequence[EngineRecord] | None = None
        sent = 0.0
        while True:
            engines = await self.serving()
            shown = [
                replace(engine, heartbeat_time=None, busy_time=None, memory_bytes=0) for engine in engines
            ]
            now = self.clock.monotonic()
            if shown != last or now - sent >= _AT_LEAST_EVERY_S:
                yield engines
                last, sent = shown, now
            await self.changes.wait(_POLL_S)

    async def ensure(self, base_id: str) -> bool:
        """Ask for at least one engine of this base; True if one is there. Raises NotFound for an unknown base.

        One of any class will do; the default class's is started if there is none.
        """
        base = await self._base(base_id)
        there = [
            engine
            for engine in await self.serving()
            if engine.base.digest == base.digest and not engine.draining
        ]
        # Whoever asks keeps the engine that answers from ending.
        await self._demand(Pool(base, there[0].engine_class if there else self.classes.default))
        if not there:
            self.changes.ring()
        return bool(there)

    async def _base(self, base_id: str) -> BaseRef:
        """By digest: an id may stand for other weights than when an engine that still runs was started."""
        try:
            return (await self.models.resolve(_ANY_PROJECT, f"baseModels/{base_id}")).base
        except (Unavailable, DeadlineExceeded):
            # While models is away, what an engine serves is the best that is known.
            for engine in await self.serving():
                if engine.base.id == base_id:
                    return engine.base
            raise

    async def _demand(self, wanted: Pool) -> None:
        now = self.clock.now()
        async with self.store.read() as session:
            found = [pool for pool in await session.pools() if pool.place == wanted.place]
        pool = found[0] if found else None
        last = pool.demand_time if pool is not None else None
        if last is not None and (now - last).total_seconds() < _DEMAND_EVERY_S:
            return
        async with self.store.write() as session:
            # Somebody else's write at the same time is the same wish.
            await session.save_pool(pool, replace(pool or wanted, demand_time=now))
