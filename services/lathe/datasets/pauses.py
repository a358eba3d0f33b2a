"""When work that failed for no known reason is tried again."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta

_FIRST = timedelta(seconds=2)
_LONGEST = timedelta(minutes=10)


@dataclass(frozen=True, slots=True)
class Pauses:
    """Pauses of pieces of work, by name: 2 s after the first failure, twice as long after each further one, at most 10
    minutes. What can never succeed must not read a large file again and again."""

    _failed: dict[str, tuple[timedelta, datetime]] = field(default_factory=dict)

    def waits(self, name: str, now: datetime) -> bool:
        """Whether the work's turn has not come yet."""
        return name in self._failed and now < self._failed[name][1]

    def begin(self, name: str, now: datetime) -> timedelta:
        """The work failed; the pause that begins now."""
        pause = min(2 * self._failed[name][0], _LONGEST) if name in self._failed else _FIRST
        self._failed[name] = pause, now + pause
        return pause

    def forget(self, name: str) -> None:
        """The work is done."""
        self._failed.pop(name, None)
