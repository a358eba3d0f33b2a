"""What goes in the background: deleted and outlived datasets, left staging, audits that nobody needs."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from datetime import timedelta

from lathe.common.clock import Clock
from lathe.common.objectstore.base import ObjectStore
from lathe.datasets.model import Dataset, DatasetState, blob_key, index_prefix
from lathe.datasets.ports import DatasetStore, UploadStore
from lathe.datasets.uploads import REMEMBERED_FOR
from lathe.datasets.validation import clear_staging, validation_owner

log = logging.getLogger(__name__)

ABANDONED_AFTER = timedelta(days=1)
# A job that runs when its file is deleted may start another attempt from the same tokens.
AUDIT_KEPT = timedelta(days=7)


@dataclass(frozen=True, slots=True)
class Cleaner:
    """Each step can be repeated: a process that dies anywhere leaves a row that says what is still to do.

    busy: names of datasets that are being validated: their turn comes with a later sweep.
    """

    store: DatasetStore
    uploads: UploadStore
    objects: ObjectStore
    clock: Clock
    busy: Collection[str] = ()

    async def sweep(self) -> None:
        """Delete all there is to delete now. Raises Unavailable if the database or the store is away."""
        now = self.clock.now()
        await self.uploads.expire_uploads(now)
        await self.uploads.forget_uploads(now - REMEMBERED_FOR)
        for dataset in await self.store.outlived(now, now - ABANDONED_AFTER):
            log.info("%s has expired or was never uploaded; it goes.", dataset.name)
            await self.store.begin_delete(dataset.project, dataset.id)
        for dataset in await self.store.in_state(DatasetState.DELETING):
            if dataset.name not in self.busy:
                await self._remove(dataset)
        for dataset in await self.store.with_leftovers():
            await clear_staging(dataset, self.store, self.objects)
        for key in await self.store.unneeded_audits(now - AUDIT_KEPT):
            await self.store.begin_remove_audit(key, now - AUDIT_KEPT)
        await self.store.forget_overlaps()
        for sha256, owner in await self.store.audit_claims():
            await self._delete_blob(sha256, owner)

    async def _remove(self, dataset: Dataset) -> None:
        await clear_staging(dataset, self.store, self.objects)
        if dataset.sha256:
            await self.store.release_blob(dataset.sha256, validation_owner(dataset))
            await self._delete_blob(dataset.sha256, dataset.name)
        await self.store.remove(dataset.project, dataset.id)

    async def _delete_blob(self, sha256: str, owner: str) -> None:
        # The claim is committed before anyone looks who else needs the blob, and who needs it says so before it
        # looks for claims: whichever comes second sees the other.
        if await self.store.claim_blob(sha256, owner):
            await self.objects.delete_prefix(index_prefix(sha256))
            await self.objects.delete(blob_key(sha256))
            await self.store.release_blob(sha256, owner)
