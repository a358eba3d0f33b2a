"""Parts straight to a real S3: the public client, a gateway, datasets, and SeaweedFS behind a relay that can be cut."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest
from pydantic import SecretStr

from lathe.accounts import main as accounts_main
from lathe.accounts.settings import AccountsSettings
from lathe.client import Client, parts
from lathe.client import datasets as client_datasets
from lathe.client.parts import PartsUpload
from lathe.common.errors import FailedPrecondition, InvalidArgument
from lathe.common.metrics import Metrics
from lathe.common.objectstore.base import ObjectStore
from lathe.common.objectstore.factory import open_store
from lathe.common.settings import MetricsSettings, RpcSettings, StoreSettings
from lathe.datasets import main as datasets_main
from lathe.datasets import uploads
from lathe.datasets.settings import DatasetsSettings
from lathe.gateway import main as gateway_main
from lathe.gateway.settings import GatewaySettings
from lathe.text.tokenizer import Tokenizer
from lathe.v1 import datasets_pb2 as pb
from tests.fakes.all_owners import AllOwners
from tests.fixtures.relay import Relay, relay
from tests.fixtures.servers import S3Endpoint, free_ports
from tests.fixtures.tiny import build_tiny_tokenizer
from tests.fixtures.until import none_left
from tests.integration.test_uploads_door import TOKEN, migrated

KEY = "sk-lathe-" + "a" * 48
MIB = 1 << 20
DATA = bytes(range(256)) * (17 * MIB // 256) + b"the end"


@dataclass
class Platform:
    client: Client
    store: ObjectStore
    public: Relay

    async def upload(self, data: bytes, progress: Callable[[int, int], None] | None = None) -> pb.Dataset:
        """The dataset when it is validated. The client blocks, and the servers are on this loop."""
        datasets = self.client.datasets
        made = await asyncio.to_thread(datasets.upload, data, "user_data", progress=progress)
        return await asyncio.to_thread(datasets.wait, made.name)

    async def names(self) -> list[str]:
        return await asyncio.to_thread(lambda: [item.name for item in self.client.datasets.list()])


@pytest.fixture(params=["offered"])
async def platform(
    request: pytest.FixtureRequest, tmp_path: Path, seaweedfs: S3Endpoint, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Platform]:
    # S3 joins parts of 5 MiB and more by itself.
    monkeypatch.setattr(uploads, "PRESIGNED_PART_BYTES", 5 * MIB)
    monkeypatch.setattr(client_datasets, "PRESIGNED_FROM_BYTES", MIB)
    public_endpoint = {"none": None, "unreachable": f"127.0.0.1:{free_ports(1)[0]}"}
    tokenizer = Tokenizer.from_folder(build_tiny_tokenizer(tmp_path / "tokenizer"))
    with ExitStack() as stack:
        public = stack.enter_context(relay(seaweedfs.endpoint))
        store = StoreSettings(
            kind="s3",
            endpoint=seaweedfs.endpoint,
            bucket=seaweedfs.new_bucket(f"presigned-{uuid.uuid4().hex[:12]}"),
            access_key=seaweedfs.access_key,
            secret_key=SecretStr(seaweedfs.secret_key),
            secure=False,
            public_endpoint=public_endpoint.get(request.param, public.address),
        )
        objects = open_store(store)
        owners = AllOwners(objects, tokenizer, {})
        server = await owners.start(TOKEN)
        (tmp_path / "token").write_text(TOKEN)
        rpc = RpcSettings(port=0, health_port=None, service_token_file=tmp_path / "token", grace_s=1)
        its = DatasetsSettings(
            rpc=rpc, db=await migrated(tmp_path, "datasets"), store=store, models_address=owners.address
        )
        who = AccountsSettings(rpc=rpc, db=await migrated(tmp_path, "accounts"), bootstrap_key=SecretStr(KEY))
        async with (
            accounts_main.running(who, Metrics()) as accounts,
            datasets_main.running(its, Metrics()) as datasets,
        ):
            settings = GatewaySettings(
                rpc=rpc,
                http_port=0,
                db=await migrated(tmp_path, "gateway"),
                store=store,
                metrics=MetricsSettings(port=None),
                cache_folder=tmp_path / "cache",
                accounts_address=f"127.0.0.1:{accounts.port}",
                models_address=owners.address,
                datasets_address=f"127.0.0.1:{datasets.port}",
                jobs_address=owners.address,
            )
            async with gateway_main.running(settings, Metrics()) as service:
                client = Client(f"127.0.0.1:{service.port}", KEY, timeout=60)
                await asyncio.to_thread(lambda: client.datasets)
                yield Platform(client, objects, public)
                client.close()
        await server.stop(0)


async def test_a_large_file_goes_straight_to_the_store_though_its_connections_break(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    limited, began = parts._limited, list[int]()

    def cut_in_the_second_part(file: IO[bytes], size: int) -> Iterator[bytes]:
        began.append(size)
        second = len(began) == 2
        for block in limited(file, size):
            yield block
            if second:
                platform.public.cut()

    monkeypatch.setattr(parts, "_AT_ONCE", 1)
    monkeypatch.setattr(parts, "_limited", cut_in_the_second_part)
    done = await platform.upload(DATA, lambda sent, size: seen.append(sent))
    assert (done.state, done.size_bytes) == (pb.DATASET_STATE_READY, len(DATA))
    assert done.sha256 == hashlib.sha256(DATA).hexdigest()
    assert seen[-1] == len(DATA) and seen == sorted(seen)
    assert len(began) == 5
    assert await platform.store.get(f"blobs/{done.sha256}") == DATA
    await none_left(platform.store, "staging/")


async def test_urls_that_are_refused_as_expired_ones_are_signed_again(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed, put, rounds = PartsUpload._signed, PartsUpload._put, list[int]()

    def wrong_in_the_second_round(upload: PartsUpload) -> pb.SignUploadPartsResponse:
        answer = signed(upload)
        rounds.append(answer.missing_bytes)
        if len(rounds) == 2:
            for part in answer.parts:
                part.url = part.url.replace("X-Amz-Date=", "X-Amz-Date=1")
        return answer

    def one_in_the_first_round(upload: PartsUpload, part: pb.SignedPart) -> None:
        if len(rounds) == 1 and part.number:
            raise ConnectionResetError
        put(upload, part)

    monkeypatch.setattr(PartsUpload, "_signed", wrong_in_the_second_round)
    monkeypatch.setattr(PartsUpload, "_put", one_in_the_first_round)
    done = await platform.upload(DATA)
    assert done.sha256 == hashlib.sha256(DATA).hexdigest()
    rest = len(DATA) - 5 * MIB
    assert rounds == [len(DATA), rest, rest, 0]


@pytest.mark.parametrize("platform", ["none", "unreachable"], indirect=True)
async def test_without_a_way_to_the_store_it_is_a_stream(platform: Platform) -> None:
    done = await platform.upload(DATA)
    assert (done.state, done.sha256) == (pb.DATASET_STATE_READY, hashlib.sha256(DATA).hexdigest())
    assert platform.public.connections == 0
    assert await platform.names() == [done.name]


@pytest.mark.parametrize("platform", ["none"], indirect=True)
async def test_the_refusal_names_the_stream(platform: Platform) -> None:
    with pytest.raises(FailedPrecondition, match="UploadDataset") as refused:
        await asyncio.to_thread(create, platform, presigned=True)
    assert refused.value.reason == "NO_PRESIGNED_PARTS"
    assert await platform.names() == []


def create(platform: Platform, **announced: object) -> pb.Dataset:
    datasets = platform.client.datasets
    new = pb.Dataset(display_name="a.bin", purpose="user_data")
    return datasets._create(new, pb.PartsAnnouncement(**{"size_bytes": 8, **announced}))  # type: ignore[arg-type]


async def test_a_missing_part_and_wrong_bytes(platform: Platform) -> None:
    datasets = platform.client.datasets

    def steps() -> pb.Dataset:
        with pytest.raises(InvalidArgument):
            create(platform, presigned=True, sha256="xyz")
        made = create(platform, presigned=True, sha256=hashlib.sha256(b"announced").hexdigest())
        complete = pb.CompleteUploadSessionRequest(name=made.name)
        stub, call = datasets._stub, datasets._transport.call
        with pytest.raises(FailedPrecondition) as refused:
            call(stub.CompleteUploadSession, complete)
        assert refused.value.reason == "PARTS_MISSING"
        # The stream and the parts would write the same keys.
        with pytest.raises(FailedPrecondition) as refused:
            call(stub.GetDatasetUpload, pb.GetDatasetUploadRequest(name=made.name))
        assert refused.value.reason == "UPLOAD_IN_PARTS"
        return made

    made = await asyncio.to_thread(steps)
    target = await asyncio.to_thread(
        datasets._transport.call, datasets._stub.SignUploadParts, pb.SignUploadPartsRequest(name=made.name)
    )
    [part] = target.parts
    key = part.url.split("?")[0].split("/", 4)[4]
    await platform.store.put(key, b"7 bytes")
    with pytest.raises(FailedPrecondition, match="another size"):
        await asyncio.to_thread(
            datasets._transport.call,
            datasets._stub.CompleteUploadSession,
            pb.CompleteUploadSessionRequest(name=made.name),
        )
    await platform.store.put(key, b"8 bytes!")
    await asyncio.to_thread(
        datasets._transport.call,
        datasets._stub.CompleteUploadSession,
        pb.CompleteUploadSessionRequest(name=made.name),
    )
    done = await asyncio.to_thread(datasets.wait, made.name)
    assert (done.state, done.report.findings[0].code) == (pb.DATASET_STATE_ERROR, "digest_mismatch")
    await none_left(platform.store)
