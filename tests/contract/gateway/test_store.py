"""The same behaviour of deployments and idempotency on the fake, SQLite and PostgreSQL."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lathe.common.db import Database, migrate
from lathe.common.errors import AlreadyExists
from lathe.gateway.model import Deployment
from lathe.gateway.ports import DeploymentStore
from lathe.gateway.store import SqlDeploymentStore, SqlIdempotencyStore
from tests.fakes.clock import FakeClock
from tests.fakes.gateway import FakeDeployments
from tests.fakes.ids import FakeIds

NOW = FakeClock().now()
ONE = Deployment("projects/acme/deployments/one", "tiny", NOW, NOW)


async def open_database(kind: str, request: pytest.FixtureRequest, folder: Path) -> Database:
    if kind == "sqlite":
        url = f"sqlite+aiosqlite:///{folder / 'gateway.db'}"
    else:
        postgres: Any = request.getfixturevalue("postgres")
        url = postgres.new_database("gateway_contract")
    db = Database(url)
    await migrate(db, "lathe.gateway")
    return db


@pytest.fixture(params=["fake", "sqlite", "postgres"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[DeploymentStore]:
    if request.param == "fake":
        yield FakeDeployments()
        return
    db = await open_database(request.param, request, tmp_path)
    yield SqlDeploymentStore(db)
    await db.close()


async def test_deployments(store: DeploymentStore) -> None:
    assert await store.add(ONE, "r1") == ONE
    assert await store.get(ONE.name) == ONE
    two = replace(ONE, name="projects/acme/deployments/two")
    assert await store.add(two, "r1") == ONE
    with pytest.raises(AlreadyExists):
        await store.add(ONE, "r2")
    with pytest.raises(AlreadyExists):
        await store.add(ONE, "")
    await store.add(two, "")
    await store.add(replace(ONE, name="projects/other/deployments/one"), "r1")
    assert list(await store.list("acme", after="", limit=10)) == [ONE, two]
    assert list(await store.list("acme", after=ONE.name, limit=10)) == [two]
    assert list(await store.list("acme", after="", limit=1)) == [ONE]

    changed = replace(ONE, model_id="ft:x", version=2)
    assert await store.update(changed, 1)
    assert not await store.update(replace(changed, version=3), 1)
    assert await store.get(ONE.name) == changed
    assert not await store.delete(ONE.name, 1)
    assert await store.delete(ONE.name, 2)
    assert not await store.delete(ONE.name, None)
    assert await store.get(ONE.name) is None


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
async def test_idempotency(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    db = await open_database(kind, request, tmp_path)
    clock = FakeClock()
    store = SqlIdempotencyStore(db, clock, FakeIds())
    assert await store.newest("k", "/v1/files", "d") is None
    first = await store.begin("k", "/v1/files", "d")
    clock.tick(1)
    second = await store.begin("k", "/v1/files", "d")
    assert await store.newest("k", "/v1/files", "d") == second
    assert await store.newest("other", "/v1/files", "d") is None

    await store.finish(second.id, 200, b"{}")
    done = await store.get(second.id)
    assert done is not None and (done.state, done.status, done.body) == ("done", 200, b"{}")
    await store.discard(second.id)
    assert await store.newest("k", "/v1/files", "d") == first

    clock.tick(600)
    assert await store.newest("k", "/v1/files", "d") is None
    assert await store.sweep(3600) == 0 and await store.sweep(600) == 1
    assert await store.get(first.id) is None
    await db.close()
