"""The rows of a file that is not JSONL: CSV, Parquet, a JSON array; or JSONL under other names.

Memory is bounded by the longest row that may be (MAX_LINE_BYTES), but for what Parquet's reader takes to unpack a page.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from msgspec import Struct

from lathe.text.columns import Columns, from_cells, from_values, without_extras
from lathe.text.decoding import check_unicode, decode_json, finite, refuse_constant, unreadable_value
from lathe.text.errors import RowError
from lathe.text.filekinds import SNIFFED_BYTES, FileType, foreign
from lathe.text.jsonl import MAX_LINE_BYTES, LineSplitter

_CHUNK = 1 << 20
_BATCH_ROWS = 64
_MAX_COLUMNS = 10_000
# Of what JSON has beside strings: `-Infinity`, an escaped pair of surrogates.
_LONGEST_WORD = 16
_DELIMITERS = ",;\t|"
_NUL = "a NUL byte stands where text should be; the file is damaged, or is it UTF-16? Save it as CSV UTF-8"
# What the csv module says of what a file may have, in better words.
_CSV_WORDS = {
    "new-line character seen in unquoted field": "a CR stands alone; end lines with LF, and put cells that have line "
    "ends into quotes",
    "unexpected end of data": "a quote is not closed",
}
_SEPARATOR_LINE = re.compile(r'"?sep=([,;\t|])"?\r?\n', re.IGNORECASE)


class Record(Struct, frozen=True):
    """One row of the file. place: where it stands there ("line 7"). row: None where `error` says why. last: nothing
    behind it can be read."""

    place: str
    row: Mapping[str, Any] | None = None
    error: RowError | None = None
    last: bool = False


def read_records(path: Path, file_type: FileType, columns: Mapping[str, str]) -> Iterator[Record]:
    """The file's rows in order. Raises RowError where none can be read, or none any further."""
    names = Columns(columns)
    with path.open("rb") as file:
        problem = foreign(file.read(SNIFFED_BYTES), file_type)
    if problem is not None:
        raise problem
    match file_type:
        case FileType.CSV:
            return _csv(path, names)
        case FileType.PARQUET:
            return _parquet(path, names)
        case FileType.JSON:
            return _json(path, names)
        case FileType.JSONL:
            return _jsonl(path, names)


def _record(place: str, make: Any, row: object) -> Record:
    try:
        return Record(place, make(row))
    except RowError as error:
        return Record(place, error=error)
    except RecursionError as error:
        return Record(place, error=RowError("", "invalid_json", unreadable_value(error)))


def _check_names(names: Sequence[str], code: str) -> None:
    if len(names) > _MAX_COLUMNS:
        raise RowError("", code, f"the file has {len(names)} columns; at most {_MAX_COLUMNS} are read")
    named = Counter(name for name in names if name.strip())
    for name, count in named.most_common(1):
        if count > 1:
            raise RowError("", code, f"the file has more than one column {name[:100]!r}")


# --- CSV ---------------------------------------------------------------------------------------------------------


class _Lines:
    """Lines of text for the csv module, which asks for another while a quoted cell is open. Raises RowError for a line
    that is no UTF-8, and for a row that has no end."""

    def __init__(self, file: BinaryIO, number: int = 0) -> None:
        """number: of lines that were read before."""
        self._file = file
        self._size = 0
        self.number = number
        self.has_nul = False
        self.ended = False

    def begin_row(self) -> str:
        """Where the next row stands."""
        self._size, self.has_nul = 0, False
        return f"line {self.number + 1}"

    def __iter__(self) -> Iterator[str]:
        while line := self._file.readline(MAX_LINE_BYTES + 1):
            self.number += 1
            self._size += len(line)
            if self._size > MAX_LINE_BYTES:
                cause = f"the row is longer than {MAX_LINE_BYTES} bytes; is a quote not closed?"
                raise RowError("", "line_too_long", cause)
            self.has_nul = self.has_nul or b"\0" in line
            try:
                yield line.decode("utf-8-sig" if self.number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                cause = (
                    f"byte {error.start + 1} of line {self.number} is not UTF-8; save the file as CSV UTF-8"
                )
                raise RowError("", "invalid_utf8", cause) from None
        self.ended = True


def _csv(path: Path, columns: Columns) -> Iterator[Record]:
    # For the whole process; `_Lines` stops a row that is as long.
    csv.field_size_limit(MAX_LINE_BYTES)
    with path.open("rb") as file:
        delimiter, read = _delimiter(file)
        lines = _Lines(file, read)
        reader = csv.reader(iter(lines), delimiter=delimiter, strict=True)
        header = _header(reader, lines)
        used = columns.names(header)
        places = [(index, used[name]) for index, name in enumerate(header) if name in used]
        for found in _csv_rows(reader, lines):
            if isinstance(found, Record):
                yield found
                continue
            place, cells = found
            if len(cells) != len(header):
                cause = (
                    f"the row has {len(cells)} cells, and the header has {len(header)}; a cell with a {delimiter!r} "
                    "needs quotes"
                )
                yield Record(place, error=RowError("", "invalid_csv", cause))
            else:
                yield _record(
                    place,
                    lambda row: without_extras(from_cells(row)),
                    {key: cells[index] for index, key in places},
                )


def _delimiter(file: BinaryIO) -> tuple[str, int]:
    """What parts the cells, and how many lines said so: Excel's `sep=;` above the header, behind which the file is
    then; else it is the one that is there most often in the header, and the file is at its beginning."""
    first = file.readline(_CHUNK).decode("utf-8-sig", "replace")
    said = _SEPARATOR_LINE.fullmatch(first)
    if said is not None:
        return said[1], 1
    file.seek(0)
    return max(_DELIMITERS, key=first.count), 0


def _header(reader: Iterator[list[str]], lines: _Lines) -> list[str]:
    lines.begin_row()
    try:
        header = next(reader, [])
    except (csv.Error, RowError) as error:
        wrong = _bad_row(error)
        raise RowError("", wrong.code, f"the header cannot be read: {wrong.detail}") from None
    if lines.has_nul:
        raise RowError("", "invalid_csv", f"the header cannot be read: {_NUL}")
    _check_names(header, "invalid_csv")
    return header


def _csv_rows(reader: Iterator[list[str]], lines: _Lines) -> Iterator[tuple[str, list[str]] | Record]:
    """Each row's place and cells, or why it has none."""
    while True:
        place = lines.begin_row()
        try:
            cells = next(reader, None)
        except (csv.Error, RowError) as error:
            last = lines.ended or isinstance(error, RowError)
            yield Record(place, error=_bad_row(error), last=last)
            if last:
                return
            continue
        if cells is None:
            return
        if lines.has_nul:
            yield Record(place, error=RowError("", "invalid_csv", _NUL))
        elif cells:
            yield place, cells


def _bad_row(error: csv.Error | RowError) -> RowError:
    if isinstance(error, RowError):
        return error
    said = str(error)
    cause = next((words for begin, words in _CSV_WORDS.items() if said.startswith(begin)), said)
    return RowError("", "invalid_csv", f"the row is not CSV: {cause}")


# --- Parquet -----------------------------------------------------------------------------------------------------


def _parquet(path: Path, columns: Columns) -> Iterator[Record]:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    number = 0
    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=_CHUNK) as file:
            _check_names(file.schema_arrow.names, "invalid_parquet")
            used = columns.names(file.schema_arrow.names)
            batches = file.iter_batches(batch_size=_BATCH_ROWS, columns=list(used), use_threads=False)
            for batch in batches:
                table = _with_times_as_text(batch.rename_columns([used[name] for name in batch.schema.names]))
                for row in _rows(table):
                    number += 1
                    yield _record(f"row {number}", _typed_row, row)
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


# --- JSON --------------------------------------------------------------------------------------------------------


def _jsonl(path: Path, columns: Columns) -> Iterator[Record]:
    splitter = LineSplitter()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            for line in splitter.feed(chunk):
                yield _json_line(line.number, line.data, columns, too_long=line.too_long)
    for line in splitter.finish():
        yield _json_line(line.number, line.data, columns, too_long=line.too_long)


def _json_line(number: int, data: bytes, columns: Columns, *, too_long: bool) -> Record:
    def made(_: object) -> Mapping[str, Any]:
        if too_long:
            raise RowError("", "line_too_long", f"the line is longer than {MAX_LINE_BYTES} bytes")
        return _object(decode_json(data), columns)

    return _record(f"line {number}", made, {})


def _object(value: object, columns: Columns) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise RowError("", "data_type", "a row must be an object of keys and values")
    return from_values(columns.renamed(value), table=False)


def _json(path: Path, columns: Columns) -> Iterator[Record]:
    def made(value: object) -> Mapping[str, Any]:
        check_unicode(value, "")
        return _object(value, columns)

    with path.open("rb") as file:
        first = file.read(_CHUNK).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
        if first != b"[":
            yield from _jsonl(path, columns)
            return
        file.seek(0)
        elements = _Elements(file)
        try:
            for number, element in enumerate(elements, 1):
                yield _record(f"element {number}", made, element)
        except RowError as error:
            yield Record(f"line {elements.line}", error=error, last=True)


class _Elements:
    """The elements of one JSON array, as they are read. Raises RowError; `line` is then where in the file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._scan = json.JSONDecoder(parse_constant=refuse_constant, parse_float=finite).raw_decode
        self._text = ""
        self._place = 0
        self._lines = 0
        self._ended = False
        self._broken = False
        self.line = 1

    def __iter__(self) -> Iterator[Any]:
        if self._token() != "[":
            raise self._wrong("a list was expected")
        self._place += 1
        if self._token() == "]":
            self._place += 1
        else:
            while True:
                yield self._element()
                token = self._token()
                self._place += 1
                if token == "]":
                    break
                if token != ",":
                    raise self._wrong("a comma or the end of the list was expected")
        if self._token():
            raise self._wrong("there is something behind the list")

    def _token(self) -> str:
        """The next character that is no space; empty at the end of the file."""
        while True:
            while self._place < len(self._text):
                if self._text[self._place] not in " \t\r\n":
                    return self._text[self._place]
                self._place += 1
            if not self._more():
                return ""

    def _element(self) -> Any:
        self._token()
        while True:
            try:
                value, end = self._scan(self._text, self._place)
            except json.JSONDecodeError as error:
                # It may only be cut where the text read so far ends.
                cut = error.pos > len(self._text) - _LONGEST_WORD or error.msg.startswith(
                    "Unterminated string"
                )
                if not cut or not self._more():
                    raise self._wrong(error.msg.removesuffix(" at"), at=error.pos) from None
            except (ValueError, RecursionError) as error:
                raise self._wrong(unreadable_value(error)) from None
            else:
                # A number may go on.
                if end < len(self._text) or not isinstance(value, int | float) or not self._more():
                    self._place = end
                    return value

    def _more(self) -> bool:
        """Read on, twice as much of an element that is not whole yet; False at the end of the file."""
        if self._ended:
            return False
        if self._broken:
            raise self._wrong("what follows is not UTF-8", "invalid_utf8", at=len(self._text))
        self._lines += self._text.count("\n", 0, self._place)
        self._text = self._text[self._place :]
        self._place = 0
        if len(self._text) > MAX_LINE_BYTES:
            cause = f"an element is longer than {MAX_LINE_BYTES} bytes, or is not JSON"
            raise self._wrong(cause, "line_too_long")
        data = self._file.read(max(_CHUNK, len(self._text)))
        try:
            self._text += self._decode(data, not data)
        except UnicodeDecodeError as error:
            # The elements before it are good ones.
            self._text += error.object[: error.start].decode()
            self._broken = True
        self._ended = not data
        return True if self._broken else bool(data)

    def _wrong(self, cause: str, code: str = "invalid_json", *, at: int | None = None) -> RowError:
        self.line = self._lines + self._text.count("\n", 0, self._place if at is None else at) + 1
        return RowError("", code, f"the file is not one JSON array of objects: {cause}")
