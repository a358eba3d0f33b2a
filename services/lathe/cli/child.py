"""A platform of our own for a while: `lathe up` as a child process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

import lathe
from lathe.common.errors import FailedPrecondition

_STOP_S = 30.0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where it answers, and the key."""

    http: str
    grpc: str
    api_key: str


@dataclass(frozen=True, slots=True)
class ChildPlatform:
    """A `lathe up` that is starting. Its log is DIR/logs/up.log."""

    process: subprocess.Popen[str]
    log: Path

    def ready(self) -> Endpoint:
        """Wait until everything answers. Raises FailedPrecondition with what the platform said when it ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            said = self.log.read_text(errors="replace").strip().splitlines()
            raise FailedPrecondition(said[-1] if said else f"The platform did not start; see {self.log}.")
        return Endpoint(**json.loads(line))


@contextmanager
def child_platform(data: Path, engine_threads: int | None = None) -> Iterator[ChildPlatform]:
    """Start one on free ports; stop it, and the engines it started, when left, however that is."""
    logs = data / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)
        log = (logs / "up.log").open("w")
    except OSError as error:
        raise FailedPrecondition(f"The data folder {data} cannot be used: {error.strerror}.") from error
    command = [sys.executable, "-m", "lathe.cli.main", "up", "--data", str(data), "--json"]
    command += ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    if engine_threads is not None:
        command += ["--engine-threads", str(engine_threads)]
    root = str(Path(lathe.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    # A session of its own: Ctrl-C reaches us alone, and we end it in order.
    with log, terminated_as_exit():
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
            start_new_session=True,
        )
        try:
            yield ChildPlatform(process, logs / "up.log")
        finally:
            _stop(process)


@contextmanager
def terminated_as_exit() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C while inside, so that what was started is stopped."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
