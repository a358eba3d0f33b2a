"""Imports as datasets really runs them: from a real S3, and from a hub that answers like the real one."""

from __future__ import annotations

import asyncio
import io
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import SecretStr, ValidationError

from lathe.common.metrics import Metrics
from lathe.common.objectstore.base import ObjectStore
from lathe.common.objectstore.factory import open_store
from lathe.common.rpc.channel import call, connect
from lathe.common.rpc.principal import Principal
from lathe.common.settings import RpcSettings, StoreSettings
from lathe.datasets import main as datasets_main
from lathe.datasets.settings import DatasetsSettings, ImportSettings
from lathe.v1 import datasets_pb2 as pb
from lathe.v1.datasets_pb2_grpc import DatasetsServiceStub
from tests.fixtures.servers import S3Endpoint
from tests.fixtures.until import none_left, until
from tests.integration.test_uploads_door import TOKEN, migrated
from tests.unit.datasets.conftest import GOOD

ALICE = Principal("acme", "member", "key_1")
DONE = (pb.DATASET_STATE_READY, pb.DATASET_STATE_ERROR)
# Import a source, with these options; the dataset once it is settled.
Imported = Callable[..., Awaitable[pb.Dataset]]


def bucket_of(seaweedfs: S3Endpoint, name: str) -> StoreSettings:
    return StoreSettings(
        kind="s3",
        endpoint=seaweedfs.endpoint,
        bucket=name,
        access_key=seaweedfs.access_key,
        secret_key=SecretStr(seaweedfs.secret_key),
        secure=False,
    )


def settings(folder: Path, db: Any, store: StoreSettings, imports: ImportSettings) -> DatasetsSettings:
    (folder / "token").write_text(TOKEN)
    rpc = RpcSettings(port=0, health_port=None, service_token_file=folder / "token", grace_s=1)
    return DatasetsSettings(rpc=rpc, db=db, store=store, imports=imports)


@pytest.fixture
async def started(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[Imported]]]:
    """Starts datasets with a store and settings of imports."""
    db = await migrated(tmp_path, "datasets")
    ends = []

    async def start(store: StoreSettings, **imports: Any) -> Imported:
        its = settings(tmp_path, db, store, ImportSettings(enabled=True, **imports))
        running = datasets_main.running(its, Metrics("test"))
        service = await running.__aenter__()
        channel = connect(f"127.0.0.1:{service.port}", TOKEN)
        ends.extend([channel.close, lambda: running.__aexit__(None, None, None)])
        stub = DatasetsServiceStub(channel)

        async def imported(source: str, **options: Any) -> pb.Dataset:
            new = pb.Dataset(purpose="fine-tune")
            if options:
                new.import_options.CopyFrom(pb.ImportOptions(**options))
            wanted = pb.ImportDatasetRequest(parent="projects/acme", dataset=new, source=source)
            made = await call(stub.ImportDataset, wanted, principal=ALICE)
            get = pb.GetDatasetRequest(name=made.name)
            return await until(
                lambda: call(stub.GetDataset, get, principal=ALICE), lambda found: found.state in DONE
            )

        return imported

    yield start
    for end in ends:
        await end()


async def test_buckets(started: Any, tmp_path: Path, seaweedfs: S3Endpoint) -> None:
    ours, listed, unlisted = (seaweedfs.new_bucket(f"imports-{name}") for name in ("ours", "listed", "other"))
    for bucket in (listed, unlisted):
        await open_store(bucket_of(seaweedfs, bucket)).put("data/v=1/train.jsonl", GOOD)
    s3 = bucket_of(seaweedfs, ours)
    imported = await started(s3, s3=s3, s3_buckets=[listed])
    found = await imported(f"s3://{listed}/data/v=1/train.jsonl")
    assert found.state == pb.DATASET_STATE_READY and found.report.example_count == 12
    assert found.source == f"s3://{listed}/data/v=1/train.jsonl"
    store: ObjectStore = open_store(s3)
    assert await store.get(f"blobs/{found.sha256}") == GOOD
    await none_left(store, "staging/")
    for source, code in (
        (f"s3://{unlisted}/data/v=1/train.jsonl", "import_refused"),
        (f"s3://{ours}/blobs/{found.sha256}", "import_refused"),
        (f"s3://{listed}/data/v=2/train.jsonl", "import_failed"),
    ):
        refused = await imported(source)
        assert refused.state == pb.DATASET_STATE_ERROR
        assert [finding.code for finding in refused.report.findings] == [code]
    with pytest.raises(ValidationError, match="everybody's data"):
        settings(tmp_path, its_db(), s3, ImportSettings(s3=s3, s3_buckets=[listed, ours]))


def its_db() -> dict[str, str]:
    return {"url": "sqlite+aiosqlite://"}


def shard(*rows: dict[str, str]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), file)
    return file.getvalue()


async def test_a_split_of_several_files(started: Any, tmp_path: Path) -> None:
    """Listed by the hub, each behind a redirect to another host; the operator's token is for the hub alone."""
    rows = [{"question": f"{n} + {n}?", "answer": f"It is {2 * n}."} for n in range(30)]
    shards = [shard(*rows[:7]), shard(*rows[7:8]), shard(*rows[8:])]
    told: list[tuple[str, bool]] = []

    async def site(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        path = head.split()[1]
        told.append((path, "authorization: bearer hf_secret" in head.lower()))
        status, extra, body = "200 OK", "", b""
        if path == "/api/datasets/o/sums/parquet/main/train":
            body = json.dumps([f"{hub}{path}/{n}.parquet" for n in range(len(shards))]).encode()
        elif found := re.fullmatch(r"/api/datasets/o/sums/parquet/main/train/(\d)\.parquet", path):
            status, extra = "302 Found", f"Location: {cdn}/cdn/{found[1]}\r\n"
        else:
            body = shards[int(path.removeprefix("/cdn/"))]
        writer.write(f"HTTP/1.1 {status}\r\n{extra}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        writer.close()

    servers = [await asyncio.start_server(site, "127.0.0.1", 0) for _ in range(2)]
    hub, cdn = (f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}" for server in servers)
    async with servers[0], servers[1]:
        imported = await started(
            StoreSettings(folder=tmp_path / "store"),
            allow_networks=["127.0.0.0/8"],
            hub=hub,
            hub_token=SecretStr("hf_secret"),
        )
        found = await imported("hf:o/sums:main/train", columns={"prompt": "question", "completion": "answer"})
    assert (found.display_name, found.state) == ("o-sums-train.parquet", pb.DATASET_STATE_READY), found.report
    assert found.report.example_count == 30
    stored = await open_store(StoreSettings(folder=tmp_path / "store")).get(f"blobs/{found.sha256}")
    assert [json.loads(line)["prompt"] for line in stored.splitlines()] == [row["question"] for row in rows]
    assert len(told) == 7 and all(known == path.startswith("/api/") for path, known in told)
