"""What an exit code means; the same for every command."""

from __future__ import annotations

from lathe.common import errors
from lathe.common.errors import LatheError

OK = 0
FAILED = 1
USAGE = 2
INVALID = 3
UNAVAILABLE = 4
AUTH = 5
INTERRUPTED = 130

MEANING = (
    "Exit codes: 0 done; 1 failed (so did the job, the platform could not start, or doctor found what does not work); "
    "2 wrong usage; "
    "3 not found, or refused as invalid; 4 the platform cannot be reached; 5 the key is wrong or may not do this; "
    "130 ended by Ctrl-C."
)

_CODES: dict[type[LatheError], int] = {
    errors.InvalidArgument: INVALID,
    errors.NotFound: INVALID,
    errors.AlreadyExists: INVALID,
    errors.OutOfRange: INVALID,
    errors.Unimplemented: INVALID,
    errors.Unavailable: UNAVAILABLE,
    errors.DeadlineExceeded: UNAVAILABLE,
    errors.ResourceExhausted: UNAVAILABLE,
    errors.Unauthenticated: AUTH,
    errors.PermissionDenied: AUTH,
}


def exit_code(error: LatheError) -> int:
    """The exit code of an error's class; FAILED for the rest."""
    return next((code for kind, code in _CODES.items() if isinstance(error, kind)), FAILED)
