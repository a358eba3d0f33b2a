"""Opaque page tokens and page sizes (Google AIP-158)."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping, Sequence

from lathe.common.errors import FieldViolation, InvalidArgument

DEFAULT_PAGE_SIZE = 50
MAX_PAGE_SIZE = 1000

Cursor = Sequence[str | int]


def coerce_page_size(
    requested: int, *, default: int = DEFAULT_PAGE_SIZE, maximum: int = MAX_PAGE_SIZE
) -> int:
    """0 means the default, more than the maximum means the maximum; a negative size is InvalidArgument."""
    if requested < 0:
        message = f"page_size is {requested}; it must be 0 (for the default of {default}) or more."
        raise InvalidArgument(message, violations=[FieldViolation("page_size", message)])
    return min(requested, maximum) if requested else default


def encode_page_token(cursor: Cursor, query: Mapping[str, object] | None = None) -> str:
    """A token for the position after `cursor` (the sort key of the last row of the page).

    query: the request's parent, filter and order. The next request must repeat them, so their digest travels
    along.
    """
    payload = json.dumps([list(cursor), _digest(query)], separators=(",", ":"))
    return base64.urlsafe_b64encode(payload.encode()).decode().rstrip("=")


def decode_page_token(token: str, query: Mapping[str, object] | None = None) -> tuple[str | int, ...] | None:
    """The cursor in the token, None for an empty token.

    Raises InvalidArgument for one that is not ours or whose request changed its other fields.
    """
    if not token:
        return None
    try:
        payload = json.loads(base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True))
    except (binascii.Error, ValueError) as error:
        raise _bad_token("page_token is not one that this service gave out.") from error
    match payload:
        case [list(cursor), str(digest)] if all(type(part) in (str, int) for part in cursor):
            if digest != _digest(query):
                raise _bad_token(
                    "page_token belongs to another request; repeat the parent, filter and order it had."
                )
            return tuple(cursor)
        case _:
            raise _bad_token("page_token is not one that this service gave out.")


def _bad_token(message: str) -> InvalidArgument:
    return InvalidArgument(
        message, reason="INVALID_PAGE_TOKEN", violations=[FieldViolation("page_token", message)]
    )


def _digest(query: Mapping[str, object] | None) -> str:
    canonical = json.dumps(dict(query or {}), sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
