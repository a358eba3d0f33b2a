"""What jobs tells `lathe doctor`: what starts its engines, and which of them are heard of."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from lathe.common.clock import Clock
from lathe.common.diagnosis import Finding
from lathe.common.probes import run_probe
from lathe.jobs.model import EngineRecord, EngineState
from lathe.jobs.ports import JobStore, Launcher

# An engine beats every few seconds; a lease ends after 15.
_SILENT_AFTER = timedelta(seconds=15)
# The Kubernetes API is asked for several things in turn.
_LAUNCHER_S = 6.0


class EngineProbe:
    """launcher: set once it is there, which is after the server that registers this; None starts no engines."""

    def __init__(self, store: JobStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self.launcher: Launcher | None = None

    async def probe(self) -> Sequence[Finding]:
        """The launcher's own findings, then one about the engines that are registered."""
        return [
            *await run_probe("launcher", self._launcher, _LAUNCHER_S),
            *await run_probe("engines", self._engines),
        ]

    async def _launcher(self) -> Sequence[Finding]:
        if self.launcher is not None:
            return await self.launcher.check()
        advice = "Start engines yourself, or set jobs' launcher.kind."
        return [Finding("launcher", True, "jobs starts no engines.", advice)]

    async def _engines(self) -> Sequence[Finding]:
        async with self._store.read() as session:
            engines = await session.engines()
        return [engines_finding(engines, self._clock.now())]


def engines_finding(engines: Sequence[EngineRecord], now: datetime) -> Finding:
    """Whether the registered engines are heard of."""
    ready = [one for one in engines if one.heartbeat_time is not None and one.state is EngineState.READY]
    silent = [
        one for one in ready if one.heartbeat_time is not None and now - one.heartbeat_time > _SILENT_AFTER
    ]
    if silent:
        names = ", ".join(one.id for one in silent[:3])
        message = f"{len(silent)} of {len(ready)} engines are silent ({names})."
        return Finding(
            "engines", True, message, "jobs replaces them by itself; if it goes on, see their logs."
        )
    if not engines:
        return Finding("engines", True, "No engine runs; the first job or chat starts one.")
    starting = len(engines) - len(ready)
    bases = ", ".join(sorted({one.base.id for one in ready}))
    text = f"{len(ready)} engines answer" + (f" ({bases})" if bases else "")
    return Finding("engines", True, text + (f", {starting} more start or stop." if starting else "."))
