"""Bytes on their way between clients and the object store: counted and hashed as they pass, cut into parts."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from typing import Self, TypeVar, cast

from lathe.common.errors import Aborted, FieldViolation, InvalidArgument, NotFound, OutOfRange
from lathe.common.metrics import Metrics
from lathe.common.objectstore.base import ObjectInfo, ObjectStore

PART_BYTES = 8 * 1024 * 1024
# A thread costs more than hashing less than this.
_HASHED_IN_PLACE = 64 * 1024
# One is on its way to the disk while the next is written.
_STORED_AT_ONCE = 2

_END = object()

T = TypeVar("T")


class Counted:
    """Counts bytes as they pass. Raises InvalidArgument past `max_bytes`. what: file or part, for words and codes."""

    def __init__(self, max_bytes: int | None, metrics: Metrics, *, what: str = "file") -> None:
        self._max_bytes = max_bytes
        self._metrics = metrics
        self._what = what
        self.size = 0

    def count(self, data: bytes, *, uploaded: bool = True) -> None:
        """uploaded: false for bytes that came earlier and are only read again."""
        self.size += len(data)
        if self._max_bytes is not None and self.size > self._max_bytes:
            raise InvalidArgument(
                f"The {self._what} is larger than {self._max_bytes} bytes; split it into several.",
                reason=f"{self._what.upper()}_TOO_LARGE",
                metadata={"max_bytes": str(self._max_bytes)},
            )
        if uploaded:
            self._metrics.upload_bytes.inc(len(data))

    async def passing(self, chunks: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
        """The same chunks."""
        async for chunk in chunks:
            self.count(chunk)
            yield chunk


class Digest(Counted):
    """Counts and hashes bytes as they pass; large pieces in a thread, while the caller stores them."""

    def __init__(self, max_bytes: int | None, metrics: Metrics) -> None:
        super().__init__(max_bytes, metrics)
        self._hash = hashlib.sha256()
        self._hashing: asyncio.Future[None] | None = None

    async def add(self, data: bytes, *, uploaded: bool = True) -> None:
        """uploaded: false for bytes that came earlier and are only read again. Raises InvalidArgument."""
        self.count(data, uploaded=uploaded)
        await self._settle()
        if len(data) < _HASHED_IN_PLACE:
            self._hash.update(data)
        else:
            self._hashing = asyncio.get_running_loop().run_in_executor(None, self._hash.update, data)

    async def passing(self, chunks: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
        async for chunk in ahead(chunks):
            await self.add(chunk)
            yield chunk

    async def sha256(self) -> str:
        """Of all that was added, in lower-case hex."""
        await self._settle()
        return self._hash.hexdigest()

    async def check(self, expected: str | None) -> None:
        """Raises InvalidArgument unless the bytes have this SHA-256 (in hex; empty or None for any)."""
        found = await self.sha256()
        if expected and expected.lower() != found:
            message = f"The bytes have the SHA-256 {found}, not {expected}; upload the file again."
            raise InvalidArgument(
                message, reason="SHA256_MISMATCH", violations=[FieldViolation("sha256", message)]
            )

    async def _settle(self) -> None:
        if self._hashing is not None:
            await self._hashing
            self._hashing = None


async def ahead(items: AsyncIterable[T]) -> AsyncGenerator[T, None]:
    """The same items; the next one is asked for while the last is worked on."""
    source = aiter(items)
    coming = asyncio.ensure_future(_next(source))
    try:
        while (item := await coming) is not _END:
            coming = asyncio.ensure_future(_next(source))
            yield cast(T, item)
    finally:
        coming.cancel()
        # Nobody wants it any more, nor what it raised.
        await asyncio.gather(coming, return_exceptions=True)


async def _next(source: AsyncIterator[object]) -> object:
    return await anext(source, _END)


async def opened(store: ObjectStore, key: str, offset: int, named: str) -> AsyncIterator[bytes]:
    """An object's bytes from `offset`; `named` says in errors what it is. Raises NotFound, OutOfRange, Unavailable."""
    found = await store.head(key)
    if found is None:
        raise NotFound(f"The bytes of {named} were not found.")
    if not 0 <= offset <= found.size:
        raise OutOfRange(f"read_offset {offset} is not within the {found.size} bytes of {named}.")
    return store.stream(key, offset=offset)


class PartWriter:
    """Cuts a stream into parts of PART_BYTES under a staging key. Parts are stored while more comes in, and each only
    after the one before, so that they have no gap. Leaving the block waits for them: after a stream that broke nothing
    is written any more."""

    def __init__(self, store: ObjectStore, key: str, next_part: int) -> None:
        self._store = store
        self._key = key
        self._next = next_part
        # As they came: joining them would copy each byte twice, on the loop's thread.
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._storing: list[asyncio.Task[ObjectInfo]] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        # What they raised is of no interest any more: the stream broke first.
        await asyncio.gather(*self._storing, return_exceptions=True)

    async def write(self, data: bytes) -> None:
        """Raises what storing an earlier part raised."""
        while self._held_bytes + len(data) >= PART_BYTES:
            room = PART_BYTES - self._held_bytes
            self._hold(data[:room])
            data = data[room:]
            await self._put()
        self._hold(data)

    async def flush(self, *, last: bool = False) -> None:
        """Store the rest as a shorter part, and wait; an empty file is one empty part."""
        if self._held or (last and self._next == 0):
            await self._put()
        await self.settle()

    async def settle(self) -> None:
        """Wait until all parts are stored. Raises what storing one raised."""
        await self._settle_to(0)

    def _hold(self, data: bytes) -> None:
        if data:
            self._held.append(data)
            self._held_bytes += len(data)

    async def _put(self) -> None:
        await self._settle_to(_STORED_AT_ONCE - 1)
        part, self._held, self._held_bytes = self._held, [], 0
        before = self._storing[-1] if self._storing else None
        key = part_key(self._key, self._next)
        self._storing.append(asyncio.create_task(self._store.put(key, _after(before, part))))
        self._next += 1

    async def _settle_to(self, left: int) -> None:
        while len(self._storing) > left:
            # It stays in the list while it is waited for: leaving the block waits for it even if this is cancelled.
            await self._storing[0]
            del self._storing[0]


async def _after(before: asyncio.Task[ObjectInfo] | None, part: list[bytes]) -> AsyncIterator[bytes]:
    """The part's bytes; they end, upon which a store gives them their name, only when the part before has its own.

    Raises what storing that one raised.
    """
    for piece in part:
        yield piece
    if before is not None:
        await asyncio.wait({before})
        before.result()


class Alone:
    """One upload of a name at a time in this gateway; another gateway's is caught by the SHA-256."""

    def __init__(self, running: set[str], name: str) -> None:
        self._running = running
        self._name = name

    def __enter__(self) -> None:
        if self._name in self._running:
            raise Aborted(
                f"Another upload of {self._name} is running; wait until it has ended.",
                reason="UPLOAD_RUNNING",
            )
        self._running.add(self._name)

    def __exit__(self, *_: object) -> None:
        self._running.discard(self._name)


async def stored_parts(store: ObjectStore, key: str) -> list[tuple[str, int]]:
    """(key, size) of the stored parts without a gap, in order."""
    found = {info.key: info.size async for info in store.list(f"{key}/")}
    parts: list[tuple[str, int]] = []
    while (name := part_key(key, len(parts))) in found:
        parts.append((name, found[name]))
    return parts


async def add_stored(store: ObjectStore, parts: list[tuple[str, int]], digest: Digest) -> None:
    """Hash the parts, which were uploaded earlier."""
    for name, _ in parts:
        async for data in store.stream(name):
            await digest.add(data, uploaded=False)


def part_key(staging_key: str, number: int) -> str:
    """staging/{random}/{nnnnn}"""
    return f"{staging_key}/{number:05d}"


def wrong_offset(given: int, right: int, method: str = "GetDatasetUpload") -> OutOfRange:
    """For a stream that does not begin where the stored bytes end. method: what says where that is."""
    message = f"write_offset is {given}, but the upload goes on at {right}; ask {method}."
    return OutOfRange(
        message,
        reason="WRONG_OFFSET",
        metadata={"committed_size": str(right)},
        violations=[FieldViolation("write_offset", message)],
    )
