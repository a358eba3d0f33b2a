"""Checkpoints: whole when the manifest is there, found again whatever was killed in between."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lathe.common.errors import DataLoss, Unavailable
from lathe.common.objectstore.base import ObjectInfo
from lathe.engine.checkpoints import (
    Manifest,
    checkpoint_prefix,
    delete,
    describe,
    newest_complete,
    sweep,
    upload,
)
from lathe.engine.model import SlicePlan, Snapshot, SnapshotKind, StepMetrics
from tests.fakes.objectstore import MemoryObjectStore

PLAN = SlicePlan(320, 2, "bfloat16", "cpu")


def metrics(step: int) -> StepMetrics:
    return StepMetrics(step, 9, 1.5, 0.5, 1e-3, 100.0, 40, 0.25, 1.0, 1)


def snapshot(
    folder: Path, step: int, kind: SnapshotKind = SnapshotKind.RESUME, content: str = ""
) -> Snapshot:
    files = ["adapter_config.json", "adapter_model.safetensors"]
    if kind is not SnapshotKind.FINAL:
        files.append("optimizer.safetensors")
    place = folder / f"{kind}-{step}-{content}"
    place.mkdir(parents=True, exist_ok=True)
    for name in files:
        (place / name).write_text(f"{name} of step {step} {content}")
    return Snapshot(kind, step, 1, 9, step * 40, place, tuple(files), metrics(step), {2: 1})


async def stored(store: MemoryObjectStore, attempt: str, item: Snapshot) -> str:
    ref = await upload(store, checkpoint_prefix(attempt, item), item.folder, describe(item, PLAN))
    assert hashlib.sha256(await store.get(f"{ref.prefix}/manifest.json")).hexdigest() == ref.manifest_sha256
    return ref.prefix


@pytest.fixture
def store() -> MemoryObjectStore:
    return MemoryObjectStore()


async def test_the_newest_complete_one_of_all_attempts_is_found_and_fetched(
    store: MemoryObjectStore, tmp_path: Path
) -> None:
    await stored(store, "jobs/j/att-1/", snapshot(tmp_path, 3, SnapshotKind.EPOCH))
    await stored(store, "jobs/j/att-1/", snapshot(tmp_path, 5))
    await stored(store, "jobs/j/att-2/", snapshot(tmp_path, 4))
    await stored(store, "jobs/j/att-2/", snapshot(tmp_path, 9, SnapshotKind.FINAL))
    await stored(store, "jobs/other/att-3/", snapshot(tmp_path, 8))
    found = await newest_complete(store, ["jobs/j/att-2/", "jobs/j/att-1/"], tmp_path / "scratch")
    assert found is not None
    assert (found.ref.prefix, found.manifest.step) == ("jobs/j/att-1/checkpoints/step-00000005", 5)
    assert (found.manifest.slice_plan, found.manifest.halvings) == (PLAN, {2: 1})
    assert "step 5" in (found.folder / "optimizer.safetensors").read_text()
    assert [(item.step, item.ref.prefix) for item in found.epochs] == [
        (3, "jobs/j/att-1/checkpoints/step-00000003")
    ]


async def test_nothing_is_found_where_nothing_is(store: MemoryObjectStore, tmp_path: Path) -> None:
    assert await newest_complete(store, ["jobs/j/att-1/"], tmp_path) is None


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.safetensors", "manifest.json"])
@pytest.mark.parametrize("gone", [True, False])
async def test_a_damaged_one_is_passed_over(
    store: MemoryObjectStore, tmp_path: Path, name: str, gone: bool
) -> None:
    await stored(store, "jobs/j/a/", snapshot(tmp_path, 3))
    damaged = await stored(store, "jobs/j/a/", snapshot(tmp_path, 6))
    if gone:
        await store.delete(f"{damaged}/{name}")
    else:
        await store.put(f"{damaged}/{name}", b"{}")
    heard: list[tuple[str, str]] = []
    found = await newest_complete(
        store,
        ["jobs/j/a/"],
        tmp_path / "scratch",
        lambda prefix, error: heard.append((prefix, error.message)),
    )
    assert found is not None
    assert found.manifest.step == 3
    if gone and name == "manifest.json":
        assert not heard  # without a manifest it never was one
    else:
        assert [prefix for prefix, _ in heard] == [damaged]
        assert (f"{damaged}/{name}" if name != "manifest.json" else "manifest cannot be read") in heard[0][1]


class Overtaken(MemoryObjectStore):
    """While somebody reads the checkpoint of step 6, an older attempt stores its next one and removes that."""

    later: Snapshot | None = None

    async def fetch(self, key: str, path: Path) -> None:
        if self.later is not None and "step-00000006" in key:
            later, self.later = self.later, None
            await stored(self, "jobs/j/a/", later)
            await delete(self, key.rpartition("/")[0])
        await super().fetch(key, path)


async def test_one_removed_while_it_is_read_gives_way_to_the_next(tmp_path: Path) -> None:
    store = Overtaken()
    await stored(store, "jobs/j/a/", snapshot(tmp_path, 6))
    store.later = snapshot(tmp_path, 9)
    damaged: list[str] = []
    found = await newest_complete(
        store, ["jobs/j/a/"], tmp_path / "scratch", lambda prefix, _: damaged.append(prefix)
    )
    assert found is not None
    assert (found.manifest.step, damaged) == (9, [])


async def test_an_outage_is_no_damage(store: MemoryObjectStore, tmp_path: Path) -> None:
    store.outage = Unavailable("away")
    with pytest.raises(Unavailable):
        await newest_complete(store, ["jobs/j/a/"], tmp_path)


class Killed(Exception):
    """The process died here."""


class DyingStore(MemoryObjectStore):
    """Dies before its n-th change."""

    left = -1

    def _count(self) -> None:
        if self.left == 0:
            raise Killed
        self.left -= 1

    async def put(
        self, key: str, data: bytes | AsyncIterable[bytes], *, if_absent: bool = False
    ) -> ObjectInfo:
        self._count()
        return await super().put(key, data, if_absent=if_absent)

    async def delete(self, key: str) -> None:
        self._count()
        await super().delete(key)


@settings(max_examples=40, deadline=None)
@given(
    history=st.lists(st.tuples(st.integers(1, 6), st.booleans()), min_size=1, max_size=6),
    dies_at=st.integers(0, 30),
)
def test_killed_between_any_two_changes_the_newest_whole_one_is_found(
    history: list[tuple[int, bool]], dies_at: int
) -> None:
    """history: (step, whether it is deleted afterwards); one attempt each."""

    async def story(folder: Path) -> None:
        store, expected = DyingStore(), dict[str, int]()
        store.left = dies_at
        attempts = [f"jobs/j/att-{number}/" for number in range(len(history))]
        try:
            for attempt, (step, deleted) in zip(attempts, history, strict=True):
                item = snapshot(folder, step, content=attempt.replace("/", "_"))
                prefix = await stored(store, attempt, item)
                expected[prefix] = step
                if deleted:
                    store_left = store.left
                    if store_left > 0:
                        del expected[prefix]
                    await delete(store, prefix)
        except Killed:
            store.left = -1
        store.left = -1
        found = await newest_complete(store, attempts, folder / "scratch")
        assert (found.manifest.step if found else None) == max(expected.values(), default=None)
        if found is not None:
            again = await newest_complete(store, attempts, folder / "scratch")
            assert again is not None
            assert again.ref == found.ref

    with TemporaryDirectory() as name:
        asyncio.run(story(Path(name)))


def test_a_manifest_is_read_back_and_is_always_the_same_bytes(tmp_path: Path) -> None:
    item = snapshot(tmp_path, 3, SnapshotKind.EPOCH)
    manifest = describe(item, PLAN, [metrics(2), metrics(3), metrics(4)])
    assert [row.step for row in manifest.unreported] == [2, 3]
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest
    assert describe(item, PLAN, [metrics(2), metrics(3)]).to_bytes() == manifest.to_bytes()


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b'{"version": 2}', b'{"version": 1}', b"\xff"])
def test_what_is_no_manifest_is_data_loss(data: bytes) -> None:
    with pytest.raises(DataLoss):
        Manifest.from_bytes(data)


@pytest.mark.parametrize("path", ["../x", "/x", "a/b", "..", ".", "", "a\\b"])
def test_a_manifest_names_files_of_its_own_folder_only(path: str, tmp_path: Path) -> None:
    manifest = describe(snapshot(tmp_path, 3, SnapshotKind.EPOCH), PLAN)
    foreign = replace(manifest, files=(replace(manifest.files[0], path=path),))
    with pytest.raises(DataLoss, match="no plain file name"):
        Manifest.from_bytes(foreign.to_bytes())


async def test_what_is_stored_is_listed_oldest_first(store: MemoryObjectStore, tmp_path: Path) -> None:
    await stored(store, "jobs/j/att-1/", snapshot(tmp_path, 3, SnapshotKind.EPOCH))
    await stored(store, "jobs/j/att-2/", snapshot(tmp_path, 5))
    await stored(store, "jobs/j/att-1/", snapshot(tmp_path, 5, content="older"))
    found = await newest_complete(store, ["jobs/j/att-2/", "jobs/j/att-1/"], tmp_path / "scratch")
    assert found is not None
    assert [(item.prefix.split("/")[2], item.step, item.kind.value) for item in found.stored] == [
        ("att-1", 3, "epoch"),
        ("att-1", 5, "resume"),
        ("att-2", 5, "resume"),
    ]


async def test_a_sweep_leaves_what_is_kept_and_the_result(store: MemoryObjectStore, tmp_path: Path) -> None:
    kept = await stored(store, "jobs/j/a/", snapshot(tmp_path, 3, SnapshotKind.EPOCH))
    final = await stored(store, "jobs/j/a/", snapshot(tmp_path, 9, SnapshotKind.FINAL))
    superseded = await stored(store, "jobs/j/a/", snapshot(tmp_path, 6, SnapshotKind.EPOCH))
    resume = await stored(store, "jobs/j/b/", snapshot(tmp_path, 3))
    await store.delete(f"{superseded}/manifest.json")  # somebody died while deleting it
    for attempt in ("jobs/j/a/", "jobs/j/b/"):
        await sweep(store, attempt, {3}, {resume})
    assert {key.rpartition("/")[0] for key in sorted(store.keys())} == {kept, final}
