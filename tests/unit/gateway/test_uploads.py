from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lathe.common.errors import (
    Aborted,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    PermissionDenied,
    Unavailable,
)
from lathe.common.metrics import Metrics
from lathe.common.objectstore.base import ObjectInfo
from lathe.common.rpc.principal import Principal
from lathe.gateway import bytestreams
from lathe.gateway.uploads import DatasetUploads, UploadChunk
from tests.fakes.clock import FakeClock
from tests.fakes.gateway import FakeDataset, FakeDatasets
from tests.fakes.objectstore import MemoryObjectStore

ALICE = Principal("acme", "member", "key_1")
NAME = "projects/acme/datasets/file-1"
PART = 8


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bytestreams, "PART_BYTES", PART)


@pytest.fixture
def store() -> MemoryObjectStore:
    return MemoryObjectStore()


@pytest.fixture
def owner(store: MemoryObjectStore) -> FakeDatasets:
    owner = FakeDatasets(store)
    owner.create(NAME)
    return owner


@pytest.fixture
def up(owner: FakeDatasets, store: MemoryObjectStore) -> DatasetUploads[FakeDataset]:
    return DatasetUploads(owner, store, FakeClock(), Metrics())


async def chunks(*data: bytes, error: Exception | None = None) -> AsyncIterator[bytes]:
    for one in data:
        yield one
    if error is not None:
        raise error


async def messages(
    data: bytes,
    *,
    start: int = 0,
    step: int = 5,
    finish: bool = True,
    sha256: str = "",
    error: Exception | None = None,
) -> AsyncIterator[UploadChunk]:
    for offset in range(start, len(data), step):
        yield UploadChunk(offset, data[offset : offset + step])
    if error is not None:
        raise error
    if finish:
        yield UploadChunk(len(data), b"", finish=True, sha256=sha256)


async def test_one_go(up: DatasetUploads[FakeDataset], store: MemoryObjectStore) -> None:
    made = await up.put_dataset(ALICE, NAME, chunks(b"ab", b"", b"cd"))
    assert (made.state, made.size, made.sha256) == ("ready", 4, hashlib.sha256(b"abcd").hexdigest())
    assert b"".join([c async for c in await up.download(ALICE, NAME, offset=1)]) == b"bcd"


async def test_the_next_is_asked_for_while_the_last_is_worked_on() -> None:
    asked: list[int] = []

    async def numbers() -> AsyncIterator[int]:
        for number in range(4):
            asked.append(number)
            yield number
        raise ConnectionError

    got: list[int] = []
    with pytest.raises(ConnectionError):
        async for number in bytestreams.ahead(numbers()):
            await asyncio.sleep(0)
            got.append(number)
            assert asked[-1] == min(number + 1, 3)
    assert got == [0, 1, 2, 3]

    async def broken_off() -> int:
        async for number in bytestreams.ahead(numbers()):
            return number
        return -1

    assert await broken_off() == 0


async def test_what_breaks_half_way_leaves_nothing(
    up: DatasetUploads[FakeDataset], owner: FakeDatasets, store: MemoryObjectStore
) -> None:
    with pytest.raises(ConnectionError):
        await up.put_dataset(ALICE, NAME, chunks(b"ab", error=ConnectionError()))
    with pytest.raises(InvalidArgument, match="larger than 3 bytes"):
        await up.put_dataset(ALICE, NAME, chunks(b"ab", b"cd"), max_bytes=3)
    with pytest.raises(InvalidArgument) as caught:
        await up.put_dataset(ALICE, NAME, chunks(b"ab"), sha256="0" * 64)
    assert caught.value.reason == "SHA256_MISMATCH"
    assert store.keys() == [] and owner.rows[NAME].state == "uploading"


async def test_commit_is_repeated_while_the_owner_is_away(
    owner: FakeDatasets, store: MemoryObjectStore
) -> None:
    owner.outages = [Unavailable("away")]

    class Quick(FakeClock):
        async def sleep(self, seconds: float) -> None:
            self.tick(seconds)

    up = DatasetUploads(owner, store, Quick(), Metrics())
    assert (await up.put_dataset(ALICE, NAME, chunks(b"ab"))).state == "ready"


@pytest.mark.parametrize("size", [0, 1, PART, PART + 1, 3 * PART])
async def test_resumable_in_one_stream(up: DatasetUploads[FakeDataset], size: int) -> None:
    data = bytes(range(size))
    made = await up.put_resumable(ALICE, NAME, messages(data, sha256=hashlib.sha256(data).hexdigest()))
    assert (made.state, made.size) == ("ready", size)


@pytest.mark.parametrize("cut", [0, 3, PART, 2 * PART + 1])
async def test_a_broken_stream_goes_on_from_its_whole_parts(
    up: DatasetUploads[FakeDataset], cut: int
) -> None:
    data = bytes(range(30))
    with pytest.raises(ConnectionError):
        await up.put_resumable(ALICE, NAME, messages(data[:cut], step=1, error=ConnectionError()))
    offset = await up.offset(ALICE, NAME)
    assert offset == cut - cut % PART
    made = await up.put_resumable(
        ALICE, NAME, messages(data, start=offset, sha256=hashlib.sha256(data).hexdigest())
    )
    assert made.size == 30


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.integers(0, 60),
    cuts=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20), st.booleans()), max_size=4),
)
def test_any_number_of_broken_tries_gives_the_same_bytes(
    size: int, cuts: list[tuple[int, int, bool]]
) -> None:
    async def run() -> None:
        owner = FakeDatasets(MemoryObjectStore())
        owner.create(NAME)
        up = DatasetUploads(owner, owner.store, FakeClock(), Metrics())
        data = bytes(range(size))
        for cut, step, clean in cuts:
            start = await up.offset(ALICE, NAME)
            end = max(start, min(cut, size))
            error = None if clean else ConnectionError()
            with suppress(ConnectionError):
                await up.put_resumable(
                    ALICE, NAME, messages(data[:end], start=start, step=step, finish=False, error=error)
                )
        start = await up.offset(ALICE, NAME)
        made = await up.put_resumable(ALICE, NAME, messages(data, start=start))
        assert made.sha256 == hashlib.sha256(data).hexdigest()

    asyncio.run(run())


class SlowStore(MemoryObjectStore):
    """Reads a part at once and names it later, the later parts sooner; notes what it holds whenever it names one."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[str]] = []
        self.begun = 0

    async def put(
        self, key: str, data: bytes | AsyncIterable[bytes], *, if_absent: bool = False
    ) -> ObjectInfo:
        if isinstance(data, bytes):
            return await super().put(key, data, if_absent=if_absent)
        self.begun += 1
        content = b"".join([piece async for piece in data])
        for _ in range(100 // self.begun):
            await asyncio.sleep(0)
        stored = await super().put(key, content, if_absent=if_absent)
        self.seen.append([name.rpartition("/")[2] for name in self.keys()])
        return stored


async def test_parts_on_their_way_together_never_leave_a_gap() -> None:
    store = SlowStore()
    owner = FakeDatasets(store)
    owner.create(NAME)
    data = bytes(range(6 * PART + 3))
    made = await DatasetUploads(owner, store, FakeClock(), Metrics()).put_resumable(
        ALICE, NAME, messages(data)
    )
    assert made.sha256 == hashlib.sha256(data).hexdigest()
    names = [f"{number:05d}" for number in range(7)]
    assert store.seen == [names[: number + 1] for number in range(7)]


async def test_a_part_that_cannot_be_stored_stops_those_after_it() -> None:
    class Full(SlowStore):
        async def put(
            self, key: str, data: bytes | AsyncIterable[bytes], *, if_absent: bool = False
        ) -> ObjectInfo:
            if key.endswith("/00001"):
                await asyncio.sleep(0)
                raise Unavailable("full")
            return await super().put(key, data, if_absent=if_absent)

    store = Full()
    owner = FakeDatasets(store)
    owner.create(NAME)
    up = DatasetUploads(owner, store, FakeClock(), Metrics())
    with pytest.raises(Unavailable, match="full"):
        await up.put_resumable(ALICE, NAME, messages(bytes(6 * PART)))
    stored = store.keys()
    assert [key.rpartition("/")[2] for key in stored] == ["00000"]
    for _ in range(300):
        await asyncio.sleep(0)
    assert store.keys() == stored and await up.offset(ALICE, NAME) == PART


async def test_a_stream_that_ends_early_stores_all_it_brought(up: DatasetUploads[FakeDataset]) -> None:
    data = bytes(range(30))
    left = await up.put_resumable(ALICE, NAME, messages(data[:11], finish=False))
    assert left.state == "uploading" and await up.offset(ALICE, NAME) == 11
    assert (await up.put_resumable(ALICE, NAME, messages(data, start=11))).sha256 == (
        hashlib.sha256(data).hexdigest()
    )


async def test_parts_behind_a_gap_do_not_count(
    up: DatasetUploads[FakeDataset], owner: FakeDatasets, store: MemoryObjectStore
) -> None:
    key = (await owner.target(ALICE, NAME)).staging_key
    for number in (0, 1, 3):
        await store.put(bytestreams.part_key(key, number), b"12345")
    assert await up.offset(ALICE, NAME) == 10


async def test_wrong_offset_names_the_right_one(up: DatasetUploads[FakeDataset]) -> None:
    data = bytes(range(30))
    await up.put_resumable(ALICE, NAME, messages(data[:11], finish=False))
    for start in (0, 10, 12):
        with pytest.raises(OutOfRange) as caught:
            await up.put_resumable(ALICE, NAME, messages(data, start=start))
        assert caught.value.metadata["committed_size"] == "11"
        assert caught.value.violations[0].field == "write_offset"


async def test_another_sha256_commits_nothing(
    up: DatasetUploads[FakeDataset], owner: FakeDatasets, store: MemoryObjectStore
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await up.put_resumable(ALICE, NAME, messages(bytes(20), sha256="0" * 64))
    assert caught.value.reason == "SHA256_MISMATCH"
    assert store.keys() == [] and owner.rows[NAME].state == "uploading"
    assert await up.offset(ALICE, NAME) == 0


async def test_one_upload_at_a_time(up: DatasetUploads[FakeDataset]) -> None:
    async def nested() -> AsyncIterator[bytes]:
        with pytest.raises(Aborted):
            await up.put_resumable(ALICE, NAME, messages(b"x"))
        yield b"ab"

    assert (await up.put_dataset(ALICE, NAME, nested())).size == 2


async def test_refusals(up: DatasetUploads[FakeDataset]) -> None:
    with pytest.raises(PermissionDenied):
        await up.put_dataset(Principal("acme", "viewer", "k"), NAME, chunks(b"a"))
    with pytest.raises(NotFound):
        await up.put_dataset(Principal("other", "member", "k"), NAME, chunks(b"a"))
    with pytest.raises(FailedPrecondition):
        await up.download(ALICE, NAME)
    await up.put_dataset(ALICE, NAME, chunks(b"a"))
    with pytest.raises(FailedPrecondition):
        await up.put_dataset(ALICE, NAME, chunks(b"a"))
    with pytest.raises(FailedPrecondition):
        await up.offset(ALICE, NAME)
    with pytest.raises(OutOfRange):
        await up.download(ALICE, NAME, offset=2)
