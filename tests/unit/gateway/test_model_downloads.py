"""Taking models away: whose files, which of them, from where on."""

from __future__ import annotations

import pytest

from lathe.common.errors import NotFound, OutOfRange
from lathe.common.rpc.principal import Principal
from lathe.gateway.model import AdapterRef, BaseModelRef, ServedModel, StoredFile
from lathe.gateway.model_downloads import ModelDownloads
from tests.fakes.gateway import FakeModels
from tests.fakes.objectstore import MemoryObjectStore

ALICE = Principal("acme", "member", "key_1")
MALLORY = Principal("other", "admin", "key_2")
TUNED = "ft:tiny:acme::1"
FILES = (StoredFile("config.json", "blobs/c", "c"), StoredFile("model.safetensors", "", "w"))


@pytest.fixture
async def downloads() -> ModelDownloads:
    store = MemoryObjectStore()
    for key, content in {
        "blobs/c": b"{}",
        "jobs/j/a/final/adapter_config.json": b"lora",
        "jobs/j/a/secret": b"secret",
    }.items():
        await store.put(key, content)
    base = BaseModelRef("baseModels/tiny", "d", 512, FILES)
    known = {
        ("", "tiny"): ServedModel(base),
        ("acme", TUNED): ServedModel(base, AdapterRef("jobs/j/a/final", "m")),
    }
    return ModelDownloads(FakeModels(known), store)


async def got(
    downloads: ModelDownloads, model: str, path: str, *, offset: int = 0, who: Principal = ALICE
) -> bytes:
    return b"".join([data async for data in await downloads.download(who, model, path, offset=offset)])


async def test_a_base_models_files_are_everybodys(downloads: ModelDownloads) -> None:
    assert await got(downloads, "tiny", "config.json", who=MALLORY) == b"{}"
    assert await got(downloads, "baseModels/tiny", "config.json", offset=1) == b"}"


async def test_an_adapters_files_are_its_projects(downloads: ModelDownloads) -> None:
    assert await got(downloads, TUNED, "adapter_config.json", offset=2) == b"ra"
    with pytest.raises(NotFound):
        await got(downloads, TUNED, "adapter_config.json", who=MALLORY)


@pytest.mark.parametrize(
    ("model", "path"),
    [
        ("tiny", "other.json"),
        ("tiny", "model.safetensors"),
        ("tiny", ""),
        (TUNED, "../secret"),
        (TUNED, "..%2fsecret"),
        (TUNED, "adapter_model.safetensors"),
        (TUNED, ""),
        ("unknown", "config.json"),
    ],
)
async def test_what_is_not_there_is_not_found(downloads: ModelDownloads, model: str, path: str) -> None:
    with pytest.raises(NotFound):
        await got(downloads, model, path)


async def test_an_offset_outside_the_file(downloads: ModelDownloads) -> None:
    assert await got(downloads, "tiny", "config.json", offset=2) == b""
    for offset in (3, -1):
        with pytest.raises(OutOfRange, match=f"read_offset {offset} is not within the 2 bytes"):
            await got(downloads, "tiny", "config.json", offset=offset)
