"""The token object: what an audit writes and an engine trains from, as one Arrow IPC file.

Columns: `tokens` (list of int32 ids), `mask` (list of uint8, 1 where a token is a target of the loss), `line` (int64,
the row's 1-based line in its dataset), `role` (uint8, a number of `Role`). The two rows of a preference pair stand side
by side, the chosen one first. The same rows and metadata give the same bytes.

Two formats: 2 has all of these columns; 1 has no column `role`, and all its rows are examples. Examples are written as
format 1, which engines from before there were roles read too.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import pyarrow as pa  # type: ignore[import-untyped]

from lathe.common.errors import DataLoss
from lathe.text.formats import Role

if TYPE_CHECKING:
    import numpy as np

# A record batch ends at so many rows or tokens: fixed, because the batches are part of the bytes.
BATCH_ROWS = 512
BATCH_TOKENS = 1 << 20

_FIELDS = [
    pa.field("tokens", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),
    pa.field("mask", pa.list_(pa.field("item", pa.uint8(), nullable=False)), nullable=False),
    pa.field("line", pa.int64(), nullable=False),
    pa.field("role", pa.uint8(), nullable=False),
]
_FORMATS = {"1": _FIELDS[:3], "2": _FIELDS}


@dataclass(frozen=True, slots=True)
class TokenRow:
    """tokens: ids. mask: one byte per token, 1 where it is trained. line: 1-based, in the dataset. role: what the row
    is to its method."""

    tokens: Sequence[int]
    mask: bytes
    line: int
    role: Role = Role.EXAMPLE


@dataclass(frozen=True, slots=True)
class TokenTable:
    """tokens[i]: int32 ids of row i. mask[i]: bool, as long. lines[i]: its line. roles[i]: its role. metadata: as it
    was written.

    The arrays are views into one buffer: they must not be written to.
    """

    tokens: list[np.ndarray[Any, np.dtype[np.int32]]]
    mask: list[np.ndarray[Any, np.dtype[np.bool_]]]
    lines: list[int]
    roles: list[Role]
    metadata: Mapping[str, str]

    def __len__(self) -> int:
        return len(self.tokens)


class TokenWriter:
    """Writes rows as they come; holds at most a batch of them. The file is whole once the block is left."""

    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        self._metadata = dict(sorted(metadata.items()))
        self._path = path
        self._writer: Any = None
        self._format = "1"
        self._pending: list[TokenRow] = []
        self._tokens = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._flush()
        finally:
            if self._writer is not None:
                self._writer.close()

    def write(self, row: TokenRow) -> None:
        """Add one row; the first one says whether the file has roles. Raises ValueError if its mask is not as long as
        its tokens, and for a role after an example."""
        if len(row.mask) != len(row.tokens):
            raise ValueError(f"line {row.line} has {len(row.tokens)} tokens and {len(row.mask)} marks")
        if row.role is not Role.EXAMPLE and self._format == "1":
            if self._pending or self._writer is not None:
                raise ValueError(f"line {row.line} has the role {row.role.name} in a file of examples")
            self._format = "2"
        self._pending.append(row)
        self._tokens += len(row.tokens)
        if len(self._pending) == BATCH_ROWS or self._tokens >= BATCH_TOKENS:
            self._flush()

    def _flush(self) -> None:
        fields = _FORMATS[self._format]
        schema = pa.schema(fields, metadata={"format": self._format, **self._metadata})
        if self._writer is None:
            # Uncompressed: ids compress badly, and an engine maps the file into memory as it is.
            self._writer = pa.ipc.new_file(str(self._path), schema)
        rows, self._pending, self._tokens = self._pending, [], 0
        if not rows:
            return
        offsets = pa.py_buffer(array("i", [0, *accumulate(len(row.mask) for row in rows)]))
        # An array made of a list is made in one go; one that a list is added to grows by each of its values.
        tokens = b"".join(array("i", row.tokens) for row in rows)
        count = len(tokens) // array("i").itemsize
        columns = [
            _lists(fields[0], offsets, len(rows), pa.py_buffer(tokens), count),
            _lists(fields[1], offsets, len(rows), pa.py_buffer(b"".join(row.mask for row in rows)), count),
            pa.array([row.line for row in rows], type=pa.int64()),
            pa.array([row.role.value for row in rows], type=pa.uint8()),
        ]
        self._writer.write_batch(pa.RecordBatch.from_arrays(columns[: len(fields)], schema=schema))


def _lists(field: Any, offsets: Any, rows: int, values: Any, count: int) -> Any:
    """A column of lists from its buffers, without a Python object for each value."""
    inner = pa.Array.from_buffers(field.type.value_type, count, [None, values])
    return pa.Array.from_buffers(field.type, rows, [None, offsets], children=[inner])


def write_tokens(path: Path, rows: Iterable[TokenRow], metadata: Mapping[str, str]) -> None:
    """Write all rows to a new file at `path`."""
    with TokenWriter(path, metadata) as writer:
        for row in rows:
            writer.write(row)


def read_tokens(path: Path) -> TokenTable:
    """The rows of a token object. Raises DataLoss for a file that is none."""
    # The control plane writes without numpy; only an engine reads.
    import numpy as np

    try:
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        raise DataLoss(f"{path.name} is no token object: {error}.") from error
    columns = [(field.name, field.type) for field in table.schema]
    if columns not in [[(field.name, field.type) for field in fields] for fields in _FORMATS.values()]:
        raise DataLoss(f"{path.name} is no token object: its columns are {table.schema.names}.")
    tokens: list[np.ndarray[Any, np.dtype[np.int32]]] = []
    mask: list[np.ndarray[Any, np.dtype[np.bool_]]] = []
    for batch in table.to_batches():
        tokens += _rows(batch.column(0), np.int32)
        mask += [row.view(np.bool_) for row in _rows(batch.column(1), np.uint8)]
    metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    return TokenTable(tokens, mask, table.column("line").to_pylist(), _roles(table, path), metadata)


def read_lines(path: Path, lines: Collection[int] | None, limit: int) -> list[TokenRow]:
    """The rows of some lines, in the file's order, at most `limit` of them; of its first line if lines is None.
    Raises DataLoss for a file that is no token object."""
    found: list[TokenRow] = []
    try:
        with pa.memory_map(str(path)) as source:
            reader = pa.ipc.open_file(source)
            for number in range(reader.num_record_batches):
                batch = reader.get_batch(number)
                numbers = batch.column("line").to_pylist()
                lines = lines if lines is not None else numbers[:1]
                wanted = [place for place, line in enumerate(numbers) if line in lines]
                found += [_row(batch, place) for place in wanted[: limit - len(found)]]
                if len(found) == limit or (numbers and numbers[-1] > max(lines, default=0)):
                    break
    except (pa.ArrowInvalid, OSError, KeyError) as error:
        raise DataLoss(f"{path.name} is no token object: {error}.") from error
    return found


def _row(batch: Any, place: int) -> TokenRow:
    role = batch.column("role")[place].as_py() if "role" in batch.schema.names else Role.EXAMPLE
    tokens, mask = (batch.column(name)[place].as_py() for name in ("tokens", "mask"))
    return TokenRow(tokens, bytes(mask), batch.column("line")[place].as_py(), Role(role))


def _roles(table: Any, path: Path) -> list[Role]:
    """The rows' roles. Raises DataLoss for a number that is none, and for a pair that is not side by side."""
    if "role" not in table.schema.names:
        return [Role.EXAMPLE] * len(table)
    numbers = table.column("role").to_pylist()
    try:
        roles = [Role(number) for number in numbers]
    except ValueError as error:
        raise DataLoss(f"{path.name} is no token object: {error}.") from error
    chosen = [index for index, role in enumerate(roles) if role is Role.CHOSEN]
    rejected = [index for index, role in enumerate(roles) if role is Role.REJECTED]
    if [index + 1 for index in chosen] != rejected:
        raise DataLoss(f"{path.name} is no token object: a pair's rows do not stand side by side.")
    return roles


def _rows(column: Any, dtype: Any) -> list[Any]:
    """The list column's rows as views of its buffer."""
    import numpy as np

    offsets = column.offsets.to_pylist()
    if not offsets:
        return []
    buffer = column.values.buffers()[1]
    start = column.values.offset
    values = np.frombuffer(buffer, dtype=dtype) if buffer is not None else np.empty(0, dtype=dtype)
    return [values[start + a : start + b] for a, b in pairwise(offsets)]
