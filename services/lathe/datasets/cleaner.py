"""What goes in the background: deleted and outlived datasets, left staging, audits that nobody needs, orphans."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from lathe.common.names import IMPORT_STAGING
from lathe.common.objectstore.base import ObjectInfo, ObjectStore
from lathe.datasets.blobs import Blobs
from lathe.datasets.model import AUDIT_BEGINS, Dataset, DatasetState
from lathe.datasets.ports import DatasetStore, UploadStore
from lathe.datasets.service import TokenUse
from lathe.datasets.uploads import REMEMBERED_FOR
from lathe.datasets.validation import clear_staging

log = logging.getLogger(__name__)

ABANDONED_AFTER = timedelta(days=1)
# A job that waits or runs when its file is deleted starts its next attempt from the same tokens: jobs says every few
# hours what it needs. While it says nothing, nobody knows, and nothing goes.
AUDIT_KEPT = timedelta(days=7)
TOLD_WITHIN = timedelta(days=1)
# The fault may have passed; of an audit that ended its process again and again only somebody's mending.
FAILED_KEPT = timedelta(minutes=10)
GIVEN_UP_KEPT = timedelta(days=1)
# What is younger may be about to be named.
ORPHANED_AFTER = timedelta(days=1)
_BATCH = 500


@dataclass(frozen=True, slots=True)
class Cleaner:
    """Each step can be repeated: a process that dies anywhere leaves a row that says what is still to do, or an object
    that no row names, which the sweep of orphans finds.

    busy: names of datasets that are being validated: their turn comes with a later sweep. token_use: shared with the
    service, which hears what jobs needs.
    """

    blobs: Blobs
    uploads: UploadStore
    busy: Collection[str] = ()
    token_use: TokenUse = field(default_factory=TokenUse)

    @property
    def store(self) -> DatasetStore:
        return self.blobs.store

    @property
    def objects(self) -> ObjectStore:
        return self.blobs.objects

    async def sweep(self) -> None:
        """Delete all there is to delete now. Raises Unavailable if the database or the store is away."""
        now = self.blobs.clock.now()
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
        if self._told(now):
            for key in await self.store.unneeded_audits(now - AUDIT_KEPT):
                await self.store.begin_remove_audit(key, now - AUDIT_KEPT)
        await self.store.forget_failed_audits(begins=AUDIT_BEGINS, unused_since=now - FAILED_KEPT)
        await self.store.forget_failed_audits(unused_since=now - GIVEN_UP_KEPT)
        await self.store.forget_overlaps()
        for sha256, owner in await self.store.left_claims(now):
            await self.blobs.delete(sha256, owner)

    def _told(self, now: datetime) -> bool:
        told = self.token_use.told
        return told is not None and now - told < TOLD_WITHIN

    async def _remove(self, dataset: Dataset) -> None:
        await clear_staging(dataset, self.store, self.objects)
        if dataset.sha256:
            await self.blobs.delete(dataset.sha256, dataset.name)
        await self.store.remove(dataset.project, dataset.id)

    async def sweep_orphans(self) -> None:
        """Delete what lies in the store and no row names: bytes that arrived, or were made one object, when their
        dataset was gone already, and what a process that was killed left half-written. Raises Unavailable."""
        before = self.blobs.clock.now() - ORPHANED_AFTER
        await self.objects.remove_unfinished(before)
        async for batch in self._old("staging/", _staging_root, before):
            for key in await self.store.unnamed_staging(batch):
                log.info("%s is no upload's any more; it goes.", key)
                await self.objects.delete_prefix(f"{key}/")
                await self.objects.delete_prefix(f"{key}.")
                await self.objects.delete(key)
        for prefix in ("blobs/", "rowindexes/"):
            async for batch in self._old(prefix, _digest, before):
                for sha256 in await self.store.unnamed(batch):
                    log.info("Nothing needs the blob %s; it goes.", sha256)
                    await self.blobs.delete(sha256, "orphan")

    async def _old(
        self, prefix: str, name: Callable[[ObjectInfo], str], before: datetime
    ) -> AsyncIterator[list[str]]:
        """The names of the objects that were written before then, in batches."""
        names: dict[str, None] = {}
        async for info in self.objects.list(prefix):
            if info.modified < before and not info.key.startswith(IMPORT_STAGING):
                names[name(info)] = None
            if len(names) == _BATCH:
                yield list(names)
                names.clear()
        if names:
            yield list(names)


def _staging_root(info: ObjectInfo) -> str:
    """staging/{random} of staging/{random}, staging/{random}/{part} and staging/{random}.{step}."""
    return f"staging/{info.key.split('/')[1].split('.')[0]}"


def _digest(info: ObjectInfo) -> str:
    return info.key.split("/")[1].split(".")[0]
