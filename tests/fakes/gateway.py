"""What the gateway needs from outside, in memory."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace

from lathe.common.errors import (
    AlreadyExists,
    FailedPrecondition,
    LatheError,
    NotFound,
    Unauthenticated,
)
from lathe.common.names import last_id, project_of
from lathe.common.objectstore.base import ObjectStore
from lathe.common.rpc.principal import Principal
from lathe.gateway.model import (
    BaseModelRef,
    Deployment,
    EngineInfo,
    SampleCall,
    SampleEvent,
    ServedModel,
    StoredUpload,
    UploadTarget,
)
from lathe.text.tokenizer import Tokenizer


@dataclass
class FakeKeys:
    """KeyService. Set `outage` and every call raises it."""

    known: dict[str, Principal]
    outage: LatheError | None = None
    calls: int = 0

    async def authenticate(self, secret: str) -> Principal:
        self.calls += 1
        if self.outage is not None:
            raise self.outage
        if secret not in self.known:
            raise Unauthenticated("unknown or revoked")
        return self.known[secret]


@dataclass
class FakeModels:
    """ModelResolver: (project or "" for all, model id) -> model."""

    known: dict[tuple[str, str], ServedModel]
    calls: int = 0

    async def resolve(self, principal: Principal, model_id: str) -> ServedModel:
        self.calls += 1
        for project in (principal.project, ""):
            found = self.known.get((project, model_id.removeprefix("baseModels/")))
            if found is not None:
                return found
        raise NotFound(f"{model_id} was not found.")


@dataclass
class FakeTokenizers:
    """TokenizerSource with one tokenizer for all."""

    tokenizer: Tokenizer

    async def get(self, base: BaseModelRef) -> Tokenizer:
        return self.tokenizer


@dataclass
class FakeDeployments:
    """DeploymentStore in a dictionary."""

    rows: dict[str, Deployment] = field(default_factory=dict)
    requests: dict[tuple[str, str], str] = field(default_factory=dict)

    async def add(self, deployment: Deployment, request_id: str) -> Deployment:
        made = self.requests.get((project_of(deployment.name), request_id)) if request_id else None
        if made is not None:
            return self.rows[made]
        if deployment.name in self.rows:
            raise AlreadyExists(f"The deployment {last_id(deployment.name)!r} exists already.")
        self.rows[deployment.name] = deployment
        if request_id:
            self.requests[(project_of(deployment.name), request_id)] = deployment.name
        return deployment

    async def get(self, name: str) -> Deployment | None:
        return self.rows.get(name)

    async def list(self, project: str, *, after: str, limit: int) -> Sequence[Deployment]:
        names = sorted(name for name in self.rows if project_of(name) == project and name > after)
        return [self.rows[name] for name in names[:limit]]

    async def update(self, deployment: Deployment, expected_version: int) -> bool:
        current = self.rows.get(deployment.name)
        if current is None or current.version != expected_version:
            return False
        self.rows[deployment.name] = deployment
        return True

    async def delete(self, name: str, expected_version: int | None) -> bool:
        current = self.rows.get(name)
        if current is None or expected_version not in (None, current.version):
            return False
        del self.rows[name]
        self.requests = {key: made for key, made in self.requests.items() if made != name}
        return True


@dataclass
class FakeEngineFeed:
    """EngineFeed: `publish` lists; an error published breaks the stream. `on_ensure` is called with each wish."""

    on_ensure: Callable[[str], None] = lambda base_model: None
    wishes: list[str] = field(default_factory=list)
    watches: int = 0
    _queue: asyncio.Queue[tuple[EngineInfo, ...] | LatheError] = field(default_factory=asyncio.Queue)

    def publish(self, item: Sequence[EngineInfo] | LatheError) -> None:
        self._queue.put_nowait(item if isinstance(item, LatheError) else tuple(item))

    async def watch(self) -> AsyncIterator[tuple[EngineInfo, ...]]:
        self.watches += 1
        while True:
            item = await self._queue.get()
            if isinstance(item, LatheError):
                raise item
            yield item

    async def ensure(self, base_model: str) -> bool:
        self.wishes.append(base_model)
        self.on_ensure(base_model)
        return False


Script = Sequence[SampleEvent | LatheError | asyncio.Event]


@dataclass
class FakeEngines:
    """EngineConnector: each address plays a script of events; an error is raised, an asyncio.Event waited for."""

    scripts: dict[str, Script] = field(default_factory=dict)
    calls: list[tuple[str, SampleCall]] = field(default_factory=list)
    open: int = 0
    kept: set[str] = field(default_factory=set)

    async def sample(self, address: str, call: SampleCall) -> AsyncGenerator[SampleEvent, None]:
        self.calls.append((address, call))
        self.open += 1
        try:
            for step in self.scripts[address]:
                if isinstance(step, LatheError):
                    raise step
                if isinstance(step, asyncio.Event):
                    await step.wait()
                    continue
                await asyncio.sleep(0)
                yield step
        finally:
            self.open -= 1

    async def keep_only(self, addresses: set[str]) -> None:
        self.kept = addresses


@dataclass(frozen=True)
class FakeDataset:
    """What FakeDatasets keeps of a dataset."""

    name: str
    state: str
    staging_key: str
    sha256: str = ""
    size: int = 0


@dataclass
class FakeDatasets:
    """DatasetOwner: commits at once, by joining the parts as the real one does later."""

    store: ObjectStore
    rows: dict[str, FakeDataset] = field(default_factory=dict)
    outages: list[LatheError] = field(default_factory=list)

    def create(self, name: str) -> None:
        self.rows[name] = FakeDataset(name, "uploading", f"staging/{last_id(name)}")

    async def get(self, principal: Principal, name: str) -> FakeDataset:
        row = self.rows.get(name)
        if row is None or project_of(name) != principal.project:
            raise NotFound(f"{name} was not found.")
        return row

    async def target(self, principal: Principal, name: str) -> UploadTarget:
        row = await self.get(principal, name)
        return UploadTarget(row.staging_key, row.state == "uploading")

    async def commit(self, principal: Principal, name: str, upload: StoredUpload) -> FakeDataset:
        row = await self.get(principal, name)
        if self.outages:
            raise self.outages.pop(0)
        parts = [info.key async for info in self.store.list(f"{upload.staging_key}/")]
        data = b"".join([await self.store.get(key) for key in parts or [upload.staging_key]])
        assert hashlib.sha256(data).hexdigest() == upload.sha256 and len(data) == upload.size
        await self.store.put(f"blobs/{upload.sha256}", data)
        self.rows[name] = replace(row, state="ready", sha256=upload.sha256, size=upload.size)
        return self.rows[name]

    async def blob_key(self, principal: Principal, name: str) -> str:
        row = await self.get(principal, name)
        if row.state != "ready":
            raise FailedPrecondition(f"{name} is {row.state}.")
        return f"blobs/{row.sha256}"
