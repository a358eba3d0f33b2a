"""The tokens by which services know each other, and how one is replaced while they run.

A token file has one token, or several, a line each: the first is shown, all are accepted. When the file changes, each
process sees it at a time of its own (kubelet takes up to a minute and a half). So whoever calls goes on showing the
old token for a while, and whoever is called accepts the old one for longer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lathe.common.clock import Clock, SystemClock
from lathe.common.errors import FailedPrecondition
from lathe.common.follow import Followed

# Longer than the whole platform takes to see a change, and together with that shorter than ACCEPT_OLD_S.
SHOW_OLD_S = 120.0
ACCEPT_OLD_S = 300.0


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a token file held over time; of `before`, the first is still shown for a while.

    since: when `now` was first seen, in monotonic seconds.
    """

    now: tuple[str, ...]
    before: tuple[str, ...] = ()
    since: float = 0.0


def replaced(known: Tokens, read: tuple[str, ...], time: float) -> Tokens:
    """`known` after the file was found to hold `read`."""
    if read == known.now:
        return known
    # What is shown now goes on: `known.now` may have been there too shortly for anybody else to see.
    before = tuple(dict.fromkeys((shown(known, time), *known.now, *accepted(known, time))))
    return Tokens(read, before, time)


def shown(tokens: Tokens, time: float) -> str:
    """The token that a caller shows."""
    if tokens.before and time - tokens.since < SHOW_OLD_S:
        return tokens.before[0]
    return tokens.now[0]


def accepted(tokens: Tokens, time: float) -> tuple[str, ...]:
    """The tokens that a server takes."""
    return tokens.now + (tokens.before if time - tokens.since < ACCEPT_OLD_S else ())


class TokenFile:
    """A token file, followed while the process runs."""

    def __init__(self, path: Path, clock: Clock | None = None) -> None:
        """Raises FailedPrecondition if the file cannot be read or is empty."""
        self._clock = clock or SystemClock()
        self._file = Followed((path,), lambda: read_tokens(path), self._clock)
        self._tokens = Tokens(self._file.current())

    def shown(self) -> str:
        """The token for a call that is made now."""
        return shown(self._look(), self._clock.monotonic())

    def accepted(self) -> tuple[str, ...]:
        """The tokens that a call may carry now."""
        return accepted(self._look(), self._clock.monotonic())

    def _look(self) -> Tokens:
        self._tokens = replaced(self._tokens, self._file.current(), self._clock.monotonic())
        return self._tokens


def read_tokens(path: Path) -> tuple[str, ...]:
    """The tokens in a file, a line each. Raises FailedPrecondition if it is missing or empty."""
    try:
        tokens = tuple(path.read_text(encoding="ascii").split())
    except (OSError, UnicodeDecodeError) as error:
        raise FailedPrecondition(f"The token file {path} cannot be read: {error}.") from error
    if not tokens:
        raise FailedPrecondition(f"The token file {path} is empty; put one secret into it.")
    return tokens


def read_token(path: Path) -> str:
    """The first token of a file. Raises FailedPrecondition if it is missing or empty."""
    return read_tokens(path)[0]
