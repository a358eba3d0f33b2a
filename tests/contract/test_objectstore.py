"""One suite on the fake, on a folder and on a real S3."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from lathe.common.errors import AlreadyExists, InvalidArgument, NotFound, OutOfRange, Unavailable
from lathe.common.objectstore import folder
from lathe.common.objectstore.base import LOCAL_DISK, ObjectStore
from lathe.common.objectstore.folder import FolderStore
from lathe.common.objectstore.s3 import S3Config, S3Store
from tests.fakes.objectstore import MemoryObjectStore
from tests.fixtures.outages import store_server
from tests.fixtures.relay import relay
from tests.fixtures.servers import S3Endpoint

MIB = 1024 * 1024


@pytest.fixture(params=["memory", "folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "memory":
        return MemoryObjectStore()
    if request.param == "folder":
        return FolderStore(tmp_path / "store")
    s3: S3Endpoint = request.getfixturevalue("seaweedfs")
    bucket = s3.new_bucket(f"test-{uuid.uuid4().hex[:12]}")
    return s3_store(s3, bucket)


def s3_store(
    s3: S3Endpoint, bucket: str = "ready", *, public_url: str | None = None, **options: float
) -> S3Store:
    """`ready` is there in every SeaweedFS that was started."""
    config = S3Config(s3.endpoint, bucket, s3.access_key, s3.secret_key, secure=False, public_url=public_url)
    return S3Store(config, **options)  # type: ignore[arg-type]


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def keys(store: ObjectStore, prefix: str = "") -> list[str]:
    return [info.key async for info in store.list(prefix)]


def files_in(folder: Path) -> list[str]:
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and "store/" not in str(path.relative_to(folder))
    )


async def read(store: ObjectStore, key: str, **range_: int) -> bytes:
    return b"".join([chunk async for chunk in store.stream(key, **range_)])  # type: ignore[arg-type]


async def test_put_get_head_delete(store: ObjectStore) -> None:
    await store.check()
    info = await store.put("jobs/ftjob-1/att-1/final/manifest.json", b"one")
    assert (info.key, info.size) == ("jobs/ftjob-1/att-1/final/manifest.json", 3)
    assert info.modified.tzinfo is not None
    assert await store.get(info.key) == b"one"
    await store.put(info.key, b"three")
    head = await store.head(info.key)
    assert head is not None
    assert head.size == 5
    await store.delete(info.key)
    await store.delete(info.key)
    assert await store.head(info.key) is None
    with pytest.raises(NotFound, match=r"manifest\.json"):
        await store.get(info.key)
    with pytest.raises(NotFound):
        await read(store, info.key)


async def test_empty_objects_and_streams(store: ObjectStore) -> None:
    assert (await store.put("staging/empty", b"")).size == 0
    assert (await store.put("staging/none", chunks())).size == 0
    assert await store.get("staging/empty") == await read(store, "staging/none") == b""


async def test_streams_go_in_and_out_in_pieces(store: ObjectStore) -> None:
    parts = [bytes([index]) * (MIB + index) for index in range(19)]
    whole = b"".join(parts)
    assert (await store.put("staging/big", chunks(*parts))).size == len(whole)
    assert await read(store, "staging/big") == whole
    assert await read(store, "staging/big", offset=5 * MIB, length=1000) == whole[5 * MIB :][:1000]
    assert await read(store, "staging/big", offset=len(whole) - 3) == whole[-3:]
    assert await read(store, "staging/big", offset=len(whole)) == b""
    assert await read(store, "staging/big", offset=4, length=0) == b""
    with pytest.raises(OutOfRange):
        await read(store, "staging/big", offset=len(whole) + 1)


@pytest.mark.parametrize("size", [0, 9 * MIB])
async def test_a_stream_that_breaks_leaves_nothing(store: ObjectStore, size: int) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"x" * size
        raise ConnectionResetError("the client went away")

    with pytest.raises(ConnectionResetError, match="client went away"):
        await store.put("staging/broken", broken())
    assert await store.head("staging/broken") is None
    assert await keys(store) == []


async def test_a_store_that_clients_cannot_reach_signs_nothing(store: ObjectStore) -> None:
    assert await store.presigned_put("staging/x/00000", 3, timedelta(hours=1)) is None
    with pytest.raises(InvalidArgument):
        await store.presigned_put("../x", 3, timedelta(hours=1))


async def test_a_presigned_url_takes_one_key_until_it_expires(seaweedfs: S3Endpoint) -> None:
    with relay(seaweedfs.endpoint) as public:
        store = s3_store(seaweedfs, public_url=f"http://{public.address}")
        url = await store.presigned_put("staging/x/00000", 3, timedelta(minutes=1))
        soon = await store.presigned_put("staging/x/00002", 3, timedelta(seconds=1))
        assert soon is not None and url is not None
        assert url.startswith(f"http://{public.address}/ready/staging/x/00000?")
        async with httpx.AsyncClient() as http:
            assert (await http.put(url, content=b"one")).status_code == 200
            assert await store.get("staging/x/00000") == b"one"
            other = await http.put(url.replace("/00000?", "/00001?"), content=b"two")
            assert other.status_code == 403
            assert (await http.get(url)).status_code == 403
            async with asyncio.timeout(30):
                while (await http.put(soon, content=b"old")).status_code == 200:  # noqa: ASYNC110
                    await asyncio.sleep(0.2)
    assert await store.head("staging/x/00001") is None


async def test_a_presigned_url_takes_one_size(seaweedfs: S3Endpoint) -> None:
    with relay(seaweedfs.endpoint) as public:
        store = s3_store(seaweedfs, public_url=f"http://{public.address}")
        url = await store.presigned_put("staging/x/a+b=c@d~e", 1000, timedelta(minutes=1))
        assert url is not None

        async def chunks() -> AsyncIterator[bytes]:
            yield b"x" * 1000

        async with httpx.AsyncClient() as http:
            assert [
                (await http.put(url, content=b"x" * size)).status_code for size in (0, 999, 1001, 9 * MIB)
            ] == [403] * 4
            # Without a length nobody knows it before the end.
            assert (await http.put(url, content=chunks())).status_code in (403, 411)
            assert await store.head("staging/x/a+b=c@d~e") is None
            assert (await http.put(url, content=b"x" * 1000)).status_code == 200
    info = await store.head("staging/x/a+b=c@d~e")
    assert info is not None and info.size == 1000


async def test_if_absent_never_replaces(store: ObjectStore) -> None:
    await store.put("blobs/a", b"first", if_absent=True)
    with pytest.raises(AlreadyExists):
        await store.put("blobs/a", b"second", if_absent=True)
    assert await store.get("blobs/a") == b"first"


async def test_lists_are_ordered_and_by_any_prefix(store: ObjectStore) -> None:
    names = ["a/b/2", "a/b/1", "a/bc", "b/1", "a/c"]
    for name in names:
        await store.put(name, name.encode())
    assert await keys(store) == sorted(names)
    assert await keys(store, "a/") == ["a/b/1", "a/b/2", "a/bc", "a/c"]
    assert await keys(store, "a/b") == ["a/b/1", "a/b/2", "a/bc"]
    assert await keys(store, "a/b/") == ["a/b/1", "a/b/2"]
    assert await keys(store, "nothing/here") == []
    assert [info.size async for info in store.list("a/b/1")] == [5]


async def test_delete_prefix(store: ObjectStore) -> None:
    for name in ("jobs/a/1", "jobs/a/x/2", "jobs/ab/1"):
        await store.put(name, b"x")
    await store.delete_prefix("jobs/a/")
    await store.delete_prefix("jobs/a/")
    assert await keys(store) == ["jobs/ab/1"]
    with pytest.raises(InvalidArgument):
        await store.delete_prefix("")


async def test_copy(store: ObjectStore) -> None:
    await store.put("staging/a", b"content")
    await store.copy("staging/a", "blobs/b")
    await store.copy("staging/a", "blobs/b")
    await store.put("staging/a", b"other")
    assert await store.get("blobs/b") == b"content"
    with pytest.raises(NotFound):
        await store.copy("staging/none", "blobs/c")
    assert await keys(store, "blobs/") == ["blobs/b"]


@pytest.mark.parametrize("sizes", [[3], [5 * MIB, 5 * MIB + 1, 7], [2, 5 * MIB, 0, 1], [0]])
async def test_compose(store: ObjectStore, sizes: list[int]) -> None:
    parts = [bytes([65 + index]) * size for index, size in enumerate(sizes)]
    names = [f"staging/u/{index:05d}" for index in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        await store.put(name, part)
    await store.compose(names, "staging/whole")
    assert await store.get("staging/whole") == b"".join(parts)
    assert await keys(store, "staging/u/") == names
    with pytest.raises(NotFound):
        await store.compose([names[0], "staging/none"], "staging/other")
    assert await store.head("staging/other") is None


async def test_files(store: ObjectStore, tmp_path: Path) -> None:
    source, target = tmp_path / "in.bin", tmp_path / "out.bin"
    source.write_bytes(os.urandom(9 * MIB))
    assert (await store.put_file("blobs/file", source)).size == 9 * MIB
    target.write_bytes(b"old")
    await store.fetch("blobs/file", target)
    assert target.read_bytes() == source.read_bytes()
    with pytest.raises(NotFound):
        await store.fetch("blobs/none", target)
    assert target.read_bytes() == source.read_bytes()
    assert files_in(tmp_path) == ["in.bin", "out.bin"]


async def test_a_file_that_cannot_be_written_is_not_blamed_on_the_store(
    store: ObjectStore, tmp_path: Path
) -> None:
    await store.put("blobs/file", b"content")
    with pytest.raises(Unavailable) as caught:
        await store.fetch("blobs/file", tmp_path / "none" / "out.bin")
    assert caught.value.reason == LOCAL_DISK
    assert caught.value.message.startswith(f"The folder {tmp_path / 'none'} cannot be written")


async def test_bad_keys_are_refused(store: ObjectStore) -> None:
    for key in ("", "/a", "a/", "a//b", "..", "a/../b", "a/.hidden", "a b", "a\n", "a\0b", "x" * 901):
        with pytest.raises(InvalidArgument):
            await store.put(key, b"x")
        with pytest.raises(InvalidArgument):
            await store.get(key)
        with pytest.raises(InvalidArgument):
            await store.copy("a", key)


async def test_a_full_disk_is_unavailable_and_leaves_nothing(tmp_path: Path) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    await FolderStore(tmp_path).put("blobs/kept", b"kept")
    store = FolderStore(tmp_path, fsync=full)
    with pytest.raises(Unavailable, match="disk is full") as caught:
        await store.put("blobs/kept", chunks(b"new"))
    assert caught.value.retry_after is not None
    with pytest.raises(Unavailable):
        await store.check()
    assert files_in(tmp_path) == ["blobs/kept"]
    assert await store.get("blobs/kept") == b"kept"


async def test_a_large_file_is_synced_while_it_comes_in_and_a_failure_of_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "_SYNC_BYTES", 8)
    sizes: list[int] = []
    failing: set[int] = set()

    def fsync(descriptor: int) -> None:
        size = os.fstat(descriptor).st_size
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            sizes.append(size)
            if len(sizes) in failing:
                raise OSError(errno.EIO, "Input/output error")

    store = FolderStore(tmp_path, fsync=fsync)
    await store.put("a", chunks(*[b"12345"] * 5))
    assert await store.get("a") == b"12345" * 5 and len(sizes) == 3

    async def broken() -> AsyncIterator[bytes]:
        yield bytes(8)
        raise ConnectionError

    for number in (1, 2):
        sizes.clear()
        failing |= {number}
        with pytest.raises(Unavailable, match="Input/output"):
            await store.put("b", chunks(*[bytes(8)] * number, b"rest"))
    sizes.clear()
    with pytest.raises(ConnectionError):
        await store.put("b", broken())
    assert files_in(tmp_path) == ["a"]


async def test_what_a_killed_writer_left_goes_and_what_is_being_written_stays(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    await store.remove_unfinished(datetime.now(UTC))

    async def beside_another() -> AsyncIterator[bytes]:
        yield b"half, "
        [being_written] = (tmp_path / ".tmp").iterdir()
        left = being_written.with_name("left")
        left.write_bytes(b"half")
        os.utime(left, (0, 0))
        await store.remove_unfinished(datetime.now(UTC) - timedelta(days=1))
        assert not left.exists()
        yield b"whole"

    await store.put("a", beside_another())
    assert await store.get("a") == b"half, whole"


async def test_a_folder_that_is_gone_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(Unavailable):
        await FolderStore(tmp_path / "file" / "store").check()


async def test_an_s3_that_is_away_is_unavailable() -> None:
    config = S3Config("127.0.0.1:1", "bucket", "a", "b", secure=False)
    store = S3Store(config, connect_timeout_s=0.5, retries=0)
    for attempt in (store.get("a"), store.put("a", b"x"), store.check(), store.put("a", chunks(b"x"))):
        with pytest.raises(Unavailable):
            await attempt


async def test_an_s3_that_stands_still_is_unavailable_and_blocks_nobody(seaweedfs: S3Endpoint) -> None:
    store = s3_store(seaweedfs, read_timeout_s=1.5)
    await store.put("staging/a", b"x")
    with store_server(seaweedfs, ExitStack()).still():
        started = time.monotonic()
        many = [asyncio.ensure_future(store.get("staging/a")) for _ in range(32)]
        await asyncio.sleep(0.1)
        await asyncio.to_thread(lambda: None)
        # A call that stood in the loop's way would have ended by now.
        assert not any(task.done() for task in many)
        for refused in await asyncio.gather(*many, store.put("staging/b", b"x"), return_exceptions=True):
            assert isinstance(refused, Unavailable), refused
        assert time.monotonic() - started < 8  # what it would wait without the setting
    await store.check()


async def test_an_s3_that_refuses_us_is_unavailable(seaweedfs: S3Endpoint) -> None:
    store = s3_store(replace(seaweedfs, secret_key="wrong"))
    for attempt in (store.get("a"), store.check()):
        with pytest.raises(Unavailable, match="secret_key"):
            await attempt


async def test_the_fakes_outage(tmp_path: Path) -> None:
    store = MemoryObjectStore()
    store.outage = Unavailable("away", retry_after=1.0)
    with pytest.raises(Unavailable):
        await store.put("a", b"x")
