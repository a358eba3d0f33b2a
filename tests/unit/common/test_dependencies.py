"""What a service depends on is watched, and its outages are counted and logged once."""

import asyncio
import logging

import pytest

from lathe.common.background import in_background
from lathe.common.dependencies import watch_dependencies
from lathe.common.errors import Unavailable
from lathe.common.metrics import Metrics
from tests.fakes.clock import FakeClock


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_an_outage_is_shown_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    clock, metrics = FakeClock(), Metrics()
    away: list[str] = []
    caplog.set_level(logging.INFO, "lathe.common.dependencies")

    async def store() -> None:
        if away:
            raise Unavailable(away[0], retry_after=1)

    async def database() -> None:
        return None

    def up(name: str) -> float | None:
        labels = {"service": "models", "dependency": name}
        return metrics.registry.get_sample_value("lathe_dependency_up", labels)

    checks = {"store": store, "database": database}
    async with in_background(watch_dependencies("models", checks, metrics, clock, interval_s=15)):
        await settle()
        assert (up("store"), up("database")) == (1, 1)
        away.append("The bucket is gone.")
        for _ in range(3):
            await clock.advance(15)
            await settle()
        assert (up("store"), up("database")) == (0, 1)
        away.clear()
        await clock.advance(15)
        await settle()
        assert up("store") == 1
    assert [record.getMessage() for record in caplog.records] == [
        "models does not reach its store: The bucket is gone.",
        "models reaches its store again.",
    ]
