"""/v1/models"""

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from lathe.common.errors import FailedPrecondition
from lathe.common.names import PROJECT, last_id
from lathe.common.rpc.principal import Principal
from lathe.gateway.gateway import Gateway
from lathe.gateway.http.answers import Json, stamp
from lathe.gateway.http.errors import door_words
from lathe.gateway.http.requests import GatewayDep, PrincipalDep, path_id
from lathe.v1 import models_pb2 as pb

router = APIRouter()

BASE_OWNER = "system"
_PAGE = 200


@router.get("/v1/models")
async def list_models(gateway: GatewayDep, principal: PrincipalDep) -> Response:
    """Every base model that can be used, then the project's tuned models; checkpoints are found by their id."""
    data: list[Json] = []
    token = ""
    while True:
        bases = await gateway.peers.call(
            gateway.peers.models.ListBaseModels,
            pb.ListBaseModelsRequest(page_token=token),
            principal=principal,
        )
        data += [base_json(base) for base in bases.base_models if base.state == pb.BASE_MODEL_STATE_READY]
        token = bases.next_page_token
        if not token:
            break
    parent = PROJECT.format(principal.project)
    while True:
        adapters = await gateway.peers.call(
            gateway.peers.models.ListAdapters,
            pb.ListAdaptersRequest(parent=parent, page_size=_PAGE, page_token=token),
            principal=principal,
        )
        data += [adapter_json(adapter) for adapter in adapters.adapters if adapter.is_final]
        token = adapters.next_page_token
        if not token:
            break
    return JSONResponse({"object": "list", "data": data})


@router.get("/v1/models/{model}")
async def retrieve(request: Request, gateway: GatewayDep, principal: PrincipalDep) -> Response:
    found = await _resolve(gateway, principal, path_id(request, "model"))
    body = adapter_json(found.adapter) if found.HasField("adapter") else base_json(found.base_model)
    return JSONResponse(body)


@router.delete("/v1/models/{model}")
async def delete(request: Request, gateway: GatewayDep, principal: PrincipalDep) -> Response:
    """Tuned models only."""
    model = path_id(request, "model")
    found = await _resolve(gateway, principal, model)
    if not found.HasField("adapter"):
        raise FailedPrecondition(
            f"{model} is a base model; only tuned models can be deleted here.", reason="BASE_MODEL"
        )
    await gateway.peers.call(
        gateway.peers.models.DeleteAdapter,
        pb.DeleteAdapterRequest(name=found.adapter.name),
        principal=principal,
    )
    return JSONResponse({"id": model, "object": "model", "deleted": True})


async def _resolve(gateway: Gateway, principal: Principal, model: str) -> pb.ResolvedModel:
    wanted = pb.ResolveModelRequest(project=PROJECT.format(principal.project), model_id=model)
    with door_words((("model_id", "model"),)):
        return await gateway.peers.call(
            gateway.peers.models_internal.ResolveModel, wanted, principal=principal
        )


def base_json(base: pb.BaseModel) -> Json:
    """OpenAI's model; `lathe` says whether and how it can be tuned."""
    return {
        "id": last_id(base.name),
        "object": "model",
        "created": stamp(base, "create_time") or 0,
        "owned_by": BASE_OWNER,
        "lathe": {
            "digest": base.digest,
            "context_length": base.context_length,
            "tunable": base.tunable,
            "methods": list(base.methods),
            "license": base.license or None,
        },
    }


def adapter_json(adapter: pb.Adapter) -> Json:
    """A tuned model, owned by its project."""
    return {
        "id": adapter.model_id,
        "object": "model",
        "created": stamp(adapter, "create_time") or 0,
        "owned_by": adapter.name.split("/")[1],
        "lathe": {
            "base_model": last_id(adapter.base_model),
            "job": last_id(adapter.lineage.job) or None,
            "step": adapter.lineage.step,
            "method": adapter.lineage.method or "supervised",
            "parent_model": adapter.lineage.parent_model_id or None,
        },
    }
