"""The rows of a file that is not JSONL: CSV, Parquet, a JSON array; or JSONL under other names.

Memory is bounded by the longest row that may be (MAX_LINE_BYTES), but for what Parquet's reader takes to unpack a page.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from msgspec import Struct

from lathe.text.columns import Columns, from_cells, from_values, without_extras
from lathe.text.decoding import check_unicode, decode_json, finite, refuse_constant
from lathe.text.errors import RowError
from lathe.text.filekinds import SNIFFED_BYTES, FileType, foreign
from lathe.text.jsonl import MAX_LINE_BYTES, LineSplitter

_CHUNK = 1 << 20
_BATCH_ROWS = 64
_MAX_COLUMNS = 10_000
# Of what JSON has beside strings: `-Infinity`, an escaped pair of surrogates.
_LONGEST_WORD = 16
_DELIMITERS = ",;\t|"
_SEPARATOR_LINE = re.compile(r'"?sep=([,;\t|])"?\r?\n', re.IGNORECASE)


class Record(Struct, frozen=True):
    """One row of the file. place: where it stands there ("line 7"). row: None where `error` says why."""

    place: str
    row: Mapping[str, Any] | None = None
    error: RowError | None = None


def read_records(path: Path, file_type: FileType, columns: Mapping[str, str]) -> Iterator[Record]:
    """The file's rows in order. Raises RowError where it cannot be read, or not any further."""
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


def _record(place: str, make: Any, row: Mapping[str, Any]) -> Record:
    try:
        return Record(place, make(row))
    except RowError as error:
        return Record(place, error=error)


# --- CSV ---------------------------------------------------------------------------------------------------------


class _Lines:
    """Lines of text for the csv module, which asks for another while a quoted cell is open. `size` counts characters
    since it was last set to 0. Raises RowError for a line that is no UTF-8, and for a row that has no end."""

    def __init__(self, file: BinaryIO, number: int = 0) -> None:
        """number: of lines that were read before."""
        self._file = file
        self.number = number
        self.size = 0

    def __iter__(self) -> Iterator[str]:
        while line := self._file.readline(MAX_LINE_BYTES + 1):
            self.number += 1
            self.size += len(line)
            if self.size > MAX_LINE_BYTES:
                raise RowError(
                    "",
                    "line_too_long",
                    f"the row that reaches to line {self.number} is longer than {MAX_LINE_BYTES} bytes; is a quote not "
                    "closed?",
                )
            try:
                yield line.decode("utf-8-sig" if self.number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise RowError(
                    "",
                    "invalid_utf8",
                    f"byte {error.start + 1} of line {self.number} is not UTF-8; save the file as CSV UTF-8",
                ) from None


def _csv(path: Path, columns: Columns) -> Iterator[Record]:
    # For the whole process; `_Lines` stops a row that is as long.
    csv.field_size_limit(MAX_LINE_BYTES)
    with path.open("rb") as file:
        delimiter, read = _delimiter(file)
        lines = _Lines(file, read)
        reader = csv.reader(iter(lines), delimiter=delimiter, strict=True)
        header = _header(reader)
        used = columns.names(header)
        places = [(index, used[name]) for index, name in enumerate(header) if name in used]
        for place, cells in _csv_rows(reader, lines):
            if isinstance(cells, RowError):
                yield Record(place, error=cells)
            elif len(cells) != len(header):
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


def _header(reader: Iterator[list[str]]) -> list[str]:
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise RowError("", "invalid_csv", f"the header cannot be read: {error}") from None
    if len(header) > _MAX_COLUMNS:
        raise RowError(
            "", "invalid_csv", f"the header has {len(header)} columns; at most {_MAX_COLUMNS} are read"
        )
    named = Counter(name for name in header if name.strip())
    for name, count in named.most_common(1):
        if count > 1:
            raise RowError("", "invalid_csv", f"the header names the column {name[:100]!r} twice")
    return header


def _csv_rows(reader: Iterator[list[str]], lines: _Lines) -> Iterator[tuple[str, list[str] | RowError]]:
    while True:
        lines.size, begin = 0, lines.number + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield f"line {begin}", RowError("", "invalid_csv", f"the row is not CSV: {error}")
            continue
        if cells is None:
            return
        if cells:
            yield f"line {begin}", cells


# --- Parquet -----------------------------------------------------------------------------------------------------


def _parquet(path: Path, columns: Columns) -> Iterator[Record]:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=_CHUNK) as file:
            used = columns.names(file.schema_arrow.names)
            batches = file.iter_batches(batch_size=_BATCH_ROWS, columns=list(used), use_threads=False)
            number = 0
            for batch in batches:
                table = batch.rename_columns([used[name] for name in batch.schema.names])
                for row in table.to_pylist():
                    number += 1
                    yield _record(f"row {number}", lambda row: without_extras(from_values(row)), row)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, MemoryError):
            raise
        cause = str(error).split("\n", 1)[0]
        raise RowError("", "invalid_parquet", f"the file is not Parquet, or is damaged: {cause}") from None


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
    return from_values(columns.renamed(value))


def _json(path: Path, columns: Columns) -> Iterator[Record]:
    with path.open("rb") as file:
        first = file.read(_CHUNK).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
        if first != b"[":
            yield from _jsonl(path, columns)
            return
        file.seek(0)
        for number, element in enumerate(_Elements(file), 1):
            yield _record(f"element {number}", lambda row: _object(row, columns), element)


class _Elements:
    """The elements of one JSON array, as they are read. Raises RowError."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._scan = json.JSONDecoder(parse_constant=refuse_constant, parse_float=finite).raw_decode
        self._text = ""
        self._place = 0
        self._ended = False

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
                check_unicode(value, "")
            except json.JSONDecodeError as error:
                # It may only be cut where the text read so far ends; read twice as much of it.
                cut = error.pos > len(self._text) - _LONGEST_WORD or error.msg.startswith(
                    "Unterminated string"
                )
                if not cut or not self._more(max(_CHUNK, len(self._text) - self._place)):
                    raise self._wrong(error.msg) from None
            except (ValueError, RecursionError) as error:
                cause = "nested too deeply" if isinstance(error, RecursionError) else str(error)
                raise self._wrong(cause) from None
            else:
                self._place = end
                return value

    def _more(self, size: int = _CHUNK) -> bool:
        """Read on; False at the end of the file."""
        if self._ended:
            return False
        self._text = self._text[self._place :]
        self._place = 0
        if len(self._text) > MAX_LINE_BYTES:
            raise self._wrong(
                f"an element is longer than {MAX_LINE_BYTES} bytes, or is not JSON", "line_too_long"
            )
        data = self._file.read(size)
        try:
            self._text += self._decode(data, not data)
        except UnicodeDecodeError as error:
            raise self._wrong(f"not UTF-8: {error.reason}", "invalid_utf8") from None
        self._ended = not data
        return bool(data)

    def _wrong(self, cause: str, code: str = "invalid_json") -> RowError:
        return RowError("", code, f"the file is not one JSON array of objects: {cause}")
