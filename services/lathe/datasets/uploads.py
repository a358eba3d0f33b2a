"""Uploads in parts: what is announced, which parts there are, when it is over. Pure.

A part is an object below the dataset's staging key. Presigned parts are numbered and all of one size but for the last;
parts that came through the gateway have ids, and their order is what the client says at the end.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from lathe.common.errors import FailedPrecondition, FieldViolation, InvalidArgument
from lathe.datasets.model import MAX_BYTES, check_upload, invalid

# OpenAI's.
OPEN_FOR = timedelta(hours=1)
MAX_PART_BYTES = 64 << 20
# For gigabytes over a slow line.
PRESIGNED_OPEN_FOR = timedelta(days=1)
# Long enough for a slow line, short enough for what anybody who sees it may do with it.
URL_LIFE = timedelta(hours=1)
# S3 joins parts of 5 MiB and more by itself.
PRESIGNED_PART_BYTES = 32 << 20
MAX_PARTS = 2000
MAX_SIGNED = 100
# For how long it is known what became of an upload.
REMEMBERED_FOR = timedelta(days=1)

_MD5 = re.compile(r"[0-9a-f]{32}")


class UploadState(StrEnum):
    """PENDING -> one of the others, for ever."""

    PENDING = "pending"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True)
class UploadSession:
    """The upload in parts of one dataset.

    size_bytes is announced; parts (names below the staging key, in the order of the file) come with COMPLETED, and so
    does md5 (empty if not given); sha256 (the same) is announced, or comes with COMPLETED.
    """

    project: str
    dataset_id: str
    display_name: str
    purpose: str
    size_bytes: int
    sha256: str
    create_time: datetime
    expire_time: datetime
    state: UploadState = UploadState.PENDING
    parts: tuple[str, ...] = ()
    md5: str = ""

    @property
    def name(self) -> str:
        return f"projects/{self.project}/datasets/{self.dataset_id}"

    def state_at(self, now: datetime) -> UploadState:
        """EXPIRED as soon as its time has come, whether or not anybody has noted it."""
        late = self.state is UploadState.PENDING and now >= self.expire_time
        return UploadState.EXPIRED if late else self.state


@dataclass(frozen=True, slots=True)
class PlannedPart:
    """A presigned part: its number from 0, where in the file it begins, its bytes."""

    number: int
    offset: int
    size: int

    @property
    def name(self) -> str:
        return f"{self.number:05d}"


def check_announced(size_bytes: int, sha256: str) -> None:
    """Raise InvalidArgument for an upload that cannot be."""
    if not 1 <= size_bytes <= MAX_BYTES:
        raise invalid(
            "in_parts.size_bytes", f"in_parts.size_bytes is {size_bytes}; it must be 1 to {MAX_BYTES} bytes."
        )
    if sha256:
        check_upload(size_bytes, sha256)


def plan(size_bytes: int) -> list[PlannedPart]:
    """The presigned parts of a file."""
    step = PRESIGNED_PART_BYTES
    return [
        PlannedPart(number, offset, min(step, size_bytes - offset))
        for number, offset in enumerate(range(0, size_bytes, step))
    ]


def missing(session: UploadSession, stored: Mapping[str, int]) -> list[PlannedPart]:
    """The presigned parts that are not stored in their size. stored: name -> bytes."""
    return [part for part in plan(session.size_bytes) if stored.get(part.name) != part.size]


def next_part_bytes(session: UploadSession, stored: Mapping[str, int]) -> int:
    """How many bytes the next part may have. Raises FailedPrecondition when far more than announced was sent."""
    check_stored(session, stored)
    return min(MAX_PART_BYTES, session.size_bytes)


def check_stored(session: UploadSession, stored: Mapping[str, int]) -> None:
    """Raises FailedPrecondition when far more than announced was sent. stored: name -> bytes."""
    # A part whose answer was lost is sent again, under another id.
    if len(stored) >= MAX_PARTS or sum(stored.values()) >= 2 * session.size_bytes + MAX_PART_BYTES:
        raise FailedPrecondition(
            f"{len(stored)} parts with {sum(stored.values())} bytes are stored, and {session.size_bytes} bytes were "
            "announced: cancel this upload and begin another, with fewer or larger parts.",
            reason="TOO_MANY_PARTS",
        )


def ordered(session: UploadSession, part_ids: Sequence[str], stored: Mapping[str, int]) -> tuple[str, ...]:
    """The parts of the whole file. stored: name -> bytes; part_ids: empty for presigned parts.

    Raises InvalidArgument for parts that are missing, twice, or another upload's, and for another size.
    """
    if not part_ids:
        left = missing(session, stored)
        if left:
            shown = ", ".join(str(part.number) for part in left[:5]) + (", …" if len(left) > 5 else "")
            raise FailedPrecondition(
                f"{len(left)} parts are missing or have another size: {shown}. SignUploadParts gives their URLs.",
                reason="PARTS_MISSING",
            )
        return tuple(part.name for part in plan(session.size_bytes))
    seen: set[str] = set()
    for number, part in enumerate(part_ids):
        field = f"part_ids[{number}]"
        if part in seen:
            raise _wrong_part(field, f"{field} names {part[:100]!r} a second time.", "DUPLICATE_PART")
        if part not in stored:
            message = f"{field}: this upload has no part {part[:100]!r}; send it, or leave it out."
            raise _wrong_part(field, message, "PART_NOT_FOUND")
        seen.add(part)
    total = sum(stored[part] for part in part_ids)
    if total != session.size_bytes:
        message = f"The parts have {total} bytes together, and {session.size_bytes} were announced."
        raise _wrong_part("part_ids", message, "SIZE_MISMATCH")
    return tuple(part_ids)


def agreed_sha256(session: UploadSession, given: str) -> str:
    """The digest that was announced, or came at the end; empty if none did. Raises InvalidArgument."""
    if given:
        check_upload(session.size_bytes, given)
    if given and session.sha256 not in ("", given):
        raise invalid(
            "sha256", f"sha256 is {given}, and {session.sha256} was given before; send one of them."
        )
    return given or session.sha256


def check_md5(md5: str) -> str:
    """The digest in lower case; empty if there is none. Raises InvalidArgument."""
    if md5 and not _MD5.fullmatch(md5.lower()):
        raise invalid("md5", "md5 must be 32 hex digits.")
    return md5.lower()


def not_pending(session: UploadSession, state: UploadState) -> FailedPrecondition:
    """For a change of an upload that is over."""
    what = {
        UploadState.COMPLETED: "is complete already and does not change",
        UploadState.CANCELLED: "was cancelled",
        UploadState.EXPIRED: f"expired at {session.expire_time:%Y-%m-%d %H:%M:%S} UTC",
    }[state]
    return FailedPrecondition(
        f"The upload of {session.display_name!r} {what}; begin another.", reason=f"UPLOAD_{state.name}"
    )


def _wrong_part(field: str, message: str, reason: str) -> InvalidArgument:
    return InvalidArgument(message, reason=reason, violations=[FieldViolation(field, message)])
