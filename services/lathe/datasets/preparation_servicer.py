"""Preparation over gRPC."""

from __future__ import annotations

from lathe.common import names
from lathe.common.errors import InvalidArgument
from lathe.common.rpc.context import ServicerContext
from lathe.common.rpc.principal import require_project, require_role
from lathe.datasets import preparation_protos as messages
from lathe.datasets import protos
from lathe.datasets.preparation import Found, PreparationService
from lathe.v1 import datasets_pb2 as pb
from lathe.v1 import datasets_pb2_grpc as pb_grpc


class PreparationMethods(pb_grpc.DatasetsServiceServicer):
    """The methods of DatasetsService that make, compare and keep rows."""

    def __init__(self, preparation: PreparationService) -> None:
        self._preparation = preparation

    async def PrepareDataset(
        self, request: pb.PrepareDatasetRequest, context: ServicerContext
    ) -> pb.PrepareDatasetResponse:
        project, dataset = _ids(request.name)
        require_role("member")
        operation, rows = messages.operation(request.operation), 0
        if request.dry_run:
            rows, made = await self._preparation.count(project, dataset, operation)
        else:
            made = await self._preparation.prepare(project, dataset, operation, request.request_id)
        return pb.PrepareDatasetResponse(rows=rows, prepared=map(protos.prepared_pb, made))

    async def DiffDatasets(self, request: pb.DiffDatasetsRequest, context: ServicerContext) -> pb.DatasetDiff:
        project, dataset = _ids(request.name)
        _, other = names.DATASET.parse(request.other, field="other")
        require_project(request.other, field="other")
        return messages.difference_pb(await self._preparation.diff(project, dataset, other))

    async def FindRows(self, request: pb.FindRowsRequest, context: ServicerContext) -> pb.FindRowsResponse:
        (project,) = names.PROJECT.parse(request.parent, field="parent")
        require_project(request.parent, field="parent")
        return protos.found_pb(await self._found(project, request))

    async def _found(self, project: str, request: pb.FindRowsRequest) -> Found:
        given = [bool(request.row), request.HasField("line"), bool(request.digest)]
        if given.count(True) != 1:
            raise InvalidArgument("Give one of row, line and digest: what to look for.")
        if request.row:
            return await self._preparation.find_row(project, request.row.encode())
        if request.digest:
            return await self._preparation.find_digest(project, protos.digest(request.digest))
        _, dataset = names.DATASET.parse(request.line.dataset, field="line.dataset")
        require_project(request.line.dataset, field="line.dataset")
        return await self._preparation.find_line(project, dataset, request.line.line)

    async def GetTrainedRows(
        self, request: pb.GetTrainedRowsRequest, context: ServicerContext
    ) -> pb.TrainedRows:
        (project,) = names.PROJECT.parse(request.parent, field="parent")
        require_project(request.parent, field="parent")
        found, audit = await self._preparation.trained_rows(
            project, request.dataset_sha256, request.audit_key
        )
        return protos.trained_rows_pb(found, audit)

    async def FreezeDataset(self, request: pb.FreezeDatasetRequest, context: ServicerContext) -> pb.Dataset:
        project, dataset = _ids(request.name)
        require_role("member")
        return protos.dataset_pb(await self._preparation.freeze(project, dataset, request.frozen_as))

    async def ThawDataset(self, request: pb.ThawDatasetRequest, context: ServicerContext) -> pb.Dataset:
        project, dataset = _ids(request.name)
        require_role("admin")
        return protos.dataset_pb(await self._preparation.thaw(project, dataset))


def _ids(name: str) -> tuple[str, str]:
    project, dataset = names.DATASET.parse(name)
    require_project(name)
    return project, dataset
