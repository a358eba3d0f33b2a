"""Objects in any S3 service. The client blocks, so each request runs in a thread, with a time limit of its own."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import urlsplit

import urllib3
from minio import Minio
from minio.commonconfig import ComposeSource, CopySource
from minio.deleteobjects import DeleteError, DeleteObject
from minio.error import InvalidResponseError, S3Error, ServerError

from lathe.common.errors import AlreadyExists, NotFound, Unavailable
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
from lathe.common.objectstore.presigning import for_size

T = TypeVar("T")

PART_SIZE = 8 * 1024 * 1024
# S3 joins parts by itself only if all but the last have this size at least.
_MIN_COMPOSE_PART = 5 * 1024 * 1024
# A store that stands still must be Unavailable before a caller's deadline has passed.
_CONNECT_S, _READ_S, _RETRIES = 3.0, 8.0, 2
# The store itself moves gigabytes then, and answers at the end.
_COPY_S = 120.0
_LIST_BATCH = 1000
_THREADS = 32
_UPLOAD_THREADS = 16
_MISSING = frozenset({"NoSuchKey", "NoSuchObject", "NotFound"})
_REFUSED = frozenset({"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "NoSuchBucket"})


@dataclass(frozen=True, slots=True)
class S3Config:
    """Where the bucket is. endpoint: `host:port`. secure: TLS. public_url: where clients reach the same service."""

    endpoint: str
    bucket: str
    access_key: str | None = None
    secret_key: str | None = None
    region: str = "us-east-1"
    secure: bool = True
    public_url: str | None = None


class S3Store:
    """An object store in one bucket, which exists already.

    `if_absent` looks before it writes: two writers at the same instant may both win. Keys that are named by the
    digest of their content lose nothing by that.
    """

    def __init__(
        self,
        config: S3Config,
        *,
        connect_timeout_s: float = _CONNECT_S,
        read_timeout_s: float = _READ_S,
        retries: int = _RETRIES,
    ) -> None:
        self._bucket = config.bucket
        self._secret_key = config.secret_key
        self._client = _client(config, connect_timeout_s, read_timeout_s, retries)
        self._copier = _client(config, connect_timeout_s, max(read_timeout_s, _COPY_S), retries)
        self._signer = _signer(config)
        # Not the loop's own threads: a store that stands still would take them all, and everybody else waits.
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="s3")
        # An upload keeps its thread while its source is read, and the source may need a thread too: with one
        # common pool, enough uploads would wait for each other for ever.
        self._uploads = ThreadPoolExecutor(_UPLOAD_THREADS, thread_name_prefix="s3-upload")

    async def put(
        self, key: str, data: bytes | AsyncIterable[bytes], *, if_absent: bool = False
    ) -> ObjectInfo:
        validate_key(key)
        if if_absent and await self.head(key) is not None:
            raise AlreadyExists(f"There is an object {key!r} already.", reason="OBJECT_EXISTS")
        source = _Reader(_once(data) if isinstance(data, bytes) else data, asyncio.get_running_loop())

        def work() -> None:
            self._client.put_object(
                self._bucket,
                key,
                # minio asks for a BinaryIO and uses `read` alone.
                cast(BinaryIO, source),
                -1,
                part_size=PART_SIZE,
                num_parallel_uploads=1,
            )

        try:
            with _outages(key):
                await asyncio.get_running_loop().run_in_executor(self._uploads, work)
        except BaseException:
            if source.failure is not None:  # what went wrong is the caller's stream, not the store
                raise source.failure from None
            raise
        finally:
            source.abandon()
        return await self._written(key)

    async def put_file(self, key: str, path: Path) -> ObjectInfo:
        validate_key(key)
        await self._run(
            key,
            lambda: self._client.fput_object(
                self._bucket, key, str(path), part_size=PART_SIZE, num_parallel_uploads=1
            ),
        )
        return await self._written(key)

    async def get(self, key: str) -> bytes:
        validate_key(key)

        def work() -> bytes:
            response = self._client.get_object(self._bucket, key)
            try:
                content: bytes = response.read()
                return content
            finally:
                response.close()
                response.release_conn()

        return await self._run(key, work)

    async def stream(
        self, key: str, *, offset: int = 0, length: int | None = None, chunk_size: int = CHUNK_SIZE
    ) -> AsyncIterator[bytes]:
        validate_key(key)
        validate_range(offset, length, chunk_size)
        if offset or length == 0:
            # A range that begins at the end is an error for S3, and 0 bytes mean "all" for minio.
            info = await self.head(key)
            if info is None:
                raise not_found(key)
            if offset > info.size:
                raise past_the_end(key, offset, info.size)
            if offset == info.size or length == 0:
                return
        response = await self._run(
            key, lambda: self._client.get_object(self._bucket, key, offset=offset, length=length or 0)
        )
        try:
            while chunk := await self._run(key, lambda: response.read(chunk_size)):
                yield chunk
        finally:
            response.close()
            response.release_conn()

    async def fetch(self, key: str, path: Path) -> None:
        validate_key(key)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")

        def work() -> None:
            with _outages(key):
                response = self._client.get_object(self._bucket, key)

            def received() -> bytes:
                with _outages(key):
                    chunk: bytes = response.read(CHUNK_SIZE)
                    return chunk

            try:
                with local_disk(path):
                    with temporary.open("xb") as file:
                        while chunk := received():
                            file.write(chunk)
                    temporary.replace(path)
            finally:
                response.close()
                response.release_conn()
                temporary.unlink(missing_ok=True)

        await self._run(key, work)

    async def head(self, key: str) -> ObjectInfo | None:
        validate_key(key)
        try:
            found = await self._run(key, lambda: self._client.stat_object(self._bucket, key))
        except NotFound:
            return None
        return _info(found)

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        validate_prefix(prefix)
        objects = self._client.list_objects(self._bucket, prefix=prefix or None, recursive=True)
        while batch := await self._run(prefix, lambda: tuple(islice(objects, _LIST_BATCH))):
            for found in batch:
                if not found.is_dir:
                    yield _info(found)

    async def copy(self, source: str, target: str) -> None:
        validate_key(source)
        validate_key(target)
        # minio joins parts by itself above S3's limit of 5 GiB for one copy.
        await self._run(
            source,
            lambda: self._copier.copy_object(self._bucket, target, CopySource(self._bucket, source)),
        )

    async def compose(self, sources: Sequence[str], target: str) -> None:
        validate_key(target)
        sizes = []
        for source in sources:
            info = await self.head(source)
            if info is None:
                raise not_found(source)
            sizes.append(info.size)
        if sources and sizes[-1] and all(size >= _MIN_COMPOSE_PART for size in sizes[:-1]):
            parts = [ComposeSource(self._bucket, source) for source in sources]
            await self._run(target, lambda: self._copier.compose_object(self._bucket, target, parts))
        else:
            await self.put(target, self._joined(sources))

    async def delete(self, key: str) -> None:
        validate_key(key)
        try:
            await self._run(key, lambda: self._client.remove_object(self._bucket, key))
        except NotFound:
            return

    async def delete_prefix(self, prefix: str) -> None:
        validate_prefix(prefix, may_be_empty=False)
        keys = [info.key async for info in self.list(prefix)]
        for start in range(0, len(keys), _LIST_BATCH):
            batch = [DeleteObject(key) for key in keys[start : start + _LIST_BATCH]]
            problems = await self._run(prefix, partial(self._remove, batch))
            if problems:
                raise Unavailable(
                    f"{len(problems)} objects under {prefix!r} could not be removed ({problems[0].code}).",
                    reason="STORE_UNAVAILABLE",
                    retry_after=1.0,
                )

    def _remove(self, batch: Sequence[DeleteObject]) -> tuple[DeleteError, ...]:
        return tuple(self._client.remove_objects(self._bucket, batch))

    async def remove_unfinished(self, before: datetime) -> None:
        """Nothing: the bucket's lifecycle rule for incomplete multipart uploads does it (docs/operations.md)."""

    async def presigned_put(self, key: str, size: int, lifetime: timedelta) -> str | None:
        validate_key(key)
        if self._signer is None:
            return None
        # Signing asks nobody: the region is given.
        url: str = self._signer.presigned_put_object(self._bucket, key, lifetime)
        return for_size(url, size, self._secret_key) if self._secret_key else url

    async def check(self) -> None:
        found = await self._run("check", lambda: self._client.bucket_exists(self._bucket))
        if not found:
            raise Unavailable(
                f"The store has no bucket {self._bucket!r}; create it.", reason="NO_BUCKET", retry_after=5.0
            )

    async def _joined(self, sources: Sequence[str]) -> AsyncIterator[bytes]:
        for source in sources:
            async for chunk in self.stream(source):
                yield chunk

    async def _written(self, key: str) -> ObjectInfo:
        info = await self.head(key)
        if info is None:
            raise Unavailable(f"Object {key!r} was deleted while it was written.", retry_after=1.0)
        return info

    async def _run(self, key: str, work: Callable[[], T]) -> T:
        with _outages(key):
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def _signer(config: S3Config) -> Minio | None:
    """Signs for the address that clients use: it is part of what is signed."""
    if config.public_url is None:
        return None
    url = urlsplit(config.public_url)
    return Minio(
        url.netloc,
        access_key=config.access_key,
        secret_key=config.secret_key,
        region=config.region,
        secure=url.scheme == "https",
    )


def _client(config: S3Config, connect_timeout_s: float, read_timeout_s: float, retries: int) -> Minio:
    pool = urllib3.PoolManager(
        timeout=urllib3.Timeout(connect=connect_timeout_s, read=read_timeout_s),
        maxsize=_THREADS,
        retries=urllib3.Retry(
            total=retries,
            # Who was not answered in time would not be answered the next time either.
            read=0,
            backoff_factor=0.2,
            status_forcelist=(500, 502, 503, 504),
            raise_on_status=False,
        ),
    )
    return Minio(
        config.endpoint,
        access_key=config.access_key,
        secret_key=config.secret_key,
        region=config.region,
        secure=config.secure,
        http_client=pool,
    )


class _Reader:
    """A blocking `read` over an asynchronous stream, for a thread; holds at most what `read` asks for."""

    def __init__(self, stream: AsyncIterable[bytes], loop: asyncio.AbstractEventLoop) -> None:
        self._stream = aiter(stream)
        self._loop = loop
        self._buffer = bytearray()
        self._ended = False
        self._abandoned = False
        self.failure: BaseException | None = None

    def read(self, size: int) -> bytes:
        while len(self._buffer) < size and not self._ended:
            if self._abandoned:
                raise OSError("the upload was abandoned")
            chunk = asyncio.run_coroutine_threadsafe(self._next(), self._loop).result()
            if chunk is None:
                self._ended = True
            else:
                self._buffer += chunk
        content = bytes(self._buffer[:size])
        del self._buffer[:size]
        return content

    def abandon(self) -> None:
        """No more is wanted: a thread that still reads gets an error, so that it aborts its upload."""
        self._abandoned = True

    async def _next(self) -> bytes | None:
        if self._abandoned:
            raise OSError("the upload was abandoned")
        try:
            return await anext(self._stream, None)
        except Exception as error:
            self.failure = error
            raise


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data


def _info(found: Any) -> ObjectInfo:
    return ObjectInfo(
        key=found.object_name,
        size=found.size or 0,
        modified=found.last_modified.astimezone(UTC)
        if found.last_modified
        else datetime.fromtimestamp(0, UTC),
    )


@contextmanager
def _outages(key: str) -> Iterator[None]:
    try:
        yield
    except S3Error as error:
        if error.code in _MISSING:
            raise not_found(key) from error
        if error.code in _REFUSED:
            # No fault of the request; some stores also say this while they start.
            raise Unavailable(
                f"The object store refuses us ({error.code}); check bucket, access_key and secret_key.",
                reason="STORE_REFUSED",
                retry_after=5.0,
            ) from error
        raise _away(error.code or "error") from error
    except (ServerError, InvalidResponseError, urllib3.exceptions.HTTPError, OSError) as error:
        raise _away(type(error).__name__) from error


def _away(why: str) -> Unavailable:
    return Unavailable(
        f"The object store cannot be used now ({why}); try again.",
        reason="STORE_UNAVAILABLE",
        retry_after=1.0,
    )
