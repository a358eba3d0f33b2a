"""Row indexes in the object store: made in the background after validation, opened by whoever compares rows."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lathe.common.background import Wakeup
from lathe.common.clock import Clock
from lathe.common.errors import DataLoss, FailedPrecondition, NotFound, Unavailable
from lathe.common.objectstore.base import ObjectStore
from lathe.datasets.blobs import fetch_blob
from lathe.datasets.folders import work_folder
from lathe.datasets.model import blob_key, index_key
from lathe.datasets.ports import DatasetStore
from lathe.text.findinglines import read_finding_lines
from lathe.text.rowindex import RowIndex, RowIndexWriter

log = logging.getLogger(__name__)

KEPT_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class RowIndexes:
    """The row indexes of stored files, by the files' digests.

    folder: where they are worked with; made if missing. wanted: set when somebody asks for one that is not there.
    kept_bytes: how much of fetched indexes stays in the folder.
    """

    store: DatasetStore
    objects: ObjectStore
    folder: Path
    clock: Clock
    wanted: Wakeup
    kept_bytes: int = KEPT_BYTES
    _alone: asyncio.Lock = field(default_factory=asyncio.Lock)

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
        try:
            async with self._alone:
                index = await self._kept(index_key(sha256))
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

    async def _kept(self, key: str) -> RowIndex:
        """From the folder, where the last ones that were used stay. Raises NotFound, DataLoss."""
        path = self.folder / "kept" / key.rpartition("/")[2]
        if await self.objects.head(key) is None:
            raise NotFound(f"There is no {key}.")
        if not await asyncio.to_thread(path.is_file):
            await asyncio.to_thread(path.parent.mkdir, parents=True, exist_ok=True)
            await self.objects.fetch(key, path)
        try:
            index = await asyncio.to_thread(RowIndex, path)
        except DataLoss:
            await asyncio.to_thread(path.unlink)
            raise
        await asyncio.to_thread(_use, path, self.kept_bytes)
        return index

    async def found_lines(self, audit_key: str, codes: Collection[str]) -> frozenset[int]:
        """The lines for which an audit found one of these codes. Raises FailedPrecondition if the audit is
        gone, DataLoss if what it found is damaged."""
        audit = await self.store.get_audit(audit_key, self.clock.now())
        if audit is None or not audit.findings_key:
            raise FailedPrecondition("The audit whose findings are meant has gone. Ask for it anew.")
        async with self._work() as folder:
            path = folder / "findings"
            await fetch_blob(self.objects, audit.result.findings_sha256, path)
            return await asyncio.to_thread(
                lambda: frozenset(line for line, _ in read_finding_lines(path, codes))
            )

    @asynccontextmanager
    async def _work(self) -> AsyncIterator[Path]:
        async with work_folder("rows-", self.folder) as folder:
            yield folder


def _use(path: Path, kept_bytes: int) -> None:
    """Note that an index was used, and remove the ones that were not for the longest time. Whoever has one open reads
    on: its bytes are mapped."""
    path.touch()
    others = [(file.stat(), file) for file in path.parent.iterdir() if file != path]
    room = kept_bytes - path.stat().st_size
    for facts, file in sorted(others, key=lambda other: other[0].st_mtime_ns, reverse=True):
        room -= facts.st_size
        if room < 0:
            file.unlink()
