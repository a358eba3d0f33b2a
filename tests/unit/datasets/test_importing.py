"""Imports in the background: what is fetched, what is tried again, what is given up."""

import hashlib

import pytest

from lathe.common.errors import FailedPrecondition, InvalidArgument
from lathe.datasets.fetching import FetchBroke, Fetcher, FetchRefused
from lathe.datasets.import_store import SqlImportStore
from lathe.datasets.importing import MAX_TRIES, Importing
from lathe.datasets.model import DatasetState
from lathe.datasets.sources import Sources, check_source, shown_source
from tests.fakes.objectstore import MemoryObjectStore
from tests.unit.datasets.conftest import GOOD

URL = "https://files.example.com/data/train.jsonl?sig=secret"


class FakeSources:
    """`content`: pieces, or what is raised in their place; an item that can be called is called."""

    def __init__(self, *content):
        self.content = content
        self.reads = []

    async def read(self, source):
        self.reads.append(source)
        for item in self.content:
            if isinstance(item, Exception):
                raise item
            yield await item() if callable(item) else item


def importing(world, sources):
    return Importing(world.start(), SqlImportStore(world.db), sources)


async def begin(work, source=URL):
    dataset = await work.datasets.create(
        "acme", check_source(source), "fine-tune", None, "r1", source=shown_source(source)
    )
    await work.begin(dataset, source)
    return dataset


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


async def test_a_process_that_died_fetches_it_again(world):
    dataset = await begin(importing(world, FakeSources(b"half", RuntimeError("died"))))
    with pytest.raises(RuntimeError):
        await importing(world, FakeSources(b"half", RuntimeError("died"))).step()
    work = importing(world, FakeSources(GOOD))
    await begin(work)
    await work.step()
    assert await state(work, dataset) is DatasetState.VALIDATING


async def test_what_is_refused_says_why_at_once(world):
    work = importing(world, FakeSources(FetchRefused("Its address may not be reached.")))
    dataset = await begin(work)
    await work.step()
    found = await work.datasets.get("acme", dataset.id)
    assert (found.state, found.report.findings[0].code) == (DatasetState.ERROR, "import_refused")


async def test_deleting_the_dataset_stops_it(world):
    async def deleted():
        await work.datasets.delete("acme", dataset.id)
        world.clock.tick(3)
        return b"more"

    rest = []

    async def never():
        rest.append(1)
        return b""

    work = importing(world, FakeSources(b"a", deleted, never))
    dataset = await begin(work)
    await work.step()
    await world.sweep()
    assert rest == [] and world.objects.keys() == []
    await work.step()
    assert len(work.sources.reads) == 1


async def test_switched_off(world):
    with pytest.raises(FailedPrecondition) as refused:
        importing(world, None).check_offered()
    assert refused.value.reason == "IMPORTS_OFF"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("https://x.example/a/gsm8k%20train.csv?sig=1", "gsm8k train.csv"),
        ("https://x.example", "x.example"),
        ("s3://my-bucket/a/b.parquet", "b.parquet"),
        ("hf:openai/gsm8k", "openai-gsm8k-train.parquet"),
        ("hf:openai/gsm8k:main/test", "openai-gsm8k-test.parquet"),
    ],
)
def test_names_of_sources(source, name):
    assert check_source(source) == name


@pytest.mark.parametrize(
    "source", ["", "train.jsonl", "hf:gsm8k", "hf:a/b:c", "s3://bucket", "gs://a/b", "file:///x"]
)
def test_what_is_no_source(source):
    with pytest.raises(InvalidArgument, match="source"):
        check_source(source)


async def test_buckets_and_the_hub(world):
    bucket = MemoryObjectStore()
    await bucket.put("a/b.jsonl", b"rows")

    class Hub(Fetcher):
        async def fetch(self, url):
            pages = {
                "https://hub.example/api/datasets/o/one/parquet/default/train": b'["https://cdn.example/0.parquet"]',
                "https://hub.example/api/datasets/o/two/parquet/main/test": b'["https://c/0.parquet", "https://c/1.parquet"]',
                "https://cdn.example/0.parquet": b"PAR1",
            }
            yield pages[url]

    sources = Sources(Hub((), 100, 10.0), "https://hub.example/", {"mine": bucket})

    async def read(source):
        return b"".join([chunk async for chunk in sources.read(source)])

    assert await read("s3://mine/a/b.jsonl") == b"rows"
    for source in ("s3://other/a/b.jsonl", "s3://mine/none", "s3://mine/../a"):
        with pytest.raises(FetchRefused):
            await read(source)
    assert await read("hf:o/one") == b"PAR1"
    with pytest.raises(FetchRefused, match="2 files"):
        await read("hf:o/two:main/test")
