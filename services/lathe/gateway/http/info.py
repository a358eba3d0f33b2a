"""What is served here, and whether it is well."""

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from lathe.gateway.http.requests import GatewayDep

router = APIRouter()

FEATURES = (
    "chat.completions",
    "files",
    "fine_tuning.jobs",
    "fine_tuning.jobs.dpo",
    "fine_tuning.jobs.kto",
    "fine_tuning.jobs.orpo",
    "fine_tuning.jobs.receipt",
    "fine_tuning.jobs.rerun",
    "fine_tuning.jobs.supervised",
    "models",
)


@router.get("/v1/lathe/info")
async def info(gateway: GatewayDep) -> Response:
    """Version, the port of the gRPC door, and what the HTTP door offers. Needs no key."""
    return JSONResponse(
        {
            "object": "lathe.info",
            "version": gateway.version,
            "grpc_port": gateway.grpc_port,
            "features": list(FEATURES),
        }
    )


@router.get("/healthz")
async def healthz() -> Response:
    """The process answers."""
    return JSONResponse({"status": "ok"})


@router.get("/readyz")
async def readyz(gateway: GatewayDep) -> Response:
    """Its database answers too, and it is not about to stop. What other services lack is theirs to report."""
    if gateway.draining():
        return JSONResponse({"status": "draining"}, 503)
    await gateway.idempotency.get("readyz")
    return JSONResponse({"status": "ok"})
