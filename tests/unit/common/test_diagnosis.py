"""What the doctor's findings say: clocks, room, databases and stores that are not well."""

from datetime import UTC, datetime, timedelta

import pytest

from lathe.common.dboutage import explain
from lathe.common.diagnosis import Finding, Severity, clock_finding, clock_skew, room_finding, size_text
from lathe.common.errors import Unavailable
from lathe.common.probes import run_probe, store_probe
from lathe.common.settings import StoreSettings
from tests.fakes.ids import FakeIds
from tests.fakes.objectstore import MemoryObjectStore

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
SETTING = "LATHE_JOBS_DB__URL"


def after(seconds: float) -> datetime:
    return NOON + timedelta(seconds=seconds)


def test_a_finding_that_works_but_has_advice_is_a_warning() -> None:
    assert Finding("a", True, "Well.").severity is Severity.OK
    assert Finding("a", True, "Well.", "Act.").severity is Severity.WARNING
    assert Finding("a", False, "Ill.").severity is Severity.FAILED


def test_the_time_that_a_question_takes_is_no_skew() -> None:
    assert clock_skew(after(3), NOON, after(5)) == 0
    assert clock_skew(after(7), NOON, after(5)) == 2
    assert clock_skew(after(-4), NOON, after(5)) == -4


@pytest.mark.parametrize(
    ("seconds", "severity"), [(0.5, Severity.OK), (-3, Severity.WARNING), (30, Severity.FAILED)]
)
def test_clocks_that_differ_by_seconds_are_told(seconds: float, severity: Severity) -> None:
    finding = clock_finding("clock", "jobs", after(seconds), NOON, NOON)
    assert finding.severity is severity
    if severity is not Severity.OK:
        assert f"{abs(seconds):.1f} seconds {'ahead' if seconds > 0 else 'behind'}" in finding.message


def test_a_disk_is_reported_before_it_is_full() -> None:
    sizes = (50 * 10**9, 10**9, 10**6)
    assert [room_finding("room", size).severity.value for size in sizes] == ["ok", "warning", "failed"]
    assert [size_text(size) for size in (7, 30_284, 2 * 10**12)] == ["7 B", "30.3 kB", "2.0 TB"]


@pytest.mark.parametrize(
    ("said", "why", "advice"),
    [
        (
            'connection failed: FATAL:  password authentication failed for user "jobs"',
            'password of user "jobs"',
            SETTING,
        ),
        ('FATAL:  database "lathe" does not exist', '"lathe"', "Create it"),
        ('FATAL:  role "jobs" does not exist', 'no user "jobs"', SETTING),
        ("failed to resolve host 'db': [Errno -2] Name or service not known", 'host "db"', SETTING),
        (
            'connection to server at "10.0.0.9", port 5432 failed: Connection refused\n\tIs the server running?',
            "10.0.0.9:5432",
            "Start the database",
        ),
        ("FATAL:  sorry, too many clients already", "no connection left", "max_connections"),
        ('could not extend file "base/1/2": No space left on device', "disk is full", "more room"),
        ("something new\n  and odd", "something new and odd", SETTING),
    ],
)
def test_what_postgres_says_becomes_what_to_do(said: str, why: str, advice: str) -> None:
    reason = explain(said, SETTING)
    assert why in reason.why
    assert advice in reason.advice


class Broken(MemoryObjectStore):
    """A store that can be read only."""

    async def put(self, key, data, *, if_absent=False):  # type: ignore[no-untyped-def]
        raise Unavailable("The store's disk is full.", reason="STORE_FULL")


async def test_a_store_that_is_full_is_told_and_one_that_works_is_left_clean() -> None:
    settings = StoreSettings(kind="s3", endpoint="s3:8333", bucket="lathe")
    [finding] = await store_probe(Broken(), settings, FakeIds())()
    assert not finding.ok
    assert "disk is full" in finding.message
    assert "lathe" in finding.advice
    store = MemoryObjectStore()
    [finding] = await store_probe(store, settings, FakeIds())()
    assert finding.severity is Severity.OK
    assert [info async for info in store.list("")] == []


async def test_a_probe_never_hangs_and_never_raises() -> None:
    import asyncio

    async def hangs() -> list[Finding]:
        await asyncio.Event().wait()
        return []

    async def breaks() -> list[Finding]:
        raise RuntimeError("nobody expected this")

    [finding] = await run_probe("store", hangs, 0.01)
    assert "within 0 seconds" in finding.message
    [finding] = await run_probe("store", breaks)
    assert not finding.ok
