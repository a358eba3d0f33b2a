"""The gateway's own gRPC methods: chat, deployments, and the streams of bytes that end here."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf import empty_pb2

from lathe.common.errors import InvalidArgument, Unauthenticated
from lathe.common.names import BASE_MODEL, DATASET, PROJECT
from lathe.common.rpc.context import ServicerContext
from lathe.common.rpc.principal import Principal, current_caller, require_project
from lathe.gateway.inference import Inference
from lathe.gateway.model_downloads import ModelDownloads
from lathe.gateway.model_uploads import ModelUploads
from lathe.gateway.protos import chat_chunk, chat_completion, chat_request, deployment_pb
from lathe.gateway.service import DeploymentService
from lathe.gateway.uploads import DatasetUploads, UploadChunk
from lathe.v1 import datasets_pb2, deployments_pb2, inference_pb2, inference_pb2_grpc, models_pb2
from lathe.v1.deployments_pb2_grpc import DeploymentsServiceServicer


def caller() -> Principal:
    """The user of the running call."""
    principal = current_caller().principal
    if principal is None:
        raise Unauthenticated("This method acts for a user; the call has no API key.")
    return principal


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """lathe.v1.InferenceService."""

    def __init__(self, inference: Inference) -> None:
        self._inference = inference

    async def CreateChatCompletion(
        self, request: inference_pb2.CreateChatCompletionRequest, context: ServicerContext
    ) -> inference_pb2.ChatCompletion:
        _own_project(request.parent, "parent")
        return chat_completion(await self._inference.chat(caller(), chat_request(request)))

    async def StreamChatCompletion(
        self, request: inference_pb2.StreamChatCompletionRequest, context: ServicerContext
    ) -> AsyncIterator[inference_pb2.ChatCompletionChunk]:
        _own_project(request.completion.parent, "completion.parent")
        chat = chat_request(request.completion)
        async with aclosing(self._inference.stream(caller(), chat, prefix="completion.")) as deltas:
            async for delta in deltas:
                yield chat_chunk(delta)


class DeploymentsServicer(DeploymentsServiceServicer):
    """lathe.v1.DeploymentsService."""

    def __init__(self, service: DeploymentService) -> None:
        self._service = service

    async def CreateDeployment(
        self, request: deployments_pb2.CreateDeploymentRequest, context: ServicerContext
    ) -> deployments_pb2.Deployment:
        _own_project(request.parent, "parent")
        made = await self._service.create(
            caller(), request.deployment_id, request.deployment.model_id, request.request_id
        )
        return deployment_pb(made)

    async def GetDeployment(
        self, request: deployments_pb2.GetDeploymentRequest, context: ServicerContext
    ) -> deployments_pb2.Deployment:
        return deployment_pb(await self._service.get(caller(), request.name))

    async def ListDeployments(
        self, request: deployments_pb2.ListDeploymentsRequest, context: ServicerContext
    ) -> deployments_pb2.ListDeploymentsResponse:
        page, token = await self._service.list(
            caller(), request.parent, request.page_size, request.page_token
        )
        return deployments_pb2.ListDeploymentsResponse(
            deployments=[deployment_pb(item) for item in page], next_page_token=token
        )

    async def UpdateDeployment(
        self, request: deployments_pb2.UpdateDeploymentRequest, context: ServicerContext
    ) -> deployments_pb2.Deployment:
        wanted = request.deployment
        paths = tuple(request.update_mask.paths) or ("model_id",)
        changed = await self._service.update(caller(), wanted.name, wanted.model_id, paths, etag=wanted.etag)
        return deployment_pb(changed)

    async def DeleteDeployment(
        self, request: deployments_pb2.DeleteDeploymentRequest, context: ServicerContext
    ) -> empty_pb2.Empty:
        await self._service.delete(caller(), request.name, request.etag)
        return empty_pb2.Empty()


class DatasetStreams:
    """The methods of lathe.v1.DatasetsService that end in the gateway."""

    def __init__(self, uploads: DatasetUploads[datasets_pb2.Dataset]) -> None:
        self._uploads = uploads

    def handlers(self) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        """Full path -> handler."""
        service = "/lathe.v1.DatasetsService"
        return {
            f"{service}/UploadDataset": grpc.stream_unary_rpc_method_handler(
                self.upload,
                request_deserializer=datasets_pb2.UploadDatasetRequest.FromString,
                response_serializer=datasets_pb2.Dataset.SerializeToString,
            ),
            f"{service}/GetDatasetUpload": grpc.unary_unary_rpc_method_handler(
                self.offset,
                request_deserializer=datasets_pb2.GetDatasetUploadRequest.FromString,
                response_serializer=datasets_pb2.DatasetUpload.SerializeToString,
            ),
            f"{service}/DownloadDataset": grpc.unary_stream_rpc_method_handler(
                self.download,
                request_deserializer=datasets_pb2.DownloadDatasetRequest.FromString,
                response_serializer=datasets_pb2.DownloadDatasetResponse.SerializeToString,
            ),
        }

    async def upload(
        self, requests: AsyncIterator[datasets_pb2.UploadDatasetRequest], context: ServicerContext
    ) -> datasets_pb2.Dataset:
        first = await anext(requests, None)
        if first is None:
            raise InvalidArgument("The stream was empty; its first message must name the dataset.")
        _own_dataset(first.name)

        async def chunks() -> AsyncIterator[UploadChunk]:
            yield _chunk(first)
            async for message in requests:
                yield _chunk(message)

        return await self._uploads.put_resumable(caller(), first.name, chunks())

    async def offset(
        self, request: datasets_pb2.GetDatasetUploadRequest, context: ServicerContext
    ) -> datasets_pb2.DatasetUpload:
        _own_dataset(request.name)
        size = await self._uploads.offset(caller(), request.name)
        return datasets_pb2.DatasetUpload(committed_size=size)

    async def download(
        self, request: datasets_pb2.DownloadDatasetRequest, context: ServicerContext
    ) -> AsyncIterator[datasets_pb2.DownloadDatasetResponse]:
        _own_dataset(request.name)
        chunks = await self._uploads.download(caller(), request.name, offset=request.read_offset)
        async for data in chunks:
            yield datasets_pb2.DownloadDatasetResponse(data=data)


class ModelStreams:
    """The methods of lathe.v1.ModelsService that end in the gateway."""

    def __init__(self, uploads: ModelUploads[models_pb2.ModelFile], downloads: ModelDownloads) -> None:
        self._uploads = uploads
        self._downloads = downloads

    def handlers(self) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        """Full path -> handler."""
        service = "/lathe.v1.ModelsService"
        return {
            f"{service}/UploadModelFile": grpc.stream_unary_rpc_method_handler(
                self.upload,
                request_deserializer=models_pb2.UploadModelFileRequest.FromString,
                response_serializer=models_pb2.UploadModelFileResponse.SerializeToString,
            ),
            f"{service}/GetModelFileUpload": grpc.unary_unary_rpc_method_handler(
                self.offset,
                request_deserializer=models_pb2.GetModelFileUploadRequest.FromString,
                response_serializer=models_pb2.ModelFileUpload.SerializeToString,
            ),
            f"{service}/DownloadModelFile": grpc.unary_stream_rpc_method_handler(
                self.download,
                request_deserializer=models_pb2.DownloadModelFileRequest.FromString,
                response_serializer=models_pb2.DownloadModelFileResponse.SerializeToString,
            ),
        }

    async def upload(
        self, requests: AsyncIterator[models_pb2.UploadModelFileRequest], context: ServicerContext
    ) -> models_pb2.UploadModelFileResponse:
        first = await anext(requests, None)
        if first is None:
            raise InvalidArgument(
                "The stream was empty; its first message must name the base model and path."
            )
        BASE_MODEL.parse(first.base_model, field="base_model")

        async def data() -> AsyncIterator[bytes]:
            yield first.data
            async for message in requests:
                yield message.data

        file = await self._uploads.put_file(
            caller(), first.base_model, first.path, data(), first.write_offset
        )
        return models_pb2.UploadModelFileResponse(file=file)

    async def offset(
        self, request: models_pb2.GetModelFileUploadRequest, context: ServicerContext
    ) -> models_pb2.ModelFileUpload:
        BASE_MODEL.parse(request.base_model, field="base_model")
        size = await self._uploads.offset(caller(), request.base_model, request.path)
        return models_pb2.ModelFileUpload(committed_size=size)

    async def download(
        self, request: models_pb2.DownloadModelFileRequest, context: ServicerContext
    ) -> AsyncIterator[models_pb2.DownloadModelFileResponse]:
        chunks = await self._downloads.download(
            caller(), request.model, request.path, offset=request.read_offset
        )
        async for data in chunks:
            yield models_pb2.DownloadModelFileResponse(data=data)


def _chunk(message: datasets_pb2.UploadDatasetRequest) -> UploadChunk:
    return UploadChunk(message.write_offset, message.data, message.finish_write, message.sha256)


def _own_dataset(name: str) -> None:
    DATASET.parse(name)
    require_project(name)


def _own_project(name: str, field: str) -> None:
    PROJECT.parse(name, field=field)
    require_project(name, field=field)
