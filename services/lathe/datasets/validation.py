"""The pass over a committed upload: hash, rows, the immutable blob."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import AsyncIterator, Collection, Sequence
from typing import Protocol

from lathe.common.errors import NotFound, RetryableError, Unavailable
from lathe.common.objectstore.base import ObjectStore
from lathe.datasets.model import (
    RESULTS_PURPOSE,
    Dataset,
    DatasetState,
    Report,
    blob_key,
    report_of,
    whole_file,
)
from lathe.datasets.ports import DatasetStore
from lathe.text.findings import Finding, Tally
from lathe.text.jsonl import LineSplitter
from lathe.text.jsonl import Validator as RowValidator

log = logging.getLogger(__name__)


class RowCheck(Protocol):
    """Is fed a file in chunks; `report` after the last one."""

    def feed(self, chunk: bytes) -> None: ...

    def report(self) -> Report: ...


class TrainingRows:
    """Purpose fine-tune: every line a training example, all of one format."""

    def __init__(self) -> None:
        self._validator = RowValidator()

    def feed(self, chunk: bytes) -> None:
        self._validator.feed(chunk)

    def report(self) -> Report:
        found = self._validator.finish()
        return Report(found.rows, found.finding_count, found.findings, found.format, found.groups)


class ObjectRows:
    """Purpose evals and batch: every line a JSON object."""

    def __init__(self) -> None:
        self._splitter = LineSplitter()
        self._rows = 0
        self._tally = Tally()

    def feed(self, chunk: bytes) -> None:
        for line in self._splitter.feed(chunk):
            self._check(line.number, line.data, line.too_long)

    def report(self) -> Report:
        for line in self._splitter.finish():
            self._check(line.number, line.data, line.too_long)
        if not self._rows:
            self._tally.add(
                Finding(0, "", "empty_file", "The file has no line; it must have one JSON object a line.")
            )
        return report_of(self._rows, self._tally)

    def _check(self, number: int, data: bytes, too_long: bool) -> None:
        self._rows += 1
        try:
            wrong = "the line is too long" if too_long else None
            if wrong is None and not isinstance(json.loads(data), dict):
                wrong = "the line must be one JSON object"
        except (ValueError, RecursionError) as error:
            wrong = f"the line is not JSON: {error}"
        if wrong is not None:
            self._tally.add(Finding(number, "", "line_too_long" if too_long else "invalid_json", wrong))


class AnyBytes:
    """Other purposes: only an empty file is refused."""

    def __init__(self) -> None:
        self._empty = True

    def feed(self, chunk: bytes) -> None:
        self._empty = self._empty and not chunk

    def report(self) -> Report:
        return whole_file("empty_file", "The file is empty.") if self._empty else Report()


def row_check(purpose: str) -> RowCheck:
    """What the rows of a file of this purpose must be."""
    if purpose == "fine-tune":
        return TrainingRows()
    return ObjectRows() if purpose in ("evals", "batch") else AnyBytes()


class Validation:
    """Validates what is VALIDATING. It can die anywhere: the dataset stays VALIDATING and is read again.

    busy: names of the datasets that are read just now, shared with the cleaner, which leaves them alone.
    """

    def __init__(self, store: DatasetStore, objects: ObjectStore, busy: set[str] | None = None) -> None:
        self._store = store
        self._objects = objects
        self._busy = busy if busy is not None else set()

    async def step(self) -> None:
        """Validate what nobody else is at, one after another, until nothing is left; several steps may run beside
        each other. Raises Unavailable if a dataset has to wait."""
        waiting: dict[str, RetryableError] = {}
        while (dataset := await self._next(waiting)) is not None:
            self._busy.add(dataset.name)
            try:
                await self.validate(dataset)
            except RetryableError as error:
                waiting[dataset.name] = error
            except Exception:
                # One file that cannot be read must not keep the others waiting.
                log.exception("%s could not be validated and is tried again.", dataset.name)
                waiting[dataset.name] = Unavailable(f"{dataset.name} could not be validated.", retry_after=2)
            finally:
                self._busy.discard(dataset.name)
        if waiting:
            raise next(iter(waiting.values()))

    async def _next(self, skipped: Collection[str]) -> Dataset | None:
        for dataset in await self._store.in_state(DatasetState.VALIDATING):
            # Jobs repeat the call that makes a results file; only they have its content.
            if dataset.purpose != RESULTS_PURPOSE and dataset.name not in {*skipped, *self._busy}:
                return dataset
        return None

    async def validate(self, dataset: Dataset) -> None:
        """VALIDATING -> READY or ERROR. The blob is made only when the digest is right, and the state written last."""
        sources = await self._sources(dataset)
        if not sources and dataset.size_bytes:
            report = whole_file(
                "upload_lost", "The uploaded bytes are not there any more. Upload the file again."
            )
            await self._finish(dataset, DatasetState.ERROR, "", report)
            return
        try:
            digest, size, report = await self._read(dataset, sources)
        except NotFound:
            # Deleted while it was read, or validated by another process at the same moment: the state knows.
            return
        if (digest, size) != (dataset.sha256, dataset.size_bytes):
            report = whole_file(
                "digest_mismatch",
                f"{size} bytes with sha256 {digest} were stored, {dataset.size_bytes} with {dataset.sha256} were "
                "announced: the file was damaged or stops half-way. Upload it again.",
            )
            await self._finish(dataset, DatasetState.ERROR, "", report)
            return
        if await self._store.is_claimed(digest):
            raise Unavailable(f"An earlier copy of {dataset.name} is still being deleted.", retry_after=1)
        await self._make_blob(sources, blob_key(digest), size)
        state = DatasetState.ERROR if report.finding_count else DatasetState.READY
        await self._finish(dataset, state, digest, report)

    async def _sources(self, dataset: Dataset) -> list[str]:
        """The staged object, or the staged parts in order."""
        if not dataset.staging_key:
            return []
        if await self._objects.head(dataset.staging_key) is not None:
            return [dataset.staging_key]
        return [info.key async for info in self._objects.list(dataset.staging_key + "/")]

    async def _read(self, dataset: Dataset, sources: Sequence[str]) -> tuple[str, int, Report]:
        digest, size = hashlib.sha256(), 0
        check = row_check(dataset.purpose)

        def take(chunk: bytes) -> None:
            digest.update(chunk)
            check.feed(chunk)

        async for chunk in self._chunks(sources):
            size += len(chunk)
            await asyncio.to_thread(take, chunk)
        report = await asyncio.to_thread(check.report)
        return digest.hexdigest(), size, report

    async def _chunks(self, sources: Sequence[str]) -> AsyncIterator[bytes]:
        for key in sources:
            async for chunk in self._objects.stream(key):
                yield chunk

    async def _make_blob(self, sources: Sequence[str], key: str, size: int) -> None:
        there = await self._objects.head(key)
        if there is not None and there.size == size:
            return
        if not sources:
            await self._objects.put(key, b"")
        elif len(sources) == 1:
            await self._objects.copy(sources[0], key)
        else:
            await self._objects.compose(sources, key)

    async def _finish(self, dataset: Dataset, state: DatasetState, sha256: str, report: Report) -> None:
        if await self._store.finish_validation(dataset.project, dataset.id, state, sha256, report):
            await clear_staging(dataset, self._store, self._objects)
        elif sha256 and await self._store.get(dataset.project, dataset.id) is None:
            # It was deleted meanwhile, perhaps before the blob was made.
            owner = validation_owner(dataset)
            if await self._store.claim_blob(sha256, owner):
                await self._objects.delete(blob_key(sha256))
            await self._store.release_blob(sha256, owner)


def validation_owner(dataset: Dataset) -> str:
    """Under which name a validation claims the blob of a dataset that was deleted meanwhile."""
    return f"{dataset.name}:validation"


async def clear_staging(dataset: Dataset, store: DatasetStore, objects: ObjectStore) -> None:
    """Delete what an upload left in staging, and note it."""
    if dataset.staging_key:
        await objects.delete_prefix(dataset.staging_key + "/")
        await objects.delete(dataset.staging_key)
        await store.clear_staging(dataset.project, dataset.id)
