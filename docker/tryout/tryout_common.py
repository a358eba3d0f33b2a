"""What the try-out's two servers share: their settings, their volume, and stopping when they are told to."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

ROOM_BYTES = 64 * 1024 * 1024


def refuse(message: str) -> NoReturn:
    """End with one sentence as the last line of the log."""
    print(message, file=sys.stderr, flush=True)
    sys.exit(1)


def setting(name: str, what: str) -> str:
    """A variable that must be there, on one line. what: it in words, for the sentence that asks for it."""
    value = os.environ.get(name, "")
    if not value:
        refuse(f"{name} is not set: give {what} in the environment.")
    if any(ord(character) < 32 for character in value):
        refuse(f"{name} has a line break or another control character in it: give {what} without one.")
    return value


def volume(path: Path) -> Path:
    """The data folder; ends the program if it cannot be written to or has no room."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".written-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        refuse(
            f"The volume at {path} cannot be written to by user {os.getuid()} ({error.strerror}): "
            "mount one that this user or group owns (fsGroup on Kubernetes), with room on it."
        )
    if full := lack_of_room(path):
        refuse(full)
    return path


def lack_of_room(path: Path) -> str:
    """One sentence if less than ROOM_BYTES are free there, else nothing."""
    free = shutil.disk_usage(path).free
    if free >= ROOM_BYTES:
        return ""
    return (
        f"The volume at {path} is full ({free // 2**20} MiB free, {ROOM_BYTES // 2**20} MiB needed): "
        "enlarge it, or remove what is no longer needed."
    )


class Server:
    """A running server, which gets `stop` when this process gets SIGTERM or SIGINT."""

    def __init__(self, command: Sequence[str], folder: Path, stop: signal.Signals) -> None:
        self._stop = stop
        self._told = False
        self._process: subprocess.Popen[bytes] | None = None
        for one in (signal.SIGTERM, signal.SIGINT):
            signal.signal(one, self._on_signal)
        # A terminal's Ctrl-C goes to the whole group; the server hears it from here only.
        self._process = subprocess.Popen(command, cwd=folder, start_new_session=True)
        if self._told:
            self._process.send_signal(stop)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._told = True
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(self._stop)

    @property
    def runs(self) -> bool:
        """Whether it is still there and nobody told it to stop."""
        return not self._told and self._process is not None and self._process.poll() is None

    def wait(self, name: str, data: Path) -> NoReturn:
        """Wait for its end and end with it; an end that nobody asked for is explained."""
        assert self._process is not None
        status = self._process.wait()
        if self._told and status in (0, -self._stop):
            sys.exit(0)
        refuse(lack_of_room(data) or f"{name} ended with status {status}: its own log, above, says why.")
