"""A file on its way up: read piece by piece, as often as it takes, and hashed once as it goes by."""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from lathe.common.errors import InvalidArgument

CHUNK_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Content:
    """What is uploaded. size: in bytes. written: when the file was last written, in ns, as far as its disk can tell."""

    source: Path | bytes
    name: str
    size: int
    written: int = 0

    @classmethod
    def of(cls, source: Path | str | bytes) -> Content:
        """Raises InvalidArgument for a file that cannot be read."""
        if isinstance(source, bytes):
            return cls(source, "data.jsonl", len(source))
        path = Path(source)
        try:
            with path.open("rb") as file:
                found = os.fstat(file.fileno())
        except OSError as error:
            raise _unreadable(path, error) from error
        return cls(path, path.name, found.st_size, found.st_mtime_ns)

    @contextmanager
    def opened(self) -> Iterator[IO[bytes]]:
        """The bytes, to be read from anywhere."""
        if isinstance(self.source, bytes):
            yield io.BytesIO(self.source)
        else:
            with self.source.open("rb") as file:
                yield file

    def pieces(self, offset: int) -> Iterator[bytes]:
        """The bytes from `offset`, CHUNK_BYTES at a time. Raises InvalidArgument where they cannot be read."""
        try:
            with self.opened() as file:
                file.seek(offset)
                while data := file.read(CHUNK_BYTES):
                    yield data
        except OSError as error:
            raise _unreadable(self.source, error) from error

    def check_unchanged(self) -> None:
        """Raises InvalidArgument for a file that is not what it was: what was sent of it may be of two versions."""
        if isinstance(self.source, bytes):
            return
        try:
            found = self.source.stat()
        except OSError as error:
            raise _unreadable(self.source, error) from error
        if (found.st_size, found.st_mtime_ns) != (self.size, self.written):
            raise InvalidArgument(
                f"{self.source} changed while it was uploaded; nothing was kept, upload it again.",
                reason="FILE_CHANGED",
            )


def _unreadable(source: object, error: OSError) -> InvalidArgument:
    return InvalidArgument(f"{source} cannot be read: {error.strerror}.")


class ContentDigest:
    """The SHA-256 of a content. Each byte is hashed once, however often its sending begins anew.

    A thread of a stream that broke may still be at its last piece when the next stream begins.
    """

    def __init__(self, content: Content) -> None:
        self.content = content
        self._hash = hashlib.sha256()
        self._hashed = 0
        self._lock = threading.Lock()

    def add(self, offset: int, data: bytes) -> None:
        """The bytes from `offset`, which is not past what was hashed so far."""
        with self._lock:
            new = memoryview(data)[self._hashed - offset :]
            self._hash.update(new)
            self._hashed += len(new)

    def hexdigest(self) -> str:
        """Of the whole content, in lower case; what was not hashed yet is read. Raises InvalidArgument."""
        self._read(threading.Event())
        return self._hash.hexdigest()

    @contextmanager
    def made_beside(self) -> Iterator[Callable[[], str]]:
        """Hash in a thread during the block, which gets what waits for `hexdigest`. That raises InvalidArgument."""
        stop = threading.Event()
        with ThreadPoolExecutor(1, thread_name_prefix="digest") as thread:
            reading = thread.submit(self._read, stop)

            def waited_for() -> str:
                reading.result()
                return self.hexdigest()

            try:
                yield waited_for
            finally:
                stop.set()

    def _read(self, stop: threading.Event) -> None:
        offset = self._hashed
        for data in self.content.pieces(offset):
            self.add(offset, data)
            offset += len(data)
            if stop.is_set():
                return
