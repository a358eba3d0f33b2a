"""models over gRPC."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime

from google.protobuf.empty_pb2 import Empty

from lathe.common import names
from lathe.common.errors import InvalidArgument, Unimplemented
from lathe.common.pages import coerce_page_size, decode_page_token, encode_page_token
from lathe.common.rpc.context import ServicerContext
from lathe.common.rpc.principal import current_caller, require_operator, require_project, require_role
from lathe.models import protos
from lathe.models.service import ModelsService
from lathe.v1 import models_pb2 as pb
from lathe.v1 import models_pb2_grpc as pb_grpc


class ModelsServicer(pb_grpc.ModelsServiceServicer):
    """The public methods. UploadModelFile, GetModelFileUpload and DownloadModelFile end in the gateway."""

    def __init__(self, service: ModelsService) -> None:
        self._service = service

    async def CreateBaseModel(
        self, request: pb.CreateBaseModelRequest, context: ServicerContext
    ) -> pb.BaseModel:
        _require_operator()
        key = _request_key(request.request_id)
        return protos.base_model_pb(
            await self._service.create_base_model(protos.new_base_model(request), key)
        )

    async def UploadModelFile(
        self, request_iterator: AsyncIterator[pb.UploadModelFileRequest], context: ServicerContext
    ) -> pb.UploadModelFileResponse:
        raise Unimplemented("UploadModelFile ends in the gateway; this service takes no bytes.")

    async def GetModelFileUpload(
        self, request: pb.GetModelFileUploadRequest, context: ServicerContext
    ) -> pb.ModelFileUpload:
        raise Unimplemented("GetModelFileUpload ends in the gateway; this service takes no bytes.")

    async def DownloadModelFile(
        self, request: pb.DownloadModelFileRequest, context: ServicerContext
    ) -> AsyncIterator[pb.DownloadModelFileResponse]:
        raise Unimplemented("DownloadModelFile ends in the gateway; this service sends no bytes.")
        yield

    async def CommitBaseModel(
        self, request: pb.CommitBaseModelRequest, context: ServicerContext
    ) -> pb.BaseModel:
        _require_operator()
        (base_model,) = names.BASE_MODEL.parse(request.name)
        return protos.base_model_pb(await self._service.commit_base_model(base_model))

    async def GetBaseModel(self, request: pb.GetBaseModelRequest, context: ServicerContext) -> pb.BaseModel:
        (base_model,) = names.BASE_MODEL.parse(request.name)
        return protos.base_model_pb(await self._service.get_base_model(base_model))

    async def ListBaseModels(
        self, request: pb.ListBaseModelsRequest, context: ServicerContext
    ) -> pb.ListBaseModelsResponse:
        size = coerce_page_size(request.page_size, maximum=_MAX_BASE_MODELS)
        cursor = decode_page_token(request.page_token)
        found = await self._service.list_base_models(after=str(cursor[0]) if cursor else "", limit=size + 1)
        token = encode_page_token([found[size - 1].id]) if len(found) > size else ""
        page = [protos.base_model_pb(model) for model in found[:size]]
        return pb.ListBaseModelsResponse(base_models=page, next_page_token=token)

    async def DeleteBaseModel(self, request: pb.DeleteBaseModelRequest, context: ServicerContext) -> Empty:
        _require_operator()
        (base_model,) = names.BASE_MODEL.parse(request.name)
        await self._service.delete_base_model(base_model)
        return Empty()

    async def GetAdapter(self, request: pb.GetAdapterRequest, context: ServicerContext) -> pb.Adapter:
        project, adapter = _adapter_ids(request.name)
        return protos.adapter_pb(await self._service.get_adapter(project, adapter))

    async def ListAdapters(
        self, request: pb.ListAdaptersRequest, context: ServicerContext
    ) -> pb.ListAdaptersResponse:
        (project,) = names.PROJECT.parse(request.parent, field="parent")
        require_project(request.parent, field="parent")
        size = coerce_page_size(request.page_size)
        after = _after(decode_page_token(request.page_token, {"parent": project}))
        found = await self._service.list_adapters(project, after=after, limit=size + 1)
        token = ""
        if len(found) > size:
            last = found[size - 1]
            token = encode_page_token([last.create_time.isoformat(), last.id], {"parent": project})
        page = [protos.adapter_pb(adapter) for adapter in found[:size]]
        return pb.ListAdaptersResponse(adapters=page, next_page_token=token)

    async def DeleteAdapter(self, request: pb.DeleteAdapterRequest, context: ServicerContext) -> Empty:
        project, adapter = _adapter_ids(request.name)
        require_role("member")
        await self._service.delete_adapter(project, adapter)
        return Empty()


class ModelsInternalServicer(pb_grpc.ModelsInternalServiceServicer):
    """What the gateway, datasets and jobs call."""

    def __init__(self, service: ModelsService) -> None:
        self._service = service

    async def CommitModelFile(
        self, request: pb.CommitModelFileRequest, context: ServicerContext
    ) -> pb.ModelFile:
        _require_operator()
        (base_model,) = names.BASE_MODEL.parse(request.base_model, field="base_model")
        file = await self._service.commit_file(
            base_model, request.path, request.staging_key, request.size_bytes, request.sha256
        )
        return protos.file_pb(file)

    async def ResolveModel(
        self, request: pb.ResolveModelRequest, context: ServicerContext
    ) -> pb.ResolvedModel:
        project = require_project(request.project, field="project")
        return protos.resolved_pb(await self._service.resolve(project, request.model_id))

    async def RegisterAdapter(
        self, request: pb.RegisterAdapterRequest, context: ServicerContext
    ) -> pb.Adapter:
        project = require_project(request.parent, field="parent")
        given = request.adapter
        (base_model,) = names.BASE_MODEL.parse(given.base_model, field="adapter.base_model")
        adapter = await self._service.register_adapter(
            project,
            given.model_id,
            base_model,
            protos.adapter_object(given.object),
            protos.lineage(given.lineage),
            is_final=given.is_final,
        )
        return protos.adapter_pb(adapter)

    async def SweepJobFiles(self, request: pb.SweepJobFilesRequest, context: ServicerContext) -> Empty:
        _, job = names.JOB.parse(request.job, field="job")
        require_project(request.job, field="job")
        await self._service.sweep_job_files(job, request.kept_prefixes)
        return Empty()


# A base model lists its files and its template: a page must stay below gRPC's 4 MiB.
_MAX_BASE_MODELS = 50


def _require_operator() -> None:
    # Base models belong to no project: one tenant's admin must not change what the others use.
    require_operator(current_caller().principal, "import, change or delete base models")


def _request_key(request_id: str) -> str:
    """Base models belong to no project, request ids do: two projects may use the same one."""
    if not request_id:
        return ""
    if len(request_id) > 128:
        raise InvalidArgument("request_id has more than 128 characters; use a UUID.")
    principal = current_caller().principal
    return f"{principal.project if principal is not None else ''}/{request_id}"


def _adapter_ids(name: str) -> tuple[str, str]:
    project, adapter = names.ADAPTER.parse(name)
    require_project(name)
    return project, adapter


def _after(cursor: tuple[str | int, ...] | None) -> tuple[datetime, str] | None:
    if cursor is None:
        return None
    try:
        time, id_ = cursor
        return datetime.fromisoformat(str(time)), str(id_)
    except ValueError as error:
        raise InvalidArgument("page_token is not one that this service gave out.") from error
