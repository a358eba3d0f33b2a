"""The row index of a training file: where each row is and what it says, as one Arrow IPC file.

Columns: `line` (int64, 1-based), `offset` and `length` (int64, bytes of the file, without the line's end), `digest`
(16 bytes, `row_digest`), `first_example` and `last_example` (16 bytes each, `example_digests`). One entry per row, in
the file's order. A stored index is read through a memory map, so that it costs no memory of its own however long the
file is.

Two rows are *equal* when their digests are: when they give a model the same texts to learn from. The spelling of the
JSON (spaces, escapes, the order of keys), the format (Alpaca or chat, `functions` or `tools`, text parts or a string)
and the weights of a chat's turns do not count. Roles, texts, tool calls, tools, the verdict on an answer (preferred or
not, its `label`), the label or score of texts, and what a grader is given do.

Two rows *share an example* when one of the answers of each, with what it answers, is the same text: a chat and a pair
of which it is the chosen or the rejected one do, and so do a prompt with its completion and the chat of two turns.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
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
from lathe.text.rows import Plain, TrainingRow, parse_line

VERSION = 2
"""Of the index's format and of what a digest is over: another one makes every index anew."""
DIGEST_BYTES = 16
_ENCODER = Encoder(order="sorted")
_BATCH_ROWS = 1 << 16
_EXAMPLES = ("first_example", "last_example")
_SCHEMA = pa.schema(
    [
        pa.field("line", pa.int64(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("length", pa.int64(), nullable=False),
        *(pa.field(name, pa.binary(DIGEST_BYTES), nullable=False) for name in ("digest", *_EXAMPLES)),
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
    return _row_digest(row, [_encoded(part.content) for part in row.parts])


def example_digests(row: TrainingRow) -> tuple[bytes, bytes]:
    """BLAKE2b-128 of the first and the last answer that a row gives, each with what it answers; the same one twice
    where there is one. The verdict on an answer does not count, nor do spaces around a text."""
    return _example_digests(row, [_encoded(part.content) for part in row.parts])


def _encoded(content: Chat | Plain) -> bytes:
    """What is said, as a JSON array."""
    if isinstance(content, Chat):
        return _ENCODER.encode((content.messages, content.tools or ()))
    return _ENCODER.encode((content.prompt, content.completion))


def _row_digest(row: TrainingRow, encoded: Sequence[bytes]) -> bytes:
    """Over the JSON array of an array for each part, its role before what it says, and of what is said beside them."""
    said = [b"[%d,%b" % (part.role.value, text[1:]) for part, text in zip(row.parts, encoded, strict=True)]
    if row.extra is not None:
        said.append(_ENCODER.encode(row.extra))
    return _blake2b(b"[%b]" % b",".join(said))


def _example_digests(row: TrainingRow, encoded: Sequence[bytes]) -> tuple[bytes, bytes]:
    first = _example_digest(row.parts[0].content, encoded[0])
    return first, first if len(encoded) == 1 else _example_digest(row.parts[-1].content, encoded[-1])


def _example_digest(content: Chat | Plain, encoded: bytes) -> bytes:
    if isinstance(content, Plain):
        turns = (("user", content.prompt.strip()), ("assistant", content.completion.strip()))
        said = [{"role": role, "content": text} for role, text in turns if text]
        return _blake2b(_ENCODER.encode((said, ())))
    texts = [message.get("content") for message in content.messages]
    if any(isinstance(text, str) and len(text.strip()) < len(text) for text in texts):
        stripped = [
            {**message, "content": text.strip()} if isinstance(text, str) else message
            for message, text in zip(content.messages, texts, strict=True)
        ]
        encoded = _ENCODER.encode((stripped, content.tools or ()))
    return _blake2b(encoded)


def _blake2b(data: bytes) -> bytes:
    return blake2b(data, digest_size=DIGEST_BYTES).digest()


def _digests(line: bytes) -> tuple[bytes, bytes, bytes]:
    """Of the row and of its examples."""
    try:
        row = parse_line(line)
    except RowError:
        # Validated by an earlier version that took it: equal only to the very same line.
        own = blake2b(line, digest_size=DIGEST_BYTES, person=b"unparsed").digest()
        return own, own, own
    encoded = [_encoded(part.content) for part in row.parts]
    return _row_digest(row, encoded), *_example_digests(row, encoded)


class RowIndexWriter:
    """Is fed a training file in chunks and writes its index; holds at most a batch of entries and one line.
    The file is whole once `finish` was called and the block is left."""

    def __init__(self, path: Path) -> None:
        self._writer = pa.ipc.new_file(str(path), _SCHEMA)
        self._splitter = LineSplitter()
        self._numbers = (array("q"), array("q"), array("q"))
        self._digests = (bytearray(), bytearray(), bytearray())

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
        for column, digest in zip(self._digests, _digests(line.data), strict=True):
            column.extend(digest)
        for numbers, value in zip(self._numbers, (line.number, line.offset, len(line.data)), strict=True):
            numbers.append(value)
        if len(self._numbers[0]) == _BATCH_ROWS:
            self._flush()

    def _flush(self) -> None:
        rows = len(self._numbers[0])
        if not rows:
            return
        buffers = [pa.py_buffer(column) for column in self._numbers]
        columns = [pa.Array.from_buffers(pa.int64(), rows, [None, buffer]) for buffer in buffers]
        for digests in self._digests:
            buffer = pa.py_buffer(bytes(digests))
            columns.append(pa.Array.from_buffers(pa.binary(DIGEST_BYTES), rows, [None, buffer]))
        self._writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=_SCHEMA))
        self._numbers = (array("q"), array("q"), array("q"))
        self._digests = (bytearray(), bytearray(), bytearray())


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
        yield from self._positions(("digest",), digests)

    def positions_sharing(self, few: RowIndex) -> Iterator[int]:
        """Positions of the rows that share an example with a row of another index, ascending, batch by batch.
        Memory: some 80 bytes a row of `few`."""
        examples = [chunk for name in _EXAMPLES for chunk in few._table.column(name).chunks]
        if examples:
            yield from self._positions(_EXAMPLES, pa.concat_arrays(examples))

    def _positions(self, columns: Sequence[str], digests: Any) -> Iterator[int]:
        """Positions of the rows that have one of the digests in one of the columns."""
        import pyarrow.compute as pc  # type: ignore[import-untyped]

        start = 0
        for batch in self._table.select(columns).to_batches():
            found = [pc.is_in(column, value_set=digests) for column in batch.columns]
            positions = pc.indices_nonzero(reduce(pc.or_, found))
            yield from (start + position for position in positions.to_pylist())
            start += len(batch)


class _Lines:
    """The line column as a sequence that `bisect` can read."""

    def __init__(self, column: Any) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, position: int) -> int:
        line: int = self._column[position].as_py()
        return line
