"""Files of base models on their way into the object store: gigabytes, hence in parts that outlive a broken stream."""

from __future__ import annotations

from collections.abc import AsyncIterable
from typing import Generic, TypeVar

from lathe.common.errors import InvalidArgument, LatheError, Unavailable
from lathe.common.ids import IdFactory
from lathe.common.metrics import Metrics
from lathe.common.names import import_staging
from lathe.common.objectstore.base import ObjectStore
from lathe.common.rpc.principal import Principal, require_operator
from lathe.gateway.bytestreams import (
    PART_BYTES,
    Alone,
    Digest,
    PartWriter,
    add_stored,
    stored_parts,
    wrong_offset,
)
from lathe.gateway.model import AnnouncedFile, StoredUpload
from lathe.gateway.ports import ModelOwner

Committed = TypeVar("Committed")

_OFFSET_METHOD = "GetModelFileUpload"


class ModelUploads(Generic[Committed]):
    """Files of base models going in. What an abandoned import leaves in staging goes with the import."""

    def __init__(
        self, owner: ModelOwner[Committed], store: ObjectStore, ids: IdFactory, metrics: Metrics
    ) -> None:
        self._owner = owner
        self._store = store
        self._ids = ids
        self._metrics = metrics
        self._running: set[str] = set()

    async def offset(self, principal: Principal, base_model: str, path: str) -> int:
        """Where an upload of this file goes on. Raises NotFound, PermissionDenied, Unavailable."""
        require_operator(principal, "upload base models")
        file = await self._owner.announced(principal, base_model, path)
        if file.stored:
            return file.size
        key = _staging_key(base_model, file)
        return sum([size for _, size in await stored_parts(self._store, key)])

    async def put_file(
        self, principal: Principal, base_model: str, path: str, chunks: AsyncIterable[bytes], offset: int = 0
    ) -> Committed:
        """Upload one file of an import from `offset` on; a stream that breaks leaves its whole parts.

        Raises NotFound for a file that the import did not name, OutOfRange naming the right offset, InvalidArgument
        for bytes other than announced (nothing of them is kept), Aborted while another upload of this file runs,
        PermissionDenied to others than operators, Unavailable.
        """
        require_operator(principal, "upload base models")
        file = await self._owner.announced(principal, base_model, path)
        key = _staging_key(base_model, file)
        if file.stored:
            upload = StoredUpload(f"{key}-whole", file.size, file.sha256)
            return await self._owner.commit(principal, base_model, path, upload)
        if file.size <= PART_BYTES:
            # Not worth parts: one object, all or nothing.
            if offset:
                raise wrong_offset(offset, 0, _OFFSET_METHOD)
            digest = Digest(None, self._metrics)
            single = f"{key}-{self._ids.token(32)}"
            await self._store.put(single, digest.passing(chunks))
            return await self._commit(principal, base_model, path, single, digest)
        with Alone(self._running, key):
            digest = await self._in_parts(key, file, chunks, offset)
            parts = [name for name, _ in await stored_parts(self._store, key)]
            await self._store.compose(parts, f"{key}-whole")
            done = await self._commit(principal, base_model, path, f"{key}-whole", digest)
            await self._store.delete_prefix(f"{key}/")
            return done

    async def _in_parts(
        self, key: str, file: AnnouncedFile, chunks: AsyncIterable[bytes], offset: int
    ) -> Digest:
        """Store the rest of a file, so that all of it is there under `key`."""
        parts = await stored_parts(self._store, key)
        if offset == 0 and parts:
            await self._store.delete_prefix(f"{key}/")
            parts = []
        stored = sum(size for _, size in parts)
        if offset != stored:
            raise wrong_offset(offset, stored, _OFFSET_METHOD)
        digest = Digest(file.size, self._metrics)
        await add_stored(self._store, parts, digest)
        # Of a stream that breaks only whole parts are kept: two streams that overlap write the same ones.
        async with PartWriter(self._store, key, len(parts)) as writer:
            async for data in chunks:
                await digest.add(data)
                await writer.write(data)
            await self._check(key, file, digest, writer)
            await writer.flush()
        return digest

    async def _check(self, key: str, file: AnnouncedFile, digest: Digest, writer: PartWriter) -> None:
        """Raises Unavailable for a stream that ended early, InvalidArgument for other bytes than announced."""
        if digest.size < file.size:
            # A stream whose client is gone ends like any other: what is whole is kept for the next.
            raise Unavailable(
                f"The stream ended after {digest.size} of {file.size} bytes; go on where {_OFFSET_METHOD} says.",
                reason="STREAM_BROKEN",
                retry_after=0.5,
            )
        found = await digest.sha256()
        if found != file.sha256:
            await writer.settle()
            await self._store.delete_prefix(f"{key}/")
            raise InvalidArgument(
                f"The file was announced with {file.size} bytes and sha256 {file.sha256}; {digest.size} bytes with "
                f"sha256 {found} came. Send the file again.",
                reason="DIGEST_MISMATCH",
            )

    async def _commit(
        self, principal: Principal, base_model: str, path: str, key: str, digest: Digest
    ) -> Committed:
        upload = StoredUpload(key, digest.size, await digest.sha256())
        try:
            return await self._owner.commit(principal, base_model, path, upload)
        except Unavailable:
            # It may have been taken over all the same; staging goes with the import.
            raise
        except LatheError:
            await self._store.delete(key)
            raise


def _staging_key(base_model: str, file: AnnouncedFile) -> str:
    """The same for every try, in whatever gateway it arrives."""
    return f"{import_staging(base_model.rpartition('/')[2])}{file.sha256}"
