"""Objects in a dictionary."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from lathe.common.clock import Clock, SystemClock
from lathe.common.errors import AlreadyExists, LatheError
from lathe.common.objectstore.base import (
    CHUNK_SIZE,
    ObjectInfo,
    local_disk,
    not_found,
    past_the_end,
    validate_key,
    validate_prefix,
    validate_range,
)


@dataclass(frozen=True, slots=True)
class _Object:
    content: bytes
    modified: datetime


class MemoryObjectStore:
    """A store that forgets. Set `outage` to an error and every method raises it; set it to None and all works."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock if clock is not None else SystemClock()
        self._objects: dict[str, _Object] = {}
        self.outage: LatheError | None = None
        # When what killed writers left was last written to.
        self.unfinished: list[datetime] = []
        # What presigned URLs begin with; None: clients cannot reach this store.
        self.public_url: str | None = None

    def keys(self) -> list[str]:
        """Every key, ordered."""
        return sorted(self._objects)

    async def put(
        self, key: str, data: bytes | AsyncIterable[bytes], *, if_absent: bool = False
    ) -> ObjectInfo:
        self._usable()
        validate_key(key)
        content = data if isinstance(data, bytes) else b"".join([chunk async for chunk in data])
        self._usable()
        if if_absent and key in self._objects:
            raise AlreadyExists(f"There is an object {key!r} already.", reason="OBJECT_EXISTS")
        self._objects[key] = _Object(content, self._clock.now())
        return self._info(key)

    async def put_file(self, key: str, path: Path) -> ObjectInfo:
        return await self.put(key, await asyncio.to_thread(path.read_bytes))

    async def get(self, key: str) -> bytes:
        self._usable()
        return self._find(key).content

    async def stream(
        self, key: str, *, offset: int = 0, length: int | None = None, chunk_size: int = CHUNK_SIZE
    ) -> AsyncIterator[bytes]:
        self._usable()
        validate_range(offset, length, chunk_size)
        content = self._find(key).content
        if offset > len(content):
            raise past_the_end(key, offset, len(content))
        wanted = content[offset:] if length is None else content[offset : offset + length]
        for start in range(0, len(wanted), chunk_size):
            self._usable()
            yield wanted[start : start + chunk_size]

    async def fetch(self, key: str, path: Path) -> None:
        content = await self.get(key)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        with local_disk(path):
            temporary.write_bytes(content)
            temporary.replace(path)

    async def head(self, key: str) -> ObjectInfo | None:
        self._usable()
        return self._info(key) if validate_key(key) in self._objects else None

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        self._usable()
        validate_prefix(prefix)
        for key in self.keys():
            if key.startswith(prefix) and key in self._objects:
                yield self._info(key)

    async def copy(self, source: str, target: str) -> None:
        await self.put(validate_key(target), await self.get(source))

    async def compose(self, sources: Sequence[str], target: str) -> None:
        await self.put(validate_key(target), b"".join([await self.get(source) for source in sources]))

    async def delete(self, key: str) -> None:
        self._usable()
        self._objects.pop(validate_key(key), None)

    async def delete_prefix(self, prefix: str) -> None:
        self._usable()
        validate_prefix(prefix, may_be_empty=False)
        for key in self.keys():
            if key.startswith(prefix):
                del self._objects[key]

    async def remove_unfinished(self, before: datetime) -> None:
        self._usable()
        self.unfinished = [written for written in self.unfinished if written >= before]

    async def presigned_put(self, key: str, size: int, lifetime: timedelta) -> str | None:
        validate_key(key)
        return f"{self.public_url}/{key}" if self.public_url else None

    async def check(self) -> None:
        self._usable()

    def _usable(self) -> None:
        if self.outage is not None:
            raise self.outage

    def _find(self, key: str) -> _Object:
        found = self._objects.get(validate_key(key))
        if found is None:
            raise not_found(key)
        return found

    def _info(self, key: str) -> ObjectInfo:
        found = self._objects[key]
        return ObjectInfo(key, len(found.content), found.modified)
