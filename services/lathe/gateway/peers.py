"""The services behind the gateway, over gRPC: stubs for the doors, and adapters for the ports."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import grpc

from lathe.common.errors import FailedPrecondition, Internal, NotFound
from lathe.common.names import PROJECT, last_id
from lathe.common.rpc import channel as rpc
from lathe.common.rpc.principal import Principal
from lathe.gateway.model import (
    AdapterRef,
    AnnouncedFile,
    BaseModelRef,
    EngineInfo,
    PartTarget,
    ServedModel,
    StoredFile,
    StoredUpload,
    UploadTarget,
)
from lathe.v1 import (
    accounts_pb2,
    accounts_pb2_grpc,
    datasets_pb2,
    datasets_pb2_grpc,
    jobs_pb2,
    jobs_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
)

Q = TypeVar("Q")
R = TypeVar("R")

_ROLES = {
    accounts_pb2.ROLE_VIEWER: "viewer",
    accounts_pb2.ROLE_MEMBER: "member",
    accounts_pb2.ROLE_ADMIN: "admin",
}
# Joining the parts of a large upload takes the store a while.
_COMMIT_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class PeerChannels:
    """One channel to each owner; they carry the gateway's credential."""

    accounts: grpc.aio.Channel
    datasets: grpc.aio.Channel
    models: grpc.aio.Channel
    jobs: grpc.aio.Channel

    def by_service(self) -> Mapping[str, grpc.aio.Channel]:
        """Full name of each forwarded service -> channel."""
        return {
            "lathe.v1.AccountsService": self.accounts,
            "lathe.v1.DatasetsService": self.datasets,
            "lathe.v1.ModelsService": self.models,
            "lathe.v1.JobsService": self.jobs,
        }

    def by_name(self) -> Mapping[str, grpc.aio.Channel]:
        """Short name of each owner -> channel."""
        return {
            "accounts": self.accounts,
            "datasets": self.datasets,
            "models": self.models,
            "jobs": self.jobs,
        }

    async def close(self) -> None:
        for channel in (self.accounts, self.datasets, self.models, self.jobs):
            await channel.close()


class Peers:
    """Stubs of every owner. `call` and `stream` add the principal and a deadline and raise LatheErrors."""

    def __init__(self, channels: PeerChannels) -> None:
        self.accounts = accounts_pb2_grpc.AccountsServiceStub(channels.accounts)
        self.accounts_internal = accounts_pb2_grpc.AccountsInternalServiceStub(channels.accounts)
        self.datasets = datasets_pb2_grpc.DatasetsServiceStub(channels.datasets)
        self.datasets_internal = datasets_pb2_grpc.DatasetsInternalServiceStub(channels.datasets)
        self.models = models_pb2_grpc.ModelsServiceStub(channels.models)
        self.models_internal = models_pb2_grpc.ModelsInternalServiceStub(channels.models)
        self.jobs = jobs_pb2_grpc.JobsServiceStub(channels.jobs)
        self.jobs_internal = jobs_pb2_grpc.JobsInternalServiceStub(channels.jobs)

    async def call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Q, R],
        request: Q,
        *,
        principal: Principal | None = None,
        timeout: float = rpc.DEFAULT_TIMEOUT_S,
    ) -> R:
        """One unary call on behalf of `principal`."""
        return await rpc.call(method, request, principal=principal, timeout=timeout)

    def stream(
        self,
        method: grpc.aio.UnaryStreamMultiCallable[Q, R],
        request: Q,
        *,
        principal: Principal | None = None,
        timeout: float | None = None,
    ) -> AsyncIterator[R]:
        """A server stream on behalf of `principal`; closing the iterator cancels it."""
        return rpc.stream(method, request, principal=principal, timeout=timeout)


class AccountsKeys:
    """KeyService on accounts."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers

    async def authenticate(self, secret: str) -> Principal:
        request = accounts_pb2.AuthenticateRequest(secret=secret)
        caller = await self._peers.call(self._peers.accounts_internal.Authenticate, request)
        role = _ROLES.get(caller.role)
        if role is None:
            raise Internal(f"accounts answered with the unknown role {caller.role}.")
        return Principal(last_id(caller.project), role, last_id(caller.api_key))


class PeerModels:
    """ModelResolver and ModelOwner on models."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers

    async def resolve(self, principal: Principal, model_id: str) -> ServedModel:
        request = models_pb2.ResolveModelRequest(project=PROJECT.format(principal.project), model_id=model_id)
        found = await self._peers.call(self._peers.models_internal.ResolveModel, request, principal=principal)
        base = found.base_model
        adapter = None
        if found.HasField("adapter"):
            adapter = AdapterRef(found.adapter.object.prefix, found.adapter.object.manifest_sha256)
        files = tuple(StoredFile(f.path, f.object_key, f.sha256) for f in base.files)
        return ServedModel(BaseModelRef(base.name, base.digest, base.context_length, files), adapter)

    async def announced(self, principal: Principal, base_model: str, path: str) -> AnnouncedFile:
        request = models_pb2.GetBaseModelRequest(name=base_model)
        model = await self._peers.call(self._peers.models.GetBaseModel, request, principal=principal)
        for file in model.files:
            if file.path == path:
                return AnnouncedFile(file.size_bytes, file.sha256, bool(file.object_key))
        raise NotFound(f"{base_model} has no file {path!r}; name it in CreateBaseModel first.")

    async def commit(
        self, principal: Principal, base_model: str, path: str, upload: StoredUpload
    ) -> models_pb2.ModelFile:
        request = models_pb2.CommitModelFileRequest(
            base_model=base_model,
            path=path,
            staging_key=upload.staging_key,
            size_bytes=upload.size,
            sha256=upload.sha256,
        )
        method = self._peers.models_internal.CommitModelFile
        return await self._peers.call(method, request, principal=principal, timeout=_COMMIT_TIMEOUT_S)


class PeerDatasets:
    """DatasetOwner on datasets."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers

    async def get(self, principal: Principal, name: str) -> datasets_pb2.Dataset:
        request = datasets_pb2.GetDatasetRequest(name=name)
        return await self._peers.call(self._peers.datasets.GetDataset, request, principal=principal)

    async def target(self, principal: Principal, name: str) -> UploadTarget:
        request = datasets_pb2.GetUploadRequest(name=name)
        found = await self._peers.call(self._peers.datasets_internal.GetUpload, request, principal=principal)
        uploading = found.state == datasets_pb2.DATASET_STATE_UPLOADING
        return UploadTarget(found.staging_key, uploading, found.in_parts)

    async def open_part(self, principal: Principal, name: str) -> PartTarget:
        request = datasets_pb2.OpenUploadPartRequest(name=name)
        method = self._peers.datasets_internal.OpenUploadPart
        found = await self._peers.call(method, request, principal=principal)
        return PartTarget(found.part_id, found.object_key, found.max_bytes)

    async def commit(self, principal: Principal, name: str, upload: StoredUpload) -> datasets_pb2.Dataset:
        request = datasets_pb2.CommitUploadRequest(
            name=name, staging_key=upload.staging_key, size_bytes=upload.size, sha256=upload.sha256
        )
        method = self._peers.datasets_internal.CommitUpload
        return await self._peers.call(method, request, principal=principal, timeout=_COMMIT_TIMEOUT_S)

    async def blob_key(self, principal: Principal, name: str) -> str:
        dataset = await self.get(principal, name)
        if dataset.state != datasets_pb2.DATASET_STATE_READY:
            state = datasets_pb2.DatasetState.Name(dataset.state).removeprefix("DATASET_STATE_").lower()
            raise FailedPrecondition(
                f"{name} is {state}; its bytes can be read once it is ready.",
                reason="DATASET_NOT_READY",
                metadata={"state": state},
            )
        return f"blobs/{dataset.sha256}"


class JobsEngines:
    """EngineFeed on jobs."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers

    async def watch(self) -> AsyncIterator[tuple[EngineInfo, ...]]:
        request = jobs_pb2.WatchEnginesRequest()
        async for message in self._peers.stream(self._peers.jobs_internal.WatchEngines, request):
            yield tuple(
                EngineInfo(
                    engine_id=engine.engine_id,
                    address=engine.address,
                    base_model=engine.base_model,
                    base_digest=engine.base_digest,
                    max_sequences=engine.max_sequences,
                    active_sequences=engine.active_sequences,
                    draining=engine.draining,
                )
                for engine in message.engines
            )

    async def ensure(self, base_model: str) -> bool:
        request = jobs_pb2.EnsureEngineRequest(base_model=base_model)
        return (await self._peers.call(self._peers.jobs_internal.EnsureEngine, request)).ready
