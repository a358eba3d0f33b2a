"""The bounded queue between the model thread and one reader of a sequence."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

from lathe.common.errors import LatheError
from lathe.engine.sampling import Sampled


@dataclass(frozen=True, slots=True)
class StreamStarted:
    """The prompt is done; so many of its tokens were cached."""

    cached_tokens: int


@dataclass(frozen=True, slots=True)
class StreamFinished:
    """The sequence ended. reason: `stop` or `length`."""

    reason: str


StreamItem = StreamStarted | Sampled | StreamFinished | LatheError


class TokenStream:
    """Written by the model thread, which looks for room first and so never waits; read by anyone.

    on_ready: called after something was put (in the model thread). on_room: called by the reader's `take`
    when it emptied a full queue.
    """

    def __init__(self, capacity: int, on_ready: Callable[[], None], on_room: Callable[[], None]) -> None:
        self._items: deque[StreamItem] = deque()
        self._capacity = capacity
        self._on_ready, self._on_room = on_ready, on_room
        self._lock = Lock()
        self._ended = False

    def has_room(self) -> bool:
        """Whether one more token fits."""
        with self._lock:
            return len(self._items) < self._capacity

    def put(self, item: StreamItem) -> None:
        """Add an item. Ends (finish or error) are taken even without room; nothing follows an end."""
        with self._lock:
            if self._ended:
                return
            self._ended = isinstance(item, (StreamFinished, LatheError))
            self._items.append(item)
        self._on_ready()

    def take(self) -> list[StreamItem]:
        """All that is there now; may be empty."""
        with self._lock:
            was_full = len(self._items) >= self._capacity
            items = list(self._items)
            self._items.clear()
        if was_full:
            self._on_room()
        return items
