"""The pass over a committed upload: hash, rows, the immutable blob."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from lathe.common.errors import NotFound, RetryableError, Unavailable
from lathe.common.objectstore.base import ObjectStore
from lathe.datasets.blobs import Blobs
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
        return Report(
            example_count=found.rows,
            finding_count=found.finding_count,
            findings=found.findings,
            format=found.format,
            groups=found.groups,
            layout=found.layout,
        )


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

    def __init__(self, blobs: Blobs, busy: set[str] | None = None) -> None:
        self._blobs = blobs
        self._store = blobs.store
        self._objects = blobs.objects
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
            if dataset.purpose == RESULTS_PURPOSE or dataset.unwritten:
                continue
            if dataset.name not in {*skipped, *self._busy}:
                return dataset
        return None

    async def validate(self, dataset: Dataset) -> None:
        """VALIDATING -> READY or ERROR. The blob is made only when the digest is right, and the state written last."""
        parts, md5 = await self._store.staged_parts(dataset.project, dataset.id)
        try:
            source = await self._frozen(dataset, parts)
        except NotFound:
            source = None
        if source is None and dataset.size_bytes:
            report = whole_file(
                "upload_lost", "The uploaded bytes are not there any more. Upload the file again."
            )
            await self._finish(dataset, DatasetState.ERROR, "", report)
            return
        try:
            found, report = await self._read(dataset, source, with_md5=bool(md5))
        except NotFound:
            # Deleted while it was read, or validated by another process at the same moment: the state knows.
            return
        damage = _damage(dataset, md5, found)
        if damage:
            await self._finish(dataset, DatasetState.ERROR, "", whole_file("digest_mismatch", damage))
            return
        # The row first: from here on nobody deletes the blob.
        if not await self._store.note_digest(dataset.project, dataset.id, found.sha256):
            return
        if await self._store.is_claimed(found.sha256):
            raise Unavailable(f"An earlier copy of {dataset.name} is still being deleted.", retry_after=1)
        await self._make_blob(source, blob_key(found.sha256), found.size)
        state = DatasetState.ERROR if report.has_errors else DatasetState.READY
        await self._finish(dataset, state, found.sha256, report)

    async def _frozen(self, dataset: Dataset, parts: Sequence[str]) -> str | None:
        """The upload as one object under a key that no uploader knows; None if nothing is there.

        What is hashed must be what is kept, and equal content is kept once for all projects: a stream or a presigned
        URL may still write to the keys in staging.
        """
        if not dataset.staging_key:
            return None
        frozen = frozen_key(dataset)
        if await self._objects.head(frozen) is not None:
            return frozen
        if await self._objects.head(dataset.staging_key) is not None:
            await self._objects.copy(dataset.staging_key, frozen)
            return frozen
        prefix = f"{dataset.staging_key}/"
        sources = [prefix + part for part in parts]
        sources = sources or [info.key async for info in self._objects.list(prefix)]
        if len(sources) == 1:
            await self._objects.copy(sources[0], frozen)
        elif sources:
            await self._objects.compose(sources, frozen)
        return frozen if sources else None

    async def _read(self, dataset: Dataset, source: str | None, *, with_md5: bool) -> tuple[_Found, Report]:
        sha256, md5, size = hashlib.sha256(), hashlib.md5(usedforsecurity=False), 0
        check = row_check(dataset.purpose)

        def take(chunk: bytes) -> None:
            sha256.update(chunk)
            if with_md5:
                md5.update(chunk)
            check.feed(chunk)

        if source is not None:
            async for chunk in self._objects.stream(source):
                size += len(chunk)
                await asyncio.to_thread(take, chunk)
        report = await asyncio.to_thread(check.report)
        return _Found(sha256.hexdigest(), md5.hexdigest(), size), report

    async def _make_blob(self, source: str | None, key: str, size: int) -> None:
        there = await self._objects.head(key)
        if there is not None and there.size == size:
            return
        if source is None:
            await self._objects.put(key, b"")
        else:
            await self._objects.copy(source, key)

    async def _finish(self, dataset: Dataset, state: DatasetState, sha256: str, report: Report) -> None:
        if await self._store.finish_validation(dataset.project, dataset.id, state, sha256, report):
            await clear_staging(dataset, self._store, self._objects)
        elif sha256 and await self._store.get(dataset.project, dataset.id) is None:
            # It was deleted meanwhile, perhaps before the blob was made.
            await self._blobs.delete(sha256, dataset.name)


@dataclass(frozen=True, slots=True)
class _Found:
    """The bytes as they were read. Digests in lower-case hex; md5 means something only if it was wanted."""

    sha256: str
    md5: str
    size: int


def _damage(dataset: Dataset, md5: str, found: _Found) -> str:
    """What is not as it was announced, in words; empty where all is. A digest may not have been announced."""
    if found.size == dataset.size_bytes and dataset.sha256 in ("", found.sha256):
        if md5 in ("", found.md5):
            return ""
        return f"The bytes have the MD5 {found.md5}, and {md5} was announced. Upload the file again."
    return (
        f"{found.size} bytes with sha256 {found.sha256} were stored, {dataset.size_bytes} with "
        f"{dataset.sha256 or 'any'} were announced: the file was damaged or stops half-way. Upload it again."
    )


def frozen_key(dataset: Dataset) -> str:
    """Where an upload lies while it is read."""
    return f"{dataset.staging_key}.whole"


async def clear_staging(dataset: Dataset, store: DatasetStore, objects: ObjectStore) -> None:
    """Delete what an upload left in staging, and note it."""
    if dataset.staging_key:
        await objects.delete_prefix(dataset.staging_key + "/")
        await objects.delete(dataset.staging_key)
        await objects.delete_prefix(f"{dataset.staging_key}.")
        await store.clear_staging(dataset.project, dataset.id)
