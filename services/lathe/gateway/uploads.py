"""Datasets between clients and the object store, handed over to their owner when whole."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from lathe.common.clock import Clock
from lathe.common.errors import FailedPrecondition, InvalidArgument, Unavailable
from lathe.common.metrics import Metrics
from lathe.common.objectstore.base import ObjectStore
from lathe.common.rpc.principal import Principal, Role
from lathe.gateway.auth import demand_role
from lathe.gateway.bytestreams import (
    Alone,
    Counted,
    Digest,
    PartWriter,
    add_stored,
    ahead,
    opened,
    stored_parts,
    wrong_offset,
)
from lathe.gateway.model import StoredUpload
from lathe.gateway.ports import DatasetOwner

# OpenAI's limits: by /files, and for what comes in parts.
MAX_FILE_BYTES = 512 * 1024 * 1024
MAX_RESUMABLE_BYTES = 8 * 1024 * 1024 * 1024
_COMMIT_WAITS_S = (0.5, 1.0, 2.0)

Committed = TypeVar("Committed")


@dataclass(frozen=True, slots=True)
class UploadChunk:
    """One message of a resumable upload. finish: the file is complete; sha256 is then checked if given."""

    offset: int
    data: bytes
    finish: bool = False
    sha256: str = ""


class DatasetUploads(Generic[Committed]):
    """Datasets going in and out. `Committed` is what the owner answers with."""

    def __init__(
        self, owner: DatasetOwner[Committed], store: ObjectStore, clock: Clock, metrics: Metrics
    ) -> None:
        self._owner = owner
        self._store = store
        self._clock = clock
        self._metrics = metrics
        self._running: set[str] = set()

    async def put_dataset(
        self,
        principal: Principal,
        dataset_name: str,
        chunks: AsyncIterable[bytes],
        *,
        max_bytes: int = MAX_FILE_BYTES,
        sha256: str | None = None,
        before_commit: Callable[[str], Awaitable[None]] | None = None,
    ) -> Committed:
        """Upload a dataset that was just created, in one go. before_commit: is told the SHA-256 of what was stored;
        what it raises is passed on.

        Raises InvalidArgument (too large, another SHA-256), NotFound, FailedPrecondition (uploaded before),
        Unavailable. Whatever is raised, nothing half is stored.
        """
        demand_role(principal, Role.MEMBER)
        with Alone(self._running, dataset_name):
            key = await self._open_target(principal, dataset_name)
            await self._store.delete_prefix(f"{key}/")
            digest = Digest(max_bytes, self._metrics)
            await self._store.put(key, digest.passing(chunks))
            try:
                await digest.check(sha256)
                if before_commit is not None:
                    await before_commit(await digest.sha256())
            except BaseException:
                await self._store.delete(key)
                raise
            return await self._commit(principal, dataset_name, key, digest)

    async def put_part(self, principal: Principal, dataset_name: str, chunks: AsyncIterable[bytes]) -> str:
        """Store one part of an upload in parts; the id that names it at the end. Parts may come beside each other.

        Raises InvalidArgument for one that is too large, NotFound, FailedPrecondition when the upload is over.
        """
        demand_role(principal, Role.MEMBER)
        target = await self._owner.open_part(principal, dataset_name)
        counted = Counted(target.max_bytes, self._metrics, what="part")
        await self._store.put(target.object_key, counted.passing(chunks))
        return target.part_id

    async def offset(self, principal: Principal, dataset_name: str) -> int:
        """Where a resumable upload goes on. Raises NotFound, FailedPrecondition once it is complete."""
        key = await self._open_target(principal, dataset_name)
        return sum([size for _, size in await stored_parts(self._store, key)])

    async def put_resumable(
        self, principal: Principal, dataset_name: str, chunks: AsyncIterable[UploadChunk]
    ) -> Committed:
        """Store what comes in parts of 8 MiB; a stream that breaks leaves its whole parts.

        A stream that ends without `finish` stores all it brought, and the dataset stays open. Raises
        OutOfRange naming the right offset, InvalidArgument for another SHA-256 (the parts are then removed),
        Aborted while another upload of this dataset runs.
        """
        demand_role(principal, Role.MEMBER)
        with Alone(self._running, dataset_name):
            key = await self._open_target(principal, dataset_name)
            parts = await stored_parts(self._store, key)
            digest: Digest | None = None
            stored = sum(size for _, size in parts)
            if not parts:
                # A whole upload whose commit failed: one key cannot be an object and a folder.
                await self._store.delete(key)
            async with PartWriter(self._store, key, len(parts)) as writer:
                async for chunk in ahead(chunks):
                    expected = digest.size if digest is not None else stored
                    if chunk.offset != expected:
                        raise wrong_offset(chunk.offset, expected)
                    if digest is None:
                        digest = Digest(MAX_RESUMABLE_BYTES, self._metrics)
                        await add_stored(self._store, parts, digest)
                    await digest.add(chunk.data)
                    await writer.write(chunk.data)
                    if chunk.finish:
                        try:
                            await digest.check(chunk.sha256)
                        except InvalidArgument:
                            # What is stored is not the client's file: the next try begins at 0.
                            await writer.settle()
                            await self._store.delete_prefix(f"{key}/")
                            raise
                        await writer.flush(last=True)
                        return await self._commit(principal, dataset_name, key, digest)
                await writer.flush()
            return await self._owner.get(principal, dataset_name)

    async def download(
        self, principal: Principal, dataset_name: str, *, offset: int = 0
    ) -> AsyncIterator[bytes]:
        """The bytes of a ready dataset from `offset`; what can be refused is raised before the first byte.

        Raises NotFound, FailedPrecondition while it is not ready, OutOfRange, Unavailable.
        """
        key = await self._owner.blob_key(principal, dataset_name)
        return await opened(self._store, key, offset, dataset_name)

    async def _open_target(self, principal: Principal, dataset_name: str) -> str:
        target = await self._owner.target(principal, dataset_name)
        if not target.open or not target.staging_key:
            raise FailedPrecondition(
                f"{dataset_name} has been uploaded already; create another dataset for other bytes.",
                reason="UPLOAD_COMPLETE",
            )
        if target.in_parts:
            raise FailedPrecondition(
                f"{dataset_name} was created for parts or an import; create another dataset to send a stream.",
                reason="UPLOAD_IN_PARTS",
            )
        return target.staging_key

    async def _commit(self, principal: Principal, name: str, key: str, digest: Digest) -> Committed:
        """Repeated while the owner is away: committing twice is committing once."""
        upload = StoredUpload(key, digest.size, await digest.sha256())
        for wait in _COMMIT_WAITS_S:
            try:
                return await self._owner.commit(principal, name, upload)
            except Unavailable:
                await self._clock.sleep(wait)
        return await self._owner.commit(principal, name, upload)
