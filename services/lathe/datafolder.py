"""The folder of an embedded platform: its lock, its version, its secrets, its first key.

DIR/VERSION            format of everything below
DIR/lock               held while a platform runs on it
DIR/api_key            the default project's first key (mode 600)
DIR/endpoint.json      where a running platform answers; gone when it does not run
DIR/secrets/           tokens that its processes show one another (mode 600)
DIR/db/  DIR/store/    databases and objects
DIR/engines/           which engines run, so that the next start finds what a killed one left
DIR/cache/  DIR/logs/  may be deleted while nothing runs
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lathe.common.errors import FailedPrecondition

FORMAT_VERSION = 1
_SUBFOLDERS = ("secrets", "db", "store", "cache", "logs")


@dataclass(frozen=True, slots=True)
class DataFolder:
    """Paths under one platform's folder."""

    root: Path

    @property
    def api_key_file(self) -> Path:
        return self.root / "api_key"

    @property
    def endpoint_file(self) -> Path:
        return self.root / "endpoint.json"

    @property
    def service_token_file(self) -> Path:
        return self.root / "secrets" / "service_token"

    @property
    def engine_token_file(self) -> Path:
        return self.root / "secrets" / "engine_token"

    def database_url(self, service: str) -> str:
        """The SQLite URL of one service's database."""
        return f"sqlite+aiosqlite:///{self.root / 'db' / service}.sqlite"


@contextlib.contextmanager
def opened(root: Path) -> Iterator[DataFolder]:
    """The folder, made if needed, and locked while inside.

    Raises FailedPrecondition, one sentence, when another platform runs on it, when a newer version wrote it, or
    when it cannot be written.
    """
    root = root.expanduser().absolute()
    try:
        for name in _SUBFOLDERS:
            (root / name).mkdir(parents=True, exist_ok=True)
        (root / "secrets").chmod(0o700)
        lock = (root / "lock").open("w")
    except OSError as error:
        raise FailedPrecondition(f"The data folder {root} cannot be used: {error.strerror}.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FailedPrecondition(
                f"Another `lathe up` is running on {root}; stop it or choose another --data.",
                reason="DATA_FOLDER_IN_USE",
            ) from error
        _check_version(root / "VERSION")
        folder = DataFolder(root)
        _make_secret(folder.service_token_file, secrets.token_hex(32))
        _make_secret(folder.engine_token_file, secrets.token_hex(32))
        _make_secret(folder.api_key_file, "sk-lathe-" + secrets.token_hex(24))
        try:
            yield folder
        finally:
            folder.endpoint_file.unlink(missing_ok=True)


def write_endpoint(folder: DataFolder, http: str, grpc: str) -> None:
    """Tell commands on this machine where the platform answers."""
    _write(folder.endpoint_file, json.dumps({"http": http, "grpc": grpc}), 0o600)


def _check_version(path: Path) -> None:
    if not path.exists():
        _write(path, f"{FORMAT_VERSION}\n", 0o644)
        return
    text = path.read_text().strip()
    if not text.isdecimal() or int(text) > FORMAT_VERSION:
        raise FailedPrecondition(
            f"The data folder {path.parent} has format {text or 'unknown'}, written by a newer version of Lathe; "
            f"this one reads up to {FORMAT_VERSION}. Start the newer version, or choose another --data.",
            reason="DATA_FOLDER_NEWER",
        )


def _make_secret(path: Path, value: str) -> None:
    if not path.exists():
        _write(path, value + "\n", 0o600)


def _write(path: Path, text: str, mode: int) -> None:
    # Whole or not at all: a process may die at any instruction.
    temporary = path.with_name(path.name + ".new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
