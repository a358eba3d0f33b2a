"""The OpenAI door through the unmodified openai SDK: a real gateway on real sockets, before small owners."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI
from pydantic import SecretStr

from lathe.common.db import Database, migrate
from lathe.common.errors import Unavailable
from lathe.common.metrics import Metrics
from lathe.common.objectstore.folder import FolderStore
from lathe.common.rpc.principal import Principal
from lathe.common.settings import DatabaseSettings, MetricsSettings, RpcSettings, StoreSettings
from lathe.gateway.main import running
from lathe.gateway.settings import GatewaySettings
from lathe.text.tokenizer import Tokenizer
from lathe.v1 import datasets_pb2, jobs_pb2, models_pb2
from tests.fakes.all_owners import AllOwners
from tests.fixtures.tiny import build_tiny_tokenizer
from tests.fixtures.until import until

TOKEN = "service-token"
HELLO: Any = [{"role": "user", "content": "Capital of France?"}]
TUNED = "ft:tiny:acme::1"
ROWS = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 10


class Door:
    """A running gateway and what is behind it."""

    def __init__(self, owners: AllOwners, port: int, metrics: Metrics) -> None:
        self.owners = owners
        self.base = f"http://127.0.0.1:{port}"
        self.metrics = metrics
        self._clients: list[AsyncOpenAI] = []

    def client(self, key: str = "sk-alice", **options: Any) -> AsyncOpenAI:
        made = AsyncOpenAI(base_url=f"{self.base}/v1", api_key=key, **{"max_retries": 0, **options})
        self._clients.append(made)
        return made

    async def close(self) -> None:
        for client in self._clients:
            await client.close()

    async def staged(self) -> list[str]:
        return [info.key async for info in self.owners.store.list("staging/")]


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[Door]:
    folder = build_tiny_tokenizer(tmp_path / "tokenizer")
    store = FolderStore(tmp_path / "store")
    keys = {"sk-alice": Principal("acme", "admin", "key_1"), "sk-eve": Principal("other", "member", "key_2")}
    owners = AllOwners(store, Tokenizer.from_folder(folder), keys)
    for path in sorted(folder.iterdir()):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        await store.put_file(f"blobs/{digest}", path)
        owners.files.append(models_pb2.ModelFile(path=path.name, sha256=digest, object_key=f"blobs/{digest}"))
    server = await owners.start(TOKEN)
    (tmp_path / "token").write_text(TOKEN)
    url = f"sqlite+aiosqlite:///{tmp_path / 'gateway.db'}"
    db = Database(url)
    await migrate(db, "lathe.gateway")
    await db.close()
    settings = GatewaySettings(
        rpc=RpcSettings(port=0, health_port=None, service_token_file=tmp_path / "token", grace_s=1),
        http_port=0,
        db=DatabaseSettings(url=SecretStr(url)),
        store=StoreSettings(folder=tmp_path / "store"),
        metrics=MetricsSettings(port=None),
        cache_folder=tmp_path / "cache",
        accounts_address=owners.address,
        models_address=owners.address,
        datasets_address=owners.address,
        jobs_address=owners.address,
    )
    metrics = Metrics()
    async with running(settings, metrics) as service:
        assert service.http_port is not None
        door = Door(owners, service.http_port, metrics)
        yield door
        await door.close()
    await server.stop(0)


async def test_files(door: Door) -> None:
    client = door.client()
    made = await client.files.create(
        file=("größe.jsonl", ROWS),
        purpose="fine-tune",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert (made.status, made.bytes, made.filename) == ("uploaded", len(ROWS), "größe.jsonl")
    assert made.expires_at is not None
    second = await client.files.create(file=io.BytesIO(b"x" * 3_000_001), purpose="user_data")
    assert second.bytes == 3_000_001 and second.expires_at is None
    assert await door.staged() == []

    got = await client.files.retrieve(made.id)
    assert (got.status, got.id) == ("processed", made.id)
    assert (await client.files.content(made.id)).content == ROWS
    assert [file.id async for file in client.files.list()] == [second.id, made.id]
    assert [file.id async for file in client.files.list(limit=1, order="asc")] == [made.id, second.id]
    page = await client.files.list(limit=1, purpose="fine-tune")
    assert [file.id for file in page.data] == [made.id] and page.has_more is False

    gone = await client.files.delete(made.id)
    assert (gone.deleted, gone.object) == (True, "file")
    with pytest.raises(openai.NotFoundError) as caught:
        await client.files.retrieve(made.id)
    assert "projects/" not in str(caught.value) and made.id in str(caught.value)
    with pytest.raises(openai.NotFoundError):
        await door.client("sk-eve").files.content(second.id)


async def test_what_is_on_its_way_in_is_a_file_only_where_the_platform_fetches_it(door: Door) -> None:
    client, name = door.client(), "projects/acme/datasets/file-coming"
    coming = datasets_pb2.Dataset(name=name, state=datasets_pb2.DATASET_STATE_UPLOADING, purpose="user_data")
    door.owners.datasets[name] = coming
    assert [file.id async for file in client.files.list()] == []
    with pytest.raises(openai.NotFoundError):
        await client.files.retrieve("file-coming")
    coming.source = "https://files.example.org/a"
    assert [file.id async for file in client.files.list()] == ["file-coming"]
    assert (await client.files.retrieve("file-coming")).status == "pending"  # type: ignore[comparison-overlap]


async def test_a_file_with_errors_says_so_by_line(door: Door) -> None:
    report = datasets_pb2.ValidationReport(example_count=9, finding_count=2)
    report.findings.add(line=3, field="messages[0].role", code="unrecognized_role", message="no such role.")
    report.groups.add(
        code="unrecognized_role",
        severity=datasets_pb2.SEVERITY_ERROR,
        count=2,
        first_lines=[3, 8],
        message="a message has an unknown role",
        advice="Correct it.",
    )
    name = "projects/acme/datasets/file-bad"
    door.owners.datasets[name] = datasets_pb2.Dataset(
        name=name, state=datasets_pb2.DATASET_STATE_ERROR, purpose="fine-tune", report=report
    )
    file = await door.client().files.retrieve("file-bad")
    assert file.status == "error"
    assert file.status_details == "line 3, messages[0].role: no such role; and 1 more. Correct it."


async def test_a_result_file_comes_in_base64(door: Door) -> None:
    client = door.client()
    csv = b"step,train_loss\n1,0.5\n"
    made = await client.files.create(file=("results.csv", csv), purpose="user_data")
    door.owners.datasets[f"projects/acme/datasets/{made.id}"].purpose = "fine-tune-results"
    assert base64.b64decode((await client.files.content(made.id)).content) == csv


async def test_refused_uploads_leave_nothing(door: Door) -> None:
    client = door.client()
    with pytest.raises(openai.BadRequestError) as caught:
        await client.files.create(file=("empty.jsonl", b""), purpose="fine-tune")
    assert (caught.value.param, caught.value.code) == ("file", "empty_file")
    with pytest.raises(openai.BadRequestError) as caught:
        await client.files.create(file=("a.jsonl", ROWS), purpose="nonsense")  # type: ignore[arg-type]
    assert caught.value.param == "purpose" and str(caught.value).count("dataset.") == 0
    # The body is larger than what fits on the way: the answer still arrives.
    with pytest.raises(openai.AuthenticationError) as denied:
        await door.client("sk-wrong").files.create(file=b"x" * 8_000_000, purpose="user_data")
    assert denied.value.code == "invalid_api_key"

    async with httpx.AsyncClient(base_url=door.base, headers={"api-key": "sk-alice"}) as http:
        parts: Any = [("file", ("a.jsonl", ROWS)), ("purpose", (None, "fine-tune"))]
        answer = await http.post("/v1/files", files=parts)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "purpose"
        assert "before" in answer.json()["error"]["message"]
        answer = await http.post("/v1/files", json={"purpose": "fine-tune"})
        assert answer.json()["error"]["code"] == "invalid_content_type"
        broken = (
            b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + ROWS
        )
        kind = {"content-type": "multipart/form-data; boundary=b"}
        answer = await http.post("/v1/files", content=broken, headers=kind)
        assert answer.json()["error"]["code"] == "invalid_form"
    await _cut_upload(door, broken)
    assert await door.staged() == [] and door.owners.datasets == {}


async def _cut_upload(door: Door, body: bytes) -> None:
    """A client that announces more than it sends, and goes away."""
    _, writer = await asyncio.open_connection("127.0.0.1", int(door.base.rsplit(":", 1)[1]))
    writer.write(
        b"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sk-alice\r\n"
        b"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 1000000\r\n\r\n" + body
    )
    await writer.drain()
    await until(lambda: len(door.owners.datasets) == 1)
    writer.close()
    await until(lambda: not door.owners.datasets)


async def test_a_retried_create_joins_the_first_try(door: Door) -> None:
    retry = {"x-stainless-retry-count": "1"}
    client = door.client()
    first = await client.files.create(file=("a.jsonl", ROWS), purpose="fine-tune")
    again = await client.files.create(file=("a.jsonl", ROWS), purpose="fine-tune", extra_headers=retry)
    other = await client.files.create(file=("a.jsonl", ROWS), purpose="fine-tune")
    assert first.id == again.id != other.id
    assert len(door.owners.datasets) == 2 and await door.staged() == []

    wanted: Any = {"model": "tiny", "training_file": first.id}
    job = await client.fine_tuning.jobs.create(**wanted)
    assert (await client.fine_tuning.jobs.create(**wanted, extra_headers=retry)).id == job.id
    assert (await client.fine_tuning.jobs.create(**wanted)).id != job.id
    assert len(door.owners.jobs) == 2
    # The job is made, and the answer lost: the SDK repeats by itself.
    door.owners.job_errors.append(Unavailable("gone", retry_after=0.01))
    lost = await door.client(max_retries=2).fine_tuning.jobs.create(**wanted, suffix="lost")
    assert len(door.owners.jobs) == 3 and lost.id == list(door.owners.jobs)[-1].rsplit("/", 1)[-1]


async def test_jobs(door: Door) -> None:
    client = door.client()
    file = await client.files.create(file=("a.jsonl", ROWS), purpose="fine-tune")
    job = await client.fine_tuning.jobs.create(
        model="tiny",
        training_file=file.id,
        suffix="mine",
        seed=7,
        metadata={"team": "a"},
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}},
        },
    )
    assert (job.status, job.seed, job.training_file, job.metadata) == (
        "validating_files",
        7,
        file.id,
        {"team": "a"},
    )
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (2, "auto")
    assert job.method is not None and job.method.type == "supervised"
    old = await client.fine_tuning.jobs.create(
        model="tiny", training_file=file.id, hyperparameters={"n_epochs": 3}
    )
    assert old.hyperparameters.n_epochs == 3
    name = f"projects/acme/jobs/{job.id}"
    door.owners.events[name] = [
        jobs_pb2.JobEvent(event_id="ftevent-1", message="Created", type=jobs_pb2.EVENT_TYPE_MESSAGE),
        jobs_pb2.JobEvent(
            event_id="ftevent-2",
            type=jobs_pb2.EVENT_TYPE_METRICS,
            metrics=jobs_pb2.StepMetrics(step=1, total_steps=2, train_loss=0.5, valid_loss=0.25),
        ),
    ]
    door.owners.checkpoints[name] = [
        jobs_pb2.JobCheckpoint(name=f"{name}/checkpoints/ftckpt_1", step=4, model_id=f"{TUNED}:ckpt-step-4")
    ]

    assert [item.id async for item in client.fine_tuning.jobs.list(limit=1)] == [old.id, job.id]
    page = await client.fine_tuning.jobs.list(metadata={"team": "a"})
    assert [item.id for item in page.data] == [job.id] and not page.has_more
    events = [event async for event in client.fine_tuning.jobs.list_events(job.id, limit=1)]
    assert [event.id for event in events] == ["ftevent-2", "ftevent-1"]
    data: Any = events[0].data
    assert (events[0].type, data["train_loss"], data["valid_loss"]) == ("metrics", 0.5, 0.25)
    checkpoints = [item async for item in client.fine_tuning.jobs.checkpoints.list(job.id)]
    assert checkpoints[0].fine_tuned_model_checkpoint == f"{TUNED}:ckpt-step-4"
    assert checkpoints[0].fine_tuning_job_id == job.id

    door.owners.jobs[name].state = jobs_pb2.JOB_STATE_STARTING
    assert (await client.fine_tuning.jobs.retrieve(job.id)).status == "queued"
    assert (await client.fine_tuning.jobs.cancel(job.id)).status == "cancelled"
    for not_yet in (client.fine_tuning.jobs.pause, client.fine_tuning.jobs.resume):
        with pytest.raises(openai.BadRequestError, match="not supported yet"):
            await not_yet(job.id)
    with pytest.raises(openai.NotFoundError):
        await door.client("sk-eve").fine_tuning.jobs.retrieve(job.id)
    with pytest.raises(openai.NotFoundError):
        await client.fine_tuning.jobs.retrieve("no such/job")


async def test_refused_jobs_name_the_field(door: Door) -> None:
    create: Any = door.client().fine_tuning.jobs.create
    base = {"model": "tiny", "training_file": "file-1"}

    async def param(**fields: Any) -> str | None:
        with pytest.raises(openai.BadRequestError) as caught:
            await create(**{**base, **fields})
        return caught.value.param

    assert await param(hyperparameters={"n_epoch": 3}) == "hyperparameters.n_epoch"
    supervised = {"hyperparameters": {"n_epochs": 51}}
    assert (
        await param(method={"type": "supervised", "supervised": supervised})
        == "method.supervised.hyperparameters.n_epochs"
    )
    beta = {"hyperparameters": {"beta": 3.0}}
    assert await param(method={"type": "dpo", "dpo": beta}) == "method.dpo.hyperparameters.beta"
    assert await param(method={"type": "reinforcement"}) == "method.type"
    assert await param(integrations=[{"type": "wandb", "wandb": {"project": "p"}}]) == "integrations"
    assert await param(extra_body={"epochs": 3}) == "epochs"
    assert await param(seed=-1) == "seed"
    with pytest.raises(openai.NotFoundError) as caught:
        await create(**base)
    assert caught.value.param == "training_file"


async def test_models(door: Door) -> None:
    tuned = "ft:tiny:acme:mine:1"
    name = "projects/acme/adapters/adp-1"
    for index, final in (("1", True), ("2", False)):
        door.owners.adapters[name[:-1] + index] = models_pb2.Adapter(
            name=name[:-1] + index,
            model_id=f"ft:tiny:acme:mine:{index}",
            base_model="baseModels/tiny",
            is_final=final,
        )
    client = door.client()
    found = {model.id: model.owned_by async for model in client.models.list()}
    assert found == {"tiny": "system", tuned: "acme"}
    assert (await client.models.retrieve(tuned)).id == tuned
    assert (await client.models.retrieve("tiny")).owned_by == "system"
    with pytest.raises(openai.NotFoundError) as caught:
        await client.models.retrieve("ft:qwen/Qwen")
    assert caught.value.code == "model_not_found" and "ft:qwen/Qwen" in str(caught.value)
    with pytest.raises(openai.BadRequestError):
        await client.models.delete("tiny")
    assert (await client.models.delete(tuned)).deleted
    with pytest.raises(openai.NotFoundError):
        await client.models.delete(tuned)


async def test_chat(door: Door) -> None:
    client = door.client()
    done = await client.chat.completions.create(
        model="tiny", messages=HELLO, temperature=0, logprobs=True, store=True, metadata={"a": "b"}
    )
    choice = done.choices[0]
    assert (choice.message.content, choice.finish_reason) == ("Paris.", "stop")
    assert done.usage is not None and done.usage.total_tokens > done.usage.completion_tokens
    assert done.usage.prompt_tokens_details is not None
    assert done.usage.prompt_tokens_details.cached_tokens == 2
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert bytes(b for item in choice.logprobs.content for b in item.bytes or []) == b"Paris."

    stream = await client.chat.completions.create(
        model=TUNED, messages=HELLO, n=2, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    for index in (0, 1):
        mine = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
        assert "".join(c.delta.content or "" for c in mine) == "Paris."
        assert [c.finish_reason for c in mine if c.finish_reason] == ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert all(chunk.usage is None for chunk in chunks[:-1])

    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    done = await client.chat.completions.create(
        model="tiny", messages=parts, tools=[tool], tool_choice="auto", stop="ris", max_completion_tokens=20
    )
    assert done.choices[0].message.content == "Pa"


async def test_refused_chats_name_the_field(door: Door) -> None:
    create: Any = door.client().chat.completions.create
    base = {"model": "tiny", "messages": HELLO}

    async def refused(**fields: Any) -> openai.BadRequestError:
        with pytest.raises(openai.BadRequestError) as caught:
            await create(**{**base, **fields})
        return caught.value

    assert (await refused(temperature=3)).param == "temperature"
    assert (await refused(temperature="hot")).code == "invalid_type"
    assert (await refused(response_format={"type": "json_object"})).param == "response_format"
    assert (await refused(functions=[{"name": "f"}])).param == "functions"
    assert (await refused(extra_body={"temprature": 1})).code == "unknown_parameter"
    assert (await refused(messages=[{"role": "user"}])).param == "messages[0].content"
    assert (await refused(max_completion_tokens=0)).param == "max_completion_tokens"
    assert (await refused(max_tokens=10_000, stream=True)).code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as caught:
        await create(model="nothing", messages=HELLO, stream=True)
    assert caught.value.code == "model_not_found"


async def test_errors_of_the_door_itself(door: Door) -> None:
    async with httpx.AsyncClient(base_url=door.base) as http:
        answer = await http.get("/v1/nothing")
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "unknown_url"
        assert answer.headers["x-request-id"].startswith("req_")
        answer = await http.put("/v1/models")
        assert answer.status_code == 405 and answer.json()["error"]["type"] == "invalid_request_error"
        assert (await http.get("/v1/models")).json()["error"]["code"] == "invalid_api_key"
        auth = {"authorization": "Bearer sk-alice"}
        # A raw slash is another path; an encoded one is part of the id.
        assert (await http.get("/v1/models/a/b", headers=auth)).json()["error"]["code"] == "unknown_url"
        encoded = await http.get("/v1/models/a%2Fb%3Ac", headers=auth)
        assert encoded.json()["error"]["code"] == "model_not_found" and "a/b:c" in encoded.text
        for body in (b"", b"{", b"[1]", b'{"a": NaN}', b"[" * 100_000):
            answer = await http.post("/v1/chat/completions", content=body, headers=auth)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")
        answer = await http.get("/v1/files?limit=0", headers=auth)
        assert answer.json()["error"]["param"] == "limit"
        answer = await http.get("/v1/files?after=a/b", headers=auth)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "after")
        info = (await http.get("/v1/lathe/info")).json()
        assert info["grpc_port"] > 0 and "files" in info["features"]
        assert [(await http.get(path)).status_code for path in ("/healthz", "/readyz")] == [200, 200]
    count = door.metrics.http_requests.labels("/v1/models/{model}", "GET", "404")
    assert count._value.get() == 1


async def test_a_stream_in_raw_bytes_and_a_client_that_goes_away(door: Door) -> None:
    auth = {"authorization": "Bearer sk-alice"}
    async with httpx.AsyncClient(base_url=door.base, headers=auth, timeout=20) as http:
        body = {"model": "tiny", "messages": HELLO, "stream": True}
        answer = await http.post("/v1/chat/completions", json=body)
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = answer.text.strip().split("\n\n")
        assert events[-1] == "data: [DONE]"
        assert all(json.loads(event.removeprefix("data: "))["id"] for event in events[:-1])

        door.owners.said = "a" * 100
        door.owners.pause_s = 0.05
        async with http.stream("POST", "/v1/chat/completions", json=body) as open_stream:
            await anext(open_stream.aiter_lines())
            assert door.owners.sampling == 1
        await until(lambda: door.owners.sampling == 0)
        assert door.owners.sampled < 100
        plain = asyncio.create_task(http.post("/v1/chat/completions", json={**body, "stream": False}))
        await until(lambda: door.owners.sampling == 1)
        plain.cancel()
        await until(lambda: door.owners.sampling == 0)
