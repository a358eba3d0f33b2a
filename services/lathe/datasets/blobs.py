"""Deleting blobs that nothing names any more, beside whoever is about to name one."""

from __future__ import annotations

from dataclasses import dataclass

from lathe.common.clock import Clock
from lathe.common.objectstore.base import ObjectStore
from lathe.datasets.model import blob_key, index_prefix
from lathe.datasets.ports import DatasetStore


@dataclass(frozen=True, slots=True)
class Blobs:
    """holder: this process; no other has the same."""

    store: DatasetStore
    objects: ObjectStore
    clock: Clock
    holder: str

    async def delete(self, sha256: str, owner: str) -> None:
        """Delete a blob unless a row needs it, or somebody else is at it. owner: on whose account, for people.

        The claim is committed before anyone looks who needs the blob, and who needs it says so before it looks for
        claims: whichever comes second sees the other. A process that dies here leaves its claim, which another takes
        over when it is old (`DatasetStore.left_claims`).
        """
        if await self.store.claim_blob(sha256, owner, self.holder, self.clock.now()):
            await self.objects.delete_prefix(index_prefix(sha256))
            await self.objects.delete(blob_key(sha256))
            await self.store.release_blob(sha256, self.holder)
