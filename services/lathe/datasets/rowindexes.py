"""Row indexes in the object store: made in the background after validation, opened by whoever compares rows."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import AsyncIterator, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from lathe.common.background import Wakeup
from lathe.common.clock import Clock
from lathe.common.errors import DataLoss, FailedPrecondition, NotFound, Unavailable
from lathe.common.objectstore.base import ObjectStore
from lathe.datasets.folders import work_folder
from lathe.datasets.model import blob_key, index_key
from lathe.datasets.ports import DatasetStore
from lathe.text.findinglines import read_finding_lines
from lathe.text.rowindex import RowIndex, RowIndexWriter

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RowIndexes:
    """The row indexes of stored files, by the files' digests.

    folder: where they are worked with; made if missing. wanted: set when somebody asks for one that is not there.
    """

    store: DatasetStore
    objects: ObjectStore
    folder: Path
    clock: Clock
    wanted: Wakeup

    async def start(self) -> None:
        """Remove what a process that was killed left half-written."""
        await asyncio.to_thread(shutil.rmtree, self.folder, ignore_errors=True)

    async def make(self, sha256: str) -> None:
        """Write the index of a training file, unless it is there. Raises NotFound if the file is gone."""
        key = index_key(sha256)
        if await self.objects.head(key) is not None:
            return
        async with self._work() as folder:
            path = folder / "rows"
            writer = await asyncio.to_thread(RowIndexWriter, path)
            with writer:
                # Each chunk in a thread of its own turn: the event loop stays free between and during them.
                async for chunk in self.objects.stream(blob_key(sha256), chunk_size=256 * 1024):
                    await asyncio.to_thread(writer.feed, chunk)
                await asyncio.to_thread(writer.finish)
            await self.objects.put_file(key, path)

    @asynccontextmanager
    async def opened(self, sha256: str) -> AsyncIterator[RowIndex]:
        """The index of a training file, as long as the block lasts. Raises Unavailable if it has yet to be made, which
        then is done, and NotFound if the file is gone."""
        async with AsyncExitStack() as held:
            try:
                path = await held.enter_async_context(self.fetched(index_key(sha256)))
                index = await asyncio.to_thread(RowIndex, path)
            except (NotFound, DataLoss) as error:
                if isinstance(error, DataLoss):
                    log.warning("The row index of %s is damaged and is made anew: %s", sha256, error)
                    await self.objects.delete(index_key(sha256))
                if not await self.store.unset_indexed(sha256):
                    raise NotFound("The file whose rows are asked for was deleted.") from error
                self.wanted.set()
                raise Unavailable(
                    "The rows of this dataset are still being indexed. Try again in a moment.",
                    reason="NOT_INDEXED",
                    retry_after=1,
                ) from error
            yield index

    @asynccontextmanager
    async def fetched(self, key: str) -> AsyncIterator[Path]:
        """An object as a file, as long as the block lasts. Raises NotFound."""
        async with self._work() as folder:
            path = folder / "object"
            await self.objects.fetch(key, path)
            yield path

    async def found_lines(self, audit_key: str, codes: Collection[str]) -> frozenset[int]:
        """The lines for which an audit found one of these codes. Raises FailedPrecondition if the audit is
        gone."""
        audit = await self.store.get_audit(audit_key, self.clock.now())
        if audit is None or not audit.findings_key:
            raise FailedPrecondition("The audit whose findings are meant has gone. Ask for it anew.")
        async with self.fetched(audit.findings_key) as path:
            return await asyncio.to_thread(
                lambda: frozenset(line for line, _ in read_finding_lines(path, codes))
            )

    @asynccontextmanager
    async def _work(self) -> AsyncIterator[Path]:
        async with work_folder("rows-", self.folder) as folder:
            yield folder
