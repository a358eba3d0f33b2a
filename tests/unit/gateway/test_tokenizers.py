from __future__ import annotations

import asyncio
import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from lathe.common.errors import DataLoss, FailedPrecondition, Unavailable
from lathe.gateway.model import BaseModelRef, StoredFile
from lathe.gateway.tokenizers import TokenizerCache
from tests.fakes.objectstore import MemoryObjectStore
from tests.fixtures.tiny import build_tiny_tokenizer


@pytest.fixture
async def base(tmp_path: Path) -> tuple[MemoryObjectStore, BaseModelRef]:
    store = MemoryObjectStore()
    files = []
    for path in sorted(build_tiny_tokenizer(tmp_path / "made").iterdir()):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        await store.put_file(f"blobs/{digest}", path)
        files.append(StoredFile(path.name, f"blobs/{digest}", digest))
    files.append(StoredFile("model.safetensors", "blobs/away", "0" * 64))
    return store, BaseModelRef("baseModels/tiny", "d1", 100, tuple(files))


async def test_fetched_once_for_all_and_kept_on_disk(
    base: tuple[MemoryObjectStore, BaseModelRef], tmp_path: Path
) -> None:
    store, model = base
    cache = TokenizerCache(store, tmp_path / "cache")
    first, second = await asyncio.gather(cache.get(model), cache.get(model))
    assert first is second and first.decode(first.encode("Hello")) == "Hello"
    assert [path.name for path in (tmp_path / "cache" / "tokenizers").iterdir()] == ["d1"]

    store.outage = Unavailable("away")
    assert (await TokenizerCache(store, tmp_path / "cache").get(model)).digest == first.digest


async def test_what_goes_wrong_leaves_nothing(
    base: tuple[MemoryObjectStore, BaseModelRef], tmp_path: Path
) -> None:
    store, model = base
    cache = TokenizerCache(store, tmp_path / "cache")
    damaged = replace(model, files=tuple(replace(file, sha256="0" * 64) for file in model.files))
    with pytest.raises(DataLoss):
        await cache.get(damaged)
    with pytest.raises(FailedPrecondition):
        await cache.get(replace(model, files=()))
    store.outage = Unavailable("away")
    with pytest.raises(Unavailable):
        await cache.get(model)
    assert list((tmp_path / "cache" / "tokenizers").iterdir()) == []
    store.outage = None
    assert (await cache.get(model)).has_template
