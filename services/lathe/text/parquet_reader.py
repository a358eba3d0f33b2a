"""The rows of a Parquet file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lathe.text.columns import Columns, from_values, without_extras
from lathe.text.errors import RowError
from lathe.text.records import CHUNK_BYTES, Record, check_names, record_of

_BATCH_ROWS = 64


def read_parquet(path: Path, columns: Columns) -> Iterator[Record]:
    """The rows in order; the last record says where the file cannot be read any further. Raises RowError for a file of
    which nothing can be read, or that lacks a column that `columns` names."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    number = 0
    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=CHUNK_BYTES) as file:
            check_names(file.schema_arrow.names, "invalid_parquet")
            used = columns.names(file.schema_arrow.names)
            batches = file.iter_batches(batch_size=_BATCH_ROWS, columns=list(used), use_threads=False)
            for batch in batches:
                table = _with_times_as_text(batch.rename_columns([used[name] for name in batch.schema.names]))
                for row in _rows(table):
                    number += 1
                    yield record_of(f"row {number}", _typed_row, row)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, MemoryError):
            raise
        cause = str(error).split("\n", 1)[0]
        if not number:
            cause = f"the file is not Parquet, or is damaged: {cause}"
            raise RowError("", "invalid_parquet", cause) from None
        cause = f"the file is damaged, here or behind it: {cause}"
        yield Record(f"row {number + 1}", error=RowError("", "invalid_parquet", cause), last=True)


def _typed_row(row: Mapping[str, Any] | RowError) -> Mapping[str, Any]:
    if isinstance(row, RowError):
        raise row
    return without_extras(from_values(row, table=True))


def _with_times_as_text(batch: Any) -> Any:
    """Dates and times as Arrow writes them: not all of them have a Python value, and which do depends on what is
    installed. Times of a zone are those of UTC, since a machine need not know any zones."""
    import pyarrow as pa

    def without_zone(kind: Any) -> Any:
        return pa.timestamp(kind.unit) if pa.types.is_timestamp(kind) else kind

    def as_text(kind: Any) -> Any:
        if pa.types.is_timestamp(kind) or pa.types.is_date(kind) or pa.types.is_time(kind):
            return pa.string()
        if pa.types.is_duration(kind):
            return pa.int64()
        return kind

    kinds = [_inside(kind, as_text) for kind in batch.schema.types]
    if kinds == batch.schema.types:
        return batch
    made = [
        column.cast(_inside(column.type, without_zone)).cast(kind)
        for column, kind in zip(batch.columns, kinds, strict=True)
    ]
    return pa.RecordBatch.from_arrays(made, names=batch.schema.names)


def _inside(kind: Any, change: Callable[[Any], Any]) -> Any:
    """The type with every value's type in it, however deep, changed."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_inside(field.type, change)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_inside(kind.value_type, change)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_inside(kind.value_type, change)))
    return change(kind)


def _rows(batch: Any) -> Iterator[Mapping[str, Any] | RowError]:
    """As Python values; an error in the place of a row whose text is none: Arrow does not look at it before."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for index in range(batch.num_rows):
            yield _row(batch.slice(index, 1))


def _row(batch: Any) -> Mapping[str, Any] | RowError:
    found: dict[str, Any] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            found[name] = column[0].as_py()
        except UnicodeDecodeError:
            return RowError(name, "invalid_utf8", "the text is not UTF-8")
    return found
