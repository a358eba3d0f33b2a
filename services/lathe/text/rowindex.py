"""The row index of a training file: where each row is and what it says, as one Arrow IPC file.

Columns: `line` (int64, 1-based), `offset` and `length` (int64, bytes of the file, without the line's end), `digest`
(16 bytes, `row_digest`). One entry per row, in the file's order. A stored index is read through a memory map, so that
it costs no memory of its own however long the file is.

Two rows are *equal* when their digests are: when they give a model the same texts to learn from. The spelling of the
JSON (spaces, escapes, the order of keys), the format (Alpaca or chat, `functions` or `tools`, text parts or a string)
and the weights of a chat's turns do not count. Roles, texts, tool calls, tools, the verdict on an answer (preferred or
not, its `label`), the label or score of texts, and what a grader is given do.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa  # type: ignore[import-untyped]
from msgspec.json import Encoder

from lathe.common.errors import DataLoss
from lathe.text.chat import Chat
from lathe.text.errors import RowError
from lathe.text.jsonl import Line, LineSplitter
from lathe.text.rows import TrainingRow, parse_line

VERSION = 1
"""Of the index's format and of what a digest is over: another one makes every index anew."""
DIGEST_BYTES = 16
_ENCODER = Encoder(order="sorted")
_BATCH_ROWS = 1 << 16
_SCHEMA = pa.schema(
    [
        pa.field("line", pa.int64(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("length", pa.int64(), nullable=False),
        pa.field("digest", pa.binary(DIGEST_BYTES), nullable=False),
    ],
    metadata={"format": str(VERSION)},
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One row: its 1-based line, the byte its line begins at, its length in bytes, its digest."""

    line: int
    offset: int
    length: int
    digest: bytes


def row_digest(row: TrainingRow) -> bytes:
    """BLAKE2b-128 of what a row says. Equal for rows that are equal (see the module), also in different formats."""
    said: list[object] = [
        (part.role.value, part.content.messages, part.content.tools or ())
        if isinstance(part.content, Chat)
        else (part.role.value, part.content.prompt, part.content.completion)
        for part in row.parts
    ]
    if row.extra is not None:
        said.append(row.extra)
    return blake2b(_ENCODER.encode(said), digest_size=DIGEST_BYTES).digest()


def _digest(line: bytes) -> bytes:
    try:
        return row_digest(parse_line(line))
    except RowError:
        # Validated by an earlier version that took it: equal only to the very same line.
        return blake2b(line, digest_size=DIGEST_BYTES, person=b"unparsed").digest()


class RowIndexWriter:
    """Is fed a training file in chunks and writes its index; holds at most a batch of entries and one line.
    The file is whole once `finish` was called and the block is left."""

    def __init__(self, path: Path) -> None:
        self._writer = pa.ipc.new_file(str(path), _SCHEMA)
        self._splitter = LineSplitter()
        self._numbers = (array("q"), array("q"), array("q"))
        self._digests = bytearray()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def feed(self, chunk: bytes) -> None:
        """The next bytes of the file."""
        for line in self._splitter.feed(chunk):
            self._take(line)

    def finish(self) -> None:
        """Call once, after the last chunk."""
        for line in self._splitter.finish():
            self._take(line)
        self._flush()

    def _take(self, line: Line) -> None:
        self._digests += _digest(line.data)
        for column, value in zip(self._numbers, (line.number, line.offset, len(line.data)), strict=True):
            column.append(value)
        if len(self._numbers[0]) == _BATCH_ROWS:
            self._flush()

    def _flush(self) -> None:
        rows = len(self._numbers[0])
        if not rows:
            return
        buffers = [pa.py_buffer(column) for column in self._numbers]
        columns = [pa.Array.from_buffers(pa.int64(), rows, [None, buffer]) for buffer in buffers]
        digests = pa.py_buffer(bytes(self._digests))
        columns.append(pa.Array.from_buffers(pa.binary(DIGEST_BYTES), rows, [None, digests]))
        self._writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=_SCHEMA))
        self._numbers = (array("q"), array("q"), array("q"))
        self._digests = bytearray()


class RowIndex:
    """A stored index, mapped into memory. Positions count rows from 0; they are lines only where no line is blank."""

    def __init__(self, path: Path) -> None:
        """Raises DataLoss for a file that is no row index."""
        try:
            with pa.memory_map(str(path)) as source:
                self._table = pa.ipc.open_file(source).read_all()
        except (pa.ArrowInvalid, OSError) as error:
            raise DataLoss(f"{path.name} is no row index: {error}.") from error
        if self._table.schema != _SCHEMA:
            raise DataLoss(f"{path.name} is no row index: its columns are {self._table.schema.names}.")

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @property
    def digests(self) -> Any:
        """All digests in order, as an Arrow chunked array of fixed-size binary."""
        return self._table.column("digest")

    def lines(self) -> Iterator[int]:
        """All lines in order."""
        for chunk in self._table.column("line").chunks:
            yield from chunk.to_pylist()

    def entry(self, position: int) -> Entry:
        """The row at a position."""
        row = self._table.slice(position, 1).to_pylist()[0]
        return Entry(row["line"], row["offset"], row["length"], row["digest"])

    def at_line(self, line: int) -> Entry | None:
        """The row of a line; None where the file has no row on it."""
        position = bisect_left(_Lines(self._table.column("line")), line)
        if position == len(self):
            return None
        entry = self.entry(position)
        return entry if entry.line == line else None

    def positions_of(self, digests: Any) -> Iterator[int]:
        """Positions of the rows whose digest is one of `digests` (an Arrow array), ascending, batch by batch."""
        import pyarrow.compute as pc  # type: ignore[import-untyped]

        start = 0
        for chunk in self.digests.chunks:
            found = pc.indices_nonzero(pc.is_in(chunk, value_set=digests))
            yield from (start + position for position in found.to_pylist())
            start += len(chunk)


class _Lines:
    """The line column as a sequence that `bisect` can read."""

    def __init__(self, column: Any) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, position: int) -> int:
        line: int = self._column[position].as_py()
        return line
