"""/uploads through the unmodified openai SDK: a real gateway before the real datasets service."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncAzureOpenAI, AsyncOpenAI
from pydantic import SecretStr

from lathe.common.db import Database, migrate
from lathe.common.metrics import Metrics
from lathe.common.objectstore.folder import FolderStore
from lathe.common.rpc.principal import Principal
from lathe.common.settings import DatabaseSettings, MetricsSettings, RpcSettings, StoreSettings
from lathe.datasets import main as datasets_main
from lathe.datasets.settings import DatasetsSettings, ImportSettings
from lathe.gateway import main as gateway_main
from lathe.gateway.settings import GatewaySettings
from lathe.text.tokenizer import Tokenizer
from tests.fakes.all_owners import AllOwners
from tests.fakes.clock import FakeClock
from tests.fixtures.tiny import build_tiny_tokenizer
from tests.fixtures.until import none_left, until

TOKEN = "service-token"
ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
ROWS = (json.dumps(ROW) + "\n").encode() * 30


class Clocks(FakeClock):
    """Stands still for datasets, but its loops wait for real: nothing but them ends a wait."""

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class Door:
    def __init__(self, base: str, store: FolderStore, clock: Clocks) -> None:
        self.base = base
        self.store = store
        self.clock = clock
        self.sdk = AsyncOpenAI(base_url=f"{base}/v1", api_key="sk-alice", max_retries=0)
        self.eve = AsyncOpenAI(base_url=f"{base}/v1", api_key="sk-eve", max_retries=0)
        self.azure = AsyncAzureOpenAI(
            azure_endpoint=base, api_key="sk-alice", api_version="2025-03-01-preview", max_retries=0
        )

    async def begin(self, size: int = len(ROWS), **options: Any) -> str:
        made = await self.sdk.uploads.create(
            **{
                "bytes": size,
                "filename": "train.jsonl",
                "mime_type": "text/jsonl",
                "purpose": "fine-tune",
                **options,
            }
        )
        assert made.status == "pending"
        return made.id

    async def part(self, upload: str, data: bytes) -> str:
        return (await self.sdk.uploads.parts.create(upload, data=data)).id

    async def processed(self, file_id: str) -> Any:
        return await until(lambda: self.sdk.files.retrieve(file_id), lambda file: file.status != "uploaded")

    async def until(self, file_id: str, status: str) -> Any:
        return await until(lambda: self.sdk.files.retrieve(file_id), lambda file: file.status == status)

    async def close(self) -> None:
        for client in (self.sdk, self.eve, self.azure):
            await client.close()


async def migrated(tmp_path: Path, name: str) -> DatabaseSettings:
    url = f"sqlite+aiosqlite:///{tmp_path / name}.db"
    db = Database(url)
    await migrate(db, f"lathe.{name}")
    await db.close()
    return DatabaseSettings(url=SecretStr(url))


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[Door]:
    clock = Clocks()
    store = StoreSettings(folder=tmp_path / "store")
    tokenizer = Tokenizer.from_folder(build_tiny_tokenizer(tmp_path / "tokenizer"))
    keys = {"sk-alice": Principal("acme", "admin", "key_1"), "sk-eve": Principal("other", "member", "key_2")}
    owners = AllOwners(FolderStore(tmp_path / "store"), tokenizer, keys)
    server = await owners.start(TOKEN)
    (tmp_path / "token").write_text(TOKEN)
    rpc = RpcSettings(port=0, health_port=None, service_token_file=tmp_path / "token", grace_s=1)
    its = DatasetsSettings(
        rpc=rpc,
        db=await migrated(tmp_path, "datasets"),
        store=store,
        models_address=owners.address,
        imports=ImportSettings(enabled=True, allow_networks=("127.0.0.0/8",)),
    )
    async with datasets_main.running(its, Metrics(), clock=clock) as datasets:
        settings = GatewaySettings(
            rpc=rpc,
            http_port=0,
            db=await migrated(tmp_path, "gateway"),
            store=store,
            metrics=MetricsSettings(port=None),
            cache_folder=tmp_path / "cache",
            accounts_address=owners.address,
            models_address=owners.address,
            datasets_address=f"127.0.0.1:{datasets.port}",
            jobs_address=owners.address,
        )
        async with gateway_main.running(settings, Metrics()) as service:
            door = Door(f"http://127.0.0.1:{service.http_port}", FolderStore(tmp_path / "store"), clock)
            yield door
            await door.close()
    await server.stop(0)


async def keys(store: FolderStore, prefix: str) -> list[str]:
    return [info.key async for info in store.list(prefix)]


async def test_parts_make_one_file_in_the_order_given(door: Door) -> None:
    upload = await door.begin()
    cut = [ROWS[:1000], ROWS[1000:1001], ROWS[1001:]]
    last, middle, first = [await door.part(upload, data) for data in reversed(cut)]
    md5 = hashlib.md5(ROWS).hexdigest()
    done = await door.sdk.uploads.complete(upload, part_ids=[first, middle, last], md5=md5)
    assert (done.status, done.bytes, done.filename) == ("completed", len(ROWS), "train.jsonl")
    assert done.file is not None and done.file.purpose == "fine-tune"
    file = await door.processed(done.file.id)
    assert file.status == "processed"
    assert (await door.sdk.files.content(file.id)).content == ROWS
    await none_left(door.store, "staging/")
    # The answer may have been lost.
    again = await door.sdk.uploads.complete(upload, part_ids=[first, middle, last], md5=md5)
    assert again.file is not None and again.file.id == file.id
    with pytest.raises(openai.BadRequestError) as refused:
        await door.sdk.uploads.complete(upload, part_ids=[first])
    assert refused.value.code == "upload_completed"
    for late in (door.sdk.uploads.cancel(upload), door.sdk.uploads.parts.create(upload, data=b"x")):
        with pytest.raises(openai.BadRequestError) as refused:
            await late
        assert refused.value.code == "upload_completed"


async def test_the_sdk_cuts_a_file_by_itself(door: Door, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(ROWS)
    for client in (door.sdk, door.azure):
        done = await client.uploads.upload_file_chunked(
            file=tmp_path / "train.jsonl", mime_type="text/jsonl", purpose="fine-tune", part_size=777
        )
        assert done.file is not None
        assert (await door.processed(done.file.id)).status == "processed"
    listed = [file.id async for file in door.azure.files.list()]
    assert done.file.id in listed


async def test_wrong_parts_are_refused_and_the_upload_goes_on(door: Door) -> None:
    upload, other = await door.begin(), await door.begin()
    part, rest = await door.part(upload, ROWS[:500]), await door.part(upload, ROWS[500:])
    foreign = await door.part(other, ROWS)

    async def refused(param: str, code: str, *part_ids: str, **more: Any) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            await door.sdk.uploads.complete(upload, part_ids=list(part_ids), **more)
        assert (caught.value.param, caught.value.code) == (param, code)

    await refused("part_ids[1]", "duplicate_part", part, part)
    await refused("part_ids[1]", "part_not_found", part, foreign)
    await refused("part_ids[0]", "part_not_found", "part_never")
    await refused("part_ids", "size_mismatch", part)
    await refused("part_ids", "invalid_value")
    await refused("md5", "invalid_value", part, rest, md5="xyz")
    assert (await door.sdk.uploads.complete(upload, part_ids=[part, rest])).status == "completed"


async def test_another_md5_is_an_error_of_the_file(door: Door) -> None:
    upload = await door.begin()
    part = await door.part(upload, ROWS)
    done = await door.sdk.uploads.complete(upload, part_ids=[part], md5="0" * 32)
    assert done.file is not None
    file = await door.processed(done.file.id)
    assert file.status == "error" and "MD5" in (file.status_details or "")
    await none_left(door.store)


async def test_completed_twice_at_the_same_time_is_one_file(door: Door) -> None:
    upload = await door.begin()
    part = await door.part(upload, ROWS)
    answers = await asyncio.gather(*(door.sdk.uploads.complete(upload, part_ids=[part]) for _ in range(8)))
    assert len({answer.file.id for answer in answers if answer.file}) == 1
    assert len([file async for file in door.sdk.files.list()]) == 1


async def test_cancelled_and_expired_uploads(door: Door) -> None:
    upload = await door.begin()
    await door.part(upload, ROWS)
    assert (await door.sdk.uploads.cancel(upload)).status == "cancelled"
    assert (await door.sdk.uploads.cancel(upload)).status == "cancelled"
    with pytest.raises(openai.BadRequestError) as refused:
        await door.part(upload, ROWS)
    assert refused.value.code == "upload_cancelled"
    late = await door.begin()
    part = await door.part(late, ROWS)
    door.clock.tick(3601)
    with pytest.raises(openai.BadRequestError) as refused:
        await door.sdk.uploads.complete(late, part_ids=[part])
    assert refused.value.code == "upload_expired"
    with pytest.raises(openai.BadRequestError) as refused:
        await door.sdk.uploads.cancel(late)
    assert refused.value.code == "upload_expired"
    assert [file async for file in door.sdk.files.list()] == []


async def test_what_cannot_be_begun(door: Door) -> None:
    for wrong, param in (
        ({"size": 0}, "bytes"),
        ({"size": (8 << 30) + 1}, "bytes"),
        ({"purpose": "nonsense"}, "purpose"),
        ({"filename": ""}, "filename"),
        ({"expires_after": {"anchor": "created_at", "seconds": 1}}, "expires_after.seconds"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            await door.begin(**wrong)  # type: ignore[arg-type]
        assert caught.value.param == param
    upload = await door.begin(10)
    for data, code in ((b"x" * 11, "part_too_large"), (b"", "empty_part")):
        with pytest.raises(openai.BadRequestError) as caught:
            await door.part(upload, data)
        assert caught.value.code == code
    for unknown in ("upload_none", "nonsense", upload):
        client = door.eve if unknown == upload else door.sdk
        with pytest.raises(openai.NotFoundError, match=unknown):
            await client.uploads.complete(unknown, part_ids=["part-1"])
        with pytest.raises(openai.NotFoundError):
            await client.uploads.parts.create(unknown, data=b"x")
    async with httpx.AsyncClient(base_url=door.base, headers={"api-key": "sk-alice"}) as http:
        answer = await http.post(f"/v1/uploads/{upload}/parts", files={"wrong": b"x"})
        assert answer.json()["error"]["param"] == "wrong"
    assert await keys(door.store, "staging/") == []


async def test_a_retried_create_joins_the_first(door: Door) -> None:
    retry = {"extra_headers": {"x-stainless-retry-count": "1"}}
    first = await door.begin()
    assert await door.begin(**retry) == first
    assert await door.begin() != first


async def test_azures_import(door: Door) -> None:
    async def site(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = (await reader.readuntil(b"\r\n\r\n")).split()[1]
        body = CSV if path == b"/train.csv?sig=secret" else b""
        status = b"200 OK" if body else b"404 Not Found"
        writer.write(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body))
        await writer.drain()
        writer.close()

    rows = "".join(f"question {n},answer {n}\n" for n in range(12))
    CSV = f"prompt,completion\n{rows}".encode()
    server = await asyncio.start_server(site, "127.0.0.1", 0)
    here = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, httpx.AsyncClient(base_url=door.base, headers={"api-key": "sk-alice"}) as http:

        async def begun(url: str, **more: str) -> httpx.Response:
            body = {"purpose": "fine-tune", "filename": "train.csv", "content_url": url, **more}
            return await http.post("/openai/files/import?api-version=2024-10-21", json=body)

        made = await begun(f"{here}/train.csv?sig=secret")
        assert (made.status_code, made.json()["status"]) == (201, "pending")
        assert made.headers["operation-location"] == made.headers["location"]
        await door.until(made.json()["id"], "processed")
        answer = await http.get(made.headers["location"])
        assert answer.json()["id"] == made.json()["id"]
        gone = await begun(f"{here}/none")
        file = await door.until(gone.json()["id"], "error")
        assert "404" in (file.status_details or "") and "sig=" not in str(file)
        refused = await begun("ftp://x/y")
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "content_url")
        metadata = await begun("http://169.254.169.254/latest/meta-data")
        file = await door.until(metadata.json()["id"], "error")
        assert "may not reach" in (file.status_details or "")
