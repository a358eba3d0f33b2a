"""Imports: what a user names is fetched in the background, into staging, from where it is validated like an upload."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from datetime import timedelta

from lathe.common.background import Wakeup
from lathe.common.errors import FailedPrecondition, LatheError, RetryableError
from lathe.datasets.fetching import FetchBroke, FetchRefused
from lathe.datasets.model import Dataset, DatasetState, whole_file
from lathe.datasets.pauses import Pauses
from lathe.datasets.ports import Import, ImportStore
from lathe.datasets.service import DatasetsService
from lathe.datasets.sources import Source, Sources
from lathe.datasets.validation import clear_objects

log = logging.getLogger(__name__)

MAX_TRIES = 5
LEASE = timedelta(minutes=1)
"""What nobody was heard of for so long is fetched by somebody else."""
UNFETCHED = timedelta(days=1)
"""What is due so long is fetched by nobody, where imports are switched off: while they are being switched on or off,
there are processes of both kinds."""
_FIRST_WAIT = timedelta(seconds=5)
_LOOK_EVERY_S = 5.0


class _NotOurs(Exception):
    """The dataset was deleted, or another try has taken it over."""


@dataclass(frozen=True, slots=True)
class Importing:
    """It can die anywhere: the import falls due again, and is fetched from the beginning. Several steps, in one process
    or many, may run beside each other.

    sources: None where the operator has not switched imports on.
    """

    datasets: DatasetsService
    store: ImportStore
    sources: Sources | None
    due: Wakeup = field(default_factory=Wakeup)
    _pauses: Pauses = field(default_factory=Pauses)

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
        """Fetch what is due and nobody else is at, one after another. Raises Unavailable while the database is away."""
        await self.store.forget_ended()
        while (item := await self._next()) is not None:
            if self.sources is None:
                await self._fail(item, "import_refused", "Imports were switched off on this platform.")
            else:
                await self._import(item, self.sources)

    async def _next(self) -> Import | None:
        now = self.datasets.clock.now()
        due = now if self.sources is not None else now - UNFETCHED
        return await self.store.take(self.datasets.new_staging_key(), due, now + LEASE)

    async def _import(self, item: Import, sources: Sources) -> None:
        work = asyncio.create_task(self._fetch(item, sources))
        try:
            await self._until(work, item)
            await work
        except _NotOurs:
            log.info("The import of %s is not wanted any more.", item.dataset_id)
        except FetchRefused as error:
            await self._fail(item, error.code, str(error))
        except FetchBroke as error:
            await self._again(item, str(error))
        except RetryableError as error:
            # The store's, not the source's.
            await self._later(item, error.message)
        except asyncio.CancelledError:
            # This process ends: nobody has to wait for the lease.
            with suppress(LatheError):
                await self.store.again(item, item.tries, self.datasets.clock.now())
            raise
        except Exception:
            log.exception("The import of %s failed.", item.dataset_id)
            await self._again(item, "Something went wrong on the platform itself.")
        finally:
            await _ended(work)
            # The dataset may be VALIDATING even if the answer that said so was lost.
            self.datasets.validation.set()

    async def _until(self, work: asyncio.Task[None], item: Import) -> None:
        """Wait for it, and say all the while that it goes on. Raises _NotOurs."""
        clock = self.datasets.clock
        while not work.done():
            pause = asyncio.ensure_future(clock.sleep(_LOOK_EVERY_S))
            try:
                await asyncio.wait((work, pause), return_when=asyncio.FIRST_COMPLETED)
            finally:
                pause.cancel()
            if not work.done() and not await self._keep(item):
                raise _NotOurs

    async def _keep(self, item: Import) -> bool:
        try:
            return await self.store.keep(item, self.datasets.clock.now() + LEASE)
        except RetryableError as error:
            # Whose it is shows at the end.
            log.warning("The import of %s goes on: %s", item.dataset_id, error.message)
            return True

    async def _fetch(self, item: Import, sources: Sources) -> None:
        """Into staging, and the dataset VALIDATING. Nothing is left where that cannot be."""
        # A try that died, or did not hear what became of its bytes, could not.
        await self._clear(item.earlier_key)
        try:
            size, sha256 = await self._stage(item, sources)
        except BaseException:
            await self._clear(item.staging_key)
            raise
        # From here on the row may name what is in staging, whatever becomes of the answer.
        if not await self.store.finish(item, size, sha256):
            await self._clear(item.staging_key)
            raise _NotOurs
        self._pauses.forget(item.dataset_id)

    async def _clear(self, staging_key: str) -> None:
        with suppress(LatheError):
            await clear_objects(self.datasets.objects, staging_key)

    async def _stage(self, item: Import, sources: Sources) -> tuple[int, str]:
        """Size and SHA-256 (lower-case hex) of all that is in staging then."""
        dataset = await self.datasets.store.get(item.project, item.dataset_id)
        if dataset is None:
            raise _NotOurs
        files = await sources.files(item.source)
        if len(files) > 1 and dataset.import_options is None:
            raise FetchRefused(
                f"It is {len(files)} files; only those of a training file are joined, which has the purpose fine-tune."
            )
        digest, size = hashlib.sha256(), 0

        async def content(file: Source) -> AsyncIterator[bytes]:
            nonlocal size
            async with aclosing(file()) as chunks:
                async for chunk in chunks:
                    digest.update(chunk)
                    size += len(chunk)
                    if size > sources.max_bytes:
                        raise FetchRefused(
                            f"It is larger than {sources.max_bytes} bytes.", "import_too_large"
                        )
                    yield chunk

        for key, file in zip(_keys(item.staging_key, len(files)), files, strict=True):
            await self.datasets.objects.put(key, content(file))
        return size, digest.hexdigest()

    async def _again(self, item: Import, why: str) -> None:
        tries = item.tries + 1
        if tries >= MAX_TRIES:
            await self._fail(item, "import_failed", f"{why} It was tried {tries} times.")
            return
        wait = _FIRST_WAIT * 2**item.tries
        log.info("The import of %s is tried again in %s: %s", item.dataset_id, wait, why)
        await self.store.again(item, tries, self.datasets.clock.now() + wait)

    async def _later(self, item: Import, why: str) -> None:
        now = self.datasets.clock.now()
        pause = self._pauses.begin(item.dataset_id, now)
        log.warning("The import of %s waits %s: %s", item.dataset_id, pause, why)
        await self.store.again(item, item.tries, now + pause)

    async def _fail(self, item: Import, code: str, why: str) -> None:
        await self.store.fail(item, whole_file(code, f"It cannot be imported. {why}"))


def _keys(staging_key: str, count: int) -> Sequence[str]:
    """Where so many files go, in order."""
    return [staging_key] if count == 1 else [f"{staging_key}/{number:05d}" for number in range(count)]


async def _ended(work: asyncio.Task[None]) -> None:
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
