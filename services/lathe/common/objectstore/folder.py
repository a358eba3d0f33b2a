"""Objects as files under one folder: the store of `lathe up`."""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import shutil
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import BinaryIO, Self

from lathe.common.errors import AlreadyExists, InvalidArgument, Unavailable
from lathe.common.objectstore.base import (
    CHUNK_SIZE,
    ObjectInfo,
    local_disk,
    not_found,
    past_the_end,
    validate_key,
    validate_prefix,
    validate_range,
)

# Beside the objects, hence on their file system: a rename across file systems would not be atomic. No key begins
# with a dot.
_TEMPORARY = ".tmp"
_CONFLICTS = (errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY)
_NO_HARD_LINKS = (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)
_COMMIT_TRIES = 20
_BUFFER_BYTES = 64 * 1024
_SYNC_BYTES = 32 * 1024 * 1024


class FolderStore:
    """An object store in a folder. Several processes may use it at once.

    fsync: makes a file or folder durable (an argument so that tests can fill the disk).
    """

    def __init__(self, folder: Path, fsync: Callable[[int], None] = os.fsync) -> None:
        self._root = folder
        self._fsync = fsync

    async def put(
        self, key: str, data: bytes | AsyncIterable[bytes], *, if_absent: bool = False
    ) -> ObjectInfo:
        validate_key(key)
        if if_absent and await self.head(key) is not None:
            raise _exists(key)
        temporary = self._temporary()
        try:
            with _outages(key):
                file = await asyncio.to_thread(_create, temporary)
            try:
                # An OSError of the caller's stream is not an outage of the store: only our own steps are guarded.
                async with _EarlySync(file, self._fsync) as early:
                    async for chunk in _chunks(data):
                        with _outages(key):
                            await asyncio.to_thread(file.write, chunk)
                            await early.written(len(chunk))
                    with _outages(key):
                        await early.settle()
                        await asyncio.to_thread(self._sync, file)
            finally:
                with _outages(key):
                    await asyncio.to_thread(file.close)
            with _outages(key):
                return await asyncio.to_thread(self._commit, temporary, key, if_absent)
        finally:
            temporary.unlink(missing_ok=True)

    async def put_file(self, key: str, path: Path) -> ObjectInfo:
        validate_key(key)
        return await asyncio.to_thread(self._build, key, lambda file: _append(file, path))

    async def compose(self, sources: Sequence[str], target: str) -> None:
        validate_key(target)
        paths = [(source, self._path(source)) for source in sources]

        def write(file: BinaryIO) -> None:
            for source, path in paths:
                with _missing(source):
                    _append(file, path)

        await asyncio.to_thread(self._build, target, write)

    async def copy(self, source: str, target: str) -> None:
        origin = self._path(source)
        validate_key(target)
        await asyncio.to_thread(self._copy, source, origin, target)

    async def get(self, key: str) -> bytes:
        path = self._path(key)
        with _outages(key), _missing(key):
            return await asyncio.to_thread(path.read_bytes)

    async def stream(
        self, key: str, *, offset: int = 0, length: int | None = None, chunk_size: int = CHUNK_SIZE
    ) -> AsyncIterator[bytes]:
        path = self._path(key)
        validate_range(offset, length, chunk_size)
        with _outages(key), _missing(key):
            file = await asyncio.to_thread(path.open, "rb")
        try:
            size = os.fstat(file.fileno()).st_size
            if offset > size:
                raise past_the_end(key, offset, size)
            file.seek(offset)
            left = size - offset if length is None else min(length, size - offset)
            while left > 0:
                with _outages(key):
                    chunk = await asyncio.to_thread(file.read, min(chunk_size, left))
                if not chunk:
                    break
                left -= len(chunk)
                yield chunk
        finally:
            file.close()

    async def fetch(self, key: str, path: Path) -> None:
        origin = self._path(key)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")

        def work() -> None:
            try:
                with _missing(key):
                    source = origin.open("rb")
                with source, local_disk(path):
                    with temporary.open("xb") as file:
                        shutil.copyfileobj(source, file, CHUNK_SIZE)
                        self._sync(file)
                    temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)

        with _outages(key):
            await asyncio.to_thread(work)

    async def head(self, key: str) -> ObjectInfo | None:
        path = self._path(key)
        with _outages(key):
            return await asyncio.to_thread(_info, key, path)

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        validate_prefix(prefix)
        with _outages(prefix):
            found = await asyncio.to_thread(self._find, prefix)
        for info in found:
            yield info

    async def delete(self, key: str) -> None:
        path = self._path(key)
        with _outages(key):
            await asyncio.to_thread(self._delete, path)

    async def delete_prefix(self, prefix: str) -> None:
        validate_prefix(prefix, may_be_empty=False)

        def work() -> None:
            for info in self._find(prefix):
                self._delete(self._path(info.key))

        with _outages(prefix):
            await asyncio.to_thread(work)

    async def remove_unfinished(self, before: datetime) -> None:
        def work() -> None:
            with suppress(FileNotFoundError):
                for path in (self._root / _TEMPORARY).iterdir():
                    # It may be whole, and gone, at any moment.
                    with suppress(FileNotFoundError):
                        if path.stat().st_mtime < before.timestamp():
                            path.unlink()

        with _outages(None):
            await asyncio.to_thread(work)

    async def presigned_put(self, key: str, size: int, lifetime: timedelta) -> str | None:
        validate_key(key)
        return None

    async def check(self) -> None:
        def work() -> None:
            temporary = self._temporary()
            try:
                with _create(temporary) as file:
                    file.write(b"check")
                    self._sync(file)
            finally:
                temporary.unlink(missing_ok=True)

        with _outages(None):
            await asyncio.to_thread(work)

    def _path(self, key: str) -> Path:
        return self._root / validate_key(key)

    def _temporary(self) -> Path:
        return self._root / _TEMPORARY / secrets.token_hex(16)

    def _sync(self, file: BinaryIO) -> None:
        file.flush()
        self._fsync(file.fileno())

    def _build(self, key: str, write: Callable[[BinaryIO], None]) -> ObjectInfo:
        temporary = self._temporary()
        try:
            with _outages(key):
                with _create(temporary) as file:
                    write(file)
                    self._sync(file)
                return self._commit(temporary, key, if_absent=False)
        finally:
            temporary.unlink(missing_ok=True)

    def _copy(self, source: str, origin: Path, target: str) -> None:
        temporary = self._temporary()
        try:
            with _outages(target), _missing(source):
                temporary.parent.mkdir(parents=True, exist_ok=True)
                # Objects are replaced, never rewritten, so two names may share one file.
                try:
                    temporary.hardlink_to(origin)
                    os.utime(temporary)
                except OSError as error:
                    if error.errno not in _NO_HARD_LINKS:
                        raise
                    with temporary.open("xb") as file:
                        _append(file, origin)
                        self._sync(file)
                self._commit(temporary, target, if_absent=False)
        finally:
            temporary.unlink(missing_ok=True)

    def _commit(self, temporary: Path, key: str, if_absent: bool) -> ObjectInfo:
        """Give a finished file its name, durably."""
        path = self._path(key)
        for attempt in range(_COMMIT_TRIES):
            # A delete beside us may prune an empty folder between any two calls.
            last = attempt == _COMMIT_TRIES - 1
            try:
                self._make_folder(path.parent)
            except (FileNotFoundError, FileExistsError):
                if last:
                    raise
                continue
            try:
                if if_absent:
                    path.hardlink_to(temporary)
                else:
                    temporary.replace(path)
                break
            except FileExistsError as error:
                raise _exists(key) from error
            except FileNotFoundError:
                if last:
                    raise
        self._sync_folder(path.parent)
        info = _info(key, path)
        if info is None:
            raise Unavailable(f"Object {key!r} was deleted while it was written.", retry_after=1.0)
        return info

    def _make_folder(self, folder: Path) -> None:
        if folder.is_dir():
            return
        self._make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        self._sync_folder(folder.parent)

    def _sync_folder(self, folder: Path) -> None:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            self._fsync(descriptor)
        finally:
            os.close(descriptor)

    def _find(self, prefix: str) -> Sequence[ObjectInfo]:
        folder, _, beginning = prefix.rpartition("/")
        found = _walk(self._root / folder, f"{folder}/" if folder else "", beginning)
        return sorted(found, key=lambda info: info.key)

    def _delete(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except (NotADirectoryError, IsADirectoryError, PermissionError):
            # A key that is another's folder, or goes through another's file, is no object.
            if path.is_file():
                raise
            return
        for folder in path.parents:
            if folder == self._root:
                break
            try:
                folder.rmdir()
            except OSError:  # it is not empty, or gone already: both are as wanted
                break


class _EarlySync:
    """Has the disk write while more comes in: a single sync at the end would wait for all of it.

    Leaving the block waits for the disk, so that the file can be closed.
    """

    def __init__(self, file: BinaryIO, fsync: Callable[[int], None]) -> None:
        self._file = file
        self._fsync = fsync
        self._waiting = 0
        self._running: asyncio.Future[None] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._running is not None:
            await asyncio.wait({self._running})

    async def written(self, size: int) -> None:
        """Raises the OSError of syncing earlier bytes."""
        self._waiting += size
        if self._waiting >= _SYNC_BYTES:
            await self.settle()
            self._waiting = 0
            loop = asyncio.get_running_loop()
            self._running = loop.run_in_executor(None, self._fsync, self._file.fileno())

    async def settle(self) -> None:
        """Raises the OSError of the sync that runs: the system tells of it once, a later sync would hide it."""
        if self._running is not None:
            running, self._running = self._running, None
            await running


def _walk(folder: Path, base: str, beginning: str) -> Iterator[ObjectInfo]:
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        if not entry.name.startswith(beginning) or entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(folder / entry.name, f"{base}{entry.name}/", "")
        else:
            info = _info(base + entry.name, folder / entry.name)
            if info is not None:
                yield info


def _info(key: str, path: Path) -> ObjectInfo | None:
    try:
        stat = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if path.is_dir():
        return None
    return ObjectInfo(key, stat.st_size, datetime.fromtimestamp(stat.st_mtime, UTC))


def _create(path: Path) -> BinaryIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    # What is larger than the buffer is written without a copy into it.
    return path.open("xb", buffering=_BUFFER_BYTES)


def _append(file: BinaryIO, path: Path) -> None:
    with path.open("rb") as source:
        shutil.copyfileobj(source, file, CHUNK_SIZE)


async def _chunks(data: bytes | AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    if isinstance(data, bytes):
        yield data
        return
    async for chunk in data:
        yield chunk


def _exists(key: str) -> AlreadyExists:
    return AlreadyExists(f"There is an object {key!r} already.", reason="OBJECT_EXISTS")


@contextmanager
def _missing(key: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise not_found(key) from error


@contextmanager
def _outages(key: str | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if key is not None and error.errno in _CONFLICTS:
            raise InvalidArgument(
                f"{key!r} cannot be a key: it is the folder of other keys, or inside an object."
            ) from error
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise Unavailable(
            "The store's disk is full; free some space, then try again."
            if full
            else f"The store's folder cannot be used ({error.strerror}); try again.",
            reason="STORE_FULL" if full else "STORE_UNAVAILABLE",
            retry_after=30.0 if full else 1.0,
        ) from error
