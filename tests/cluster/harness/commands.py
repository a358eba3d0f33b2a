"""Commands by plain name from PATH, and a failure that says what they said."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parents[3]
T = TypeVar("T")
POLL_S = 0.25


class CommandFailed(AssertionError):
    """A command ended with another exit code than 0, or did not end in time. Its output is in the message."""

    def __init__(self, argv: tuple[str, ...], code: int, output: str) -> None:
        super().__init__(f"{' '.join(argv)[:300]}: exit code {code}\n{output.strip()[-4000:]}")
        self.code = code
        self.output = output


def run(
    *argv: str | Path,
    stdin: str | None = None,
    timeout: float = 120.0,
    env: Mapping[str, str] | None = None,
    quiet: bool = True,
) -> str:
    """What the command wrote to stdout. env: added to ours. Raises CommandFailed with all that it wrote; its code is
    124, as of `timeout`, when the command did not end within `timeout` seconds and was killed.

    quiet: without it, stderr goes where ours goes.
    """
    words = tuple(str(word) for word in argv)
    try:
        done = subprocess.run(
            words,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if quiet else None,
            text=True,
            timeout=timeout,
            env={**os.environ, **(env or {})},
            cwd=ROOT,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        said = b"\n".join(part for part in (late.stdout, late.stderr) if part).decode(errors="replace")
        raise CommandFailed(words, 124, f"killed: it did not end within {timeout:.0f} s\n{said}") from None
    if done.returncode:
        raise CommandFailed(words, done.returncode, f"{done.stdout}\n{done.stderr or ''}")
    return done.stdout


def works(*argv: str, timeout: float = 30.0) -> bool:
    """Whether the command is there and ends with exit code 0."""
    try:
        run(*argv, timeout=timeout)
    except (CommandFailed, OSError):
        return False
    return True


def until(condition: Callable[[], T], timeout: float, what: str) -> T:
    """The first true answer. Raises AssertionError with `what` when there was none in `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"not within {timeout:.0f} s: {what}"
        time.sleep(POLL_S)
    return answer
