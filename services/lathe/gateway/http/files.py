"""/v1/files"""

import asyncio
import base64
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import asdict, dataclass
from datetime import timedelta

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import JSONResponse, Response, StreamingResponse

from lathe.common.errors import Aborted, LatheError, NotFound
from lathe.common.names import DATASET, PROJECT
from lathe.common.rpc.principal import Principal
from lathe.gateway.gateway import Gateway
from lathe.gateway.http.conversion import ConversionBody, new_dataset
from lathe.gateway.http.errors import cursor_errors, door_words, invalid
from lathe.gateway.http.files_json import FIELDS, RESULTS_PURPOSE, disposition, file_json
from lathe.gateway.http.idempotency import Begun, Creates, is_retry
from lathe.gateway.http.multipart import Event, FileForm, file_bytes, parts, read_head
from lathe.gateway.http.requests import (
    GatewayDep,
    PrincipalDep,
    json_digest,
    list_body,
    page_of,
    path_id,
    read_json,
    resource,
    validated,
)
from lathe.v1 import datasets_pb2 as pb

log = logging.getLogger(__name__)
router = APIRouter()

# As many as datasets gives at once at most.
_PAGE = 100
# Handing a large file over takes the store a while; a retry waits for it that long.
_COMMIT_WAIT_S = 130.0


@router.post("/v1/files")
async def create(request: Request, gateway: GatewayDep, principal: PrincipalDep) -> Response:
    """The bytes go to the store as they come. Answers with `uploaded` while the rows are validated."""
    form = parts(request.headers.get("content-type", ""), request.stream())
    head = await read_head(form)
    creates = Creates(gateway.idempotency, gateway.clock, principal, "/v1/files", is_retry(request.headers))
    body = await _upload(gateway, principal, head, _Incoming(form, head, creates))
    return Response(body, media_type="application/json")


@dataclass(slots=True)
class _Incoming:
    """A file on its way in. Its digest is known when it is stored, which is before it is committed: there a retry finds
    the earlier try and stops."""

    form: AsyncIterator[Event]
    head: FileForm
    creates: Creates
    begun: Begun | None = None

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        empty = True
        async for chunk in file_bytes(self.form):
            empty = False
            yield chunk
        if empty:
            raise invalid("file", "The file is empty.", "EMPTY_FILE")

    async def begin(self, sha256: str) -> None:
        """Raises Aborted when an earlier try stored the same file."""
        digest = json_digest({**asdict(self.head), "sha256": sha256})
        self.begun = await self.creates.begin(digest, _COMMIT_WAIT_S)
        if self.begun.body is not None:
            raise Aborted("An earlier try of this upload has stored the file.", reason="JOINED")


async def _upload(gateway: Gateway, principal: Principal, head: FileForm, incoming: _Incoming) -> bytes:
    dataset = new_dataset(head.filename, head.purpose, head.file_type, head.columns)
    if head.expires_after_s is not None:
        dataset.expire_time.FromDatetime(gateway.clock.now() + timedelta(seconds=head.expires_after_s))
    wanted = pb.CreateDatasetRequest(parent=PROJECT.format(principal.project), dataset=dataset)
    with door_words(FIELDS):
        made = await gateway.peers.call(gateway.peers.datasets.CreateDataset, wanted, principal=principal)
    try:
        with door_words(FIELDS):
            stored = await gateway.datasets.put_dataset(
                principal, made.name, incoming.chunks(), before_commit=incoming.begin
            )
    except BaseException as error:
        await asyncio.shield(_forget(gateway, principal, made.name))
        begun = incoming.begun
        if begun is not None and begun.body is not None:
            return begun.body
        if begun is not None and isinstance(error, LatheError):
            await incoming.creates.failed(begun, error)
        raise
    body = json.dumps(file_json(stored)).encode()
    if incoming.begun is not None:
        await incoming.creates.done(incoming.begun, body)
    return body


class ImportBody(ConversionBody):
    """Azure's files/import."""

    purpose: str
    filename: str = Field(min_length=1, max_length=255)
    content_url: str = Field(min_length=1)


@router.post("/v1/files/import", status_code=201)
async def import_file(request: Request, gateway: GatewayDep, principal: PrincipalDep) -> Response:
    """Azure's: the platform fetches the file. The answer says `pending` until it is here."""
    data = await read_json(request)
    body = validated(ImportBody, data)

    async def work(request_id: str) -> bytes:
        wanted = pb.ImportDatasetRequest(
            parent=PROJECT.format(principal.project),
            dataset=new_dataset(body.filename, body.purpose, body.file_type, body.columns),
            source=body.content_url,
            request_id=request_id,
        )
        with door_words((("source", "content_url"), ("dataset.display_name", "filename"), *FIELDS)):
            made = await gateway.peers.call(gateway.peers.datasets.ImportDataset, wanted, principal=principal)
        return json.dumps(file_json(made)).encode()

    creates = Creates(
        gateway.idempotency, gateway.clock, principal, "/v1/files/import", is_retry(request.headers)
    )
    answer = await creates.once(json_digest(data), work)
    here = f"{str(request.base_url).rstrip('/')}/openai/files/{json.loads(answer)['id']}"
    headers = {"location": here, "operation-location": here}
    return Response(answer, 201, headers, media_type="application/json")


async def _forget(gateway: Gateway, principal: Principal, name: str) -> None:
    """Remove a dataset that got no bytes; when its owner is away it sweeps it by itself, later."""
    try:
        await gateway.peers.call(
            gateway.peers.datasets.DeleteDataset, pb.DeleteDatasetRequest(name=name), principal=principal
        )
    except LatheError as error:
        log.warning("The broken-off upload %s could not be removed: %s", name, error)


@router.get("/v1/files")
async def list_files(request: Request, gateway: GatewayDep, principal: PrincipalDep) -> Response:
    """Newest first unless order=asc. What is still on its way in is no file yet."""
    page = page_of(request, default=10_000, maximum=10_000)
    order = request.query_params.get("order", "desc")
    if order not in ("asc", "desc"):
        raise invalid("order", f"Invalid value for 'order': {order[:20]!r} is neither 'asc' nor 'desc'.")
    found: list[pb.Dataset] = []
    with cursor_errors():
        after = resource(DATASET, principal.project, page.after, "file") if page.after else ""
    while len(found) <= page.limit:
        wanted = pb.ListDatasetsRequest(
            parent=PROJECT.format(principal.project),
            page_size=min(_PAGE, page.limit + 1),
            purpose=request.query_params.get("purpose", ""),
            ascending=order == "asc",
            after=after,
        )
        with door_words(FIELDS), cursor_errors():
            answer = await gateway.peers.call(
                gateway.peers.datasets.ListDatasets, wanted, principal=principal
            )
        found += [item for item in answer.datasets if _is_file(item)]
        if not answer.next_page_token or not answer.datasets:
            break
        after = answer.datasets[-1].name
    shown = [file_json(item) for item in found[: page.limit]]
    return JSONResponse(list_body(shown, has_more=len(found) > page.limit))


def _is_file(dataset: pb.Dataset) -> bool:
    if dataset.state == pb.DATASET_STATE_UPLOADING:
        return bool(dataset.source)  # the platform fetches it by itself
    return dataset.state != pb.DATASET_STATE_DELETING


@router.get("/v1/files/{file_id}")
async def retrieve(request: Request, gateway: GatewayDep, principal: PrincipalDep) -> Response:
    dataset = await _existing(gateway, principal, path_id(request, "file_id"))
    return JSONResponse(file_json(dataset))


@router.get("/v1/files/{file_id}/content")
async def content(request: Request, gateway: GatewayDep, principal: PrincipalDep) -> Response:
    """The bytes as they were uploaded; a result file's in base64, as OpenAI's clients expect it."""
    dataset = await _existing(gateway, principal, path_id(request, "file_id"))
    chunks = await gateway.datasets.download(principal, dataset.name)
    size = dataset.size_bytes
    if dataset.purpose == RESULTS_PURPOSE:
        chunks, size = base64_of(chunks), (size + 2) // 3 * 4
    headers = {"content-length": str(size), "content-disposition": disposition(dataset.display_name)}
    return StreamingResponse(chunks, headers=headers, media_type="application/octet-stream")


async def base64_of(chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """The stream's base64, without line breaks."""
    held = b""
    async for chunk in chunks:
        held += chunk
        whole = len(held) // 3 * 3
        yield base64.b64encode(held[:whole])
        held = held[whole:]
    if held:
        yield base64.b64encode(held)


@router.delete("/v1/files/{file_id}")
async def delete(request: Request, gateway: GatewayDep, principal: PrincipalDep) -> Response:
    file_id = path_id(request, "file_id")
    name = resource(DATASET, principal.project, file_id, "file")
    await gateway.peers.call(
        gateway.peers.datasets.DeleteDataset, pb.DeleteDatasetRequest(name=name), principal=principal
    )
    return JSONResponse({"id": file_id, "object": "file", "deleted": True})


async def _existing(gateway: Gateway, principal: Principal, file_id: str) -> pb.Dataset:
    name = resource(DATASET, principal.project, file_id, "file")
    found = await gateway.peers.call(
        gateway.peers.datasets.GetDataset, pb.GetDatasetRequest(name=name), principal=principal
    )
    if not _is_file(found):
        raise NotFound(f"The file {file_id} was not found.")
    return found
