"""The gRPC services behind the gateway, all on one server, each as small as it can be."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from lathe.common.errors import InvalidArgument, NotFound, Unauthenticated
from lathe.common.metrics import Metrics
from lathe.common.objectstore.base import ObjectStore
from lathe.common.rpc.auth import ServiceAuthenticator, ServiceCredentials
from lathe.common.rpc.principal import Principal, current_caller, require_project
from lathe.common.rpc.server import Registration, RpcServer, build_server
from lathe.common.settings import RpcSettings
from lathe.text.tokenizer import Tokenizer
from lathe.v1 import (
    accounts_pb2,
    accounts_pb2_grpc,
    datasets_pb2,
    datasets_pb2_grpc,
    engine_pb2,
    engine_pb2_grpc,
    jobs_pb2,
    jobs_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
)

BASE_DIGEST = "d" * 64


@dataclass
class Owners(
    accounts_pb2_grpc.AccountsInternalServiceServicer,
    datasets_pb2_grpc.DatasetsServiceServicer,
    datasets_pb2_grpc.DatasetsInternalServiceServicer,
    models_pb2_grpc.ModelsServiceServicer,
    models_pb2_grpc.ModelsInternalServiceServicer,
    jobs_pb2_grpc.JobsInternalServiceServicer,
    engine_pb2_grpc.EngineServiceServicer,
):
    """accounts, datasets, models, jobs and one engine. `said` is what the engine answers to everything, a token
    every `token_s` seconds."""

    store: ObjectStore
    tokenizer: Tokenizer
    keys: dict[str, Principal]
    files: list[models_pb2.ModelFile] = field(default_factory=list)
    said: str = "Paris."
    token_s: float = 0.0
    datasets: dict[str, datasets_pb2.Dataset] = field(default_factory=dict)
    engine_ready: asyncio.Event = field(default_factory=asyncio.Event)
    wishes: list[str] = field(default_factory=list)
    samples: list[engine_pb2.SampleRequest] = field(default_factory=list)
    address: str = ""

    async def start(self, token: str) -> RpcServer:
        """Serve every service on one free port; stop what is returned."""
        added = (
            (accounts_pb2_grpc.add_AccountsInternalServiceServicer_to_server, "AccountsInternalService"),
            (datasets_pb2_grpc.add_DatasetsServiceServicer_to_server, "DatasetsService"),
            (datasets_pb2_grpc.add_DatasetsInternalServiceServicer_to_server, "DatasetsInternalService"),
            (models_pb2_grpc.add_ModelsServiceServicer_to_server, "ModelsService"),
            (models_pb2_grpc.add_ModelsInternalServiceServicer_to_server, "ModelsInternalService"),
            (jobs_pb2_grpc.add_JobsInternalServiceServicer_to_server, "JobsInternalService"),
            (engine_pb2_grpc.add_EngineServiceServicer_to_server, "EngineService"),
        )
        registrations = [Registration(add, self, f"lathe.v1.{name}") for add, name in added]
        credentials = ServiceAuthenticator(ServiceCredentials.from_tokens({"lathe": token}))
        settings = RpcSettings(port=0, health_port=None, grace_s=0)
        server = build_server(registrations, settings, credentials, Metrics())
        self.address = f"127.0.0.1:{await server.start()}"
        return server

    async def Authenticate(self, request: Any, context: Any) -> accounts_pb2.Caller:
        who = self.keys.get(request.secret)
        if who is None:
            raise Unauthenticated("no such key")
        return accounts_pb2.Caller(
            project=f"projects/{who.project}",
            role=accounts_pb2.Role.Value(f"ROLE_{who.role.upper()}"),
            api_key=f"projects/{who.project}/apiKeys/{who.key_id}",
        )

    async def CreateDataset(self, request: Any, context: Any) -> datasets_pb2.Dataset:
        project = require_project(request.parent)
        name = f"projects/{project}/datasets/file-{len(self.datasets)}"
        self.datasets[name] = datasets_pb2.Dataset(
            name=name,
            display_name=request.dataset.display_name,
            purpose=request.dataset.purpose,
            state=datasets_pb2.DATASET_STATE_UPLOADING,
        )
        return self.datasets[name]

    async def GetDataset(self, request: Any, context: Any) -> datasets_pb2.Dataset:
        require_project(request.name)
        if request.name not in self.datasets:
            raise NotFound(f"{request.name} was not found.")
        return self.datasets[request.name]

    async def GetUpload(self, request: Any, context: Any) -> datasets_pb2.Upload:
        found = await self.GetDataset(request, context)
        key = f"staging/{request.name.rsplit('/', 1)[-1]}"
        return datasets_pb2.Upload(name=request.name, state=found.state, staging_key=key)

    async def CommitUpload(self, request: Any, context: Any) -> datasets_pb2.Dataset:
        found = await self.GetDataset(request, context)
        parts = [info.key async for info in self.store.list(f"{request.staging_key}/")]
        await self.store.compose(parts or [request.staging_key], f"blobs/{request.sha256}")
        stored = await self.store.get(f"blobs/{request.sha256}")
        if (len(stored), hashlib.sha256(stored).hexdigest()) != (request.size_bytes, request.sha256):
            raise InvalidArgument("The stored bytes are others.")
        found.state = datasets_pb2.DATASET_STATE_READY
        found.size_bytes, found.sha256 = request.size_bytes, request.sha256
        return found

    async def GetBaseModel(self, request: Any, context: Any) -> models_pb2.BaseModel:
        return models_pb2.BaseModel(
            name="baseModels/tiny", digest=BASE_DIGEST, context_length=256, files=self.files
        )

    async def CommitModelFile(self, request: Any, context: Any) -> models_pb2.ModelFile:
        file = next(file for file in self.files if file.path == request.path)
        if file.sha256 != request.sha256:
            raise InvalidArgument(f"{request.path} is not the file that was announced.")
        if not file.object_key:
            await self.store.copy(request.staging_key, f"blobs/{request.sha256}")
        await self.store.delete(request.staging_key)
        file.object_key = f"blobs/{request.sha256}"
        return file

    async def ResolveModel(self, request: Any, context: Any) -> models_pb2.ResolvedModel:
        found = models_pb2.ResolvedModel(base_model=await self.GetBaseModel(request, context))
        principal = current_caller().principal
        if principal is not None and request.model_id == f"ft:tiny:{principal.project}::1":
            found.adapter.model_id = request.model_id
            found.adapter.object.CopyFrom(models_pb2.AdapterObject(prefix="jobs/j", manifest_sha256="m"))
        elif request.model_id not in ("tiny", "baseModels/tiny"):
            raise NotFound(f"{request.model_id} was not found.")
        return found

    async def WatchEngines(self, request: Any, context: Any) -> AsyncIterator[jobs_pb2.WatchEnginesResponse]:
        yield jobs_pb2.WatchEnginesResponse()
        await self.engine_ready.wait()
        engine = jobs_pb2.ServingEngine(
            engine_id="eng-1",
            address=self.address,
            base_model="baseModels/tiny",
            base_digest=BASE_DIGEST,
            max_sequences=4,
        )
        yield jobs_pb2.WatchEnginesResponse(engines=[engine])
        await asyncio.Event().wait()

    async def EnsureEngine(self, request: Any, context: Any) -> jobs_pb2.EnsureEngineResponse:
        self.wishes.append(request.base_model)
        self.engine_ready.set()
        return jobs_pb2.EnsureEngineResponse()

    async def Sample(self, request: Any, context: Any) -> AsyncIterator[engine_pb2.SampleResponse]:
        self.samples.append(request)
        ids = [*self.tokenizer.encode(self.said), self.tokenizer.eos_ids[0]]
        yield engine_pb2.SampleResponse(cached_prompt_tokens=2)
        for number, token in enumerate(ids):
            await asyncio.sleep(self.token_s)
            last = number == len(ids) - 1
            yield engine_pb2.SampleResponse(
                tokens=[engine_pb2.SampledToken(token_id=token, logprob=-0.25)],
                finish_reason=engine_pb2.FINISH_REASON_STOP if last else 0,
            )

    def _unused(self, request: Any, context: Any) -> Any:
        raise InvalidArgument("No test of the gateway calls this.")

    GetQuota = UploadDataset = GetDatasetUpload = DownloadDataset = ListDatasets = DeleteDataset = _unused
    EnsureAudit = CreateResultFile = CreateBaseModel = UploadModelFile = GetModelFileUpload = (
        DownloadModelFile
    ) = CommitBaseModel = _unused
    ListBaseModels = DeleteBaseModel = GetAdapter = ListAdapters = DeleteAdapter = _unused
    RegisterAdapter = LoadAdapter = GetEngineStatus = Drain = _unused
