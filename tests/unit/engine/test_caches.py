"""Base models and adapters on disk and in memory."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from lathe.common.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from lathe.common.objectstore.base import local_disk
from lathe.engine.adaptercache import AdapterCache
from lathe.engine.basecache import ensure_adapter, ensure_base, parse_base_manifest, work_folder
from lathe.engine.checkpoints import describe, upload
from lathe.engine.full import FullSpec
from lathe.engine.loop import LoopLimits, ModelLoop
from lathe.engine.lora_config import LoraSpec
from lathe.engine.model import AdapterRef, SlicePlan, Snapshot, SnapshotKind
from tests.fakes.clock import FakeClock
from tests.fakes.engine import FakeEngine
from tests.fakes.objectstore import MemoryObjectStore

DIGEST = hashlib.sha256(b"base").hexdigest()
FILES = {"config.json": b"{}", "sub/model.safetensors": b"weights"}


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def manifest(**changes: object) -> bytes:
    files = [{"path": path, "size": len(data), "sha256": sha(data)} for path, data in FILES.items()]
    return json.dumps({"digest": DIGEST, "files": files} | changes).encode()


@pytest.fixture
async def store() -> MemoryObjectStore:
    made = MemoryObjectStore()
    for data in FILES.values():
        await made.put(f"basemodels/files/{sha(data)}", data)
    await made.put(f"basemodels/{DIGEST}.json", manifest())
    return made


async def test_a_base_is_fetched_once_and_found_again_without_the_store(
    store: MemoryObjectStore, tmp_path: Path
) -> None:
    folder = await ensure_base(store, DIGEST, tmp_path, FakeClock())
    assert {path: (folder / path).read_bytes() for path in FILES} == FILES
    store.outage = Unavailable("away")
    assert await ensure_base(store, DIGEST, tmp_path, FakeClock()) == folder


async def test_two_engines_on_one_cache_fetch_one_after_the_other(
    store: MemoryObjectStore, tmp_path: Path
) -> None:
    clock = FakeClock()
    tasks = [asyncio.create_task(ensure_base(store, DIGEST, tmp_path, clock)) for _ in range(2)]
    while not all(task.done() for task in tasks):
        await clock.advance(0.2)
        await asyncio.sleep(0.001)
    assert tasks[0].result() == tasks[1].result()


async def test_bytes_that_do_not_match_are_never_used(store: MemoryObjectStore, tmp_path: Path) -> None:
    await store.put(f"basemodels/files/{sha(b'weights')}", b"others")
    with pytest.raises(DataLoss):
        await ensure_base(store, DIGEST, tmp_path, FakeClock())
    await store.put(f"basemodels/files/{sha(b'weights')}", b"weights")
    assert (await ensure_base(store, DIGEST, tmp_path, FakeClock())).is_dir()


async def test_an_unknown_base(store: MemoryObjectStore, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        await ensure_base(store, "0" * 64, tmp_path, FakeClock())
    with pytest.raises(InvalidArgument):
        await ensure_base(store, "../x", tmp_path, FakeClock())


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", ""])
def test_a_manifest_cannot_leave_the_folder(path: str) -> None:
    data = manifest(files=[{"path": path, "size": 1, "sha256": "0" * 64}])
    with pytest.raises(DataLoss):
        parse_base_manifest(data, DIGEST)


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", manifest(files=[]), manifest(digest="1" * 64)])
def test_what_is_no_base_manifest(data: bytes) -> None:
    with pytest.raises(DataLoss):
        parse_base_manifest(data, DIGEST)


def test_the_work_of_killed_engines_is_swept_and_that_of_living_ones_is_not(tmp_path: Path) -> None:
    with work_folder(tmp_path, "alive") as alive:
        (tmp_path / "work" / "killed").mkdir()
        (tmp_path / "work" / "killed.lock").touch()
        with work_folder(tmp_path, "new") as new:
            assert sorted(item.name for item in (tmp_path / "work").iterdir() if item.is_dir()) == [
                "alive",
                "new",
            ]
        assert alive.is_dir()
        assert not new.exists()


class Bench:
    def __init__(self, folder: Path, limit: int) -> None:
        self.engine, self.store, self.folder = FakeEngine(), MemoryObjectStore(), folder
        self.loop = ModelLoop(self.engine, FakeClock(), LoopLimits())  # type: ignore[arg-type]
        self.cache = AdapterCache(self.store, self.loop, folder / "cache", limit, FakeClock())

    async def adapter(self, number: int, *, whole: bool = False) -> AdapterRef:
        maker, folder = FakeEngine(), self.folder / str(number)
        maker.create_adapter("a", FullSpec() if whole else LoraSpec(r=2), number)
        files = maker.save("a", folder, with_optimizer=True)
        item = Snapshot(SnapshotKind.EPOCH, number, 1, 9, 1, folder, files, None)
        prefix = f"jobs/j/att-{number}/checkpoints/step-{number:08d}"
        return await upload(self.store, prefix, folder, describe(item, SlicePlan(1, 1, "float32", "cpu")))


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path, limit=2)

    async def turn() -> None:
        while True:
            made.loop.run_once()
            await asyncio.sleep(0.001)

    task = asyncio.create_task(turn())
    yield made
    task.cancel()


async def test_an_adapter_is_loaded_when_first_used_and_stays(bench: Bench) -> None:
    ref = await bench.adapter(1)
    assert await bench.cache.load(ref)
    bench.store.outage = Unavailable("away")
    assert not await bench.cache.load(ref)
    async with bench.cache.using(ref) as key:
        assert key in bench.engine.adapter_keys()
    async with bench.cache.using(None) as key:
        assert key == ""


async def test_of_a_checkpoint_only_its_adapter_is_brought(bench: Bench, tmp_path: Path) -> None:
    await bench.adapter(1)
    folder = tmp_path / "1"
    names = tuple(path.name for path in folder.iterdir())
    for name in ("reference.safetensors", "best-adapter_config.json", "best-adapter_model.safetensors"):
        (folder / name).write_bytes(b"of the run")
    item = Snapshot(
        SnapshotKind.EPOCH, 2, 1, 9, 1, folder, tuple(path.name for path in folder.iterdir()), None
    )
    plan = SlicePlan(1, 1, "float32", "cpu")
    second = await upload(bench.store, "jobs/j/att-2/checkpoints/step-2", folder, describe(item, plan))
    brought = await ensure_adapter(bench.store, second, tmp_path / "cache", FakeClock())
    assert {path.name for path in brought.iterdir()} == set(names) - {"optimizer.safetensors"}


async def test_the_least_recently_used_goes_and_those_in_use_stay(bench: Bench) -> None:
    first, second, third = [await bench.adapter(number) for number in (1, 2, 3)]
    async with bench.cache.using(first):
        await bench.cache.load(second)
        await bench.cache.load(third)
        assert set(bench.engine.adapter_keys()) == {first.manifest_sha256, third.manifest_sha256}
        async with bench.cache.using(third):
            with pytest.raises(ResourceExhausted):
                await bench.cache.load(second)
    assert await bench.cache.load(second)


async def test_a_whole_model_takes_the_place_of_several_adapters(bench: Bench, tmp_path: Path) -> None:
    bench.cache = AdapterCache(bench.store, bench.loop, tmp_path / "cache", 8, FakeClock())
    whole = [await bench.adapter(number, whole=True) for number in range(4)]
    adapters = [await bench.adapter(number) for number in range(4, 7)]
    for ref in (*whole, *adapters[:2]):
        await bench.cache.load(ref)
    held = set(bench.engine.adapter_keys())
    assert held == {ref.manifest_sha256 for ref in (*whole[1:], *adapters[:2])}
    async with bench.cache.using(whole[1]):
        await bench.cache.load(adapters[2])
        assert whole[2].manifest_sha256 not in bench.engine.adapter_keys()


async def test_many_calls_for_one_adapter_load_it_once(bench: Bench) -> None:
    ref = await bench.adapter(1)
    await asyncio.gather(*(bench.cache.load(ref) for _ in range(8)))
    assert bench.cache.loaded == 1


async def test_an_adapter_wanted_twice_at_once_is_fetched_once(bench: Bench, tmp_path: Path) -> None:
    """By a job that goes on from it and by a chat with it, say: neither takes the other's half-fetched files away."""
    ref, clock = await bench.adapter(1), FakeClock()
    fetched: list[str] = []

    class Slow(MemoryObjectStore):
        async def get(self, key: str) -> bytes:
            return await bench.store.get(key)

        async def fetch(self, key: str, path: Path) -> None:
            fetched.append(key)
            await asyncio.sleep(0.002)
            await bench.store.fetch(key, path)

    (tmp_path / "adapters").mkdir()
    left = tmp_path / "adapters" / f"{ref.manifest_sha256}.partial"  # by an engine that was killed
    left.mkdir()
    (left / "torn").touch()
    tasks = [asyncio.create_task(ensure_adapter(Slow(), ref, tmp_path, clock)) for _ in range(3)]
    while not all(task.done() for task in tasks):
        await clock.advance(0.2)
        await asyncio.sleep(0.001)
    (folder,) = {task.result() for task in tasks}
    files = ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == files
    assert sorted(key.rsplit("/")[-1] for key in fetched) == files
    assert not left.exists()


async def test_an_adapter_that_is_not_what_was_registered(bench: Bench) -> None:
    ref = await bench.adapter(1)
    with pytest.raises(NotFound):
        await bench.cache.load(AdapterRef("jobs/j/nobody/final", ref.manifest_sha256))
    with pytest.raises(DataLoss):
        await bench.cache.load(AdapterRef(ref.prefix, "0" * 64))
    with pytest.raises(InvalidArgument):
        await bench.cache.load(AdapterRef(ref.prefix, ""))
    await bench.store.put(f"{ref.prefix}/adapter_model.safetensors", b"other")
    with pytest.raises(DataLoss):
        await bench.cache.load(ref)


async def test_a_cache_that_is_full_is_said_to_be_full(store: MemoryObjectStore, tmp_path: Path) -> None:
    """Nothing is waited for: the store is not away."""

    class NoRoom(MemoryObjectStore):
        async def fetch(self, key: str, path: Path) -> None:
            with local_disk(path):
                raise OSError(errno.ENOSPC, "No space left on device")

    full = NoRoom()
    await full.put(f"basemodels/{DIGEST}.json", manifest())
    with pytest.raises(FailedPrecondition) as caught:
        await ensure_base(full, DIGEST, tmp_path, FakeClock())
    assert f"cache {tmp_path}" in caught.value.message and "full" in caught.value.message
    assert "engines.cache" in caught.value.message


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(FailedPrecondition, match="LATHE_ENGINE_CACHE_FOLDER"),
        work_folder(tmp_path / "file", "eng-1"),
    ):
        pass
