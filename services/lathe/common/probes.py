"""How a service looks at itself: its database, its store, the room that they have."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime

from lathe.common.clock import Clock
from lathe.common.db import Database, outage_reason, schema_state, url_setting
from lathe.common.diagnosis import Finding, clock_finding, room_finding, size_text
from lathe.common.errors import LatheError
from lathe.common.ids import IdFactory
from lathe.common.objectstore.base import ObjectStore
from lathe.common.objectstore.factory import free_bytes
from lathe.common.settings import StoreSettings

log = logging.getLogger(__name__)

PROBE_S = 3.0
_SCHEMA_ADVICE = {
    "behind": "Run `lathe migrate`; the chart does it at an upgrade.",
    "ahead": "Start the version of Lathe that wrote it.",
}

Probe = Callable[[], Awaitable[Sequence[Finding]]]


async def run_probe(name: str, look: Probe, timeout_s: float = PROBE_S) -> Sequence[Finding]:
    """What `look` finds; whatever goes wrong is a finding under `name`, and nothing takes longer than `timeout_s`."""
    try:
        async with asyncio.timeout(timeout_s):
            return await look()
    except TimeoutError:
        message = f"The {name} did not answer within {timeout_s:.0f} seconds."
        return [Finding(name, False, message, f"See whether the {name} is overloaded or hangs.")]
    except LatheError as error:
        return [Finding(name, False, error.message)]
    except Exception:
        log.exception("Looking at the %s failed", name)
        message = f"Looking at the {name} failed in a way that nobody expected."
        return [Finding(name, False, message, "The service's log has the traceback.")]


def database_probe(db: Database, package: str, clock: Clock) -> Probe:
    """Whether a service's database can be written, has this version's schema, has room, and keeps our time."""

    async def look() -> Sequence[Finding]:
        begun, started = clock.now(), clock.monotonic()
        try:
            state = await schema_state(db, package)
            if state != "current":
                message = f"The database's schema is {state} of this version."
                return [Finding("database", False, message, _SCHEMA_ADVICE[state])]
            facts = await db.examine()
        except LatheError as error:
            reason = outage_reason(error, url_setting(package))
            if reason is None:
                raise
            return [Finding("database", False, f"The database {reason.why}.", reason.advice)]
        took_ms = (clock.monotonic() - started) * 1000
        size = f" and takes {size_text(facts.size_bytes)}" if facts.size_bytes is not None else ""
        message = f"The database can be written ({took_ms:.0f} ms), its schema is current{size}."
        found = [Finding("database", True, message)]
        if facts.free_bytes is not None:
            found.append(room_finding("database room", facts.free_bytes))
        if facts.now is not None:
            found.append(_database_clock(facts.now, begun, clock.now()))
        return found

    async def bounded() -> Sequence[Finding]:
        return await run_probe("database", look)

    return bounded


def _database_clock(theirs: datetime, begun: datetime, ended: datetime) -> Finding:
    return clock_finding("database clock", "database", theirs, begun, ended)


def store_probe(store: ObjectStore, settings: StoreSettings, ids: IdFactory) -> Probe:
    """Whether the store takes an object, gives it back and deletes it, and how much room a folder has."""

    async def look() -> Sequence[Finding]:
        try:
            await store.check()
        except LatheError as error:
            return [Finding("store", False, error.message, _where(settings))]
        # Beginning with staging/: what is left of a probe that was cut off expires like any upload.
        key = f"staging/doctor-{ids.token(16)}"
        content = key.encode()
        try:
            await store.put(key, content)
            same = await store.get(key) == content
            await store.delete(key)
        except LatheError as error:
            message = f"The store answers but cannot be written: {error.message}"
            return [
                Finding("store", False, message, f"See whether it is full or read-only. {_where(settings)}")
            ]
        if not same:
            return [Finding("store", False, "The store gave back other bytes than it was given.")]
        found = [Finding("store", True, f"{_named(settings)} was written, read and cleared.")]
        free = free_bytes(settings)
        return [*found, room_finding("store room", free)] if free is not None else found

    async def bounded() -> Sequence[Finding]:
        return await run_probe("store", look)

    return bounded


def _named(settings: StoreSettings) -> str:
    if settings.kind == "folder":
        return f"The folder {settings.folder}"
    return f"The bucket {settings.bucket} at {settings.endpoint}"


def _where(settings: StoreSettings) -> str:
    if settings.kind == "folder":
        return f"The setting store.folder names {settings.folder}."
    place = f"LATHE_STORE__ENDPOINT ({settings.endpoint}), LATHE_STORE__BUCKET ({settings.bucket})"
    return f"Check {place} and the store's keys."
