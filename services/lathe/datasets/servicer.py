"""datasets over gRPC."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime

from google.protobuf.empty_pb2 import Empty

from lathe.common import names
from lathe.common.errors import InvalidArgument, Unimplemented
from lathe.common.pages import coerce_page_size, decode_page_token, encode_page_token
from lathe.common.rpc.context import ServicerContext
from lathe.common.rpc.principal import require_project, require_role
from lathe.datasets import protos
from lathe.datasets.importing import Importing
from lathe.datasets.preparation import PreparationService
from lathe.datasets.preparation_servicer import PreparationMethods
from lathe.datasets.preview import Previews
from lathe.datasets.service import DatasetsService
from lathe.datasets.sources import check_source, shown_source
from lathe.datasets.upload_service import UploadService
from lathe.v1 import datasets_pb2 as pb
from lathe.v1 import datasets_pb2_grpc as pb_grpc

_MAX_PAGE = 100


class DatasetsServicer(PreparationMethods):
    """The public methods. The streams of bytes end in the gateway."""

    def __init__(
        self,
        service: DatasetsService,
        uploads: UploadService,
        imports: Importing,
        preparation: PreparationService,
        previews: Previews,
    ) -> None:
        super().__init__(preparation)
        self._service = service
        self._previews = previews
        self._uploads = uploads
        self._imports = imports

    async def CreateDataset(self, request: pb.CreateDatasetRequest, context: ServicerContext) -> pb.Dataset:
        (project,) = names.PROJECT.parse(request.parent, field="parent")
        require_project(request.parent, field="parent")
        require_role("member")
        new, in_parts = request.dataset, request.HasField("in_parts")
        announced = (request.in_parts.size_bytes, request.in_parts.sha256)
        if in_parts:
            await self._uploads.check(*announced, presigned=request.in_parts.presigned)
        dataset = await self._service.create(
            project,
            new.display_name,
            new.purpose,
            protos.expire_time(new),
            request.request_id,
            import_options=protos.import_options(new),
        )
        if in_parts:
            await self._uploads.open(dataset, *announced, presigned=request.in_parts.presigned)
        return protos.dataset_pb(dataset)

    async def ImportDataset(self, request: pb.ImportDatasetRequest, context: ServicerContext) -> pb.Dataset:
        (project,) = names.PROJECT.parse(request.parent, field="parent")
        require_project(request.parent, field="parent")
        require_role("member")
        self._imports.check_offered()
        new, name = request.dataset, check_source(request.source)
        dataset = await self._service.create(
            project,
            new.display_name or name,
            new.purpose or "fine-tune",
            protos.expire_time(new),
            request.request_id,
            import_options=protos.import_options(new, name),
            source=shown_source(request.source),
            original_name=name,
        )
        await self._imports.begin(dataset, request.source)
        return protos.dataset_pb(dataset)

    async def UploadDataset(
        self, request_iterator: AsyncIterator[pb.UploadDatasetRequest], context: ServicerContext
    ) -> pb.Dataset:
        raise _ends_in_gateway("UploadDataset")

    async def GetDatasetUpload(
        self, request: pb.GetDatasetUploadRequest, context: ServicerContext
    ) -> pb.DatasetUpload:
        raise _ends_in_gateway("GetDatasetUpload")

    async def DownloadDataset(
        self, request: pb.DownloadDatasetRequest, context: ServicerContext
    ) -> AsyncIterator[pb.DownloadDatasetResponse]:
        raise _ends_in_gateway("DownloadDataset")
        yield

    async def GetDataset(self, request: pb.GetDatasetRequest, context: ServicerContext) -> pb.Dataset:
        project, dataset = _ids(request.name)
        return protos.dataset_pb(await self._service.get(project, dataset))

    async def ListDatasets(
        self, request: pb.ListDatasetsRequest, context: ServicerContext
    ) -> pb.ListDatasetsResponse:
        (project,) = names.PROJECT.parse(request.parent, field="parent")
        require_project(request.parent, field="parent")
        size = coerce_page_size(request.page_size, maximum=_MAX_PAGE)
        query = {"parent": project, "purpose": request.purpose, "ascending": request.ascending}
        found = await self._service.page(
            project,
            purpose=request.purpose,
            after=await self._position(request, query),
            ascending=request.ascending,
            limit=size + 1,
        )
        page, token = protos.page_pb(found[:size]), ""
        if len(page) < len(found):
            last = found[len(page) - 1]
            token = encode_page_token([last.create_time.isoformat(), last.id], query)
        return pb.ListDatasetsResponse(datasets=page, next_page_token=token)

    async def _position(
        self, request: pb.ListDatasetsRequest, query: dict[str, object]
    ) -> tuple[datetime, str] | None:
        """Where the page begins: after a page_token's place, or after the dataset that `after` names."""
        if not request.after:
            return _cursor(decode_page_token(request.page_token, query))
        if request.page_token:
            raise InvalidArgument("after and page_token were both given; a page begins in one place.")
        project, dataset = names.DATASET.parse(request.after, field="after")
        require_project(request.after, field="after")
        found = await self._service.get(project, dataset)
        return found.create_time, found.id

    async def AuditDataset(self, request: pb.AuditDatasetRequest, context: ServicerContext) -> pb.Audit:
        project, dataset = _ids(request.name)
        require_role("member")
        audit = await self._service.ensure_audit(
            project,
            dataset,
            request.model,
            protos.audit_options(request.options),
            held_out=True,
            validation=_validation(project, request.validation_dataset),
        )
        return protos.public_audit_pb(audit)

    async def PreviewDataset(
        self, request: pb.PreviewDatasetRequest, context: ServicerContext
    ) -> pb.PreviewDatasetResponse:
        project, dataset = _ids(request.name)
        require_role("member")
        options = protos.audit_options(request.options)
        found = await self._previews.preview(project, dataset, request.model, options, request.lines)
        return protos.preview_pb(*found)

    async def DeleteDataset(self, request: pb.DeleteDatasetRequest, context: ServicerContext) -> Empty:
        project, dataset = _ids(request.name)
        require_role("member")
        await self._service.delete(project, dataset)
        return Empty()

    async def GetUploadSession(
        self, request: pb.GetUploadSessionRequest, context: ServicerContext
    ) -> pb.UploadSession:
        return protos.session_pb(*await self._uploads.get(*_ids(request.name)))

    async def SignUploadParts(
        self, request: pb.SignUploadPartsRequest, context: ServicerContext
    ) -> pb.SignUploadPartsResponse:
        project, dataset = _ids(request.name)
        require_role("member")
        return protos.signed_pb(await self._uploads.sign(project, dataset))

    async def CompleteUploadSession(
        self, request: pb.CompleteUploadSessionRequest, context: ServicerContext
    ) -> pb.UploadSession:
        project, dataset = _ids(request.name)
        require_role("member")
        done = await self._uploads.complete(project, dataset, request.part_ids, request.md5, request.sha256)
        return protos.session_pb(*done)

    async def CancelUploadSession(
        self, request: pb.CancelUploadSessionRequest, context: ServicerContext
    ) -> pb.UploadSession:
        project, dataset = _ids(request.name)
        require_role("member")
        return protos.session_pb(await self._uploads.cancel(project, dataset))


class DatasetsInternalServicer(pb_grpc.DatasetsInternalServiceServicer):
    """What the gateway and jobs call."""

    def __init__(self, service: DatasetsService, uploads: UploadService) -> None:
        self._service = service
        self._uploads = uploads

    async def GetUpload(self, request: pb.GetUploadRequest, context: ServicerContext) -> pb.Upload:
        dataset = await self._service.get(*_ids(request.name))
        in_parts = bool(dataset.source) or await self._uploads.is_in_parts(dataset)
        return protos.upload_pb(dataset, in_parts=in_parts)

    async def OpenUploadPart(
        self, request: pb.OpenUploadPartRequest, context: ServicerContext
    ) -> pb.UploadPartTarget:
        project, dataset = _ids(request.name)
        require_role("member")
        return protos.part_target_pb(await self._uploads.open_part(project, dataset))

    async def CommitUpload(self, request: pb.CommitUploadRequest, context: ServicerContext) -> pb.Dataset:
        project, dataset = _ids(request.name)
        require_role("member")
        committed = await self._service.commit_upload(
            project, dataset, request.staging_key, request.size_bytes, request.sha256
        )
        return protos.dataset_pb(committed)

    async def EnsureAudit(self, request: pb.EnsureAuditRequest, context: ServicerContext) -> pb.Audit:
        project, dataset = names.DATASET.parse(request.dataset, field="dataset")
        require_project(request.dataset, field="dataset")
        names.BASE_MODEL.parse(request.base_model, field="base_model")
        audit = await self._service.ensure_audit(
            project,
            dataset,
            request.base_model,
            protos.audit_options(request.options),
            held_out=request.held_out,
            validation=_validation(project, request.validation_dataset),
        )
        return protos.audit_pb(audit)

    async def KeepTokens(
        self, request: pb.KeepTokensRequest, context: ServicerContext
    ) -> pb.KeepTokensResponse:
        await self._service.keep_tokens(request.sha256)
        return pb.KeepTokensResponse()

    async def CreateResultFile(
        self, request: pb.CreateResultFileRequest, context: ServicerContext
    ) -> pb.Dataset:
        (project,) = names.PROJECT.parse(request.parent, field="parent")
        require_project(request.parent, field="parent")
        dataset = await self._service.create_result_file(
            project, request.display_name, request.content, request.request_id
        )
        return protos.dataset_pb(dataset)


def _ids(name: str) -> tuple[str, str]:
    project, dataset = names.DATASET.parse(name)
    require_project(name)
    return project, dataset


def _validation(project: str, name: str) -> str:
    """The id of a validation file; empty for none."""
    if not name:
        return ""
    _, dataset = names.DATASET.parse(name, field="validation_dataset")
    require_project(name, field="validation_dataset")
    return dataset


def _cursor(cursor: tuple[str | int, ...] | None) -> tuple[datetime, str] | None:
    if cursor is None:
        return None
    try:
        time, id_ = cursor
        return datetime.fromisoformat(str(time)), str(id_)
    except ValueError as error:
        raise InvalidArgument("page_token is not one that this service gave out.") from error


def _ends_in_gateway(method: str) -> Unimplemented:
    return Unimplemented(f"{method} ends in the gateway; this service takes and gives no bytes.")
