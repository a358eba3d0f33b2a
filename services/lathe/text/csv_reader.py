"""The rows of a CSV file. Memory is bounded by the longest row that may be (MAX_LINE_BYTES)."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from lathe.text.columns import Columns, from_cells, without_extras
from lathe.text.errors import RowError
from lathe.text.jsonl import MAX_LINE_BYTES
from lathe.text.records import CHUNK_BYTES, Record, check_names, record_of

_DELIMITERS = ",;\t|"
_NUL = "a NUL byte stands where text should be; the file is damaged, or is it UTF-16? Save it as CSV UTF-8"
# What the csv module says of what a file may have, in better words.
_CSV_WORDS = {
    "new-line character seen in unquoted field": "a CR stands alone; end lines with LF, and put cells that have line "
    "ends into quotes",
    "unexpected end of data": "a quote is not closed",
}
_SEPARATOR_LINE = re.compile(r'"?sep=([,;\t|])"?\r?\n', re.IGNORECASE)


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


def read_csv(path: Path, columns: Columns) -> Iterator[Record]:
    """The rows behind the header; the last record says where the file cannot be read any further. Raises RowError for
    a header that cannot be read, or lacks a column that `columns` names."""
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
                yield record_of(
                    place,
                    lambda row: without_extras(from_cells(row)),
                    {key: cells[index] for index, key in places},
                )


def _delimiter(file: BinaryIO) -> tuple[str, int]:
    """What parts the cells, and how many lines said so: Excel's `sep=;` above the header, behind which the file is
    then; else it is the one that is there most often in the header, and the file is at its beginning."""
    first = file.readline(CHUNK_BYTES).decode("utf-8-sig", "replace")
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
    check_names(header, "invalid_csv")
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
