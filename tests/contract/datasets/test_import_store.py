"""ImportStore on SQLite and on PostgreSQL."""

import asyncio
from dataclasses import replace
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


LATER = NOW + timedelta(minutes=1)


async def taken(imports, key, now=NOW):
    return await imports.take(key, now, now + timedelta(minutes=1))


async def test_each_is_one_trys(stores):
    datasets, imports = stores
    for id_ in ("file-1", "file-2"):
        await datasets.add(dataset(id_, source="https://x.example/a"), "")
        for source in ("https://x.example/a?sig=1", "another"):
            await imports.begin("p", id_, source, NOW)
    assert (await datasets.get("p", "file-1")).source == "https://x.example/a"
    assert await taken(imports, "staging/0", NOW - timedelta(seconds=1)) is None
    first, second = await taken(imports, "staging/1"), await taken(imports, "staging/2")
    assert first == Import("p", "file-1", "https://x.example/a?sig=1", 0, "staging/1", "staging/x")
    assert (second.dataset_id, second.staging_key) == ("file-2", "staging/2")
    assert (await datasets.get("p", "file-1")).staging_key == "staging/1"
    assert await taken(imports, "staging/3") is None
    # Nobody was heard of until then; what goes on is not taken.
    assert await imports.keep(second, LATER + timedelta(seconds=1))
    over = await taken(imports, "staging/3", LATER)
    assert over.dataset_id == "file-1" and await taken(imports, "staging/4", LATER) is None
    for said in (
        imports.keep(first, LATER),
        imports.again(first, 3, NOW),
        imports.finish(first, 5, "a" * 64),
        imports.fail(first, REPORT),
    ):
        assert not await said
    assert (await datasets.get("p", "file-1")).state is DatasetState.UPLOADING
    assert await imports.again(over, 1, NOW)
    again = await taken(imports, "staging/5")
    assert (over.earlier_key, again.earlier_key, again.tries) == ("staging/1", "staging/3", 1)


async def test_ends(stores):
    datasets, imports = stores
    for id_ in ("file-1", "file-2", "file-3"):
        await datasets.add(dataset(id_), "")
        await imports.begin("p", id_, "s", NOW)
    good, bad, gone = [await taken(imports, f"staging/{n}") for n in range(3)]
    assert await imports.finish(good, 5, "a" * 64) and not await imports.finish(good, 5, "a" * 64)
    found = await datasets.get("p", "file-1")
    assert (found.state, found.uploaded) == (DatasetState.VALIDATING, (5, "a" * 64))
    assert found.staging_key == "staging/0"
    assert await imports.fail(bad, REPORT)
    found = await datasets.get("p", "file-2")
    assert (found.state, found.report) == (DatasetState.ERROR, REPORT)
    await datasets.begin_delete("p", "file-3")
    for item in (good, bad, gone):
        assert not await imports.keep(item, LATER) and not await imports.again(item, 1, NOW)
    assert await taken(imports, "staging/9", LATER) is None
    # As if it never was.
    await imports.forget_ended()
    await imports.begin("p", "file-1", "other", NOW)
    await imports.forget_ended()
    assert await taken(imports, "staging/9", LATER) is None


async def test_a_project_with_many_keeps_no_other_waiting(stores):
    datasets, imports = stores
    for number, project in enumerate("pppqq"):
        id_ = f"file-{number}"
        await datasets.add(replace(dataset(id_), project=project), "")
        await imports.begin(project, id_, "s", NOW - timedelta(seconds=9 - number))
    found = [(await taken(imports, f"staging/{n}")).dataset_id for n in range(5)]
    assert found == ["file-0", "file-3", "file-1", "file-4", "file-2"]


async def test_what_waits_to_be_fetched_is_not_abandoned(stores):
    datasets, imports = stores
    for id_ in ("file-1", "file-2"):
        await datasets.add(dataset(id_, source="s"), "")
    # Of file-2 the process died before it could say so.
    await imports.begin("p", "file-1", "s", NOW)
    later = NOW + timedelta(days=2)
    assert [each.id for each in await datasets.outlived(later, NOW + timedelta(days=1))] == ["file-2"]


async def test_takers_beside_each_other(stores):
    datasets, imports = stores
    for number in range(8):
        await datasets.add(dataset(f"file-{number}"), "")
        await imports.begin("p", f"file-{number}", "s", NOW)
    found = [
        item.dataset_id
        for item in await asyncio.gather(*(taken(imports, f"staging/{n}") for n in range(12)))
        if item is not None
    ]
    # Who meets another's hand may go away empty; nobody gets what another has.
    assert len(found) == len(set(found)) > 0
    while (item := await taken(imports, "staging/x")) is not None:
        found.append(item.dataset_id)
    assert sorted(found) == [f"file-{n}" for n in range(8)]
