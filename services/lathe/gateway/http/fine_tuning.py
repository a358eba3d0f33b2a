"""/v1/fine_tuning/jobs"""

import json
from collections.abc import Mapping

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from lathe.common.errors import Unimplemented
from lathe.common.names import JOB, PROJECT
from lathe.gateway.http.errors import cursor_errors, door_words, invalid
from lathe.gateway.http.fine_tuning_body import FIELDS, JobBody, job_fields, job_request
from lathe.gateway.http.fine_tuning_json import checkpoint_json, event_json, job_json
from lathe.gateway.http.idempotency import Creates, is_retry
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
from lathe.v1 import jobs_pb2 as pb

router = APIRouter()

PATH = "/v1/fine_tuning/jobs"
# Auto hyperparameters, the model and the files are looked up before the answer.
_CREATE_TIMEOUT_S = 30.0
# A page must stay below gRPC's 4 MiB, and a job may carry 9 KiB of metadata.
_MAX_JOBS = 100
_MAX_LIMIT = 1000


@router.post(PATH)
async def create(request: Request, gateway: GatewayDep, principal: PrincipalDep) -> Response:
    data = await read_json(request)
    body = validated(JobBody, data)

    async def work(request_id: str) -> bytes:
        wanted = job_request(body, principal.project, request_id)
        with door_words(job_fields(body)):
            job = await gateway.peers.call(
                gateway.peers.jobs.CreateJob, wanted, principal=principal, timeout=_CREATE_TIMEOUT_S
            )
        return json.dumps(job_json(job)).encode()

    creates = Creates(gateway.idempotency, gateway.clock, principal, PATH, is_retry(request.headers))
    return Response(await creates.once(json_digest(data), work), media_type="application/json")


@router.get(PATH)
async def list_jobs(request: Request, gateway: GatewayDep, principal: PrincipalDep) -> Response:
    """Newest first; `metadata[k]=v` filters."""
    page = page_of(request, default=20, maximum=_MAX_JOBS)
    wanted = pb.ListJobsRequest(
        parent=PROJECT.format(principal.project),
        page_size=page.limit,
        metadata=metadata_filter(request.query_params),
        after=page.after,
    )
    with cursor_errors():
        found = await gateway.peers.call(gateway.peers.jobs.ListJobs, wanted, principal=principal)
    return JSONResponse(
        list_body([job_json(job) for job in found.jobs], has_more=bool(found.next_page_token))
    )


def metadata_filter(query: Mapping[str, str]) -> dict[str, str]:
    """The pairs of `metadata[k]=v`. Raises InvalidArgument for a pair without key."""
    found: dict[str, str] = {}
    for name, value in query.items():
        if name.startswith("metadata[") and name.endswith("]"):
            key = name.removeprefix("metadata[").removesuffix("]")
            if not key:
                raise invalid("metadata", "metadata: the key in metadata[key]=value is missing.")
            found[key] = value
    return found


@router.get(PATH + "/{job_id}")
async def retrieve(request: Request, gateway: GatewayDep, principal: PrincipalDep) -> Response:
    name = resource(JOB, principal.project, path_id(request, "job_id"), "job")
    job = await gateway.peers.call(
        gateway.peers.jobs.GetJob, pb.GetJobRequest(name=name), principal=principal
    )
    return JSONResponse(job_json(job))


@router.post(PATH + "/{job_id}/cancel")
async def cancel(request: Request, gateway: GatewayDep, principal: PrincipalDep) -> Response:
    """The body is not read: the SDK says that it is JSON, and sends none."""
    name = resource(JOB, principal.project, path_id(request, "job_id"), "job")
    job = await gateway.peers.call(
        gateway.peers.jobs.CancelJob, pb.CancelJobRequest(name=name), principal=principal
    )
    return JSONResponse(job_json(job))


@router.get(PATH + "/{job_id}/receipt")
async def receipt(request: Request, gateway: GatewayDep, principal: PrincipalDep) -> Response:
    """Lathe's own: what the job was made from and computed with, as it was written."""
    name = resource(JOB, principal.project, path_id(request, "job_id"), "job")
    found = await gateway.peers.call(
        gateway.peers.jobs.GetJobReceipt, pb.GetJobReceiptRequest(name=name), principal=principal
    )
    return Response(found.document, media_type="application/json")


@router.post(PATH + "/{job_id}/rerun")
async def rerun(request: Request, gateway: GatewayDep, principal: PrincipalDep) -> Response:
    """Lathe's own: a new job from the receipt of this one. The body is not read."""
    name = resource(JOB, principal.project, path_id(request, "job_id"), "job")

    async def work(request_id: str) -> bytes:
        wanted = pb.RerunJobRequest(name=name, request_id=request_id)
        with door_words(FIELDS):
            job = await gateway.peers.call(
                gateway.peers.jobs.RerunJob, wanted, principal=principal, timeout=_CREATE_TIMEOUT_S
            )
        return json.dumps(job_json(job)).encode()

    path = f"{PATH}/{{job_id}}/rerun"
    creates = Creates(gateway.idempotency, gateway.clock, principal, path, is_retry(request.headers))
    return Response(await creates.once(json_digest(name), work), media_type="application/json")


@router.post(PATH + "/{job_id}/pause")
async def pause(request: Request, principal: PrincipalDep) -> Response:
    raise Unimplemented("Pausing a job is not supported yet.", reason="NOT_IMPLEMENTED")


@router.post(PATH + "/{job_id}/resume")
async def resume(request: Request, principal: PrincipalDep) -> Response:
    raise Unimplemented("Resuming a job is not supported yet.", reason="NOT_IMPLEMENTED")


@router.get(PATH + "/{job_id}/events")
async def events(request: Request, gateway: GatewayDep, principal: PrincipalDep) -> Response:
    """Newest first."""
    page = page_of(request, default=20, maximum=_MAX_LIMIT)
    name = resource(JOB, principal.project, path_id(request, "job_id"), "job")
    wanted = pb.ListJobEventsRequest(parent=name, page_size=page.limit, after=page.after)
    found = await gateway.peers.call(gateway.peers.jobs.ListJobEvents, wanted, principal=principal)
    shown = [event_json(event) for event in found.events]
    return JSONResponse(list_body(shown, has_more=bool(found.next_page_token)))


@router.get(PATH + "/{job_id}/checkpoints")
async def checkpoints(request: Request, gateway: GatewayDep, principal: PrincipalDep) -> Response:
    """Newest first."""
    page = page_of(request, default=10, maximum=_MAX_LIMIT)
    name = resource(JOB, principal.project, path_id(request, "job_id"), "job")
    wanted = pb.ListJobCheckpointsRequest(parent=name, page_size=page.limit, after=page.after)
    found = await gateway.peers.call(gateway.peers.jobs.ListJobCheckpoints, wanted, principal=principal)
    shown = [checkpoint_json(checkpoint) for checkpoint in found.checkpoints]
    return JSONResponse(list_body(shown, has_more=bool(found.next_page_token)))
