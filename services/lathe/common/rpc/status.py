"""Errors to gRPC statuses and back: the one table, used by servers, by services and by the public client.

Imports only the standard library, grpc, protobuf and googleapis-common-protos (the client shares it).
"""

from __future__ import annotations

from collections.abc import Iterable

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from lathe.common import errors
from lathe.common.errors import FieldViolation, LatheError, RetryableError

DOMAIN = "lathe"
DETAILS_KEY = "grpc-status-details-bin"

STATUS_CODES: dict[type[LatheError], grpc.StatusCode] = {
    errors.InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Aborted: grpc.StatusCode.ABORTED,
    errors.OutOfRange: grpc.StatusCode.OUT_OF_RANGE,
    errors.ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Cancelled: grpc.StatusCode.CANCELLED,
    errors.Unimplemented: grpc.StatusCode.UNIMPLEMENTED,
    errors.DataLoss: grpc.StatusCode.DATA_LOSS,
    errors.Internal: grpc.StatusCode.INTERNAL,
}
_ERRORS = {code: error for error, code in STATUS_CODES.items()}

# gRPC refuses metadata above 8 KiB by default; the message is in it twice, so long ones are cut.
_MAX_MESSAGE = 1500
_MAX_VIOLATIONS = 20
_RETRY_AFTER_S = 1.0
_NOT_CONNECTED = ("failed to connect to all addresses", "errors resolving")
# What is in gRPC's own words about a connection that was not made -> what it means.
_SIGNS = (
    (
        "CERTIFICATE_VERIFY_FAILED",
        "The server's certificate comes from no authority that this side knows, or is out of date; check the CA file.",
    ),
    (
        "Hostname Verification",
        "The server's certificate is not for the name it was called by; call it by one that it has.",
    ),
    ("Connection refused", "Nothing answers at the address; check it, and that what should be there runs."),
    ("errors resolving", "The address has no such host; check its name."),
    ("WRONG_VERSION_NUMBER", "The server does not speak TLS on this port."),
    (
        "Socket closed",
        "The server closed the connection before it answered: one side speaks TLS and the other does not, or the "
        "server takes no certificate of this side's authority.",
    ),
)

Metadata = tuple[tuple[str, str | bytes], ...]


def status_code(error: LatheError) -> grpc.StatusCode:
    """The gRPC code of an error's class, or of its nearest ancestor in the table; UNKNOWN otherwise."""
    for cls in type(error).__mro__:
        if cls in STATUS_CODES:
            return STATUS_CODES[cls]
    return grpc.StatusCode.UNKNOWN


def to_rpc_status(error: LatheError) -> tuple[grpc.StatusCode, str, Metadata]:
    """(code, details, trailing metadata) for `context.abort`.

    The metadata holds a google.rpc.Status with ErrorInfo, and BadRequest and RetryInfo where they apply.
    """
    code = status_code(error)
    message = _cut(error.message, _MAX_MESSAGE)
    status = status_pb2.Status(code=code.value[0], message=message)
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)
    for key, value in error.metadata.items():
        info.metadata[key] = _cut(value, 500)
    status.details.add().Pack(info)
    if error.violations:
        bad = error_details_pb2.BadRequest()
        for violation in error.violations[:_MAX_VIOLATIONS]:
            bad.field_violations.add(field=violation.field, description=_cut(violation.description, 200))
        status.details.add().Pack(bad)
    wait = _retry_after(error)
    if wait is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(round(wait * 1e9))
        status.details.add().Pack(retry)
    return code, message, ((DETAILS_KEY, status.SerializeToString()),)


def _retry_after(error: LatheError) -> float | None:
    """Seconds. What is away may always be tried again, also where nobody thought of saying when."""
    if not isinstance(error, RetryableError):
        return None
    if error.retry_after is None and isinstance(error, errors.Unavailable):
        return _RETRY_AFTER_S
    return error.retry_after


def from_rpc_error(error: grpc.RpcError) -> LatheError:
    """The LatheError behind a failed call of a synchronous or an aio stub.

    A status without details (the connection failed, the deadline passed) gives the class of its code.
    """
    code, message, metadata = _parts(error)
    message = explain_connection(message)
    reason: str | None = None
    facts: dict[str, str] = {}
    violations: list[FieldViolation] = []
    retry_after: float | None = None
    for detail in _details(metadata):
        info, bad, retry = (
            error_details_pb2.ErrorInfo(),
            error_details_pb2.BadRequest(),
            error_details_pb2.RetryInfo(),
        )
        if detail.Unpack(info):
            reason, facts = info.reason, dict(info.metadata)
        elif detail.Unpack(bad):
            violations = [FieldViolation(item.field, item.description) for item in bad.field_violations]
        elif detail.Unpack(retry):
            retry_after = retry.retry_delay.ToNanoseconds() / 1e9
    cls = _ERRORS.get(code, errors.Internal)
    if issubclass(cls, RetryableError):
        return cls(message, reason=reason, metadata=facts, violations=violations, retry_after=retry_after)
    return cls(message, reason=reason, metadata=facts, violations=violations)


def explain_connection(message: str) -> str:
    """What a connection that was not made means, with gRPC's words after it; else unchanged."""
    if message.startswith(_NOT_CONNECTED):
        for sign, meaning in _SIGNS:
            if sign in message:
                return f"{meaning} ({message})"
    return message


def _parts(error: grpc.RpcError) -> tuple[grpc.StatusCode, str, Iterable[tuple[str, str | bytes]]]:
    # Both kinds of error have these methods, though neither is declared on grpc.RpcError itself.
    if isinstance(error, grpc.aio.AioRpcError):
        return error.code(), error.details() or str(error.code().name), error.trailing_metadata() or ()
    if isinstance(error, grpc.Call):
        code = error.code() or grpc.StatusCode.UNKNOWN
        return code, error.details() or code.name, error.trailing_metadata() or ()
    return grpc.StatusCode.UNKNOWN, str(error), ()


def _details(metadata: Iterable[tuple[str, str | bytes]]) -> Iterable[any_pb2.Any]:
    status = status_pb2.Status()
    for key, value in metadata:
        if key == DETAILS_KEY and isinstance(value, bytes):
            try:
                status.ParseFromString(value)
            except DecodeError:
                # A proxy's own details: the code and the message still say what happened.
                return []
    details: Iterable[any_pb2.Any] = status.details
    return details


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
