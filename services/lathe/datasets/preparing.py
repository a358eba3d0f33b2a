"""What is done to datasets in the background: index their rows, find rows of held-out sets in them, write the ones
that are made from others."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from lathe.common.background import Wakeup
from lathe.common.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    RetryableError,
    Unavailable,
)
from lathe.common.objectstore.base import ObjectStore
from lathe.datasets.blobs import blob_chunks
from lathe.datasets.model import (
    MAX_OVERLAP_LINES,
    Dataset,
    DatasetState,
    Overlap,
    Report,
    index_prefix,
    whole_file,
)
from lathe.datasets.operations import (
    Choosing,
    Drop,
    Preparation,
    Split,
    Truncate,
    audit_of,
    check_parts,
    check_size,
    findings_of,
    parts_of,
)
from lathe.datasets.pauses import Pauses
from lathe.datasets.ports import DatasetStore
from lathe.datasets.rowindexes import RowIndexes
from lathe.datasets.selection import Cut, Selection, StrataPass, counts, select
from lathe.datasets.truncation import Truncations
from lathe.text.rowindex import VERSION, RowIndex

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Preparing:
    """Three kinds of work that wait for each other's results, never for each other's turn: jobs wait for comparisons,
    and writing a large dataset takes minutes. It can die anywhere: every row of the database says what is still to do,
    and doing it again gives the same.

    busy: names of the datasets that are written just now, shared with the cleaner, which leaves them alone.
    validation: set when there is something to validate. indexed: set when there is one index more.
    """

    store: DatasetStore
    objects: ObjectStore
    indexes: RowIndexes
    truncations: Truncations
    busy: set[str] = field(default_factory=set)
    validation: Wakeup = field(default_factory=Wakeup)
    indexed: Sequence[Wakeup] = ()
    pauses: Pauses = field(default_factory=Pauses)

    async def index_all(self) -> None:
        """Index all files that are not. Raises Unavailable if one of them has to wait."""
        files = await self.store.to_index(VERSION)
        await self._each((f"The index of {sha256}", partial(self.index, sha256)) for sha256 in files)

    async def compare_all(self) -> None:
        """Find all rows of held-out sets that somebody asked for. Raises Unavailable if a pair has to wait."""
        pairs = await self.store.overlaps_to_find()
        await self._each((_name(pair), partial(self.find_overlap, pair)) for pair in pairs)

    async def write_all(self) -> None:
        """Write all datasets that are made from others. Raises Unavailable if one of them has to wait."""
        datasets = await self.store.unwritten()
        await self._each((dataset.name, partial(self.write, dataset)) for dataset in datasets)

    async def _each(self, work: Iterable[tuple[str, Callable[[], Awaitable[None]]]]) -> None:
        done = [await self._tried(name, do) for name, do in work]
        for waiting in filter(None, done):
            raise waiting

    async def _tried(self, name: str, work: Callable[[], Awaitable[None]]) -> RetryableError | None:
        """Why the work has to wait; None once it is done, and while it pauses."""
        clock = self.indexes.clock
        if self.pauses.waits(name, clock.now()):
            return None
        try:
            await work()
        except RetryableError as error:
            return error
        except Exception:
            # One dataset with which something is wrong must not keep the others waiting.
            pause = self.pauses.begin(name, clock.now())
            log.exception("%s could not be prepared and is tried again in %s.", name, pause)
            return Unavailable(f"{name} could not be prepared.", retry_after=2)
        self.pauses.forget(name)
        return None

    async def index(self, sha256: str) -> None:
        """Make the row index of a file and note it. Raises Unavailable."""
        try:
            await self.indexes.make(sha256)
        except NotFound:
            # Deleted meanwhile; nobody asks for it any more.
            return
        if not await self.store.set_indexed(sha256, VERSION):
            await self.objects.delete_prefix(index_prefix(sha256))
            return
        for waiting in self.indexed:
            waiting.set()

    async def find_overlap(self, pair: Overlap) -> None:
        """Count the rows of a file that have an example of a frozen one. Raises Unavailable while one of the two is
        not indexed."""
        try:
            async with (
                self.indexes.opened(pair.frozen_sha256) as frozen,
                self.indexes.opened(pair.dataset_sha256) as file,
            ):
                found = await asyncio.to_thread(leaked_rows, frozen, file)
        except NotFound:
            # The sweep forgets the pair.
            return
        await self.store.set_overlap(replace(pair, count=found[0], lines=found[1]))

    async def write(self, dataset: Dataset) -> None:
        """Write an unwritten dataset into staging, from where it is validated like an upload; one that cannot be
        made becomes an ERROR that says why. Raises Unavailable."""
        assert dataset.preparation is not None
        self.busy.add(dataset.name)
        try:
            size, digest = await self._write(dataset, dataset.preparation)
        except (DataLoss, FailedPrecondition, InvalidArgument) as error:
            await self._refuse(dataset, whole_file("cannot_prepare", error.message))
        except NotFound:
            gone = (
                "The dataset that it is made from was deleted, or the base model of its audit. Make it anew."
            )
            await self._refuse(dataset, whole_file("parent_deleted", gone))
        else:
            if await self.store.set_written(dataset.project, dataset.id, size, digest):
                self.validation.set()
        finally:
            self.busy.discard(dataset.name)

    async def _write(self, dataset: Dataset, made: Preparation) -> tuple[int, str]:
        """Size and digest of what is in staging now."""
        pieces = await self._pieces(made)
        hashed, size = hashlib.sha256(), 0

        async def content() -> AsyncIterator[bytes]:
            nonlocal size
            async for rows in pieces:
                size += len(rows)
                await asyncio.to_thread(hashed.update, rows)
                yield rows

        await self.objects.put(dataset.staging_key, content())
        return size, hashed.hexdigest()

    async def _pieces(self, made: Preparation) -> AsyncIterator[bytes]:
        """The rows of what is made, as they come."""
        (parent,) = made.parents
        if isinstance(made.operation, Truncate):
            return self.truncations.rows(await self.truncations.begun(made.operation), parent.sha256)
        selection = await selected(made.operation, self.indexes, parent.sha256)
        cut = Cut(selection, parts_of(made.operation).index(made.part))
        return _cut(cut, self.objects, parent.sha256)

    async def _refuse(self, dataset: Dataset, report: Report) -> None:
        await self.store.finish_validation(dataset.project, dataset.id, DatasetState.ERROR, "", report)


async def selected(operation: Choosing, indexes: RowIndexes, sha256: str) -> Selection:
    """Which rows of the file an operation takes. Raises InvalidArgument for one that cannot be done to it or leaves
    too few rows, NotFound if the file is gone, DataLoss if it is damaged, Unavailable while it is not indexed."""
    async with indexes.opened(sha256) as index:
        check_size(operation, len(index))
        strata = await _strata(operation, indexes.objects, sha256)
        found = await _found(operation, indexes) | await _held_out(operation, indexes, index)
        selection = await asyncio.to_thread(select, operation, index, strata, found)
    check_parts(operation, counts(operation, selection))
    return selection


async def _strata(operation: Choosing, objects: ObjectStore, sha256: str) -> array[int] | None:
    if not isinstance(operation, Split) or not operation.stratify_by:
        return None
    work = StrataPass(operation.stratify_by)
    async for chunk in blob_chunks(objects, sha256):
        await asyncio.to_thread(work.feed, chunk)
    return await asyncio.to_thread(work.finish)


async def _found(operation: Choosing, indexes: RowIndexes) -> frozenset[int]:
    """The lines with a finding that the operation leaves out."""
    codes, audit = findings_of(operation), audit_of(operation)
    return await indexes.found_lines(audit.key, codes) if codes and audit is not None else frozenset()


async def _held_out(operation: Choosing, indexes: RowIndexes, file: RowIndex) -> frozenset[int]:
    """The lines with a row of the held-out sets that the operation leaves out."""
    lines: set[int] = set()
    for sha256 in operation.frozen if isinstance(operation, Drop) else ():
        async with indexes.opened(sha256) as frozen:
            lines.update(await asyncio.to_thread(_leaked_lines, frozen, file))
    return frozenset(lines)


def _leaked_lines(frozen: RowIndex, file: RowIndex) -> list[int]:
    return [file.entry(position).line for position in file.positions_sharing(frozen)]


def leaked_rows(frozen: RowIndex, file: RowIndex) -> tuple[int, tuple[int, ...]]:
    """How many rows of a file share an example with one of a held-out set, and the first lines."""
    count, lines = 0, []
    for position in file.positions_sharing(frozen):
        count += 1
        if count <= MAX_OVERLAP_LINES:
            lines.append(file.entry(position).line)
    return count, tuple(lines)


async def _cut(cut: Cut, objects: ObjectStore, sha256: str) -> AsyncIterator[bytes]:
    """What the chunks of a file give, without the empty ones. Raises DataLoss if it is damaged."""
    async for chunk in blob_chunks(objects, sha256):
        if rows := await asyncio.to_thread(cut.feed, chunk):
            yield rows
    if rows := await asyncio.to_thread(cut.finish):
        yield rows


def _name(pair: Overlap) -> str:
    return f"The comparison of {pair.dataset_sha256} with {pair.frozen_sha256}"
