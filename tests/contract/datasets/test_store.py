"""DatasetStore on SQLite and on PostgreSQL."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from lathe.common.db import Database, check_schema, migrate
from lathe.common.errors import AlreadyExists
from lathe.datasets.import_store import SqlImportStore
from lathe.datasets.model import (
    Audit,
    AuditOptions,
    AuditResult,
    AuditState,
    AuditTask,
    Dataset,
    DatasetState,
    Finding,
    Overlap,
    Report,
    TokenizerFile,
)
from lathe.datasets.operations import Drop, Parent, Preparation, Split
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


async def test_what_waits_and_since_when(store):
    assert await store.waiting_since() == {"import": None, "validation": None, "audit": None}
    assert set((await store.count_audits()).values()) == {0}
    for n, state in enumerate([DatasetState.UPLOADING, DatasetState.VALIDATING, DatasetState.VALIDATING]):
        await store.add(dataset(f"file-{n}", NOW + timedelta(minutes=n), state=state), "")
    # One that a user uploads waits for that user; the other one is fetched.
    await store.add(dataset("file-9", NOW + timedelta(minutes=9)), "")
    await SqlImportStore(store._db).begin("p", "file-9", "https://example.org/a.jsonl", NOW)
    await store.add_audit(TASK)
    await store.add_audit(replace(TASK, key="l" * 64, now=NOW + timedelta(minutes=1)))
    waits = {"import": NOW + timedelta(minutes=9), "validation": NOW + timedelta(minutes=1)}
    assert await store.waiting_since() == {**waits, "audit": NOW}
    await store.finish_audit(TASK.key, AuditState.READY, REPORT, RESULT)
    assert (await store.waiting_since())["audit"] == NOW + timedelta(minutes=1)
    counts = await store.count_audits()
    assert (counts[AuditState.RUNNING], counts[AuditState.READY], counts[AuditState.FAILED]) == (1, 1, 0)


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


async def test_several_are_kept_together_or_not_at_all(store):
    one, two, three = (dataset(id=f"file-{n}") for n in "123")
    assert await store.add_all([(one, "a"), (two, "b")])
    assert not await store.add_all([(three, "c"), (dataset(id="file-4"), "a")])
    assert not await store.add_all([(three, ""), (one, "")])
    assert await store.get("p", "file-3") is None and await store.find_by_request("p", "c") is None
    assert (await store.find_by_request("p", "b")).id == "file-2"


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
    def claim(holder, time=NOW):
        return store.claim_blob("a" * 64, "file-1", holder, time)

    for id_ in ("one", "two"):
        await store.add(dataset(id_, sha256="a" * 64, state=DatasetState.READY), "")
    await store.begin_delete("p", "one")
    assert not await claim("one")
    assert not await store.is_claimed("a" * 64)
    await store.begin_delete("p", "two")
    assert await claim("one")
    assert not await claim("one") and not await claim("two")
    assert await store.is_claimed("a" * 64)
    await store.release_blob("a" * 64, "two")
    assert await store.is_claimed("a" * 64)
    await store.release_blob("a" * 64, "one")
    assert not await store.is_claimed("a" * 64)


async def test_the_claim_of_a_call_that_broke_off_is_taken_over(store):
    lease = timedelta(minutes=10)
    assert await store.claim_blob("a" * 64, "file-1", "one", NOW)
    assert await store.left_claims(NOW + lease) == []
    assert not await store.claim_blob("a" * 64, "file-1", "two", NOW + lease)
    later = NOW + lease + timedelta(seconds=1)
    assert await store.left_claims(later) == [("a" * 64, "file-1")]
    assert await store.claim_blob("a" * 64, "orphan", "two", later)
    await store.release_blob("a" * 64, "one")
    assert await store.is_claimed("a" * 64)
    assert await store.left_claims(later) == []


async def test_what_nothing_names(store):
    await store.add(dataset("file-1", sha256="a" * 64, state=DatasetState.READY), "")
    await store.add(dataset("file-2", sha256="b" * 64, staging_key="staging/y"), "")
    await store.begin_delete("p", "file-2")
    await store.add_audit(TASK)
    await store.set_audit_objects(TASK.key, RESULT.sha256, "f" * 64)
    await store.claim_blob("c" * 64, "x", "one", NOW)
    named = ["a" * 64, "b" * 64, "c" * 64, "f" * 64, RESULT.sha256]
    assert await store.unnamed([*named, "0" * 64]) == {"0" * 64}
    assert await store.unnamed_staging(["staging/x", "staging/y", "staging/z"]) == {"staging/z"}


async def test_audits(store):
    await store.add_audit(TASK)
    await store.add_audit(replace(TASK, base_model="baseModels/other"))
    assert await store.running_audits() == [TASK]
    assert await store.get_audit("none", NOW) is None
    assert await store.is_audit_of(TASK.key, TASK.dataset_sha256)
    assert not await store.is_audit_of(TASK.key, "0" * 64)
    assert not await store.is_audit_of("none", TASK.dataset_sha256)
    assert [await store.begin_audit(TASK.key) for _ in range(2)] == [1, 2]
    await store.end_audit_try(TASK.key)
    assert [await store.begin_audit(key) for key in (TASK.key, "none")] == [1, 0]
    await store.set_audit_objects(TASK.key, RESULT.sha256, "")
    assert await store.get_audit(TASK.key, NOW) == Audit(TASK.key, AuditState.RUNNING)
    assert not await store.claim_blob(RESULT.sha256, "someone", "one", NOW)
    await store.finish_audit(TASK.key, AuditState.READY, REPORT, RESULT)
    await store.finish_audit(TASK.key, AuditState.ERROR, Report(), AuditResult())
    assert await store.get_audit(TASK.key, NOW) == Audit(TASK.key, AuditState.READY, REPORT, RESULT)
    assert await store.running_audits() == []
    await store.drop_running_audit(TASK.key)
    assert await store.get_audit(TASK.key, NOW) is not None


async def test_failed_audits_are_forgotten_and_dropped_ones_leave_a_claim(store):
    await store.add_audit(TASK)
    await store.finish_audit(TASK.key, AuditState.FAILED, REPORT, AuditResult())
    await store.forget_failed_audits(begins=0)
    await store.forget_failed_audits(unused_since=NOW)
    await store.forget_failed_audits(dataset_sha256="0" * 64)
    assert await store.get_audit(TASK.key, NOW) is not None
    await store.forget_failed_audits(begins=1, unused_since=NOW + timedelta(seconds=1))
    assert await store.get_audit(TASK.key, NOW) is None
    await store.add_audit(TASK)
    await store.forget_failed_audits(dataset_sha256=TASK.dataset_sha256)
    await store.finish_audit(TASK.key, AuditState.FAILED, REPORT, AuditResult())
    await store.forget_failed_audits(dataset_sha256=TASK.dataset_sha256)
    assert await store.get_audit(TASK.key, NOW) is None
    await store.add_audit(TASK)
    await store.set_audit_objects(TASK.key, RESULT.sha256, "")
    await store.drop_running_audit(TASK.key)
    assert await store.left_claims(NOW) == [(RESULT.sha256, "audit:" + TASK.key)]
    assert await store.claim_blob(RESULT.sha256, "audit:" + TASK.key, "one", NOW)


async def test_the_tokens_that_are_used_keep_their_audits(store):
    await store.add_audit(TASK)
    await store.finish_audit(TASK.key, AuditState.READY, REPORT, RESULT)
    later = NOW + timedelta(days=8)
    # More than a database takes at once.
    await store.use_tokens([f"{n:064x}" for n in range(1200)], later)
    assert await store.unneeded_audits(later) == [TASK.key]
    await store.use_tokens([*(f"{n:064x}" for n in range(1200)), RESULT.sha256], later)
    assert await store.unneeded_audits(later) == []
    await store.begin_remove_audit(TASK.key, later)
    assert await store.is_audit_of(TASK.key, TASK.dataset_sha256)


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
    assert await store.left_claims(NOW) == []
    await store.begin_delete("p", "file-1")
    await store.begin_remove_audit(TASK.key, later)
    assert await store.get_audit(TASK.key, NOW) is None
    assert await store.left_claims(NOW) == [(RESULT.sha256, "audit:" + TASK.key)]


def ready(id_, time=NOW, **changes):
    return dataset(id_, time, **{"state": DatasetState.READY, "sha256": id_[-1] * 64, **changes})


async def test_what_was_made_of_others_is_written_once(store):
    made = Preparation((Parent("file-0", "a" * 64),), Split(3, 0.25, 0, "label"), "held_out")
    new = dataset(state=DatasetState.VALIDATING, preparation=made)
    await store.add(new, "")
    await store.add(dataset("file-2", state=DatasetState.VALIDATING, sha256="b" * 64), "")
    assert await store.unwritten() == [new] and new.unwritten
    assert not await store.set_written("q", "file-1", 5, "c" * 64)
    assert await store.set_written("p", "file-1", 5, "c" * 64)
    assert not await store.set_written("p", "file-1", 6, "d" * 64)
    assert await store.unwritten() == []
    written = await store.get("p", "file-1")
    assert (written.size_bytes, written.sha256, written.preparation) == (5, "c" * 64, made)
    await store.add(
        dataset("file-3", state=DatasetState.VALIDATING, preparation=replace(made, operation=Drop((1, 9)))),
        "",
    )
    await store.begin_delete("p", "file-3")
    assert not await store.set_written("p", "file-3", 5, "c" * 64)
    assert await store.unwritten() == []


async def test_training_files_are_indexed_once_per_content_and_version(store):
    later = NOW + timedelta(seconds=1)
    one, copy, other = ready("file-a", later), ready("file-b", sha256="a" * 64), ready("file-c", later)
    for each in (one, copy, other, ready("evals-d", purpose="evals")):
        await store.add(each, "")
    await store.add(dataset("file-e", state=DatasetState.VALIDATING, sha256="a" * 64), "")
    assert await store.training_files("p") == [copy, one, other]
    assert await store.training_files("q") == []
    assert await store.to_index(1) == ["a" * 64, "c" * 64]
    assert await store.set_indexed("a" * 64, 1)
    assert not await store.set_indexed("f" * 64, 1)
    assert await store.to_index(1) == ["c" * 64]
    assert await store.to_index(2) == ["a" * 64, "c" * 64]
    await store.add(ready("file-f", NOW - timedelta(days=1), sha256="0" * 64, size_bytes=1 << 33), "")
    await store.add(ready("file-g", sha256="f" * 64, size_bytes=1), "")
    assert await store.to_index(2) == ["a" * 64, "c" * 64, "f" * 64, "0" * 64]
    for id_ in ("file-f", "file-g"):
        await store.begin_delete("p", id_)
    # What was still being validated may lose the index to a deletion of the same content.
    await store.finish_validation("p", "file-e", DatasetState.READY, "a" * 64, None)
    assert await store.to_index(1) == ["a" * 64, "c" * 64]
    assert await store.set_indexed("c" * 64, 1) and await store.unset_indexed("c" * 64)
    assert "c" * 64 in await store.to_index(1)
    await store.begin_delete("p", "file-c")
    assert not await store.unset_indexed("c" * 64) and not await store.set_indexed("c" * 64, 1)


async def test_a_frozen_dataset_has_one_name_and_stays(store):
    await store.add(ready("file-a", expire_time=NOW), "")
    await store.add(ready("file-b"), "")
    await store.add(replace(ready("file-c"), project="q"), "")
    await store.add(dataset("file-d"), "")
    assert await store.freeze("p", "file-a", "exam") and await store.freeze("p", "file-a", "exam")
    assert not await store.freeze("p", "file-a", "other")
    assert not await store.freeze("p", "file-d", "other")
    with pytest.raises(AlreadyExists):
        await store.freeze("p", "file-b", "exam")
    assert await store.freeze("q", "file-c", "exam") and await store.freeze("p", "file-b", "a")
    assert [each.frozen_as for each in await store.frozen("p")] == ["a", "exam"]
    found = await store.get("p", "file-a")
    assert (found.frozen_as, found.expire_time) == ("exam", None)
    assert not await store.begin_delete("p", "file-a")
    assert await store.outlived(NOW + timedelta(days=9), NOW - timedelta(days=1)) == []
    await store.thaw("p", "file-a")
    assert (await store.get("p", "file-a")).frozen_as == ""
    assert await store.begin_delete("p", "file-a")


async def test_what_two_files_share_is_kept_as_long_as_both_are_there(store):
    for id_ in ("file-a", "file-b"):
        await store.add(ready(id_), "")
    pair = Overlap("a" * 64, "b" * 64)
    assert await store.overlap("a" * 64, "b" * 64) == await store.overlap("a" * 64, "b" * 64) == pair
    assert await store.overlaps_to_find() == [pair]
    found = replace(pair, count=2**33, lines=(1, 2**33))
    await store.set_overlap(found)
    assert await store.overlap("a" * 64, "b" * 64) == found
    assert await store.overlaps_to_find() == []
    await store.forget_overlaps()
    assert await store.overlap("a" * 64, "b" * 64) == found
    await store.begin_delete("p", "file-a")
    await store.forget_overlaps()
    assert await store.overlap("a" * 64, "b" * 64) == pair
