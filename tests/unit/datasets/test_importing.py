"""Imports in the background: what is fetched, what is tried again, what is given up."""

import asyncio
import hashlib
import io
import json
from contextlib import suppress
from dataclasses import replace
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from lathe.common.errors import FailedPrecondition, InvalidArgument, Unavailable
from lathe.datasets.fetching import FetchBroke, Fetcher, FetchRefused, Secret, checked
from lathe.datasets.import_store import SqlImportStore
from lathe.datasets.importing import LEASE, MAX_TRIES, UNFETCHED, Importing
from lathe.datasets.model import DatasetState, ImportOptions
from lathe.datasets.settings import DatasetsSettings
from lathe.datasets.sources import Sources, check_source, shown_source
from lathe.text.filekinds import FileType
from tests.fakes.objectstore import MemoryObjectStore
from tests.unit.datasets.conftest import GOOD

HUB = "https://hub.example/api/datasets"
S3 = {"kind": "s3", "endpoint": "s3.example:443", "bucket": "any"}
URL = "https://files.example.com/data/train.jsonl?sig=secret"


class FakeSources:
    """`content`: pieces of one file, or what is raised in their place; an item that can be called is called. more:
    further files, each whole."""

    def __init__(self, *content, more=(), max_bytes=1 << 20):
        self.content = content
        self.more = more
        self.max_bytes = max_bytes
        self.reads = []
        self.closed = 0

    async def files(self, source):
        self.reads.append(source)
        return [self.first, *(partial(self.whole, content) for content in self.more)]

    async def first(self):
        try:
            for item in self.content:
                if isinstance(item, Exception):
                    raise item
                yield await item() if callable(item) else item
        finally:
            self.closed += 1

    async def whole(self, content):
        yield content


def importing(world, sources):
    return Importing(world.start(), SqlImportStore(world.db), sources)


async def begin(work, source=URL):
    dataset = await work.datasets.create(
        "acme", check_source(source), "fine-tune", None, source, source=shown_source(source)
    )
    await work.begin(dataset, source)
    return dataset


def staged(world):
    keys = world.objects.keys()
    return [key for key in keys if key.startswith("staging/")]


async def state(work, dataset):
    return (await work.datasets.get("acme", dataset.id)).state


async def test_what_is_fetched_is_validated_like_an_upload(world):
    work = importing(world, FakeSources(GOOD[:100], GOOD[100:]))
    dataset = await begin(work)
    assert (dataset.display_name, dataset.source) == (
        "train.jsonl",
        "https://files.example.com/data/train.jsonl",
    )
    await work.step()
    await world.validate()
    found = await work.datasets.get("acme", dataset.id)
    assert (found.state, found.sha256) == (DatasetState.READY, hashlib.sha256(GOOD).hexdigest())
    assert found.source == dataset.source
    await work.step()
    assert work.sources.reads == [URL]


async def test_what_broke_is_tried_again_and_given_up_in_the_end(world):
    work = importing(world, FakeSources(b"half", FetchBroke("The server answered 503.")))
    dataset = await begin(work)
    for number in range(1, MAX_TRIES + 1):
        assert await state(work, dataset) is DatasetState.UPLOADING
        await work.step()
        await work.step()
        assert len(work.sources.reads) == number
        world.clock.tick(5 * 2**number)
    found = await work.datasets.get("acme", dataset.id)
    assert (found.state, found.report.findings[0].code) == (DatasetState.ERROR, "import_failed")
    assert "503" in found.report.findings[0].message and world.objects.keys() == []


async def test_a_process_that_died_is_followed_by_another(world):
    dataset = await begin(importing(world, FakeSources()))
    # As a process leaves it that is killed while it fetches.
    await importing(world, None).store.take("staging/dead", world.clock.now(), world.clock.now() + LEASE)
    work = importing(world, FakeSources(GOOD))
    await work.step()
    assert work.sources.reads == []
    world.clock.tick(LEASE.total_seconds())
    await work.step()
    assert await state(work, dataset) is DatasetState.VALIDATING


async def test_a_process_that_ends_leaves_it_to_the_next(world):
    entered = asyncio.Event()

    async def stands_still():
        entered.set()
        await asyncio.Event().wait()

    first = importing(world, FakeSources(b"a", stands_still))
    dataset = await begin(first)
    step = asyncio.create_task(first.step())
    await entered.wait()
    step.cancel()
    with pytest.raises(asyncio.CancelledError):
        await step
    assert first.sources.closed == 1
    work = importing(world, FakeSources(GOOD))
    await work.step()
    assert await state(work, dataset) is DatasetState.VALIDATING


async def test_two_replicas_never_fetch_one_dataset_beside_each_other(world):
    """And one that was thought dead cannot put its bytes, or its word, in the place of the other's."""
    entered, go_on = asyncio.Event(), asyncio.Event()

    async def stands_still():
        entered.set()
        await go_on.wait()
        return b"the file as it was before"

    slow, other = importing(world, FakeSources(stands_still)), importing(world, FakeSources(GOOD))
    dataset = await begin(slow)
    step = asyncio.create_task(slow.step())
    await entered.wait()
    await other.step()
    assert other.sources.reads == []
    # It says so while it goes on.
    for _ in range(30):
        world.clock.tick(5)
        while not world.clock.sleeping:  # noqa: ASYNC110
            await asyncio.sleep(0)
    await other.step()
    assert other.sources.reads == []
    # It was suspended: the clock went on, it did not.
    world.clock.leap(LEASE.total_seconds())
    await other.step()
    assert other.sources.reads == [URL] and await state(other, dataset) is DatasetState.VALIDATING
    go_on.set()
    await step
    await world.validate()
    found = await other.datasets.get("acme", dataset.id)
    assert (found.state, found.sha256) == (DatasetState.READY, hashlib.sha256(GOOD).hexdigest())
    assert not staged(world)


async def test_a_store_that_is_away_costs_no_try_and_keeps_nobody_waiting(world):
    work = importing(world, FakeSources(GOOD))
    dataset, other = await begin(work), await begin(work, "https://files.example.com/other.jsonl")
    world.objects.outage = Unavailable("The store's disk is full.")
    for _ in range(MAX_TRIES + 2):
        await work.step()
        world.clock.tick(700)
    assert len(work.sources.reads) == 2 * (MAX_TRIES + 2)
    assert await state(work, dataset) is DatasetState.UPLOADING
    world.objects.outage = None
    await work.step()
    for one in (dataset, other):
        assert await state(work, one) is DatasetState.VALIDATING


async def test_a_fault_of_ours_is_no_endless_loop(world):
    work = importing(world, FakeSources(RuntimeError("a bug")))
    dataset = await begin(work)
    for number in range(MAX_TRIES):
        await work.step()
        world.clock.tick(5 * 2**number)
    found = await work.datasets.get("acme", dataset.id)
    assert (found.state, found.report.findings[0].code) == (DatasetState.ERROR, "import_failed")


async def test_what_is_refused_says_why_at_once(world):
    work = importing(world, FakeSources(FetchRefused("Its address may not be reached.")))
    dataset = await begin(work)
    await work.step()
    found = await work.datasets.get("acme", dataset.id)
    assert (found.state, found.report.findings[0].code) == (DatasetState.ERROR, "import_refused")


async def test_deleting_the_dataset_stops_it_though_the_server_is_silent(world):
    entered = asyncio.Event()

    async def silent():
        entered.set()
        await asyncio.Event().wait()

    work = importing(world, FakeSources(b"a", silent))
    dataset = await begin(work)
    step = asyncio.create_task(work.step())
    await entered.wait()
    await work.datasets.delete("acme", dataset.id)
    await world.clock.advance(6)
    await asyncio.wait_for(step, 60)
    assert work.sources.closed == 1
    await world.sweep()
    assert world.objects.keys() == []
    await work.step()
    assert len(work.sources.reads) == 1


async def test_deleted_at_the_very_end_it_leaves_nothing(world):
    async def deleted():
        await work.datasets.delete("acme", dataset.id)
        await world.sweep()
        return b"the rest"

    work = importing(world, FakeSources(b"a", deleted))
    dataset = await begin(work)
    await work.step()
    assert world.objects.keys() == []


@pytest.mark.parametrize("cut_off", [Unavailable("The connection broke."), asyncio.CancelledError()])
async def test_an_answer_of_the_database_that_is_lost_loses_no_bytes(world, cut_off):
    """It has the row all the same, which says that the bytes are in staging."""

    class Lost(SqlImportStore):
        async def finish(self, item, size_bytes, sha256):
            assert await super().finish(item, size_bytes, sha256)
            raise cut_off

    work = replace(importing(world, FakeSources(GOOD)), store=Lost(world.db))
    dataset = await begin(work)
    with suppress(asyncio.CancelledError):
        await work.step()
    await world.validate()
    assert await state(work, dataset) is DatasetState.READY


async def test_what_an_earlier_try_left_goes_with_the_next(world):
    class Away(SqlImportStore):
        async def finish(self, item, size_bytes, sha256):
            raise Unavailable("The connection broke.")

    work = replace(importing(world, FakeSources(GOOD)), store=Away(world.db))
    dataset = await begin(work)
    for _ in range(3):
        await work.step()
        assert len(staged(world)) == 1
        world.clock.tick(600)
    await importing(world, FakeSources(GOOD)).step()
    assert staged(world) == [(await work.datasets.store.get("acme", dataset.id)).staging_key]


async def test_what_is_finished_while_it_is_asked_after_loses_no_bytes(world):
    asked, finished = asyncio.Event(), asyncio.Event()

    async def rest():
        await asked.wait()
        return GOOD

    class Meanwhile(SqlImportStore):
        async def keep(self, item, until):
            asked.set()
            await finished.wait()
            return await super().keep(item, until)

        async def finish(self, item, size_bytes, sha256):
            try:
                return await super().finish(item, size_bytes, sha256)
            finally:
                finished.set()

    work = replace(importing(world, FakeSources(rest)), store=Meanwhile(world.db))
    dataset = await begin(work)
    step = asyncio.create_task(work.step())
    while not world.clock.sleeping:  # noqa: ASYNC110
        await asyncio.sleep(0)
    await world.clock.advance(6)
    await asyncio.wait_for(step, 60)
    assert asked.is_set()
    await world.validate()
    assert await state(work, dataset) is DatasetState.READY


def parquet(*rows):
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), file)
    return file.getvalue()


SHARDS = [parquet(*({"q": f"{n}{m}?", "a": "yes"} for m in range(n + 1))) for n in range(4)]


async def joined(world, shards, purpose="fine-tune", **more):
    work = importing(world, FakeSources(*shards[:1], more=shards[1:], **more))
    options = ImportOptions(FileType.PARQUET, {"prompt": "q", "completion": "a"})
    dataset = await work.datasets.create(
        "acme", "x.parquet", purpose, None, "", import_options=options if purpose == "fine-tune" else None,
        source="hf:o/x",
    )  # fmt: skip
    await work.begin(dataset, "hf:o/x")
    await work.step()
    await world.validate()
    return await work.datasets.get("acme", dataset.id)


async def test_several_files_are_one_dataset(world):
    found = await joined(world, SHARDS)
    rows = [json.loads(line)["prompt"] for line in (await world.content(found)).splitlines()]
    assert rows == [f"{n}{m}?" for n in range(4) for m in range(n + 1)]
    assert found.source_size_bytes == sum(map(len, SHARDS))
    assert not staged(world)


async def test_a_bad_one_of_several_files_is_named(world):
    found = await joined(world, [SHARDS[0], parquet({"other": 1}), SHARDS[2]])
    assert found.state is DatasetState.ERROR and "file 2" in found.report.findings[0].message


async def test_several_files_are_limited_and_joined_only_as_rows(world):
    found = await joined(world, SHARDS, max_bytes=len(SHARDS[0]) + 1)
    assert found.report.findings[0].code == "import_too_large"
    found = await joined(world, SHARDS, purpose="evals")
    assert "4 files" in found.report.findings[0].message
    await world.sweep()
    assert not staged(world)


async def test_an_import_is_no_repetition_of_an_upload(world):
    work = importing(world, FakeSources(GOOD))
    upload = await work.datasets.create("acme", "a.jsonl", "fine-tune", None, URL)
    assert (await begin(work)).id != upload.id and (await begin(work)).id == (await begin(work)).id


async def test_switched_off(world):
    with pytest.raises(FailedPrecondition) as refused:
        importing(world, None).check_offered()
    assert refused.value.reason == "IMPORTS_OFF"


async def test_what_was_begun_before_they_were_switched_off_ends_after_a_day(world):
    """Not sooner: where they are being switched on, another process may be about to fetch it."""
    begun = importing(world, FakeSources(b"half", FetchBroke("The server answered 503.")))
    dataset = await begin(begun)
    await begun.step()
    off = importing(world, None)
    world.clock.tick(UNFETCHED.total_seconds())
    await off.step()
    assert await state(off, dataset) is DatasetState.UPLOADING
    world.clock.tick(5)
    await off.step()
    found = await off.datasets.get("acme", dataset.id)
    assert (found.state, found.report.findings[0].code) == (DatasetState.ERROR, "import_refused")
    assert "switched off" in found.report.findings[0].message
    await off.step()
    await begun.step()
    assert len(begun.sources.reads) == 1


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("https://x.example/a/gsm8k%20train.csv?sig=1", "gsm8k train.csv"),
        ("https://x.example", "x.example"),
        ("https://x.example/a%2F..%2Fb%0A%00.csv", "b__.csv"),
        ("https://x.example/" + "a" * 300 + ".csv", "a" * 251 + ".csv"),
        ("s3://my-bucket/a/b.parquet", "b.parquet"),
        ("hf:openai/gsm8k", "openai-gsm8k-train.parquet"),
        ("hf:openai/gsm8k:main/test", "openai-gsm8k-test.parquet"),
    ],
)
def test_names_of_sources(source, name):
    assert check_source(source) == name


@pytest.mark.parametrize(
    "source",
    [
        *("", "train.jsonl", "hf:gsm8k", "hf:a/b:c", "s3://bucket", "gs://a/b", "file:///x", "hf:a/b:../.."),
        *("s3://mine/../a", "s3://mine/a b", "s3://mine//a", "s3://mine/" + "a" * 5000),
    ],
)
def test_what_is_no_source(source):
    with pytest.raises(InvalidArgument, match="source"):
        check_source(source)


async def test_buckets_and_the_hub(world):
    bucket = MemoryObjectStore()
    await bucket.put("a/b.jsonl", b"rows")
    asked = []

    class Hub(Fetcher):
        async def fetch(self, url, secret=None):
            asked.append((url, secret))
            pages = {
                f"{HUB}/o/one/parquet": b'{"main": {"train": ["https://cdn.example/0.parquet"], "test": []}}',
                f"{HUB}/o/default/parquet": b'{"a": {}, "default": {"train": ["https://cdn.example/0.parquet"]}}',
                f"{HUB}/o/configs/parquet": b'{"a": {"train": [], "test": []}, "b": {"train": []}}',
                f"{HUB}/o/splits/parquet": b'{"default": {"test": []}}',
                f"{HUB}/o/two/parquet/main/test": b'["https://c/0.parquet", "https://c/1.parquet"]',
                f"{HUB}/o/many/parquet/main/train": json.dumps(["https://c/0.parquet"] * 1001).encode(),
                f"{HUB}/o/deep/parquet/main/train": b"[" * 100_000,
                f"{HUB}/o/none/parquet/main/train": b"[]",
                f"{HUB}/o/long/parquet": b" " * (1 << 20) + b"{}",
                f"{HUB}/o/long/parquet/main/train": b" " * (1 << 20) + b"[]",
                f"{HUB}/o/odd/parquet/main/train": b'["https://c/0.csv"]',
                "https://cdn.example/0.parquet": b"PAR1",
                "https://c/0.parquet": b"0",
                "https://c/1.parquet": b"1",
                "https://x.example/a": b"a",
            }
            yield pages[url]

    secret = Secret("https://hub.example", "Bearer x")
    sources = Sources(Hub((), 100, 10.0), "https://hub.example/", {"mine": bucket}, secret)

    async def read(source):
        return [b"".join([chunk async for chunk in file()]) for file in await sources.files(source)]

    assert await read("s3://mine/a/b.jsonl") == [b"rows"]
    assert await read("https://x.example/a") == [b"a"]
    for source in ("s3://other/a/b.jsonl", "s3://mine/none"):
        with pytest.raises(FetchRefused):
            await read(source)
    assert await read("hf:o/one") == await read("hf:o/default") == [b"PAR1"]
    for name, said in (
        ("configs", "hf:o/configs:a/train, hf:o/configs:a/test, hf:o/configs:b/train"),
        ("splits", "hf:o/splits:default/test"),
        ("long", "too long. Name its config and split: hf:o/long:config/split."),
        ("long:main/train", "too long.$"),
    ):
        with pytest.raises(FetchRefused, match=said):
            await read(f"hf:o/{name}")
    assert await read("hf:o/two:main/test") == [b"0", b"1"]
    assert {url for url, given in asked if given is None} == {"https://x.example/a"}
    for name in ("many", "deep", "none", "odd"):
        with pytest.raises(FetchRefused):
            await read(f"hf:o/{name}:main/train")


def test_a_secret_is_its_hosts_alone():
    secret = Secret("https://hub.example/", "Bearer hf_x")
    assert secret.headers(checked("https://HUB.example:443/a")) == {"Authorization": "Bearer hf_x"}
    for other in (
        "http://hub.example/a",
        "https://hub.example:8443/",
        "https://hub.example.evil.com/",
        "https://x/",
    ):
        assert secret.headers(checked(other)) == {}
    assert "hf_x" not in repr(secret)


@pytest.mark.parametrize(
    "imports",
    [
        {"s3": S3, "s3_buckets": ["other", "ours"]},
        {"s3": {**S3, "endpoint": "another-name-of-it:443"}, "s3_buckets": ["ours"]},
        {"s3": {"kind": "folder", "folder": "/tmp/x"}, "s3_buckets": ["other"]},
        {"s3_buckets": ["other"]},
        {"allow_networks": ["10.0.0.1/8"]},
    ],
)
def test_settings_that_would_let_anybody_read_everything(imports):
    given = {"db": {"url": "sqlite+aiosqlite://"}, "rpc": {}, "store": {**S3, "bucket": "ours"}}
    DatasetsSettings(**given, imports={"s3": S3, "s3_buckets": ["other"]})
    with pytest.raises(ValidationError, match="imports"):
        DatasetsSettings(**given, imports=imports)
