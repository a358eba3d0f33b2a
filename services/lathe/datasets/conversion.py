"""A training file of another type, or under other names, as JSONL: what is stored, audited and trained on.

It is read in a process of its own, which has neither credentials nor much memory: what such files can do to the
libraries that unpack them ends there.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import resource
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

import lathe
from lathe.common.errors import Unavailable
from lathe.common.objectstore.base import LOCAL_DISK, local_disk
from lathe.datasets.model import MAX_BYTES, ImportOptions, Report, training_report, whole_file
from lathe.text.errors import RowError
from lathe.text.jsonl import MAX_LINE_BYTES, Line, Validator
from lathe.text.readers import read_records
from lathe.text.records import Record

MAX_MEMORY_BYTES = 512 << 20
"""Of the process that reads a file: what it may have beside its code."""
# Some ten times what the largest file takes, in seconds of CPU.
_MAX_CPU_S = 7200
# Who sends these stops a machine, or makes room on it: it says nothing of the file.
_FROM_OUTSIDE = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
# What a file may unpack to: so many times its own size, and this much beside. A row counts this much at least.
_MAX_RATIO = 200
_SLACK_BYTES = 64 << 20
_MIN_ROW_BYTES = 32
_LOCAL_DISK_FULL = 3
# A number of a table is one in JSON.
_ENCODER = msgspec.json.Encoder(decimal_format="number")
_KEPT_VARIABLES = ("PATH", "PYTHONPATH", "LANG", "TZ", "LD_LIBRARY_PATH", "TMPDIR")


class ReaderKilled(Unavailable):
    """The process that reads a file was ended from outside: perhaps for other reasons than the file."""


class Converted(msgspec.Struct, frozen=True):
    """The JSONL that was written: its digest (lower-case hex) and size, and what is to be said of its rows. If the
    report has errors, what was written is not whole."""

    sha256: str
    size: int
    report: Report


class Converter(Protocol):
    """Reads `source`, writes `target`. Raises Unavailable if the local disk is full, ReaderKilled if something ended
    it."""

    async def __call__(self, source: Path, target: Path, options: ImportOptions) -> Converted: ...


def convert(source: Path, target: Path, options: ImportOptions) -> Converted:
    """In this process. Every row is checked as it is written. source: a file, or a folder of files that are read by
    name, one after another. Raises Unavailable."""
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    limit = min(MAX_BYTES, sum(file.stat().st_size for file in files) * _MAX_RATIO + _SLACK_BYTES)
    writer = _Writer()
    with local_disk(target), target.open("wb") as file:
        try:
            for record in _records(files, options):
                file.write(writer.line(record))
                if writer.validator.stopped:
                    break
                if writer.charged > limit:
                    raise RowError("", "too_large", f"the file unpacks to more than {limit} bytes")
        except RowError as error:
            writer.stop(error)
        except MemoryError:
            writer.stop(RowError("", "too_large", "reading the file takes more memory than a file may have"))
    return Converted(writer.digest.hexdigest(), writer.size, training_report(writer.validator.finish()))


def _records(files: Sequence[Path], options: ImportOptions) -> Iterator[Record]:
    for number, path in enumerate(files, 1):
        try:
            for record in read_records(path, options.file_type, options.columns):
                place = record.place if len(files) == 1 else f"file {number}, {record.place}"
                yield msgspec.structs.replace(record, place=place)
        except RowError as error:
            if len(files) == 1:
                raise
            raise RowError(error.field, error.code, f"file {number}: {error.detail}") from None


class _Writer:
    """Rows as lines. A line's number is that of the row; the place in the source stands in what is said of it."""

    def __init__(self) -> None:
        self.validator = Validator()
        self.digest = hashlib.sha256()
        self.size = 0
        self.charged = 0
        self._rows = 0

    def line(self, record: Record) -> bytes:
        self._rows += 1
        self.charged += _MIN_ROW_BYTES
        data, error = b"", record.error
        if error is None:
            try:
                data = _ENCODER.encode(record.row)
            except (TypeError, ValueError, RecursionError) as cause:
                error = RowError("", "data_type", f"the row cannot be written as JSON: {cause}")
        if error is not None:
            self.validator.refuse(self._rows, error, record.place, last=record.last)
            return b""
        too_long = len(data) > MAX_LINE_BYTES
        line = Line(self._rows, b"" if too_long else data, self.size, too_long=too_long)
        self.validator.check(line, record.place)
        data += b"\n"
        self.digest.update(data)
        self.size += len(data)
        self.charged += len(data)
        return data

    def stop(self, error: RowError) -> None:
        """The file cannot be read any further."""
        self.validator.stop(error)


async def convert_apart(
    source: Path, target: Path, options: ImportOptions, *, memory: int = MAX_MEMORY_BYTES
) -> Converted:
    """In a process of its own with so many bytes of memory. Raises Unavailable, ReaderKilled."""
    environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    # So that it finds this very code, installed or not, and nothing in the working folder.
    paths = [str(Path(lathe.__file__).parents[1]), *environment.get("PYTHONPATH", "").split(os.pathsep)]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        "-m",
        "lathe.datasets.conversion",
        str(source),
        str(target),
        msgspec.json.encode(options).decode(),
        str(memory),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        # Ctrl-C at `lathe up` is meant for this process, which ends the other one if it has to.
        start_new_session=True,
        # pyarrow's own allocators reserve memory ahead, which the limit would count.
        env={**environment, "ARROW_DEFAULT_MEMORY_POOL": "system", "OMP_NUM_THREADS": "1"},
    )
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    ended = process.returncode or 0
    if ended == 0:
        return msgspec.json.decode(output, type=Converted)
    if ended == _LOCAL_DISK_FULL:
        raise Unavailable(output.decode(), reason=LOCAL_DISK, retry_after=30.0)
    how = f"by signal {-ended}" if ended < 0 else f"with {ended}"
    words = f"The program that reads such files ended {how}"
    if -ended in _FROM_OUTSIDE:
        raise ReaderKilled(f"{words}.", retry_after=2)
    return unreadable(f"{words}; the file may be damaged, or need more memory than a file may have.")


def unreadable(message: str) -> Converted:
    """Of a file that the program which reads it does not survive."""
    return Converted("", 0, whole_file("unreadable_file", message))


def main() -> int:
    """What convert_apart starts: source, target, options as JSON, bytes of memory. The result goes to standard
    output."""
    source, target, options, memory = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory), int(memory)))
    resource.setrlimit(resource.RLIMIT_CPU, (_MAX_CPU_S, _MAX_CPU_S + 10))
    try:
        converted = convert(Path(source), Path(target), msgspec.json.decode(options, type=ImportOptions))
    except Unavailable as error:
        sys.stdout.write(error.message)
        return _LOCAL_DISK_FULL
    sys.stdout.buffer.write(msgspec.json.encode(converted))
    return 0


if __name__ == "__main__":
    sys.exit(main())
