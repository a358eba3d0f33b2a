"""The HTTP application."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lathe.common.errors import LatheError
from lathe.gateway.gateway import Gateway
from lathe.gateway.http import chat, files, fine_tuning, info, models, uploads
from lathe.gateway.http.answers import error_response
from lathe.gateway.http.errors import error_answer, error_body
from lathe.gateway.http.middleware import Door


def create_app(gateway: Gateway) -> FastAPI:
    """OpenAI's API before the gateway's collaborators."""
    app = FastAPI(
        title="Lathe",
        version=gateway.version,
        openapi_url=None,
        redirect_slashes=False,
        exception_handlers={LatheError: _lathe_error, HTTPException: _http_error},
    )
    app.state.gateway = gateway
    app.add_middleware(Door, gateway=gateway)
    for module in (chat, files, uploads, fine_tuning, models, info):
        app.include_router(module.router)
    return app


async def _lathe_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, LatheError)  # the table of handlers says so
    return error_response(error_answer(error))


async def _http_error(request: Request, error: Exception) -> Response:
    """Routing's own answers: no such path, or not with this method."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}"
    if error.status_code == 405:
        body = error_body(
            f"{what}: this path takes other methods.", "invalid_request_error", code="method_not_allowed"
        )
    elif error.status_code == 404:
        body = error_body(f"Unknown request URL: {what}.", "invalid_request_error", code="unknown_url")
    else:
        body = error_body(error.detail, "invalid_request_error")
    return JSONResponse(body, error.status_code, error.headers)
