"""The pass over a committed upload: hash, rows, the immutable blob; of a file of another type, its rows as JSONL."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import shutil
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lathe.common.errors import LatheError, NotFound, RetryableError, Unavailable
from lathe.common.objectstore.base import ObjectStore, local_disk
from lathe.datasets.blobs import Blobs
from lathe.datasets.conversion import Converted, Converter, ReaderKilled, convert_apart, unreadable
from lathe.datasets.folders import work_folder
from lathe.datasets.model import (
    AUDIT_BEGINS,
    RESULTS_PURPOSE,
    Dataset,
    DatasetState,
    ImportOptions,
    Report,
    blob_key,
    whole_file,
)
from lathe.datasets.pauses import Pauses
from lathe.datasets.ports import DatasetStore
from lathe.datasets.rowchecks import RowCheck, row_check

log = logging.getLogger(__name__)

# So often what reads a file may be ended from outside before that is held against the file.
_READS = 3


class Validation:
    """Validates what is VALIDATING. It can die anywhere: the dataset stays VALIDATING and is read again.

    busy: names of the datasets that are read just now, shared with the cleaner, which leaves them alone. folder: where
    files of other types lie while they are converted; the system's temporary folder if not given.
    """

    def __init__(
        self,
        blobs: Blobs,
        busy: set[str] | None = None,
        *,
        folder: Path | None = None,
        convert: Converter = convert_apart,
    ) -> None:
        self._blobs = blobs
        self._store = blobs.store
        self._objects = blobs.objects
        self._busy = busy if busy is not None else set()
        self._folder = folder
        self._convert = convert
        self._killed: Counter[str] = Counter()
        self._pauses = Pauses()

    async def start(self) -> None:
        """Remove what a process that was killed left half-converted."""
        if self._folder is not None:
            await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)

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
                pause = self._pauses.begin(dataset.name, self._blobs.clock.now())
                log.exception("%s could not be validated and is tried again in %s.", dataset.name, pause)
                waiting[dataset.name] = Unavailable(f"{dataset.name} could not be validated.", retry_after=2)
            else:
                self._pauses.forget(dataset.name)
            finally:
                self._busy.discard(dataset.name)
        if waiting:
            raise next(iter(waiting.values()))

    async def _next(self, skipped: Collection[str]) -> Dataset | None:
        for dataset in await self._store.in_state(DatasetState.VALIDATING):
            # Jobs repeat the call that makes a results file; only they have its content.
            if dataset.purpose == RESULTS_PURPOSE or dataset.unwritten:
                continue
            if self._pauses.waits(dataset.name, self._blobs.clock.now()):
                continue
            if dataset.name not in {*skipped, *self._busy}:
                return dataset
        return None

    async def validate(self, dataset: Dataset) -> None:
        """VALIDATING -> READY or ERROR. The blob is made only when the digest is right, and the state written last."""
        # Of this try alone: another replica may validate the same upload, and must not write to what this one hashes.
        frozen = f"{dataset.staging_key}.{self._blobs.ids.token(24)}"
        try:
            await self._validate(dataset, frozen)
        except Exception:
            with suppress(LatheError):
                await self._objects.delete(frozen)
            raise

    async def _validate(self, dataset: Dataset, frozen: str) -> None:
        parts, md5 = await self._store.staged_parts(dataset.project, dataset.id)
        try:
            source = frozen if await self._freeze(dataset, parts, frozen) else None
        except NotFound:
            source = None
        if source is None and dataset.size_bytes:
            report = whole_file(
                "upload_lost", "The uploaded bytes are not there any more. Upload the file again."
            )
            await self._finish(dataset, DatasetState.ERROR, "", report)
            return
        try:
            if dataset.import_options is None:
                await self._take(dataset, source, md5)
            else:
                await self._import(dataset, dataset.import_options, source, md5)
        except NotFound:
            # Deleted while it was read, or validated by another process at the same moment: the state knows.
            return

    async def _take(self, dataset: Dataset, source: str | None, md5: str) -> None:
        """What was uploaded is what is stored."""
        check = row_check(dataset.purpose)
        found = await self._read(dataset, source, check, md5)
        if found is None:
            return
        report = await asyncio.to_thread(check.report)
        # The row first: from here on nobody deletes the blob.
        if not await self._store.note_digest(dataset.project, dataset.id, found.sha256):
            return
        await self._check_unclaimed(dataset, found.sha256)
        # Also where it is there already: what is there may be damaged, and these bytes were read just now.
        if source is None:
            await self._objects.put(blob_key(found.sha256), b"")
        else:
            await self._objects.copy(source, blob_key(found.sha256))
        await self._forget_failures(found.sha256)
        state = DatasetState.ERROR if report.has_errors else DatasetState.READY
        await self._finish(dataset, state, found.sha256, report)

    async def _import(self, dataset: Dataset, options: ImportOptions, source: str | None, md5: str) -> None:
        """What is stored is made of what was uploaded; nothing is if not all of it can be."""
        async with work_folder("convert-", self._folder) as folder:
            original, target = folder / "source", folder / "rows.jsonl"
            sizes = await self._file_sizes(dataset)
            check = _Files(original, sizes) if len(sizes) > 1 else _Copy(original)
            found = await self._read(dataset, source, check, md5)
            if found is None:
                return
            made = await self._converted(dataset, original, target, options)
            bad = made.report.has_errors
            sha256, size = ("", found.size) if bad else (made.sha256, made.size)
            uploaded = (found.sha256, found.size)
            if not await self._store.note_conversion(dataset.project, dataset.id, (sha256, size), uploaded):
                return
            if bad:
                await self._finish(dataset, DatasetState.ERROR, "", made.report)
                return
            await self._check_unclaimed(dataset, sha256)
            await self._objects.put_file(blob_key(sha256), target)
            await self._forget_failures(sha256)
            await self._finish(dataset, DatasetState.READY, sha256, made.report)

    async def _file_sizes(self, dataset: Dataset) -> list[int]:
        """Of an import of several files, each of which is a part; the parts of an upload are one file."""
        if not (dataset.source and dataset.staging_key):
            return []
        return [info.size async for info in self._objects.list(f"{dataset.staging_key}/")]

    async def _converted(
        self, dataset: Dataset, original: Path, target: Path, options: ImportOptions
    ) -> Converted:
        try:
            made = await self._convert(original, target, options)
        except ReaderKilled as error:
            self._killed[dataset.name] += 1
            if self._killed[dataset.name] < _READS:
                raise
            made = unreadable(f"{error.message} It did so {_READS} times; it may be a damaged file.")
        del self._killed[dataset.name]
        return made

    async def _check_unclaimed(self, dataset: Dataset, sha256: str) -> None:
        """Of the blob that the row names already. Raises Unavailable while an earlier one is deleted."""
        if await self._store.is_claimed(sha256):
            raise Unavailable(f"An earlier copy of {dataset.name} is still being deleted.", retry_after=1)

    async def _forget_failures(self, sha256: str) -> None:
        """Audits of a blob that was damaged are made anew; not those that end their processes."""
        await self._store.forget_failed_audits(begins=AUDIT_BEGINS, dataset_sha256=sha256)

    async def _freeze(self, dataset: Dataset, parts: Sequence[str], frozen: str) -> bool:
        """Make the upload one object under a key that nobody else knows; False if nothing is there.

        What is hashed must be what is kept, and equal content is kept once for all projects: a stream or a presigned
        URL may still write to the keys in staging.
        """
        if not dataset.staging_key:
            return False
        if await self._objects.head(dataset.staging_key) is not None:
            await self._objects.copy(dataset.staging_key, frozen)
            return True
        prefix = f"{dataset.staging_key}/"
        sources = [prefix + part for part in parts]
        sources = sources or [info.key async for info in self._objects.list(prefix)]
        if len(sources) == 1:
            await self._objects.copy(sources[0], frozen)
        elif sources:
            await self._objects.compose(sources, frozen)
        return bool(sources)

    async def _read(self, dataset: Dataset, source: str | None, check: RowCheck, md5: str) -> _Found | None:
        """Feed the upload to a check; None if it is not what was announced, and the dataset then an ERROR."""
        digest, check_sum, size = hashlib.sha256(), hashlib.md5(usedforsecurity=False), 0

        def take(chunk: bytes) -> None:
            digest.update(chunk)
            if md5:
                check_sum.update(chunk)
            check.feed(chunk)

        if source is not None:
            async for chunk in self._objects.stream(source):
                size += len(chunk)
                await asyncio.to_thread(take, chunk)
        found = _Found(digest.hexdigest(), check_sum.hexdigest(), size)
        damage = _damage(dataset, md5, found)
        if damage:
            await self._finish(dataset, DatasetState.ERROR, "", whole_file("digest_mismatch", damage))
            return None
        return found

    async def _finish(self, dataset: Dataset, state: DatasetState, sha256: str, report: Report) -> None:
        if await self._store.finish_validation(dataset.project, dataset.id, state, sha256, report):
            await clear_staging(dataset, self._store, self._objects)
        elif sha256 and await self._store.get(dataset.project, dataset.id) is None:
            # It was deleted meanwhile, perhaps before the blob was made.
            await self._blobs.delete(sha256, dataset.name)


class _Copy:
    """A RowCheck that only keeps the bytes in a file."""

    def __init__(self, path: Path) -> None:
        path.touch()
        self._path = path

    def feed(self, chunk: bytes) -> None:
        with local_disk(self._path), self._path.open("ab") as file:
            file.write(chunk)

    def report(self) -> Report:
        return Report()


class _Files:
    """The same with several files of these sizes, one after another in a folder."""

    def __init__(self, folder: Path, sizes: Sequence[int]) -> None:
        folder.mkdir()
        self._files = [(_Copy(folder / f"{number:05d}"), size) for number, size in enumerate(sizes)]
        self._number = self._size = 0

    def feed(self, chunk: bytes) -> None:
        while chunk:
            if self._number == len(self._files):
                return  # It will be told as damage: the digest is of other bytes.
            file, size = self._files[self._number]
            begin = chunk[: size - self._size]
            file.feed(begin)
            self._size += len(begin)
            chunk = chunk[len(begin) :]
            if self._size == size:
                self._number, self._size = self._number + 1, 0

    def report(self) -> Report:
        return Report()


@dataclass(frozen=True, slots=True)
class _Found:
    """The bytes as they were read. Digests in lower-case hex; md5 means something only if it was wanted."""

    sha256: str
    md5: str
    size: int


def _damage(dataset: Dataset, md5: str, found: _Found) -> str:
    """What is not as it was announced, in words; empty where all is. A digest may not have been announced."""
    size, sha256 = dataset.uploaded
    if found.size == size and sha256 in ("", found.sha256):
        if md5 in ("", found.md5):
            return ""
        return f"The bytes have the MD5 {found.md5}, and {md5} was announced. Upload the file again."
    return (
        f"{found.size} bytes with sha256 {found.sha256} were stored, {size} with "
        f"{sha256 or 'any'} were announced: the file was damaged or stops half-way. Upload it again."
    )


async def clear_staging(dataset: Dataset, store: DatasetStore, objects: ObjectStore) -> None:
    """Delete what an upload left in staging, and note it."""
    if dataset.staging_key:
        await clear_objects(objects, dataset.staging_key)
        await store.clear_staging(dataset.project, dataset.id)


async def clear_objects(objects: ObjectStore, staging_key: str) -> None:
    """Delete an upload: one object, or parts, and what was made of them."""
    await objects.delete_prefix(f"{staging_key}/")
    await objects.delete(staging_key)
    await objects.delete_prefix(f"{staging_key}.")
