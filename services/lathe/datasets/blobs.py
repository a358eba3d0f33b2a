"""Blobs, which bear the names of their digests: reading one whole, and deleting those that nothing names any more,
beside whoever is about to name one."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from lathe.common.clock import Clock
from lathe.common.errors import DataLoss
from lathe.common.ids import IdFactory
from lathe.common.objectstore.base import CHUNK_SIZE, ObjectStore
from lathe.datasets.model import blob_key, index_prefix
from lathe.datasets.ports import DatasetStore


@dataclass(frozen=True, slots=True)
class Blobs:
    """Where blobs are, and what is needed to delete one."""

    store: DatasetStore
    objects: ObjectStore
    clock: Clock
    ids: IdFactory

    async def delete(self, sha256: str, owner: str) -> None:
        """Delete a blob unless a row needs it, or somebody else is at it. owner: on whose account, for people.

        The claim is committed before anyone looks who needs the blob, and who needs it says so before it looks for
        claims: whichever comes second sees the other. The claim is this call's, not the process's: deletions within one
        process stand still and pass each other just as well. A call that breaks off leaves its claim, which another
        takes over when it is old (`DatasetStore.left_claims`).
        """
        holder = self.ids.token(24)
        if await self.store.claim_blob(sha256, owner, holder, self.clock.now()):
            await self.objects.delete_prefix(index_prefix(sha256))
            await self.objects.delete(blob_key(sha256))
            await self.store.release_blob(sha256, holder)


async def blob_chunks(
    objects: ObjectStore, sha256: str, chunk_size: int = CHUNK_SIZE
) -> AsyncIterator[bytes]:
    """The bytes of a stored file. Raises DataLoss, at their end, if they are not what was stored; NotFound,
    Unavailable."""
    digest = hashlib.sha256()
    async for chunk in objects.stream(blob_key(sha256), chunk_size=chunk_size):
        await asyncio.to_thread(digest.update, chunk)
        yield chunk
    if digest.hexdigest() != sha256:
        raise DataLoss(
            "The stored file is damaged: its SHA-256 is not what it was. Upload the same file again: that mends every "
            "dataset of it."
        )


async def fetch_blob(objects: ObjectStore, sha256: str, path: Path) -> None:
    """Copy a blob into a file. Raises NotFound, DataLoss for one that is not what was stored (the file is then gone),
    Unavailable."""
    await objects.fetch(blob_key(sha256), path)
    if await asyncio.to_thread(file_sha256, path) != sha256:
        await asyncio.to_thread(path.unlink)
        raise DataLoss(f"The stored object {blob_key(sha256)} is damaged: its SHA-256 is another.")


def file_sha256(path: Path) -> str:
    """Lower-case hex of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
