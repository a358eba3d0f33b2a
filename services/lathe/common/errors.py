"""The one error hierarchy of Lathe.

Services raise only these classes. `rpc/status.py` turns them into gRPC statuses, the gateway into OpenAI and
Azure error bodies. Only the standard library is imported here, because the public client shares this module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field of a request that is wrong: its path (`hyperparameters.n_epochs`) and what to do about it."""

    field: str
    description: str


class LatheError(Exception):
    """Base of every error that crosses a service's boundary.

    message: a sentence for the person who called; it names the field or line and says what to do.
    reason: UPPER_SNAKE code that programs may compare; each class has a default.
    metadata: more facts for programs, as strings (google.rpc.ErrorInfo.metadata).
    """

    default_reason: ClassVar[str] = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[FieldViolation] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason if reason is not None else self.default_reason
        self.metadata: dict[str, str] = dict(metadata or {})
        self.violations: tuple[FieldViolation, ...] = tuple(violations)

    def __str__(self) -> str:
        return self.message

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.message!r}, reason={self.reason!r})"


class RetryableError(LatheError):
    """An error after which the same call may succeed; `retry_after` is the advised wait in seconds."""

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[FieldViolation] = (),
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message, reason=reason, metadata=metadata, violations=violations)
        self.retry_after = retry_after


class InvalidArgument(LatheError):
    """The request is wrong whatever the state of the system."""

    default_reason = "INVALID_ARGUMENT"


class Unauthenticated(LatheError):
    """The caller did not prove who it is."""

    default_reason = "UNAUTHENTICATED"


class PermissionDenied(LatheError):
    """The caller's role inside its own project is too low."""

    default_reason = "PERMISSION_DENIED"


class NotFound(LatheError):
    """The resource does not exist, or is another project's: the answer is the same."""

    default_reason = "NOT_FOUND"


class AlreadyExists(LatheError):
    """The resource to create exists."""

    default_reason = "ALREADY_EXISTS"


class FailedPrecondition(LatheError):
    """The system is not in a state in which the call can be carried out."""

    default_reason = "FAILED_PRECONDITION"


class Aborted(LatheError):
    """A concurrent change won: a stale etag or a stale lease token."""

    default_reason = "ABORTED"


class OutOfRange(LatheError):
    """An offset or position lies past the end."""

    default_reason = "OUT_OF_RANGE"


class ResourceExhausted(RetryableError):
    """A quota or limit is used up."""

    default_reason = "RESOURCE_EXHAUSTED"


class Unavailable(RetryableError):
    """Something needed (database, store, another service) is away; calling again later may succeed."""

    default_reason = "UNAVAILABLE"


class DeadlineExceeded(LatheError):
    """The caller's deadline passed first; the call may or may not have taken effect."""

    default_reason = "DEADLINE_EXCEEDED"


class Cancelled(LatheError):
    """The caller cancelled the call."""

    default_reason = "CANCELLED"


class Unimplemented(LatheError):
    """Lathe does not offer this (yet); the message names the method or field."""

    default_reason = "UNIMPLEMENTED"


class DataLoss(LatheError):
    """Stored bytes do not match their digest, or are gone."""

    default_reason = "DATA_LOSS"


class Internal(LatheError):
    """A fault of Lathe itself."""

    default_reason = "INTERNAL"
