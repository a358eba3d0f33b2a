"""UploadStore on SQLite and on PostgreSQL."""

from dataclasses import replace
from datetime import timedelta

import pytest

from lathe.common.db import Database, migrate
from lathe.datasets.model import DatasetState
from lathe.datasets.store import SqlDatasetStore
from lathe.datasets.upload_store import SqlUploadStore
from lathe.datasets.uploads import UploadSession, UploadState
from tests.contract.datasets.test_store import NOW, dataset

SESSION = UploadSession("p", "file-1", "train.jsonl", "fine-tune", 2**33, "", NOW, NOW + timedelta(hours=1))
LATER = NOW + timedelta(minutes=30)


@pytest.fixture(params=["sqlite", "postgresql"])
async def stores(request, tmp_path):
    if request.param == "sqlite":
        url = f"sqlite+aiosqlite:///{tmp_path}/datasets.sqlite"
    else:
        url = request.getfixturevalue("postgres").new_database("upload_store")
    db = Database(url)
    await migrate(db, "lathe.datasets")
    datasets, uploads = SqlDatasetStore(db), SqlUploadStore(db)
    await datasets.add(dataset(), "create:1")
    await uploads.add_upload(SESSION)
    yield datasets, uploads
    await db.close()


async def test_a_session_comes_back_as_it_went_in(stores):
    datasets, uploads = stores
    assert await uploads.get_upload("p", "file-1") == SESSION
    assert await uploads.get_upload("q", "file-1") is None
    assert await uploads.add_upload(replace(SESSION, size_bytes=7)) == SESSION
    assert await datasets.staged_parts("p", "file-1") == ([], "")
    assert await datasets.staged_parts("p", "file-2") == ((), "")


async def test_completing_changes_both_once(stores):
    datasets, uploads = stores
    brought = replace(SESSION, parts=("b", "a"), md5="m" * 32, sha256="s" * 64)
    assert not await uploads.complete_upload(replace(brought, project="q"), LATER)
    assert not await uploads.complete_upload(brought, SESSION.expire_time)
    assert await uploads.complete_upload(brought, LATER)
    assert not await uploads.complete_upload(replace(SESSION, parts=("a",)), LATER)
    assert not await uploads.cancel_upload("p", "file-1", LATER)
    found = await uploads.get_upload("p", "file-1")
    assert found == replace(brought, state=UploadState.COMPLETED)
    assert await datasets.staged_parts("p", "file-1") == (["b", "a"], "m" * 32)
    made = await datasets.get("p", "file-1")
    assert (made.state, made.size_bytes, made.sha256) == (DatasetState.VALIDATING, 2**33, "s" * 64)
    assert await datasets.note_digest("p", "file-1", "d" * 64)
    assert (await datasets.get("p", "file-1")).sha256 == "d" * 64
    await uploads.forget_uploads(SESSION.expire_time + timedelta(days=9))
    assert await uploads.get_upload("p", "file-1") is not None
    await datasets.finish_validation("p", "file-1", DatasetState.READY, "d" * 64, None)
    assert not await datasets.note_digest("p", "file-1", "e" * 64)
    await uploads.forget_uploads(SESSION.expire_time)
    assert await uploads.get_upload("p", "file-1") is not None
    await uploads.forget_uploads(SESSION.expire_time + timedelta(seconds=1))
    assert await uploads.get_upload("p", "file-1") is None


async def test_nothing_is_completed_without_its_dataset(stores):
    datasets, uploads = stores
    await datasets.begin_delete("p", "file-1")
    assert not await uploads.complete_upload(replace(SESSION, parts=("a",)), LATER)
    assert (await uploads.get_upload("p", "file-1")).state is UploadState.PENDING
    assert await uploads.cancel_upload("p", "file-1", LATER)


@pytest.mark.parametrize("cancelled", [True, False])
async def test_what_is_given_up_takes_its_dataset_with_it(stores, cancelled):
    datasets, uploads = stores
    if cancelled:
        assert await uploads.cancel_upload("p", "file-1", LATER)
        assert not await uploads.cancel_upload("p", "file-1", LATER)
    else:
        await uploads.expire_uploads(LATER)
        assert (await uploads.get_upload("p", "file-1")).state is UploadState.PENDING
        assert not await uploads.cancel_upload("p", "file-1", SESSION.expire_time)
    await uploads.expire_uploads(SESSION.expire_time)
    state = (await uploads.get_upload("p", "file-1")).state
    assert state is (UploadState.CANCELLED if cancelled else UploadState.EXPIRED)
    assert await datasets.get("p", "file-1") is None
    assert await datasets.find_by_request("p", "create:1") is None
    assert [found.id for found in await datasets.in_state(DatasetState.DELETING)] == ["file-1"]
