"""All findings of an audit by line, as one Arrow IPC file beside its token object.

Columns: `line` (int64, 1-based; 0 for the file as a whole) and `code` (a dictionary of strings), sorted by line, then
by code. The same findings and metadata give the same bytes.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]

from lathe.common.errors import DataLoss

_BATCH_ROWS = 1 << 16
_TYPE = pa.dictionary(pa.int16(), pa.string())
_FIELDS = [pa.field("line", pa.int64(), nullable=False), pa.field("code", _TYPE, nullable=False)]


class FindingLines:
    """Collects (line, code): eight bytes each. A line has a code once."""

    def __init__(self) -> None:
        self._lines: dict[str, array[int]] = {}

    def add(self, code: str, lines: Iterable[int]) -> None:
        """More lines that have a code, in any order."""
        self._lines.setdefault(code, array("q")).extend(lines)

    def write(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Write all of them to a new file."""
        codes = sorted(self._lines)
        schema = pa.schema(_FIELDS, metadata={"format": "1", **dict(sorted(metadata.items()))})
        lines = pa.concat_arrays([pa.array([], pa.int64()), *(_plain(self._lines[code]) for code in codes)])
        repeated = (
            pa.repeat(pa.scalar(number, pa.int16()), len(self._lines[code]))
            for number, code in enumerate(codes)
        )
        numbers = pa.concat_arrays([pa.array([], pa.int16()), *repeated])
        table = pa.table({"line": lines, "code": numbers}).group_by(["line", "code"]).aggregate([])
        table = table.sort_by([("line", "ascending"), ("code", "ascending")]).combine_chunks()
        names = pa.array(codes, pa.string())
        with pa.ipc.new_file(str(path), schema) as writer:
            for batch in table.to_batches(max_chunksize=_BATCH_ROWS):
                code = pa.DictionaryArray.from_arrays(batch.column("code"), names)
                writer.write_batch(pa.RecordBatch.from_arrays([batch.column("line"), code], schema=schema))


def read_finding_lines(path: Path, codes: Collection[str] | None = None) -> Iterator[tuple[int, str]]:
    """(line, code) in order; only those of some codes, when given. Raises DataLoss for a file that is none."""
    try:
        with pa.memory_map(str(path)) as source:
            reader = pa.ipc.open_file(source)
            if reader.schema.names != [field.name for field in _FIELDS]:
                raise DataLoss(f"{path.name} is no list of findings: its columns are {reader.schema.names}.")
            for number in range(reader.num_record_batches):
                batch = reader.get_batch(number)
                pairs = zip(batch.column("line").to_pylist(), batch.column("code").to_pylist(), strict=True)
                yield from (pair for pair in pairs if codes is None or pair[1] in codes)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataLoss(f"{path.name} is no list of findings: {error}.") from error


def _plain(lines: array[int]) -> pa.Array:
    return pa.Array.from_buffers(pa.int64(), len(lines), [None, pa.py_buffer(lines)])
