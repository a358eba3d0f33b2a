"""Small files that change while a process runs: certificates and tokens, as Kubernetes swaps a mounted Secret."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import Generic, TypeVar

from lathe.common.clock import Clock, SystemClock
from lathe.common.errors import LatheError

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
T = TypeVar("T")
Stamps = tuple[tuple[int, int, int] | None, ...]


class Followed(Generic[T]):
    """What some files mean together, read again after they changed; looked for at most once a second.

    read: reads and checks the files; raises a LatheError that names the file. What raises is logged once and what was
    read before stays in use. May be asked from any thread.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[], T], clock: Clock | None = None) -> None:
        """Raises what `read` raises."""
        self._paths, self._read, self._clock = tuple(paths), read, clock or SystemClock()
        self._lock = Lock()
        self._complaint = ""
        self._looked = self._clock.monotonic()
        self._stamps = _stamps(self._paths)
        self._value = read()

    def current(self) -> T:
        """What the files mean now, as far as they can be read."""
        with self._lock:
            now = self._clock.monotonic()
            if now - self._looked >= LOOK_EVERY_S:
                self._looked = now
                self._look()
            return self._value

    def _look(self) -> None:
        stamps = _stamps(self._paths)
        if stamps == self._stamps:
            return
        try:
            value = self._read()
        except LatheError as error:
            # Tried again at every look: the writer may be half-way.
            if error.message != self._complaint:
                logger.warning("%s What was read before stays in use.", error.message)
            self._complaint = error.message
            return
        if _stamps(self._paths) != stamps:
            return  # changed while it was read; the next look has all of it
        self._stamps, self._value, self._complaint = stamps, value, ""
        logger.info("Read %s again.", ", ".join(map(str, self._paths)))


def _stamps(paths: Sequence[Path]) -> Stamps:
    return tuple(map(_stamp, paths))


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None  # `read` says what is wrong with it
    return found.st_ino, found.st_mtime_ns, found.st_size
