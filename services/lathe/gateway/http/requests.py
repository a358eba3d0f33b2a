"""What comes in: who calls, bodies, ids in paths, paging."""

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar
from urllib.parse import unquote

from fastapi import Depends, Request
from pydantic import BaseModel, ConfigDict, ValidationError

from lathe.common.errors import FieldViolation, InvalidArgument, NotFound
from lathe.common.names import Pattern
from lathe.common.rpc.principal import Principal
from lathe.gateway.gateway import Gateway
from lathe.gateway.http.errors import invalid
from lathe.text.decoding import refuse_constant, unreadable_value

MAX_JSON_BYTES = 16 * 1024 * 1024

_AZURE = re.compile(r"\A/openai/(?:v1/)?(?=(?:files|uploads)(?:/|\Z))")

Body = TypeVar("Body", bound="Model")

_REASONS = {
    "extra_forbidden": "UNKNOWN_PARAMETER",
    "missing": "MISSING_REQUIRED_PARAMETER",
    "string_type": "INVALID_TYPE",
    "int_type": "INVALID_TYPE",
    "float_type": "INVALID_TYPE",
    "bool_type": "INVALID_TYPE",
    "list_type": "INVALID_TYPE",
    "dict_type": "INVALID_TYPE",
    "model_type": "INVALID_TYPE",
}


class Model(BaseModel):
    """A request body: nothing is converted, nothing unknown is ignored."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


def gateway_of(request: Request) -> Gateway:
    """The collaborators that `create_app` was given."""
    gateway: Gateway = request.app.state.gateway
    return gateway


GatewayDep = Annotated[Gateway, Depends(gateway_of)]


async def principal_of(request: Request, gateway: GatewayDep) -> Principal:
    """Whose key came along. Raises Unauthenticated."""
    headers = request.headers
    return await gateway.authenticator.authenticate(headers.get("authorization"), headers.get("api-key"))


PrincipalDep = Annotated[Principal, Depends(principal_of)]


def path_id(request: Request, name: str) -> str:
    """An id in the path, as the client meant it: routing keeps each segment's `/` as `%2F`."""
    return unquote(request.path_params[name])


def routing_path(raw_path: bytes) -> str:
    """The path to route on: percent-encoding undone within each segment, but for `/` and `%` themselves.

    A server's decoded path cannot tell `models/a%2Fb` from `models/a/b`. Azure's paths of files and uploads are
    OpenAI's under another root.
    """
    segments = _AZURE.sub("/v1/", raw_path.decode("latin-1")).split("/")
    return "/".join(unquote(segment).replace("%", "%25").replace("/", "%2F") for segment in segments)


def resource(pattern: Pattern, project: str, id_: str, noun: str) -> str:
    """The resource name of an id from a path. An id that cannot exist is NotFound like any unknown one."""
    try:
        return pattern.format(project, id_)
    except InvalidArgument as error:
        raise NotFound(f"The {noun} {id_[:100]!r} was not found.") from error


async def read_body(request: Request, limit: int = MAX_JSON_BYTES) -> bytes:
    """The whole body. Raises InvalidArgument past `limit` bytes."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise InvalidArgument(
                f"The request's body is larger than {limit} bytes; send less.", reason="REQUEST_TOO_LARGE"
            )
    return bytes(body)


async def read_json(request: Request) -> dict[str, Any]:
    """The JSON object in the body. Raises InvalidArgument."""
    return parse_json(await read_body(request))


def parse_json(body: bytes) -> dict[str, Any]:
    """Strict JSON, an object. Raises InvalidArgument."""
    try:
        value = json.loads(body, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        why = unreadable_value(error)
        raise InvalidArgument(f"The request's body is not JSON: {why}.", reason="INVALID_JSON") from error
    if not isinstance(value, dict):
        raise InvalidArgument("The request's body must be a JSON object.", reason="INVALID_JSON")
    return value


def json_digest(value: object) -> str:
    """SHA-256 of the canonical JSON of a value."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def validated(model: type[Body], data: dict[str, Any]) -> Body:
    """The body as `model`. Raises InvalidArgument with one violation per wrong field, by OpenAI's path."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        violations = [FieldViolation(_path(item["loc"]), _words(item)) for item in found]
        reason = _REASONS.get(found[0]["type"], "INVALID_VALUE")
        message = " ".join(violation.description for violation in violations[:5])
        raise InvalidArgument(message, reason=reason, violations=violations) from error


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def _words(item: Any) -> str:
    path = _path(item["loc"])
    if item["type"] == "extra_forbidden":
        return f"Unknown parameter: '{path}'."
    if item["type"] == "missing":
        return f"Missing required parameter: '{path}'."
    message = str(item["msg"]).removeprefix("Value error, ")
    return f"Invalid value for '{path}': {message[:1].lower()}{message[1:].rstrip('.')}."


@dataclass(frozen=True, slots=True)
class Page:
    """Which part of a list is wanted. after: the id of the last item seen; empty for the beginning."""

    after: str
    limit: int


def page_of(request: Request, *, default: int, maximum: int = 100) -> Page:
    """`after` and `limit` of the query. Raises InvalidArgument for a limit outside 1 to `maximum`."""
    text = request.query_params.get("limit", "") or str(default)
    if not text.isascii() or not text.isdigit() or len(text) > 9 or not 1 <= int(text) <= maximum:
        raise invalid(
            "limit", f"Invalid value for 'limit': {text[:20]!r} is not an integer from 1 to {maximum}."
        )
    return Page(request.query_params.get("after", ""), int(text))


def list_body(data: list[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    """OpenAI's page."""
    return {
        "object": "list",
        "data": data,
        "has_more": has_more,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
    }
