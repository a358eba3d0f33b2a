"""Uploads in parts: what is refused, and two who complete at the same moment."""

import asyncio
import hashlib
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe.common.errors import FailedPrecondition, InvalidArgument, NotFound
from lathe.datasets import uploads as rules
from lathe.datasets.model import DatasetState
from lathe.datasets.upload_service import UploadService
from tests.unit.datasets.conftest import GOOD


@pytest.fixture
def parts(world):
    return UploadService(world.start(), world.uploads)


async def begin(world, parts, content=GOOD, sha256=""):
    dataset = await parts.datasets.create("acme", "a.jsonl", "fine-tune", None, "")
    await parts.open(dataset, len(content), sha256, presigned=False)
    target = await parts.open_part("acme", dataset.id)
    await world.objects.put(target.object_key, content)
    return dataset, target.part_id


async def test_whoever_completes_second_hears_the_same_even_when_the_parts_are_gone(world, parts):
    dataset, part = await begin(world, parts)

    class Slow:
        """The second stands still between its look at the row and its look at the parts."""

        def __init__(self):
            self.arrived, self.go_on = asyncio.Event(), asyncio.Event()

        def __getattr__(self, name):
            return getattr(world.objects, name)

        async def list(self, prefix):
            self.arrived.set()
            await self.go_on.wait()
            async for info in world.objects.list(prefix):
                yield info

    slow = Slow()
    second = UploadService(world.start(objects=slow), world.uploads)
    answer = asyncio.ensure_future(second.complete("acme", dataset.id, [part]))
    await slow.arrived.wait()
    await parts.complete("acme", dataset.id, [part])
    await world.validate()
    slow.go_on.set()
    session, found = await answer
    assert session.parts == (part,)
    assert (found.id, found.state) == (dataset.id, DatasetState.READY)
    assert await parts.complete("acme", dataset.id, [part]) == (session, found)
    with pytest.raises(FailedPrecondition) as refused:
        await parts.complete("acme", dataset.id, ["part-other"])
    assert refused.value.reason == "UPLOAD_COMPLETED"


async def test_a_digest_that_comes_at_the_end_is_checked_like_an_announced_one(world, parts):
    right, wrong = hashlib.sha256(GOOD).hexdigest(), "0" * 64
    for brought, state in ((right, DatasetState.READY), (wrong, DatasetState.ERROR)):
        dataset, part = await begin(world, parts)
        with pytest.raises(InvalidArgument, match="64 lower-case hex") as refused:
            await parts.complete("acme", dataset.id, [part], sha256="xyz")
        assert refused.value.violations[0].field == "sha256"
        await parts.complete("acme", dataset.id, [part], sha256=brought)
        await world.validate()
        assert (await parts.datasets.get("acme", dataset.id)).state is state
        await parts.complete("acme", dataset.id, [part], sha256=brought)
        with pytest.raises(InvalidArgument, match="was given before"):
            await parts.complete("acme", dataset.id, [part], sha256="1" * 64)
    announced, part = await begin(world, parts, sha256=right)
    with pytest.raises(InvalidArgument, match="was given before"):
        await parts.complete("acme", announced.id, [part], sha256=wrong)
    session, _ = await parts.complete("acme", announced.id, [part])
    assert session.sha256 == right


async def test_a_part_that_grew_after_the_end_is_not_the_file(world, parts):
    """A presigned URL works on for a while."""
    dataset, part = await begin(world, parts)
    _, committed = await parts.complete("acme", dataset.id, [part])
    await world.objects.put(f"{dataset.staging_key}/{part}", GOOD * 2)
    await world.validate()
    found = await parts.datasets.get("acme", dataset.id)
    assert (found.state, found.report.findings[0].code) == (DatasetState.ERROR, "digest_mismatch")
    assert committed.size_bytes == len(GOOD) and world.objects.keys() == []


async def test_a_client_that_sends_far_more_than_it_announced_is_stopped(world, parts, monkeypatch):
    monkeypatch.setattr(rules, "MAX_PART_BYTES", 10)
    dataset, _ = await begin(world, parts, b"0123456789")
    for _ in range(2):
        target = await parts.open_part("acme", dataset.id)
        await world.objects.put(target.object_key, b"0123456789")
    with pytest.raises(FailedPrecondition) as refused:
        await parts.open_part("acme", dataset.id)
    assert refused.value.reason == "TOO_MANY_PARTS"


async def test_a_deleted_dataset_takes_its_upload_with_it(world, parts):
    dataset, part = await begin(world, parts)
    await parts.datasets.delete("acme", dataset.id)
    with pytest.raises(FailedPrecondition) as refused:
        await parts.complete("acme", dataset.id, [part])
    assert refused.value.reason == "UPLOAD_CANCELLED"
    await world.sweep()
    assert world.objects.keys() == []
    with pytest.raises(NotFound):
        await parts.get("other", dataset.id)


async def test_signing(world, parts, monkeypatch):
    monkeypatch.setattr(rules, "PRESIGNED_PART_BYTES", 8)
    monkeypatch.setattr(rules, "MAX_SIGNED", 2)
    with pytest.raises(FailedPrecondition, match="UploadDataset"):
        await parts.check(20, "", presigned=True)
    for size in (0, (8 << 30) + 1):
        with pytest.raises(InvalidArgument):
            await parts.check(size, "", presigned=False)
    world.objects.public_url = "https://s3.example.com"
    await parts.check(20, "", presigned=True)
    dataset = await parts.datasets.create("acme", "a", "user_data", None, "")
    await parts.open(dataset, 20, "", presigned=True)
    rounds = []
    while (signed := await parts.sign("acme", dataset.id)).parts:
        rounds.append([(part.number, part.offset, part.size) for part, _ in signed.parts])
        for part, url in signed.parts:
            await world.objects.put(url.removeprefix("https://s3.example.com/"), b"x" * part.size)
    assert rounds == [[(0, 0, 8), (1, 8, 8)], [(2, 16, 4)]]
    # What is none of the planned parts is none of the file.
    await world.objects.put(f"{dataset.staging_key}/part-x", b"y")
    _, committed = await parts.complete("acme", dataset.id, [])
    assert committed.state is DatasetState.VALIDATING
    await world.validate()
    assert (await parts.datasets.get("acme", dataset.id)).size_bytes == 20


async def test_urls_work_no_longer_than_the_upload_is_open_and_not_for_much_more_than_announced(
    world, parts, monkeypatch
):
    world.objects.public_url = "https://s3.example.com"
    lives, signing = [], world.objects.presigned_put

    async def presigned_put(key, size, life):
        lives.append((size, life))
        return await signing(key, size, life)

    monkeypatch.setattr(world.objects, "presigned_put", presigned_put)
    monkeypatch.setattr(rules, "MAX_PART_BYTES", 8)
    dataset = await parts.datasets.create("acme", "a", "user_data", None, "")
    await parts.open(dataset, 20, "", presigned=True)
    session, _ = await parts.get("acme", dataset.id)
    await parts.sign("acme", dataset.id)
    await world.clock.advance((session.expire_time - world.clock.now()).total_seconds() - 60)
    ((_, url),) = (await parts.sign("acme", dataset.id)).parts
    assert lives == [(20, rules.URL_LIFE), (20, timedelta(seconds=60))]
    await world.objects.put(url.removeprefix("https://s3.example.com/"), b"x" * 48)
    with pytest.raises(FailedPrecondition, match="cancel this upload"):
        await parts.sign("acme", dataset.id)


@given(st.integers(1, 8 << 30))
def test_a_plan_covers_the_file_and_every_part_but_the_last_can_be_joined_by_s3(size):
    planned = rules.plan(size)
    assert [part.offset for part in planned] == [
        sum(p.size for p in planned[:n]) for n in range(len(planned))
    ]
    assert planned[-1].offset + planned[-1].size == size
    assert all(part.size >= 5 << 20 for part in planned[:-1]) and len(planned) < rules.MAX_PARTS
