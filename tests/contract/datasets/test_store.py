"""DatasetStore on SQLite and on PostgreSQL."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from lathe.common.db import Database, check_schema, migrate
from lathe.datasets.model import (
    Audit,
    AuditOptions,
    AuditResult,
    AuditState,
    AuditTask,
    Dataset,
    DatasetState,
    Finding,
    Report,
    TokenizerFile,
)
from lathe.datasets.store import SqlDatasetStore

NOW = datetime(2026, 1, 1, 12, 0, 0, 123456, tzinfo=UTC)
REPORT = Report(12, 25, (Finding(3, "messages[0].role", "unrecognized_role", "…"), Finding(0, "", "x", "y")))
TASK = AuditTask(
    "k" * 64, "d" * 64, "baseModels/b", "t" * 64, "c" * 64, AuditOptions("supervised", 512, "end"),
    (TokenizerFile("tokenizer.json", "basemodels/files/x", "a" * 64),), NOW,
)  # fmt: skip
RESULT = AuditResult("e" * 64, 12, 2**33, 2**32, 1, 512)


def dataset(id_="file-1", time=NOW, **changes):
    made = Dataset(
        "p", id_, "train.jsonl", "fine-tune", DatasetState.UPLOADING, time, staging_key="staging/x"
    )
    return replace(made, **changes)


@pytest.fixture(params=["sqlite", "postgresql"])
async def store(request, tmp_path):
    if request.param == "sqlite":
        url = f"sqlite+aiosqlite:///{tmp_path}/datasets.sqlite"
    else:
        url = request.getfixturevalue("postgres").new_database("datasets_store")
    db = Database(url)
    await migrate(db, "lathe.datasets")
    await check_schema(db, "lathe.datasets")
    yield SqlDatasetStore(db)
    await db.close()


async def test_a_dataset_comes_back_as_it_went_in(store):
    made = dataset(expire_time=NOW + timedelta(days=1), size_bytes=2**33, sha256="a" * 64, report=REPORT)
    assert await store.add(made, "create:1") == made
    assert await store.get("p", "file-1") == made
    assert await store.get("q", "file-1") is None
    assert await store.add(dataset("file-2"), "create:1") == made
    assert await store.find_by_request("p", "create:1") == made
    assert await store.find_by_request("q", "create:1") is None
    for id_ in ("file-3", "file-4"):
        assert (await store.add(dataset(id_), "")).id == id_


async def test_states_change_only_from_the_right_one(store):
    await store.add(dataset(), "")
    assert not await store.finish_validation("p", "file-1", DatasetState.READY, "a" * 64, None)
    assert not await store.begin_validation("q", "file-1", 5, "a" * 64)
    assert await store.begin_validation("p", "file-1", 5, "a" * 64)
    assert not await store.begin_validation("p", "file-1", 6, "b" * 64)
    counts = await store.count()
    assert (counts[DatasetState.VALIDATING], counts[DatasetState.READY]) == (1, 0)
    assert [found.id for found in await store.in_state(DatasetState.VALIDATING)] == ["file-1"]
    assert await store.finish_validation("p", "file-1", DatasetState.ERROR, "a" * 64, REPORT)
    assert not await store.finish_validation("p", "file-1", DatasetState.READY, "a" * 64, None)
    found = await store.get("p", "file-1")
    assert (found.state, found.size_bytes, found.report) == (DatasetState.ERROR, 5, REPORT)
    assert [left.id for left in await store.with_leftovers()] == ["file-1"]
    await store.clear_staging("p", "file-1")
    assert await store.with_leftovers() == []
    results = dataset("file-2", purpose="fine-tune-results", state=DatasetState.VALIDATING)
    await store.add(results, "")
    assert await store.begin_validation("p", "file-2", 7, "c" * 64)


async def test_pages_in_both_directions(store):
    made = [dataset(f"file-{n}", NOW + timedelta(microseconds=n // 2)) for n in range(5)]
    for each in made:
        await store.add(each, "")
    await store.add(dataset("other", purpose="evals"), "")
    await store.add(replace(dataset("foreign"), project="q"), "")
    options = {"purpose": "fine-tune", "after": None, "limit": 2}
    assert await store.page("p", **options, ascending=True) == made[:2]
    assert await store.page("p", **options, ascending=False) == [made[4], made[3]]
    options["after"] = (made[2].create_time, "file-2")
    assert await store.page("p", **options, ascending=True) == made[3:]
    assert await store.page("p", **options, ascending=False) == [made[1], made[0]]
    everything = await store.page("p", purpose="", after=None, ascending=True, limit=9)
    assert len(everything) == 6


async def test_what_has_outlived_its_time(store):
    await store.add(dataset("expired", expire_time=NOW), "")
    await store.add(dataset("expiring", expire_time=NOW + timedelta(seconds=1)), "")
    await store.add(dataset("old", NOW - timedelta(days=2)), "")
    await store.add(dataset("ready", NOW - timedelta(days=2), state=DatasetState.READY), "")
    found = await store.outlived(NOW, NOW - timedelta(days=1))
    assert {each.id for each in found} == {"expired", "old"}


async def test_deleting_hides_and_frees_the_request(store):
    await store.add(dataset(), "create:1")
    assert await store.begin_delete("p", "file-1")
    assert not await store.begin_delete("p", "file-1")
    assert await store.get("p", "file-1") is None
    assert await store.page("p", purpose="", after=None, ascending=True, limit=9) == []
    assert [found.id for found in await store.in_state(DatasetState.DELETING)] == ["file-1"]
    assert (await store.add(dataset("file-2"), "create:1")).id == "file-2"
    await store.remove("p", "file-1")
    await store.remove("p", "file-2")
    assert await store.in_state(DatasetState.DELETING) == []
    assert await store.get("p", "file-2") is not None


async def test_a_blob_is_claimed_only_while_nobody_needs_it(store):
    for id_ in ("one", "two"):
        await store.add(dataset(id_, sha256="a" * 64, state=DatasetState.READY), "")
    await store.begin_delete("p", "one")
    assert not await store.claim_blob("a" * 64, "one")
    assert not await store.is_claimed("a" * 64)
    await store.begin_delete("p", "two")
    assert await store.claim_blob("a" * 64, "one") and await store.claim_blob("a" * 64, "one")
    assert not await store.claim_blob("a" * 64, "two")
    assert await store.is_claimed("a" * 64)
    await store.release_blob("a" * 64, "two")
    assert await store.is_claimed("a" * 64)
    await store.release_blob("a" * 64, "one")
    assert not await store.is_claimed("a" * 64)


async def test_audits(store):
    await store.add_audit(TASK)
    await store.add_audit(replace(TASK, base_model="baseModels/other"))
    assert await store.running_audits() == [TASK]
    assert await store.get_audit("none", NOW) is None
    await store.set_audit_object(TASK.key, RESULT.sha256)
    assert await store.get_audit(TASK.key, NOW) == Audit(TASK.key, AuditState.RUNNING)
    assert not await store.claim_blob(RESULT.sha256, "someone")
    await store.finish_audit(TASK.key, AuditState.READY, REPORT, RESULT)
    await store.finish_audit(TASK.key, AuditState.ERROR, Report(), AuditResult())
    assert await store.get_audit(TASK.key, NOW) == Audit(TASK.key, AuditState.READY, REPORT, RESULT)
    assert await store.running_audits() == []
    await store.drop_running_audit(TASK.key)
    assert await store.get_audit(TASK.key, NOW) is not None


async def test_failed_audits_are_forgotten_and_dropped_ones_leave_a_claim(store):
    await store.add_audit(TASK)
    await store.finish_audit(TASK.key, AuditState.FAILED, REPORT, AuditResult())
    await store.forget_failed_audits()
    assert await store.get_audit(TASK.key, NOW) is None
    await store.add_audit(TASK)
    await store.set_audit_object(TASK.key, RESULT.sha256)
    await store.drop_running_audit(TASK.key)
    assert await store.audit_claims() == [(RESULT.sha256, "audit:" + TASK.key)]
    assert await store.claim_blob(RESULT.sha256, "audit:" + TASK.key)


async def test_unneeded_audits(store):
    later = NOW + timedelta(seconds=1)
    await store.add_audit(TASK)
    assert await store.unneeded_audits(later) == []
    await store.finish_audit(TASK.key, AuditState.READY, REPORT, RESULT)
    assert await store.unneeded_audits(NOW) == []
    assert await store.unneeded_audits(later) == [TASK.key]
    await store.add(dataset(sha256=TASK.dataset_sha256), "")
    assert await store.unneeded_audits(later) == []
    await store.begin_remove_audit(TASK.key, later)
    assert await store.audit_claims() == []
    await store.begin_delete("p", "file-1")
    await store.begin_remove_audit(TASK.key, later)
    assert await store.get_audit(TASK.key, NOW) is None
    assert await store.audit_claims() == [(RESULT.sha256, "audit:" + TASK.key)]
