"""ImportStore on SQLite and on PostgreSQL."""

from datetime import timedelta

import pytest

from lathe.common.db import Database, migrate
from lathe.datasets.import_store import SqlImportStore
from lathe.datasets.model import DatasetState, whole_file
from lathe.datasets.ports import Import
from lathe.datasets.store import SqlDatasetStore
from tests.contract.datasets.test_store import NOW, dataset

REPORT = whole_file("import_failed", "gone")


@pytest.fixture(params=["sqlite", "postgresql"])
async def stores(request, tmp_path):
    if request.param == "sqlite":
        url = f"sqlite+aiosqlite:///{tmp_path}/datasets.sqlite"
    else:
        url = request.getfixturevalue("postgres").new_database("import_store")
    db = Database(url)
    await migrate(db, "lathe.datasets")
    yield SqlDatasetStore(db), SqlImportStore(db)
    await db.close()


async def test_what_is_due(stores):
    datasets, imports = stores
    for id_ in ("file-1", "file-2"):
        await datasets.add(dataset(id_, source="https://x.example/a"), "")
        for source in ("https://x.example/a?sig=1", "another"):
            await imports.begin("p", id_, source, NOW)
    assert (await datasets.get("p", "file-1")).source == "https://x.example/a"
    wanted = [Import("p", id_, "https://x.example/a?sig=1", 0) for id_ in ("file-1", "file-2")]
    assert await imports.due(NOW) == wanted
    assert await imports.due(NOW - timedelta(seconds=1)) == []
    later = NOW + timedelta(seconds=9)
    await imports.again("file-1", 1, later)
    assert await imports.due(NOW) == wanted[1:]
    assert [item.tries for item in await imports.due(later)] == [0, 1]
    await imports.fail("q", "file-2", REPORT)
    assert len(await imports.due(later)) == 2
    await imports.fail("p", "file-2", REPORT)
    found = await datasets.get("p", "file-2")
    assert (found.state, found.report) == (DatasetState.ERROR, REPORT)
    await datasets.begin_validation("p", "file-1", 5, "a" * 64)
    await imports.fail("p", "file-1", REPORT)
    assert (await datasets.get("p", "file-1")).state is DatasetState.VALIDATING
    await imports.forget_ended()
    assert await imports.due(later) == []
