"""/v1/uploads"""

import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import JSONResponse, Response

from lathe.common.errors import NotFound
from lathe.common.names import DATASET, PROJECT
from lathe.common.rpc.principal import Principal
from lathe.gateway.http.answers import seconds
from lathe.gateway.http.conversion import ConversionBody, new_dataset
from lathe.gateway.http.errors import door_words, invalid
from lathe.gateway.http.idempotency import Creates, is_retry
from lathe.gateway.http.multipart import MAX_LIFE_S, MIN_LIFE_S, Event, file_bytes, parts, read_to_data
from lathe.gateway.http.requests import (
    GatewayDep,
    Model,
    PrincipalDep,
    json_digest,
    path_id,
    read_json,
    resource,
    validated,
)
from lathe.gateway.http.uploads_json import FIELDS, file_id_of, upload_json
from lathe.gateway.uploads import MAX_RESUMABLE_BYTES
from lathe.v1 import datasets_pb2 as pb

router = APIRouter()

PATH = "/v1/uploads"


class ExpiresAfter(Model):
    anchor: Literal["created_at"]
    seconds: int = Field(ge=MIN_LIFE_S, le=MAX_LIFE_S)


class UploadBody(ConversionBody):
    """uploads.create. mime_type: OpenAI demands one; here a file is what its bytes are."""

    bytes: int = Field(ge=1, le=MAX_RESUMABLE_BYTES)
    filename: str = Field(min_length=1, max_length=255)
    mime_type: str = Field(min_length=1, max_length=255)
    purpose: str
    expires_after: ExpiresAfter | None = None


class CompleteBody(Model):
    """uploads.complete."""

    part_ids: list[str] = Field(min_length=1)
    md5: str | None = None


@router.post(PATH)
async def create(request: Request, gateway: GatewayDep, principal: PrincipalDep) -> Response:
    """An hour to send the parts and complete it."""
    data = await read_json(request)
    body = validated(UploadBody, data)

    async def work(request_id: str) -> bytes:
        dataset = new_dataset(body.filename, body.purpose, body.file_type, body.columns)
        if body.expires_after is not None:
            life = timedelta(seconds=body.expires_after.seconds)
            dataset.expire_time.FromDatetime(gateway.clock.now() + life)
        wanted = pb.CreateDatasetRequest(
            parent=PROJECT.format(principal.project),
            dataset=dataset,
            request_id=request_id,
            in_parts=pb.PartsAnnouncement(size_bytes=body.bytes),
        )
        datasets = gateway.peers.datasets
        with door_words(FIELDS):
            made = await gateway.peers.call(datasets.CreateDataset, wanted, principal=principal)
            session = await gateway.peers.call(
                datasets.GetUploadSession, pb.GetUploadSessionRequest(name=made.name), principal=principal
            )
        return json.dumps(upload_json(session)).encode()

    creates = Creates(gateway.idempotency, gateway.clock, principal, PATH, is_retry(request.headers))
    return Response(await creates.once(json_digest(data), work), media_type="application/json")


@router.post(PATH + "/{upload_id}/parts")
async def create_part(request: Request, gateway: GatewayDep, principal: PrincipalDep) -> Response:
    """The bytes go to the store as they come. A part that is sent again is another part, and the client names one."""
    upload_id = path_id(request, "upload_id")
    name = _name(principal, upload_id)
    form = parts(request.headers.get("content-type", ""), request.stream())
    await read_to_data(form)
    with _its_words(upload_id):
        part_id = await gateway.datasets.put_part(principal, name, _some(form))
    return JSONResponse(
        {
            "id": part_id,
            "object": "upload.part",
            "created_at": seconds(gateway.clock.now()),
            "upload_id": upload_id,
        }
    )


async def _some(form: AsyncIterator[Event]) -> AsyncGenerator[bytes, None]:
    empty = True
    async for chunk in file_bytes(form):
        empty = False
        yield chunk
    if empty:
        raise invalid("data", "The part is empty.", "EMPTY_PART")


@router.post(PATH + "/{upload_id}/complete")
async def complete(request: Request, gateway: GatewayDep, principal: PrincipalDep) -> Response:
    """Answers at once; the rows and digests are checked while the file is `uploaded`."""
    body = validated(CompleteBody, await read_json(request))
    upload_id = path_id(request, "upload_id")
    wanted = pb.CompleteUploadSessionRequest(
        name=_name(principal, upload_id), part_ids=body.part_ids, md5=body.md5 or ""
    )
    with _its_words(upload_id):
        done = await gateway.peers.call(
            gateway.peers.datasets.CompleteUploadSession, wanted, principal=principal
        )
    return JSONResponse(upload_json(done))


@router.post(PATH + "/{upload_id}/cancel")
async def cancel(request: Request, gateway: GatewayDep, principal: PrincipalDep) -> Response:
    upload_id = path_id(request, "upload_id")
    wanted = pb.CancelUploadSessionRequest(name=_name(principal, upload_id))
    with _its_words(upload_id):
        done = await gateway.peers.call(
            gateway.peers.datasets.CancelUploadSession, wanted, principal=principal
        )
    return JSONResponse(upload_json(done))


def _name(principal: Principal, upload_id: str) -> str:
    """The resource name of the dataset that an upload makes. Raises NotFound."""
    return resource(DATASET, principal.project, file_id_of(upload_id), "upload")


@contextmanager
def _its_words(upload_id: str) -> Iterator[None]:
    """Errors in OpenAI's words."""
    try:
        with door_words(FIELDS):
            yield
    except NotFound as error:
        raise NotFound(f"The upload {upload_id[:100]!r} was not found, or its file was deleted.") from error
