"""Imports: what a user names is fetched in the background, into staging, from where it is validated like an upload."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import timedelta

from lathe.common.background import Wakeup
from lathe.common.errors import FailedPrecondition
from lathe.datasets.fetching import FetchBroke, FetchRefused
from lathe.datasets.model import Dataset, DatasetState, whole_file
from lathe.datasets.ports import Import, ImportStore
from lathe.datasets.service import DatasetsService
from lathe.datasets.sources import Sources

log = logging.getLogger(__name__)

MAX_TRIES = 5
_FIRST_WAIT = timedelta(seconds=5)
_LOOK_EVERY_S = 2.0


class _Unwanted(Exception):
    """The dataset was deleted."""


@dataclass(frozen=True, slots=True)
class Importing:
    """It can die anywhere: the import stays due, and is fetched again from the beginning.

    sources: None where the operator has not switched imports on. busy: ids of datasets that are fetched just now.
    """

    datasets: DatasetsService
    store: ImportStore
    sources: Sources | None
    busy: set[str] = field(default_factory=set)
    due: Wakeup = field(default_factory=Wakeup)

    def check_offered(self) -> None:
        """Raises FailedPrecondition."""
        if self.sources is None:
            raise FailedPrecondition(
                "Imports are switched off on this platform; upload the file, or ask its operator for imports.enabled.",
                reason="IMPORTS_OFF",
            )

    async def begin(self, dataset: Dataset, source: str) -> None:
        """Of a dataset that was just made; repeating it is no error."""
        if dataset.state is DatasetState.UPLOADING:
            await self.store.begin(dataset.project, dataset.id, source, self.datasets.clock.now())
            self.due.set()

    async def step(self) -> None:
        """Fetch what is due and nobody else is at, one after another. Raises Unavailable while the store is away."""
        if self.sources is None:
            return
        await self.store.forget_ended()
        for item in await self.store.due(self.datasets.clock.now()):
            if item.dataset_id not in self.busy:
                self.busy.add(item.dataset_id)
                try:
                    await self._import(item, self.sources)
                finally:
                    self.busy.discard(item.dataset_id)

    async def _import(self, item: Import, sources: Sources) -> None:
        dataset = await self.datasets.store.get(item.project, item.dataset_id)
        if dataset is None:
            return
        digest, size = hashlib.sha256(), 0

        async def content() -> AsyncIterator[bytes]:
            nonlocal size
            async for chunk in self._while_wanted(dataset, sources.read(item.source)):
                digest.update(chunk)
                size += len(chunk)
                yield chunk

        try:
            await self.datasets.objects.put(dataset.staging_key, content())
        except _Unwanted:
            return
        except FetchRefused as error:
            await self._fail(item, error.code, str(error))
        except FetchBroke as error:
            await self._again(item, str(error))
        else:
            store = self.datasets.store
            if await store.begin_validation(item.project, item.dataset_id, size, digest.hexdigest()):
                self.datasets.validation.set()

    async def _while_wanted(self, dataset: Dataset, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        clock = self.datasets.clock
        looked = clock.monotonic()
        async for chunk in chunks:
            if clock.monotonic() - looked > _LOOK_EVERY_S:
                looked = clock.monotonic()
                if await self.datasets.store.get(dataset.project, dataset.id) is None:
                    raise _Unwanted
            yield chunk

    async def _again(self, item: Import, why: str) -> None:
        tries = item.tries + 1
        if tries >= MAX_TRIES:
            await self._fail(item, "import_failed", f"{why} It was tried {tries} times.")
            return
        wait = _FIRST_WAIT * 2**item.tries
        log.info("The import of %s is tried again in %s: %s", item.dataset_id, wait, why)
        await self.store.again(item.dataset_id, tries, self.datasets.clock.now() + wait)

    async def _fail(self, item: Import, code: str, why: str) -> None:
        await self.store.fail(
            item.project, item.dataset_id, whole_file(code, f"It cannot be imported. {why}")
        )
