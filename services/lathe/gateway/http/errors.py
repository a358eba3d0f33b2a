"""The one table from LatheErrors to OpenAI's error bodies."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lathe.common import errors
from lathe.common.errors import (
    FieldViolation,
    InvalidArgument,
    LatheError,
    NotFound,
    RetryableError,
    Unimplemented,
)
from lathe.common.fieldwords import renamed
from lathe.text.errors import RowError


@dataclass(frozen=True, slots=True)
class Kind:
    """How a class of errors looks to OpenAI's clients. code: where the error has no reason of its own."""

    status: int
    type: str
    code: str | None


# A state conflict is 400: the SDK would repeat a 409 by itself.
KINDS: dict[type[LatheError], Kind] = {
    errors.InvalidArgument: Kind(400, "invalid_request_error", "invalid_value"),
    errors.OutOfRange: Kind(400, "invalid_request_error", "invalid_value"),
    errors.FailedPrecondition: Kind(400, "invalid_request_error", "invalid_state"),
    errors.AlreadyExists: Kind(400, "invalid_request_error", "already_exists"),
    errors.Aborted: Kind(400, "invalid_request_error", "conflict"),
    errors.Unimplemented: Kind(400, "invalid_request_error", "unsupported_parameter"),
    errors.Unauthenticated: Kind(401, "invalid_request_error", "invalid_api_key"),
    errors.PermissionDenied: Kind(403, "permission_error", "insufficient_permissions"),
    errors.NotFound: Kind(404, "invalid_request_error", "not_found"),
    errors.ResourceExhausted: Kind(429, "rate_limit_error", "rate_limit_exceeded"),
    errors.Unavailable: Kind(503, "server_error", "service_unavailable"),
    errors.DeadlineExceeded: Kind(504, "server_error", "timeout"),
    errors.Cancelled: Kind(503, "server_error", "service_unavailable"),
    errors.DataLoss: Kind(500, "server_error", "server_error"),
    errors.Internal: Kind(500, "server_error", "server_error"),
}
_UNKNOWN = Kind(500, "server_error", "server_error")
# These answer with the same code whatever the reason behind it is.
_ONE_CODE = (errors.Unauthenticated, errors.DataLoss)
_HIDDEN = (
    "The server had an error while it processed the request; its log has the details under this request id."
)
# Resource names are gRPC's; a client of this door knows ids.
_RESOURCE = re.compile(r"\bprojects/[a-z0-9-]+/(?:datasets|jobs|adapters|deployments)/(?=[A-Za-z0-9])")


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """What is sent for an error."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str]


def kind_of(error: LatheError) -> Kind:
    """The entry of the error's class, or of its nearest ancestor."""
    for cls in type(error).__mro__:
        if cls in KINDS:
            return KINDS[cls]
    return _UNKNOWN


def error_body(
    message: str, type_: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """`{"error": {…}}`."""
    return {"error": {"message": message, "type": type_, "param": param, "code": code}}


def error_answer(error: LatheError) -> ErrorAnswer:
    """Status, body and headers for an error. Faults of the server itself are not described to the client, but for
    those that have a reason of their own: they were raised for somebody to read."""
    kind = kind_of(error)
    own_reason = error.reason != type(error).default_reason and not isinstance(error, _ONE_CODE)
    code = error.reason.lower() if own_reason else kind.code
    if isinstance(error, RowError):
        code = error.code
    message = _HIDDEN if kind.status == 500 and not own_reason else _RESOURCE.sub("", error.message)
    param = error.violations[0].field if error.violations else None
    headers: dict[str, str] = {}
    if kind.status == 500 and own_reason:
        headers["x-should-retry"] = "false"  # the SDK would repeat it twice, with the same end
    if kind.status in (429, 503):
        wait = error.retry_after if isinstance(error, RetryableError) else None
        headers["retry-after"] = str(max(1, math.ceil(wait if wait is not None else 1.0)))
    return ErrorAnswer(kind.status, error_body(message, kind.type, param=param, code=code), headers)


def invalid(field: str, message: str, reason: str = "INVALID_VALUE") -> InvalidArgument:
    """A 400 about one field; `field` is OpenAI's path."""
    return InvalidArgument(message, reason=reason, violations=[FieldViolation(field, message)])


def unsupported(field: str, message: str) -> Unimplemented:
    """A 400 about a field that OpenAI knows and Lathe does not (yet)."""
    return Unimplemented(message, reason="UNSUPPORTED_PARAMETER", violations=[FieldViolation(field, message)])


@contextmanager
def door_words(renames: Sequence[tuple[str, str]]) -> Iterator[None]:
    """Raise any LatheError inside with gRPC's field paths replaced by OpenAI's, as `renamed` does it."""
    try:
        yield
    except LatheError as error:
        raise renamed(error, renames) from error


@contextmanager
def cursor_errors() -> Iterator[None]:
    """In a list of what a project has, all that can be missing is the item to go on after: a 400 about `after`."""
    try:
        yield
    except NotFound as error:
        raise invalid("after", f"Invalid value for 'after': {error.message}") from error
