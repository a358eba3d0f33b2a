"""JSONL as it streams in: lines, and the findings of a training file by line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from msgspec import Struct

from lathe.text.errors import RowError
from lathe.text.filekinds import SNIFFED_BYTES, foreign
from lathe.text.findings import Finding, FindingGroup, Severity, Tally, kind_of
from lathe.text.formats import Layout, RowFormat, described
from lathe.text.rows import TrainingRow, parse_line

MAX_LINE_BYTES = 16 << 20
MIN_EXAMPLES = 10
MAX_BAD_ROWS = 10_000
"""After so many the rest of a file is not checked: it is no training file, and saying why of each line takes long."""
# Of the keys that are not used: so many are named, so much of each.
_MAX_NAMED = 20
_MAX_NAME = 40
_BOM = b"\xef\xbb\xbf"
_BLANK_LINES = re.compile(rb"\s*\n")


class Line(Struct, frozen=True, gc=False):
    """number: 1-based, blank lines counted. data: without the newline. offset: of its first byte in the file. too_long:
    data is empty, the line was over the limit. ended: a newline was there (the last line of a file may lack it)."""

    number: int
    data: bytes
    offset: int
    too_long: bool = False
    ended: bool = True


class LineSplitter:
    """Lines of a byte stream in chunks of any size; a BOM at its beginning and CR before LF are dropped,
    blank lines are counted but not given. Holds at most one line, and of a line that is too long nothing."""

    def __init__(self, max_line_bytes: int = MAX_LINE_BYTES) -> None:
        self._max = max_line_bytes
        self._parts: list[bytes] = []
        self._size = 0
        self._number = 0
        self._offset = 0

    def feed(self, chunk: bytes) -> Iterator[Line]:
        """The lines that this chunk ends. Consume them all before the next call."""
        begin = 0
        while (end := chunk.find(b"\n", begin)) >= 0:
            if self._size:
                self._hold(chunk[begin:end])
                line = self._held(ended=True)
            else:
                line = self._line(chunk[begin:end], end - begin)
            begin = end + 1
            if line is None:
                begin = self._skip_blank(chunk, begin)
            else:
                yield line
        self._hold(chunk[begin:])

    def finish(self) -> Iterator[Line]:
        """The last line, where no newline ends it."""
        if self._size:
            line = self._held(ended=False)
            if line is not None:
                yield line

    def _skip_blank(self, chunk: bytes, begin: int) -> int:
        """Where the blank lines that begin there end: a file may be full of them. Looks no further than one line may
        be long, so that none of them is too long, however the chunks are cut."""
        blank = _BLANK_LINES.match(chunk, begin, begin + self._max)
        if blank is None:
            return begin
        self._number += chunk.count(b"\n", begin, blank.end())
        self._offset += blank.end() - begin
        return blank.end()

    def _hold(self, part: bytes) -> None:
        if part:
            self._size += len(part)
            self._parts.append(part)
            if self._size > self._max + len(_BOM) + 1:
                self._parts.clear()

    def _held(self, *, ended: bool) -> Line | None:
        data, size = b"".join(self._parts), self._size
        self._parts.clear()
        self._size = 0
        return self._line(data, size, ended=ended)

    def _line(self, data: bytes, size: int, *, ended: bool = True) -> Line | None:
        """A line of `size` bytes; `data` may lack some of them only where they are too many."""
        offset = self._offset
        self._offset += size + 1
        self._number += 1
        if self._number == 1 and data.startswith(_BOM):
            data, offset, size = data[len(_BOM) :], len(_BOM), size - len(_BOM)
        if data.endswith(b"\r"):
            data, size = data[:-1], size - 1
        if size > self._max:
            return Line(self._number, b"", offset, too_long=True, ended=ended)
        return Line(self._number, data, offset, ended=ended) if data and not data.isspace() else None


@dataclass(frozen=True, slots=True)
class Report:
    """examples: rows without an error. rows: lines that are not blank. findings: the first 20 of finding_count.
    format: that of the good rows, layout: how the first of them is written; None where there is none. groups: all
    findings by code."""

    examples: int
    rows: int
    findings: tuple[Finding, ...]
    finding_count: int
    format: RowFormat | None
    groups: tuple[FindingGroup, ...] = ()
    layout: Layout | None = None

    @property
    def valid(self) -> bool:
        """Whether the file can be trained on, as far as its rows tell."""
        return not any(kind_of(group.code).severity is Severity.ERROR for group in self.groups)


@dataclass(slots=True)
class Validator:
    """Fed a training file in chunks, checks every row; `finish` gives the report.

    A file has one format, that of its first good row. One finding a row, the first. `file_kind` names the file in the
    sentence about too few examples. `on_row` is given each good row, in order.
    """

    max_line_bytes: int = MAX_LINE_BYTES
    min_examples: int = MIN_EXAMPLES
    file_kind: str = "Training file"
    on_row: Callable[[Line, TrainingRow], object] | None = None
    _splitter: LineSplitter = field(init=False)
    _examples: int = field(default=0, init=False)
    _rows: int = field(default=0, init=False)
    _tally: Tally = field(default_factory=Tally, init=False)
    _first: tuple[int, RowFormat, Layout] | None = field(default=None, init=False)
    _unused: dict[str, None] = field(default_factory=dict, init=False)
    _begin: bytes | None = field(default=b"", init=False)
    _stopped: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._splitter = LineSplitter(self.max_line_bytes)

    def feed(self, chunk: bytes) -> None:
        """Checks the rows that this chunk ends."""
        if self._begin is not None:
            self._begin += chunk
            if len(self._begin) < SNIFFED_BYTES:
                return
            chunk = self._sniffed(self._begin)
        if not self._stopped:
            for line in self._splitter.feed(chunk):
                if not self._stopped:
                    self.check(line)

    def _sniffed(self, begin: bytes) -> bytes:
        """The file's first bytes, unless they are those of another type: then that is all that is said of it."""
        self._begin = None
        problem = foreign(begin)
        if problem is not None:
            self.stop(problem)
        return begin

    def finish(self) -> Report:
        """Call once, after the last chunk."""
        if self._begin:
            begin = self._sniffed(self._begin)
            if not self._stopped:
                self.feed(begin)
        for line in self._splitter.finish():
            if not self._stopped:
                self.check(line)
        if self._rows < self.min_examples and not self._stopped:
            message = (
                f"{self.file_kind} has {self._rows} example(s), "
                f"but must have at least {self.min_examples} examples"
            )
            self._add(Finding(0, "", "invalid_n_examples", message))
        if self._unused:
            message = f"These keys of the rows are not used: {', '.join(self._unused)}"
            self._add(Finding(0, "", "unused_keys", message))
        _, found, layout = self._first or (0, None, None)
        tally = self._tally
        return Report(
            examples=self._examples,
            rows=self._rows,
            findings=tally.first(),
            finding_count=tally.count,
            format=found,
            groups=tally.groups(),
            layout=layout,
        )

    def check(self, line: Line, place: str = "") -> None:
        """Checks one row. place: where it stood in a file of another type, for what is said of it."""
        try:
            row = self._row(line)
        except RowError as error:
            self.refuse(line.number, error, place)
            return
        self._rows += 1
        self._examples += 1
        if row.unused and len(self._unused) < _MAX_NAMED:
            self._unused.update((key[:_MAX_NAME], None) for key in row.unused[:_MAX_NAMED])
        if self.on_row is not None:
            self.on_row(line, row)

    @property
    def stopped(self) -> bool:
        """Whether the rest of the file is not looked at."""
        return self._stopped

    def refuse(self, number: int, error: RowError, place: str = "", *, last: bool = False) -> None:
        """Counts a row that is a bad one. last: what is behind it cannot be read."""
        self._rows += 1
        message = f"{error.detail} ({place} of the file)" if place else error.detail
        self._add(Finding(number, error.field, error.code, message))
        self._stopped = self._stopped or last
        if self._rows - self._examples >= MAX_BAD_ROWS:
            self.stop(
                RowError("", "too_many_errors", f"{MAX_BAD_ROWS} rows are bad; the others were not checked")
            )

    def stop(self, error: RowError) -> None:
        """The file cannot be read, or not any further."""
        self._stopped = True
        self._add(Finding(0, error.field, error.code, error.detail))

    def _row(self, line: Line) -> TrainingRow:
        if line.too_long:
            raise RowError("", "line_too_long", f"the line is longer than {self.max_line_bytes} bytes")
        try:
            row = parse_line(line.data)
        except RowError as error:
            # Where no line was good, it is not the end that is missing.
            whole = line.ended or self._first is None
            if whole or error.code not in ("invalid_json", "invalid_utf8"):
                raise
            raise RowError("", error.code, f"{error.detail}; the file seems to stop half-way") from None
        self._first = self._first or (line.number, row.format, row.layout)
        number, expected, _ = self._first
        if row.format is not expected:
            raise RowError(
                "",
                "mixed_formats",
                f"the row is {described(row.format)}, line {number} is {described(expected)}; a file has one format",
            )
        return row

    def _add(self, finding: Finding) -> None:
        self._tally.add(finding)
