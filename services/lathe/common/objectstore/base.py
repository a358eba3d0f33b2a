"""The object store: the one thing that services share beside their contracts.

A key is a path of plain segments (`blobs/<sha256>`, `jobs/<job>/<attempt>/…`). No key may be the folder of another
(`a` and `a/b`): a folder on disk and some S3 servers cannot hold both.
"""

from __future__ import annotations

import errno
import re
from collections.abc import AsyncIterable, AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Protocol

from lathe.common.errors import InvalidArgument, NotFound, OutOfRange, Unavailable

CHUNK_SIZE = 1 << 20
MAX_KEY_LENGTH = 900
# The reason of an error that is about this machine's disk, not about the store.
LOCAL_DISK = "LOCAL_DISK"
_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._=+@:~-]{0,254}")


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """An object: its key, its size in bytes, and when it was written (UTC)."""

    key: str
    size: int
    modified: datetime


class ObjectStore(Protocol):
    """Objects by key. Every method raises Unavailable while the store is away or full, and InvalidArgument for
    a key that cannot be one."""

    async def put(
        self, key: str, data: bytes | AsyncIterable[bytes], *, if_absent: bool = False
    ) -> ObjectInfo:
        """Write an object, whole or not at all; a stream is never held in memory whole.

        An exception of the stream is passed on. With `if_absent`, raises AlreadyExists if there is one.
        """
        ...

    async def put_file(self, key: str, path: Path) -> ObjectInfo:
        """Write a file's content as an object."""
        ...

    async def get(self, key: str) -> bytes:
        """The whole object. Raises NotFound."""
        ...

    def stream(
        self, key: str, *, offset: int = 0, length: int | None = None, chunk_size: int = CHUNK_SIZE
    ) -> AsyncIterator[bytes]:
        """The bytes from `offset`, at most `length` of them. Raises NotFound; OutOfRange for an offset past the end."""
        ...

    async def fetch(self, key: str, path: Path) -> None:
        """Copy an object into a file: under a temporary name, then renamed.

        Raises NotFound; Unavailable with the reason LOCAL_DISK for a file that cannot be written.
        """
        ...

    async def head(self, key: str) -> ObjectInfo | None:
        """Facts about an object, None if there is none."""
        ...

    def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        """Objects whose key begins with `prefix` (any string, also half a segment), ordered by key."""
        ...

    async def copy(self, source: str, target: str) -> None:
        """Make `target` the same object, without moving bytes through this process. Raises NotFound."""
        ...

    async def compose(self, sources: Sequence[str], target: str) -> None:
        """Make `target` the sources' bytes one after another. The sources stay. Raises NotFound."""
        ...

    async def delete(self, key: str) -> None:
        """Remove an object; nothing happens if there is none."""
        ...

    async def delete_prefix(self, prefix: str) -> None:
        """Remove every object whose key begins with `prefix`, which may not be empty."""
        ...

    async def remove_unfinished(self, before: datetime) -> None:
        """Remove what was last written to before then by a process that died with its object half-written: no key
        names it. An S3 service does so itself, where its bucket has a rule for it."""
        ...

    async def presigned_put(self, key: str, size: int, lifetime: timedelta) -> str | None:
        """A URL to which anybody may PUT an object of `size` bytes, and of no other size, until `lifetime` (7 days at
        most) is over; None if clients cannot reach this store."""
        ...

    async def check(self) -> None:
        """Raise Unavailable unless objects can be read and written."""
        ...


def validate_key(key: str) -> str:
    """The key itself. Raises InvalidArgument for one that is empty, absolute, or leaves its folder."""
    if len(key) > MAX_KEY_LENGTH or not all(_SEGMENT.fullmatch(part) for part in key.split("/")):
        raise InvalidArgument(
            f"{key[:200]!r} is no object key: segments of letters, digits and ._=+@:~- joined by single slashes, "
            "none beginning with a dot."
        )
    return key


def validate_prefix(prefix: str, *, may_be_empty: bool = True) -> str:
    """The prefix itself: empty, or the beginning of a key. Raises InvalidArgument."""
    if not prefix and not may_be_empty:
        raise InvalidArgument("The prefix is empty; that would mean the whole store.")
    if prefix:
        validate_key(prefix.removesuffix("/"))
    return prefix


def validate_range(offset: int, length: int | None, chunk_size: int) -> None:
    """Raise InvalidArgument for a range that means nothing."""
    if offset < 0 or (length is not None and length < 0) or chunk_size < 1:
        raise InvalidArgument("offset and length must be 0 or more, and chunk_size 1 or more.")


@contextmanager
def local_disk(path: Path) -> Iterator[None]:
    """Turn what the disk refuses while `path` is written into Unavailable that names its folder."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "is full: give it more room" if full else f"cannot be written ({error.strerror})"
        raise Unavailable(f"The folder {path.parent} {why}.", reason=LOCAL_DISK, retry_after=30.0) from error


def not_found(key: str) -> NotFound:
    return NotFound(f"There is no object {key!r} in the store.", reason="OBJECT_NOT_FOUND")


def past_the_end(key: str, offset: int, size: int) -> OutOfRange:
    return OutOfRange(f"Object {key!r} has {size} bytes; there is no offset {offset}.")
