"""The whole gateway process, on real sockets, before small owners: chat, uploads, deployments, start and stop."""

from __future__ import annotations

import asyncio
import hashlib
import json
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pydantic import SecretStr

from lathe.common.db import Database, migrate
from lathe.common.errors import FailedPrecondition, InvalidArgument, LatheError, OutOfRange
from lathe.common.metrics import Metrics
from lathe.common.objectstore.folder import FolderStore
from lathe.common.rpc.principal import Principal
from lathe.common.rpc.status import from_rpc_error
from lathe.common.service import RunningService
from lathe.common.settings import DatabaseSettings, MetricsSettings, RpcSettings, StoreSettings
from lathe.gateway.bytestreams import PART_BYTES
from lathe.gateway.main import running
from lathe.gateway.settings import GatewaySettings
from lathe.text.tokenizer import Tokenizer
from lathe.v1 import (
    datasets_pb2,
    datasets_pb2_grpc,
    deployments_pb2,
    deployments_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
)
from tests.fakes.owners import Owners
from tests.fixtures.certificates import Authority, mount
from tests.fixtures.tiny import build_tiny_tokenizer
from tests.fixtures.until import until

TOKEN = "service-token"
KEY = grpc.aio.Metadata(("authorization", "Bearer sk-alice"))
OTHER = grpc.aio.Metadata(("api-key", "sk-eve"))
OPERATOR = grpc.aio.Metadata(("api-key", "sk-root"))


@pytest.fixture
async def owners(tmp_path: Path) -> AsyncIterator[Owners]:
    folder = build_tiny_tokenizer(tmp_path / "tokenizer")
    store = FolderStore(tmp_path / "store")
    keys = {
        "sk-alice": Principal("acme", "admin", "key_1"),
        "sk-eve": Principal("other", "member", "key_2"),
        "sk-root": Principal("default", "admin", "key_3"),
    }
    owners = Owners(store, Tokenizer.from_folder(folder), keys)
    for path in sorted(folder.iterdir()):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        await store.put_file(f"blobs/{digest}", path)
        owners.files.append(models_pb2.ModelFile(path=path.name, sha256=digest, object_key=f"blobs/{digest}"))
    server = await owners.start(TOKEN)
    yield owners
    await server.stop(0)


@asynccontextmanager
async def gateway(owners: Owners, folder: Path, **changes: Any) -> AsyncIterator[RunningService]:
    (folder / "token").write_text(TOKEN)
    url = f"sqlite+aiosqlite:///{folder / 'gateway.db'}"
    db = Database(url)
    await migrate(db, "lathe.gateway")
    await db.close()
    given = {
        "rpc": RpcSettings(
            port=0, health_port=None, service_token_file=folder / "token", grace_s=1, reflection=True
        ),
        "http_port": 0,
        "db": DatabaseSettings(url=SecretStr(url)),
        "store": StoreSettings(folder=folder / "store"),
        "metrics": MetricsSettings(port=None),
        "cache_folder": folder / "cache",
        **{f"{peer}_address": owners.address for peer in ("accounts", "models", "datasets", "jobs")},
        **changes,
    }
    async with running(GatewaySettings(**given), Metrics()) as service:
        yield service


@pytest.fixture
async def channel(owners: Owners, tmp_path: Path) -> AsyncIterator[grpc.aio.Channel]:
    async with (
        gateway(owners, tmp_path) as service,
        grpc.aio.insecure_channel(f"127.0.0.1:{service.port}") as channel,
    ):
        yield channel


async def refused(call: Any) -> LatheError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


def ask(model: str = "tiny", **fields: Any) -> inference_pb2.CreateChatCompletionRequest:
    messages = [inference_pb2.ChatMessage(role="user", content="Capital of France?")]
    return inference_pb2.CreateChatCompletionRequest(
        parent="projects/acme", model=model, messages=messages, **fields
    )


async def test_chat_starts_an_engine_and_answers(channel: grpc.aio.Channel, owners: Owners) -> None:
    stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
    done = await stub.CreateChatCompletion(ask(temperature=0, logprobs=True), metadata=KEY, timeout=20)
    assert owners.wishes == ["baseModels/tiny"]
    choice = done.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == (
        "assistant",
        "Paris.",
        "stop",
    )
    assert b"".join(item.token_bytes for item in choice.logprobs) == b"Paris."
    assert done.usage.cached_prompt_tokens == 2 and done.usage.prompt_tokens > 5
    sampled = owners.samples[0]
    assert sampled.params.temperature == 0 and not sampled.HasField("adapter")
    assert list(sampled.params.stop_token_ids) == list(owners.tokenizer.eos_ids)

    request = inference_pb2.StreamChatCompletionRequest(completion=ask("ft:tiny:acme::1"))
    chunks = [chunk async for chunk in stub.StreamChatCompletion(request, metadata=KEY, timeout=20)]
    assert "".join(c.choices[0].delta.content for c in chunks if c.choices) == "Paris."
    assert not chunks[-1].choices and chunks[-1].usage.completion_tokens > 1
    assert owners.samples[1].adapter.prefix == "jobs/j"


async def test_chat_refusals(channel: grpc.aio.Channel) -> None:
    stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
    error = await refused(stub.CreateChatCompletion(ask(temperature=3), metadata=KEY))
    assert error.violations[0].field == "temperature"
    error = await refused(stub.CreateChatCompletion(ask("nothing"), metadata=KEY))
    assert error.reason == "MODEL_NOT_FOUND"
    error = await refused(stub.CreateChatCompletion(ask(), metadata=OTHER))
    assert error.reason == "NOT_FOUND"
    request = inference_pb2.StreamChatCompletionRequest(completion=ask(max_tokens=10_000))
    error = await refused(stub.StreamChatCompletion(request, metadata=KEY).read())
    assert error.reason == "CONTEXT_LENGTH_EXCEEDED"


async def test_a_deployment_answers(channel: grpc.aio.Channel, owners: Owners) -> None:
    deployments: Any = deployments_pb2_grpc.DeploymentsServiceStub(channel)
    made = await deployments.CreateDeployment(
        deployments_pb2.CreateDeploymentRequest(
            parent="projects/acme",
            deployment_id="support",
            deployment=deployments_pb2.Deployment(model_id="ft:tiny:acme::1"),
        ),
        metadata=KEY,
    )
    assert made.name == "projects/acme/deployments/support" and made.etag
    stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
    done = await stub.CreateChatCompletion(ask("support"), metadata=KEY, timeout=20)
    assert done.model == "support" and owners.samples[0].adapter.prefix == "jobs/j"
    made.model_id = "tiny"
    changed = await deployments.UpdateDeployment(
        deployments_pb2.UpdateDeploymentRequest(deployment=made), metadata=KEY
    )
    assert changed.model_id == "tiny"
    error = await refused(
        deployments.DeleteDeployment(
            deployments_pb2.DeleteDeploymentRequest(name=made.name, etag=made.etag), metadata=KEY
        )
    )
    assert error.reason == "ETAG_MISMATCH"
    await deployments.DeleteDeployment(deployments_pb2.DeleteDeploymentRequest(name=made.name), metadata=KEY)
    page = await deployments.ListDeployments(
        deployments_pb2.ListDeploymentsRequest(parent="projects/acme"), metadata=KEY
    )
    assert list(page.deployments) == []


async def test_a_dataset_goes_in_by_a_resumed_stream_and_out_again(channel: grpc.aio.Channel) -> None:
    stub: Any = datasets_pb2_grpc.DatasetsServiceStub(channel)
    data = bytes(range(256)) * 50_000
    made = await stub.CreateDataset(
        datasets_pb2.CreateDatasetRequest(
            parent="projects/acme", dataset=datasets_pb2.Dataset(display_name="train.jsonl")
        ),
        metadata=KEY,
    )

    async def messages(start: int, end: int) -> AsyncIterator[datasets_pb2.UploadDatasetRequest]:
        step = 1_000_000
        for offset in range(start, end, step):
            last = min(offset + step, end) == len(data)
            yield datasets_pb2.UploadDatasetRequest(
                name=made.name,
                write_offset=offset,
                data=data[offset : min(offset + step, end)],
                finish_write=last,
                sha256=hashlib.sha256(data).hexdigest() if last else "",
            )

    left = await stub.UploadDataset(messages(0, 9_000_000), metadata=KEY)
    assert left.state == datasets_pb2.DATASET_STATE_UPLOADING
    where = await stub.GetDatasetUpload(datasets_pb2.GetDatasetUploadRequest(name=made.name), metadata=KEY)
    assert where.committed_size == 9_000_000
    error = await refused(stub.UploadDataset(messages(8_000_000, len(data)), metadata=KEY))
    assert isinstance(error, OutOfRange) and error.metadata["committed_size"] == "9000000"
    done = await stub.UploadDataset(messages(9_000_000, len(data)), metadata=KEY)
    assert (done.state, done.size_bytes) == (datasets_pb2.DATASET_STATE_READY, len(data))

    request = datasets_pb2.DownloadDatasetRequest(name=made.name, read_offset=100)
    got = b"".join([m.data async for m in stub.DownloadDataset(request, metadata=KEY)])
    assert got == data[100:]
    error = await refused(stub.DownloadDataset(request, metadata=OTHER).read())
    assert error.reason == "NOT_FOUND"


async def test_a_model_file_goes_in(channel: grpc.aio.Channel, owners: Owners) -> None:
    stub: Any = models_pb2_grpc.ModelsServiceStub(channel)
    weights = b"w" * 3_000_000
    sha256 = hashlib.sha256(weights).hexdigest()
    owners.files.append(models_pb2.ModelFile(path="model.safetensors", sha256=sha256))

    async def messages(data: bytes, path: str) -> AsyncIterator[models_pb2.UploadModelFileRequest]:
        yield models_pb2.UploadModelFileRequest(base_model="baseModels/tiny", path=path)
        for offset in range(0, len(data), 1_000_000):
            yield models_pb2.UploadModelFileRequest(data=data[offset : offset + 1_000_000])

    error = await refused(stub.UploadModelFile(messages(b"other", "model.safetensors"), metadata=OPERATOR))
    assert isinstance(error, InvalidArgument)
    error = await refused(stub.UploadModelFile(messages(weights, "unknown.bin"), metadata=OPERATOR))
    assert error.reason == "NOT_FOUND"
    for user in (KEY, OTHER):
        error = await refused(stub.UploadModelFile(messages(weights, "model.safetensors"), metadata=user))
        assert error.reason == "OPERATOR_REQUIRED"
    done = await stub.UploadModelFile(messages(weights, "model.safetensors"), metadata=OPERATOR)
    assert done.file.object_key == f"blobs/{sha256}"
    assert [info.key async for info in owners.store.list("staging/")] == []

    request = models_pb2.DownloadModelFileRequest(model="tiny", path="model.safetensors", read_offset=5)
    got = b"".join([m.data async for m in stub.DownloadModelFile(request, metadata=KEY)])
    assert got == weights[5:]
    request.model = "ft:tiny:other::1"
    error = await refused(stub.DownloadModelFile(request, metadata=KEY).read())
    assert error.reason == "NOT_FOUND"


async def test_a_large_model_file_is_gone_on_with_where_its_stream_broke(
    channel: grpc.aio.Channel, owners: Owners
) -> None:
    stub: Any = models_pb2_grpc.ModelsServiceStub(channel)
    weights = bytes(range(256)) * (PART_BYTES // 256 * 2) + b"the rest"
    sha256 = hashlib.sha256(weights).hexdigest()
    path = "large.safetensors"
    owners.files.append(models_pb2.ModelFile(path=path, sha256=sha256, size_bytes=len(weights)))
    name = models_pb2.GetModelFileUploadRequest(base_model="baseModels/tiny", path=path)

    async def messages(data: bytes, offset: int) -> AsyncIterator[models_pb2.UploadModelFileRequest]:
        yield models_pb2.UploadModelFileRequest(base_model=name.base_model, path=path, write_offset=offset)
        for start in range(offset, len(data), 1_000_000):
            yield models_pb2.UploadModelFileRequest(data=data[start : start + 1_000_000])

    async def broken() -> AsyncIterator[models_pb2.UploadModelFileRequest]:
        async for message in messages(weights[: PART_BYTES + 1_500_000], 0):
            yield message
        await asyncio.Event().wait()

    call = stub.UploadModelFile(broken(), metadata=OPERATOR)
    await until(
        lambda: stub.GetModelFileUpload(name, metadata=OPERATOR),
        lambda upload: upload.committed_size >= PART_BYTES,
    )
    error = await refused(stub.UploadModelFile(messages(b"", PART_BYTES), metadata=OPERATOR))
    assert error.reason == "UPLOAD_RUNNING"
    call.cancel()
    error = await until(
        lambda: refused(stub.UploadModelFile(messages(b"", 5), metadata=OPERATOR)),
        lambda error: error.reason != "UPLOAD_RUNNING",
    )
    assert error.reason == "WRONG_OFFSET", repr(error)
    assert error.metadata["committed_size"] == str(PART_BYTES)
    error = await refused(stub.UploadModelFile(messages(weights[:-1], PART_BYTES), metadata=OPERATOR))
    assert error.reason == "STREAM_BROKEN"
    other = weights[:-1] + b"?"
    offset = (await stub.GetModelFileUpload(name, metadata=OPERATOR)).committed_size
    assert offset == 2 * PART_BYTES
    error = await refused(stub.UploadModelFile(messages(other, offset), metadata=OPERATOR))
    assert error.reason == "DIGEST_MISMATCH"
    assert (await stub.GetModelFileUpload(name, metadata=OPERATOR)).committed_size == 0
    done = await stub.UploadModelFile(messages(weights, 0), metadata=OPERATOR)
    assert done.file.object_key == f"blobs/{sha256}"
    assert [info.key async for info in owners.store.list("staging/")] == []
    assert (await stub.GetModelFileUpload(name, metadata=OPERATOR)).committed_size == len(weights)
    again = await stub.UploadModelFile(messages(weights, len(weights)), metadata=OPERATOR)
    assert again.file == done.file


async def test_health_names_every_public_service(channel: grpc.aio.Channel) -> None:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    for name in ("Accounts", "Datasets", "Models", "Jobs", "Inference", "Deployments"):
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=f"lathe.v1.{name}Service"))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_port_in_use_is_one_sentence(owners: Owners, tmp_path: Path) -> None:
    async with gateway(owners, tmp_path) as first:
        assert first.http_port
        with pytest.raises(FailedPrecondition, match=f"Port {first.http_port} .* in use"):
            async with gateway(owners, tmp_path, http_port=first.http_port):
                raise AssertionError("it started")


CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Capital of France?"}], "stream": True}


async def test_a_stop_is_announced_first_and_open_streams_end_in_peace(
    owners: Owners, tmp_path: Path
) -> None:
    owners.said, owners.token_s = "Paris. " * 20, 0.03
    (tmp_path / "token").write_text(TOKEN)
    rpc = RpcSettings(
        port=0, health_port=0, service_token_file=tmp_path / "token", drain_delay_s=3, grace_s=20
    )
    stopping = asyncio.Event()
    running_service: asyncio.Future[RunningService] = asyncio.get_running_loop().create_future()

    async def serve() -> None:
        async with gateway(owners, tmp_path, rpc=rpc) as service:
            running_service.set_result(service)
            await stopping.wait()

    process = asyncio.create_task(serve())
    service = await running_service
    base = f"http://127.0.0.1:{service.http_port}"
    client = httpx.AsyncClient(base_url=base, headers={"authorization": "Bearer sk-alice"}, timeout=20)
    async with client, client.stream("POST", "/v1/chat/completions", json=CHAT) as streamed:
        lines = streamed.aiter_lines()
        assert (await anext(lines)).startswith("data: ")
        assert (await client.get("/readyz")).status_code == 200
        stopping.set()
        while (ready := await client.get("/readyz")).status_code == 200:
            pass
        assert (ready.status_code, ready.json()["status"]) == (503, "draining")
        # Whoever has not heard of it yet is still answered, and told to connect anew.
        listed = await client.get("/v1/lathe/info")
        assert (listed.status_code, listed.headers["connection"]) == (200, "close")
        async with grpc.aio.insecure_channel(f"127.0.0.1:{service.health_port}") as channel:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        async with grpc.aio.insecure_channel(f"127.0.0.1:{service.port}") as channel:
            stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
            request = inference_pb2.StreamChatCompletionRequest(completion=ask())
            chunks = [chunk async for chunk in stub.StreamChatCompletion(request, metadata=KEY, timeout=20)]
            assert "".join(c.choices[0].delta.content for c in chunks if c.choices) == owners.said
        with pytest.raises(httpx.ConnectError):
            async with asyncio.timeout(20):
                while True:
                    await client.get("/readyz")
                    await asyncio.sleep(0.01)
        assert [line async for line in lines if line][-1] == "data: [DONE]"
    await asyncio.wait_for(process, 30)


async def test_both_doors_with_tls_and_a_new_certificate(owners: Owners, tmp_path: Path) -> None:
    authority, folder = Authority(), tmp_path / "tls"
    files = authority.mount(folder, ["127.0.0.1"])
    (tmp_path / "token").write_text(TOKEN)
    rpc = RpcSettings(
        port=0,
        health_port=None,
        service_token_file=tmp_path / "token",
        tls_cert_file=files.cert,
        tls_key_file=files.key,
        grace_s=1,
    )
    tls = {"http_tls_cert_file": files.cert, "http_tls_key_file": files.key}
    async with gateway(owners, tmp_path, rpc=rpc, **tls) as service:

        async def both(authority: Authority) -> None:
            trust = ssl.create_default_context(cadata=authority.pem.decode())
            async with httpx.AsyncClient(verify=trust) as client:
                answer = await client.get(f"https://127.0.0.1:{service.http_port}/v1/lathe/info")
                assert answer.json()["grpc_port"] == service.port
            (tmp_path / "ca.crt").write_bytes(authority.pem)
            command = ["--address", f"127.0.0.1:{service.port}", "--api-key", "sk-alice", "--ca-file"]
            lathe = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "lathe.cli.main", *command, str(tmp_path / "ca.crt")),
                *("models", "show", "baseModels/tiny", "--json"),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
            assert json.loads((await lathe.communicate())[0])["name"] == "baseModels/tiny"

        await both(authority)
        another = Authority("another")
        certificate, key = another.issue(["127.0.0.1"])
        mount(folder, {"tls.crt": certificate, "tls.key": key})
        await asyncio.sleep(1.1)
        await both(another)
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            await both(authority)
